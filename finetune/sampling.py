"""Functions of the library that sample videos."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from finetune.arguments import checked

if TYPE_CHECKING:
    from finetune.core.types import Bucket, SamplePrompt
    from finetune.inference.generate import GenerateReport


@checked
def generate(
    prompts: str | Sequence[str | SamplePrompt],
    out: str | Path = Path("videos"),
    *,
    model: str | Path | None = None,
    revision: str | None = None,
    transformer: str | Path | None = None,
    adapters: str | Path | Sequence[str | Path] = (),
    images: str | Path | Sequence[str | Path] = (),
    seed: int = 0,
    bucket: str | Bucket | None = None,
    fps: float | None = None,
    negative_prompt: str = "",
    num_inference_steps: int = 50,
    guidance_scale: float = 6.0,
    dynamic_cfg: bool = False,
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto",
    offload: bool = False,
    device: str | None = None,
) -> GenerateReport:
    """Sample a video for each prompt from a base model with any number of adapters.

    Args:
        prompts: one text or several; a ``SamplePrompt`` has an image and a seed of its own.
        out: folder for the videos.
        model: the base model, a folder or a hub id; None for what the first adapter was trained on.
        revision: branch, tag or commit of a hub id.
        transformer: a fully fine-tuned transformer in place of the base's, from an export.
        adapters: LoRAs, each a file, an export, a checkpoint or a run, as ``PATH`` or ``PATH:STRENGTH``.
        images: first frames, for image-to-video models: one for all texts, or one for each.
        seed: of the first text; each further one has the next.
        bucket: frames x height x width, such as ``49x480x720``; None: as the first adapter was trained.
        fps: of the written files; None: as the first adapter was trained.
        negative_prompt: what to steer away from.
        num_inference_steps: denoising steps.
        guidance_scale: classifier-free guidance; 1 for none.
        dynamic_cfg: let the guidance grow with the steps.
        dtype: what to compute in.
        offload: keep on the GPU only the component that runs; slower.
        device: such as ``cuda:1`` or ``cpu``; None for the GPU if there is one.

    Raises:
        ModelError: if the base cannot be found or loaded.
        ConfigError: for a prompt, image, adapter, size or number that cannot be used; all of them at once.
        DataError: if an image cannot be read.
    """
    from finetune.core.errors import ConfigError
    from finetune.datasets.geometry import parse_bucket
    from finetune.inference.generate import generate
    from finetune.inference.request import GenerateRequest, parse_adapter, prompts_with_seeds

    listed = [adapters] if isinstance(adapters, str | Path) else adapters
    frames = [images] if isinstance(images, str | Path) else images
    items = [prompts] if isinstance(prompts, str) else prompts
    texts = [item for item in items if isinstance(item, str)]
    seeded = iter(prompts_with_seeds(texts, [*map(Path, frames)], seed=seed))
    try:
        shape = None if bucket is None else parse_bucket(bucket)
    except ValueError as error:
        raise ConfigError(str(error), where=f"--bucket {bucket}") from None
    return generate(
        GenerateRequest(
            base=None if model is None else str(model),
            prompts=tuple(next(seeded) if isinstance(item, str) else item for item in items),
            out=Path(out),
            revision=revision,
            transformer=None if transformer is None else Path(transformer),
            adapters=tuple(parse_adapter(str(adapter)) for adapter in listed),
            bucket=shape,
            fps=fps,
            negative_prompt=negative_prompt,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            dynamic_cfg=dynamic_cfg,
            dtype=dtype,
            offload=offload,
            device=device,
        )
    )
