"""Verbs that hand on what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

import finetune
from finetune.cli.app import (
    Model,
    flag,
    option,
    print_next,
    verb,
)

_PANEL = "What was trained"


@verb(
    _PANEL,
    "finetune export runs/run",
    "finetune export runs/run --checkpoint best --output my-lora",
    "finetune export runs/run --to comfyui",
    "finetune export runs/run --to merged --strength 0.8 --dtype bf16",
)
def export(
    source: Annotated[Path, typer.Argument(metavar="RUN_OR_CHECKPOINT", help="A run's folder, or one checkpoint's.")],
    to: Annotated[
        Literal["diffusers", "comfyui", "kohya", "peft", "merged"],
        option("Layout of an adapter; merged: into the base's weights, a whole transformer."),
    ] = "diffusers",
    output: Annotated[Path | None, option("Where to; left out: RUN/export, or RUN/ and the layout.", "DIR")] = None,
    checkpoint: Annotated[Literal["latest", "best"], option("Of a run's folder; best by held-out loss.")] = "latest",
    strength: Annotated[float, option("With --to merged: how much of the adapter; 1 as trained, 0 none.")] = 1.0,
    full_pipeline: Annotated[
        bool,
        flag(
            "--full-pipeline",
            "After full fine-tuning, or with --to merged: VAE, text encoder and scheduler beside the transformer.",
        ),
    ] = False,
    model: Model = None,
    weights: Annotated[Literal["auto", "ema", "raw"], option("auto takes the average where one was kept.")] = "auto",
    dtype: Annotated[
        Literal["bf16", "fp16", "fp32"] | None, option("Of a whole transformer; left out: what the run trained in.")
    ] = None,
    max_shard_size: Annotated[str | None, option("Of a whole transformer's files, such as 2GB.", "SIZE")] = None,
) -> None:
    """Write what was trained for other programs: reloaded through the stock pipeline, compared, kept if equal."""
    print(
        finetune.export(
            source,
            output,
            checkpoint=checkpoint,
            full_pipeline=full_pipeline,
            weights=weights,
            pretrained=model,
            layout=to,
            strength=strength,
            dtype=dtype,
            max_shard_size=max_shard_size,
        )
    )


@verb(
    _PANEL,
    "finetune inspect my_lora.safetensors",
    "finetune inspect runs/run/export --norms",
    "finetune inspect my_lora.safetensors --json",
)
def inspect(
    source: Annotated[
        Path, typer.Argument(metavar="FILE_OR_FOLDER", help="An adapter, a checkpoint, a model or a run.")
    ],
    norms: Annotated[bool, flag("--norms", "Read the tensors too: how strong each block's update is.")] = False,
    json: Annotated[bool, flag("--json", "Print everything as JSON.")] = False,
) -> None:
    """Say what an adapter or a checkpoint is, from its header, and what each program will make of it."""
    report = finetune.inspect(source, norms=norms)
    print(report.to_json() if json else report)


@verb(
    _PANEL,
    "finetune convert CogVideoX-5b-sat --out CogVideoX-5b",
    "finetune convert pytorch_lora_weights.safetensors --alpha 64 --out my-lora",
    "finetune convert CogVideoX-5b --to sat --out CogVideoX-5b-sat",
    "finetune convert runs/full/export --model 5b --extract-lora 64 --out full-as-lora",
)
def convert(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="A file of weights, or a folder of SAT, DeepSpeed, FSDP, DCP.")
    ],
    out: Annotated[Path, option("The folder to make; it must be new or empty.", "DIR")],
    to: Annotated[
        Literal["diffusers", "sat"], option("What it becomes; sat is CogVideo's own first format.")
    ] = "diffusers",
    model: Annotated[
        str | None,
        option(
            "A model of the same shapes, if no published one has them; its files stand in for what the source lacks.",
            "MODEL",
        ),
    ] = None,
    dtype: Annotated[Literal["bf16", "fp16", "fp32"] | None, option("Of the weights; left out: as they are.")] = None,
    alpha: Annotated[float | None, option("Of a LoRA whose file does not state it.", "NUMBER")] = None,
    extract_lora: Annotated[
        float | None,
        option("A LoRA of how a full fine-tuning differs from --model: its rank, or a share to keep.", "RANK|SHARE"),
    ] = None,
) -> None:
    """Turn others' checkpoints and LoRAs into diffusers' format, or diffusers' into SAT's; compared, kept if equal."""
    print(finetune.convert(source, out, to=to, model=model, dtype=dtype, alpha=alpha, extract_lora=extract_lora))


@verb(
    _PANEL,
    "finetune merge style.safetensors:0.7 runs/run/export:0.5 --out both.safetensors",
    "finetune merge my_lora.safetensors --rank 32 --out small.safetensors",
    "finetune merge my_lora.safetensors --to comfyui --out my_lora_comfyui.safetensors",
)
def merge(
    sources: Annotated[
        list[str],
        typer.Argument(metavar="ADAPTER[:WEIGHT] ...", help="LoRA files of any program, exports, checkpoints or runs."),
    ],
    out: Annotated[Path, option("The file to write; for peft a folder.", "FILE")],
    to: Annotated[Literal["diffusers", "comfyui", "kohya", "peft"], option("Layout of what is written.")] = "diffusers",
    rank: Annotated[int | None, option("Of each layer at most; left out: the sum of all, and nothing is lost.")] = None,
) -> None:
    """Write LoRAs as one: added by weight, at a lower rank, or under another program's names."""
    print(finetune.merge(sources, out, layout=to, rank=rank))
    if to == "diffusers":
        print_next("inspect", str(out))


@verb(
    _PANEL,
    "finetune push runs/run/export --repo me/red-kites",
    "finetune push runs/run/export --repo me/red-kites --yes",
)
def push(
    folder: Annotated[Path, typer.Argument(metavar="EXPORT", help="An export's folder.")],
    repo: Annotated[str, option("On the Hugging Face hub; created if need be.", "USER/NAME")],
    public: Annotated[bool, flag("--public", "Let everybody see it; without, it is private.")] = False,
    yes: Annotated[bool, flag("--yes", "Upload; without, only say what would be.")] = False,
) -> None:
    """Upload an export to the Hugging Face hub, with its card and sampled videos; a dry run unless told --yes."""
    print(finetune.push(folder, repo, public=public, dry_run=not yes))
