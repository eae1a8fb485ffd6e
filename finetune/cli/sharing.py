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
    verb,
)

_PANEL = "What was trained"


@verb(
    _PANEL,
    "finetune export runs/run",
    "finetune export runs/run --checkpoint best --output my-lora",
    "finetune export runs/run --merged --strength 0.8",
)
def export(
    source: Annotated[Path, typer.Argument(metavar="RUN_OR_CHECKPOINT", help="A run's folder, or one checkpoint's.")],
    to: Annotated[Literal["diffusers"], option("Layout of the export.")] = "diffusers",
    output: Annotated[Path | None, option("Where to; left out: RUN/export, or RUN/merged.", "DIR")] = None,
    checkpoint: Annotated[Literal["latest", "best"], option("Of a run's folder; best by held-out loss.")] = "latest",
    merged: Annotated[
        bool,
        flag(
            "--merged",
            "Put the adapter into the base's weights: a whole transformer, in RUN/merged where --output is left out.",
        ),
    ] = False,
    strength: Annotated[float, option("With --merged: how much of the adapter; 1 as trained, 0 none.")] = 1.0,
    full_pipeline: Annotated[
        bool,
        flag(
            "--full-pipeline",
            "After full fine-tuning, or with --merged: VAE, text encoder and scheduler beside the transformer.",
        ),
    ] = False,
    model: Model = None,
    weights: Annotated[Literal["auto", "ema", "raw"], option("auto takes the average where one was kept.")] = "auto",
) -> None:
    """Write what was trained in diffusers' format: reloaded through the stock pipeline, compared, kept if equal."""
    print(
        finetune.export(
            source,
            output,
            checkpoint=checkpoint,
            full_pipeline=full_pipeline,
            weights=weights,
            pretrained=model,
            merged=merged,
            strength=strength,
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
    "finetune convert CogVideoX-5b --to sat --out CogVideoX-5b-sat",
)
def convert(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="A file of weights, or a folder of SAT or diffusers.")
    ],
    out: Annotated[Path, option("The folder to make; it must be new or empty.", "DIR")],
    to: Annotated[
        Literal["diffusers", "sat"], option("What it becomes; sat is CogVideo's own first format.")
    ] = "diffusers",
    model: Annotated[
        str | None,
        option("Has the source's shapes, if they are no published model's; lends the parts that it lacks.", "MODEL"),
    ] = None,
    dtype: Annotated[Literal["bf16", "fp16", "fp32"] | None, option("Of the weights; left out: as they are.")] = None,
) -> None:
    """Turn others' checkpoints into diffusers' format, or diffusers' into SAT's; compared, kept if equal."""
    print(finetune.convert(source, out, to=to, model=model, dtype=dtype))
