"""Functions of the library that sample videos."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

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
    adapters: str | Path | Sequence[str | Path] | None = None,
    images: str | Path | Sequence[str | Path] = (),
    last_images: str | Path | Sequence[str | Path] = (),
    source_videos: str | Path | Sequence[str | Path] = (),
    strength: float | None = None,
    extend: int | None = None,
    videos: int | None = None,
    seed: int = 0,
    bucket: str | Bucket | None = None,
    fps: float | None = None,
    negative_prompt: str | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    dynamic_cfg: bool | None = None,
    scheduler: Literal["ddim", "dpm"] | None = None,
    gif: bool | None = None,
    dtype: Literal["auto", "bf16", "fp16", "fp32"] | None = None,
    offload: bool | None = None,
    device: str | None = None,
) -> GenerateReport:
    """Sample a video for each prompt from a base model with any number of adapters.

    What is None is as ``GenerateRequest`` has it.

    Args:
        prompts: one text or several; a ``SamplePrompt`` has an image and a seed of its own, a ``VideoPrompt`` of
            ``finetune.inference.request`` adapters, size, last frame and source video as well.
        out: folder for the videos.
        model: the base model, a folder or a hub id; None for what the first adapter was trained on.
        revision: branch, tag or commit of a hub id.
        transformer: a fully fine-tuned transformer in place of the base's, from an export.
        adapters: LoRAs, each a file, an export, a checkpoint or a run, as ``PATH`` or ``PATH:STRENGTH``.
        images: first frames, for image-to-video models: one for all texts, or one for each.
        last_images: last frames, likewise.
        source_videos: what video-to-video starts from, likewise; for text-to-video models.
        strength: of video-to-video, more than 0 to 1: which part of the denoising steps is made.
        extend: by how many parts each video is continued.
        videos: of each prompt; each has the next seed.
        seed: of the first text's first video; each further one has the next.
        bucket: frames x height x width, such as ``49x480x720``; None: as the first adapter was trained.
        fps: of the written files; None: as the first adapter was trained.
        negative_prompt: what to steer away from.
        num_inference_steps: denoising steps.
        guidance_scale: classifier-free guidance; 1 for none.
        dynamic_cfg: let the guidance grow with the steps.
        scheduler: what takes the steps; None for the base's own.
        gif: write animated GIFs as well.
        dtype: what to compute in.
        offload: keep on the GPU only the component that runs; slower.
        device: such as ``cuda:1`` or ``cpu``; None for the GPU if there is one.

    Raises:
        ModelError: if the base cannot be found or loaded.
        ConfigError: for a prompt, image, adapter, size or number that cannot be used; all of them at once.
        DataError: if an image or a video cannot be read.
    """
    from finetune.core.errors import ConfigError
    from finetune.datasets.geometry import parse_bucket
    from finetune.inference.generate import generate
    from finetune.inference.request import GenerateRequest, VideoPrompt, parse_adapter, prompts_with_seeds

    items = [prompts] if isinstance(prompts, str) else prompts
    texts = [item for item in items if isinstance(item, str)]
    seeded = iter(
        prompts_with_seeds(
            texts,
            _paths(images),
            last_images=_paths(last_images),
            videos=_paths(source_videos),
            seeds=range(seed, 2**62, videos or 1),
        )
    )
    listed = [next(seeded) if isinstance(item, str) else VideoPrompt.model_validate(dict(item)) for item in items]
    try:
        shape = None if bucket is None else parse_bucket(bucket)
    except ValueError as error:
        raise ConfigError(str(error), where=f"--bucket {bucket}") from None
    given: dict[str, Any] = {
        "base": None if model is None else str(model),
        "prompts": tuple(listed),
        "out": Path(out),
        "revision": revision,
        "transformer": None if transformer is None else Path(transformer),
        "adapters": None if adapters is None else tuple(parse_adapter(str(path)) for path in _paths(adapters)),
        "bucket": shape,
        "fps": fps,
        "negative_prompt": negative_prompt,
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "dynamic_cfg": dynamic_cfg,
        "scheduler": scheduler,
        "strength": strength,
        "extend": extend,
        "videos": videos,
        "gif": gif,
        "dtype": dtype,
        "offload": offload,
        "device": device,
    }
    return generate(GenerateRequest(**{name: value for name, value in given.items() if value is not None}))


def _paths(paths: str | Path | Sequence[str | Path]) -> list[Path]:
    return [Path(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
