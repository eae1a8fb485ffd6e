"""Sampling with diffusers alone: none of this package is imported here, nor may it be.

As a script it reads jobs from a JSON file, each an export to load and a name for what it gives, and writes all outputs
into one safetensors file: what anybody gets in a process that knows nothing of the training.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

PROMPT = "a red circle moving left"


def load_pipeline(model: str, *, adapter: str | None = None, transformer: Any = None) -> Any:
    """The stock pipeline of a model folder; ``transformer`` is a module, or a folder that holds one."""
    import diffusers

    name = json.loads((Path(model) / "model_index.json").read_text())["_class_name"]
    if isinstance(transformer, str):
        transformer = diffusers.CogVideoXTransformer3DModel.from_pretrained(transformer, subfolder="transformer")
    parts = {} if transformer is None else {"transformer": transformer}
    pipeline = getattr(diffusers, name).from_pretrained(model, **parts)
    if adapter is not None:
        pipeline.load_lora_weights(adapter, weight_name="pytorch_lora_weights.safetensors", adapter_name="tuned")
    return pipeline


def latents_of(pipeline: Any) -> torch.Tensor:
    """What it samples, before the VAE decodes it: two guided steps from a fixed seed."""
    arguments: dict[str, Any] = {}
    if "ImageToVideo" in type(pipeline).__name__:
        from PIL import Image

        arguments["image"] = Image.new("RGB", (64, 64), (200, 60, 20))
    pipeline.set_progress_bar_config(disable=True)
    length = pipeline.transformer.config.max_text_seq_length
    result = pipeline(
        prompt=PROMPT,
        height=64,
        width=64,
        num_frames=9,
        num_inference_steps=2,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(5),
        max_sequence_length=length,
        output_type="latent",
        **arguments,
    )
    frames: torch.Tensor = result.frames
    return frames.float()


def main(jobs: Path, out: Path) -> None:
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    outputs = {}
    for job in json.loads(jobs.read_text()):
        pipeline = load_pipeline(job["model"], adapter=job.get("adapter"), transformer=job.get("transformer"))
        outputs[job["name"]] = latents_of(pipeline).contiguous()
        for scale in job.get("scales", []):
            pipeline.set_adapters("tuned", scale)
            outputs[f"{job['name']} {scale}"] = latents_of(pipeline).contiguous()
        if "adapter" in job:
            pipeline.disable_lora()
            outputs[f"{job['name']} disabled"] = latents_of(pipeline).contiguous()
    assert not [name for name in sys.modules if name.split(".")[0] == "finetune"]
    save_file(outputs, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
