"""Verbs that sample videos."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import finetune
from finetune.cli.app import (
    flag,
    option,
    verb,
)

if TYPE_CHECKING:
    pass


_PANEL = "Videos"


_MODEL, _SHOWN, _SAMPLING, _FILES, _COMPUTE = "Model", "What is shown", "Sampling", "Files", "Computing"


@verb(
    _PANEL,
    'finetune generate --adapter runs/run/export --prompt "a red kite at sea"',
    "finetune generate --adapter a:0.8 --adapter b:0.5 --prompts prompts.txt",
    'finetune generate --model 5b-i2v --image boat.png --prompt "it sails away"',
)
def generate(
    model: Annotated[str | None, option("Folder, hub id, 5b...; left out: the adapter's own.", "MODEL", _MODEL)] = None,
    revision: Annotated[str | None, option("Branch, tag or commit of a hub id.", "REV", _MODEL)] = None,
    transformer: Annotated[Path | None, option("A fully fine-tuned one, from an export.", "DIR", _MODEL)] = None,
    adapter: Annotated[
        list[str], option("A LoRA: file, export, checkpoint or run; give it again for more.", "PATH:STRENGTH", _MODEL)
    ] = [],
    prompt: Annotated[list[str], option("Give it again for more videos.", "TEXT", _SHOWN)] = [],
    prompts: Annotated[
        Path | None, option("Text file with a prompt per line, or .jsonl (docs/inference.md).", "FILE", _SHOWN)
    ] = None,
    image: Annotated[list[Path], option("First frame: one for all --prompt, or one for each.", "FILE", _SHOWN)] = [],
    last_image: Annotated[list[Path], option("Last frame, likewise.", "FILE", _SHOWN)] = [],
    video: Annotated[list[Path], option("Video-to-video: what to start from, likewise.", "FILE", _SHOWN)] = [],
    strength: Annotated[float | None, option("Of video-to-video, to 1 (0.8).", "X", _SHOWN)] = None,
    extend: Annotated[int | None, option("Continue each video by so many parts.", "N", _SHOWN)] = None,
    videos: Annotated[int | None, option("Of each prompt (1).", "N", _SHOWN)] = None,
    negative_prompt: Annotated[str | None, option("What to steer away from.", "TEXT", _SHOWN)] = None,
    seed: Annotated[int, option("Of the first video; each further one has the next.", "N", _SAMPLING)] = 0,
    bucket: Annotated[
        str | None, option("Frames x height x width; left out: as the adapter was trained.", "FxHxW", _SAMPLING)
    ] = None,
    steps: Annotated[int | None, option("Denoising steps (50).", "N", _SAMPLING)] = None,
    guidance: Annotated[float | None, option("Classifier-free guidance (6); 1 for none.", "X", _SAMPLING)] = None,
    dynamic_cfg: Annotated[bool, flag("--dynamic-cfg", "Let the guidance grow with the steps.", _SAMPLING)] = False,
    scheduler: Annotated[
        Literal["ddim", "dpm"] | None, option("What takes the steps; left out: the model's own.", None, _SAMPLING)
    ] = None,
    output: Annotated[Path, option("Folder for the videos.", "DIR", _FILES)] = Path("videos"),
    fps: Annotated[float | None, option("Left out: as the adapter was trained.", "X", _FILES)] = None,
    gif: Annotated[bool, flag("--gif", "Write animated GIFs as well.", _FILES)] = False,
    dtype: Annotated[
        Literal["auto", "bf16", "fp16", "fp32"] | None, option("Left out: as the model is stored.", None, _COMPUTE)
    ] = None,
    offload: Annotated[bool, flag("--offload", "Keep on the GPU only what is in use; slower.", _COMPUTE)] = False,
    device: Annotated[
        str | None, option("Such as cuda:1 or cpu; left out: a GPU where there is one.", "NAME", _COMPUTE)
    ] = None,
) -> None:
    """Sample videos from a base model with any number of adapters."""
    from finetune.inference.request import prompts_with_seeds, read_prompts

    seeds = range(seed, 2**62, videos or 1)
    listed = () if prompts is None else read_prompts(prompts, seeds=seeds)
    typed = prompts_with_seeds(prompt, image, last_images=last_image, videos=video, seeds=seeds[len(listed) :])
    print(
        finetune.generate(
            [*listed, *typed],
            output,
            model=model,
            revision=revision,
            transformer=transformer,
            adapters=adapter or None,
            strength=strength,
            extend=extend,
            videos=videos,
            bucket=bucket,
            fps=fps,
            negative_prompt=negative_prompt,
            num_inference_steps=steps,
            guidance_scale=guidance,
            dynamic_cfg=dynamic_cfg or None,
            scheduler=scheduler,
            gif=gif or None,
            dtype=dtype,
            offload=offload or None,
            device=device,
        )
    )
