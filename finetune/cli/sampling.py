"""Verbs that sample videos."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import finetune
from finetune.cli.app import (
    Device,
    flag,
    option,
    verb,
)

if TYPE_CHECKING:
    pass


_PANEL = "Videos"


@verb(
    _PANEL,
    'finetune generate --adapter runs/run/export --prompt "a red kite at sea"',
    "finetune generate --adapter a:0.8 --adapter b:0.5 --prompts prompts.txt",
    'finetune generate --model 5b-i2v --image boat.png --prompt "it sails away"',
)
def generate(
    model: Annotated[
        str | None,
        option("The base model: a folder, a hub id or 5b...; left out: the adapter's own.", "MODEL"),
    ] = None,
    revision: Annotated[str | None, option("Branch, tag or commit of a hub id.", "REV")] = None,
    transformer: Annotated[Path | None, option("A fully fine-tuned transformer, from an export.", "DIR")] = None,
    adapter: Annotated[
        list[str],
        option("A LoRA: a file, an export, a checkpoint, or a run (its newest checkpoint).", "PATH:STRENGTH"),
    ] = [],
    prompt: Annotated[list[str], option("Give it again for more videos.", "TEXT")] = [],
    prompts: Annotated[
        Path | None,
        option("Text file with a prompt per line, or .jsonl with prompt, image, seed.", "FILE"),
    ] = None,
    image: Annotated[
        list[Path],
        option("First frame (image-to-video): one for all --prompt, or one for each.", "FILE"),
    ] = [],
    seed: Annotated[int, option("Of the first video; each further one has the next.")] = 0,
    bucket: Annotated[
        str | None,
        option("Frames x height x width; left out: as the adapter was trained.", "FxHxW"),
    ] = None,
    fps: Annotated[float | None, option("Of the written files; left out: as the adapter was trained.")] = None,
    negative_prompt: Annotated[str, option("What to steer away from.", "TEXT")] = "",
    steps: Annotated[int, option("Denoising steps.")] = 50,
    guidance: Annotated[float, option("Classifier-free guidance; 1 for none.")] = 6.0,
    dynamic_cfg: Annotated[bool, flag("--dynamic-cfg", "Let the guidance grow with the steps.")] = False,
    dtype: Annotated[Literal["auto", "bf16", "fp16", "fp32"], option("What to compute in.")] = "auto",
    offload: Annotated[bool, flag("--offload", "Keep on the GPU only what is in use; slower.")] = False,
    device: Device = None,
    output: Annotated[Path, option("Folder for the videos.", "DIR")] = Path("videos"),
) -> None:
    """Sample videos from a base model with any number of adapters."""
    from finetune.inference.request import prompts_with_seeds, read_prompts

    listed = () if prompts is None else read_prompts(prompts, seed=seed)
    print(
        finetune.generate(
            [*listed, *prompts_with_seeds(prompt, image, seed=seed + len(listed))],
            output,
            model=model,
            revision=revision,
            transformer=transformer,
            adapters=adapter,
            bucket=bucket,
            fps=fps,
            negative_prompt=negative_prompt,
            num_inference_steps=steps,
            guidance_scale=guidance,
            dynamic_cfg=dynamic_cfg,
            dtype=dtype,
            offload=offload,
            device=device,
        )
    )
