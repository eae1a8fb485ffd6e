"""Videos through the stock diffusers pipeline: for training, from modules that are loaded, and for ``generate``.

The stock pipeline, because it is what a fine-tuned model will meet in other people's hands.
"""

from __future__ import annotations

import gc
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune.cogvideox.captions import load_tokenizer, tokenize
from finetune.cogvideox.config import ModelConfig
from finetune.cogvideox.encode import encode_prompts
from finetune.cogvideox.load import (
    build_pipeline,
    empty_transformer,
    load_scheduler,
    load_text,
    load_transformer,
    load_vae,
)
from finetune.cogvideox.model_files import json_folder, pin_revision
from finetune.cogvideox.spec import ModelSpec, read_spec
from finetune.core.distributed import compute_device
from finetune.core.errors import ConfigError, FinetuneError, is_out_of_memory, raise_all
from finetune.core.files import require_writable
from finetune.core.rng import training_state_untouched
from finetune.core.terminal import Bar
from finetune.core.types import Bucket
from finetune.datasets.geometry import parse_bucket
from finetune.inference.adapters import (
    AdapterSource,
    TrainingRecord,
    base_faults,
    load_adapters,
    named_base,
    read_record,
    read_sources,
    require_same_base,
    shape_faults,
    transformer_root,
    trigger_notes,
)
from finetune.inference.request import GenerateRequest, request_faults
from finetune.inference.videos import Frames, contact_sheet, write_mp4

_log = logging.getLogger(__name__)

DECODED_BYTES_PER_PIXEL = 46_000
"""Memory that decoding whole frames takes per pixel of one frame, at two bytes per activation: counted on the VAE of
the published models (14.7 GiB for 49x480x720, 44.5 GiB for 81x768x1360); clips of less than 25 frames take less."""

DECODE_WHOLE_BELOW = 4 * 2**30
"""Above this, decode in tiles, which take about 4 GiB for any size."""


def decodes_in_tiles(bucket: Bucket, dtype: torch.dtype) -> bool:
    """Whether a sampled video is decoded in overlapping tiles. A rule of sizes alone, not of the memory that is free:
    the same prompt and seed give the same video on every card.
    """
    return DECODED_BYTES_PER_PIXEL * bucket.height * bucket.width * dtype.itemsize // 2 > DECODE_WHOLE_BELOW


# ------------------------------------------------------------------------------------------------------------- sampling


@dataclass(frozen=True)
class SampleRequest:
    """One video to sample from embeddings that are ready: T5 need not be in memory."""

    prompt_embeds: Tensor
    """[L, D]"""
    negative_embeds: Tensor
    """[L, D]: what guidance leads away from, usually the embedding of the empty caption."""
    seed: int
    bucket: Bucket
    image: Path | Tensor | None = None
    """First frame for image-to-video: a file, or uint8 RGB [3, H, W]; resized and cropped as training clips are."""


@dataclass(frozen=True)
class SampleModules:
    """What samples; used as it is: dtype, device, adapters."""

    spec: ModelSpec
    transformer: Any
    """Unwrapped, with or without adapters."""
    scheduler: Any
    """The checkpoint's own."""
    vae: Any
    """In the transformer's dtype."""


@dataclass(frozen=True)
class SampleSettings:
    """How to sample."""

    num_inference_steps: int
    """Denoising steps."""
    guidance_scale: float
    """1 for no guidance."""
    dynamic_cfg: bool = False
    """Let the guidance grow with the denoising steps."""


def sample_videos(
    modules: SampleModules,
    requests: Sequence[SampleRequest],
    settings: SampleSettings,
    *,
    progress: bool = False,
    offload_to: torch.device | None = None,
) -> list[Frames]:
    """Sample each request through the stock pipeline, one at a time, so that none depends on its neighbours.

    The modules are left as they were: no hook stays on them, their train/eval flags and the global random state are
    restored, and the scheduler's state is a copy's. All randomness comes from a CPU generator with the request's seed.

    Args:
        modules: what samples.
        requests: what to sample.
        settings: how.
        progress: show a bar per video.
        offload_to: keep each module on the CPU but while it runs on this device.

    Returns:
        One uint8 [F, H, W, 3] per request.

    Raises:
        ValueError: if an image is missing or superfluous, or the VAE has another dtype than the transformer.
        DataError: if an image cannot be read.
    """
    spec, transformer, scheduler, vae = modules.spec, modules.transformer, modules.scheduler, modules.vae
    # The patch embedding's: LoRA weights come later and may be float32 beside a bfloat16 base.
    dtype = next(parameter.dtype for parameter in transformer.parameters() if parameter.is_floating_point())
    if vae.dtype != dtype:
        raise ValueError(f"the VAE is {vae.dtype} and the transformer {dtype}; the pipeline needs them equal")
    videos = []
    with training_state_untouched(transformer, vae), _without_new_hooks(transformer):
        fresh_scheduler = type(scheduler).from_config(scheduler.config)
        pipeline = build_pipeline(spec, transformer=transformer, scheduler=fresh_scheduler, vae=vae)
        pipeline.progress_bar = lambda iterable=None, total=None: Bar(
            iterable, total=total, desc="denoising", disable=not progress
        )
        try:
            if offload_to is not None:
                pipeline.enable_model_cpu_offload(device=offload_to)
            device = pipeline._execution_device
            for request in requests:
                with _tiled_if_large(vae, request.bucket):
                    output = pipeline(
                        **_image_argument(spec, request),
                        prompt_embeds=request.prompt_embeds[None].to(device, dtype),
                        negative_prompt_embeds=request.negative_embeds[None].to(device, dtype),
                        num_frames=request.bucket.frames,
                        height=request.bucket.height,
                        width=request.bucket.width,
                        num_inference_steps=settings.num_inference_steps,
                        guidance_scale=settings.guidance_scale,
                        use_dynamic_cfg=settings.dynamic_cfg,
                        generator=torch.Generator("cpu").manual_seed(request.seed),
                        output_type="np",
                    )
                # The VAE decodes an even number of latent frames (possible with a temporal patch only) to 4F' frames
                # where 4F' - 3 were encoded: the first, single frame comes out as four.
                videos.append(_to_uint8(output.frames[0][-request.bucket.frames :], request.seed))
        finally:
            if offload_to is not None:
                pipeline.remove_all_hooks()
    return videos


@contextmanager
def _without_new_hooks(transformer: Any) -> Iterator[None]:
    """Take away the hook registry that a pipeline call leaves on a transformer which had none."""
    had_registry = hasattr(transformer, "_diffusers_hook")
    try:
        yield
    finally:
        if not had_registry and hasattr(transformer, "_diffusers_hook"):
            del transformer._diffusers_hook


@contextmanager
def _tiled_if_large(vae: Any, bucket: Bucket) -> Iterator[None]:
    before = vae.use_tiling
    if decodes_in_tiles(bucket, vae.dtype):
        vae.enable_tiling()
    try:
        yield
    finally:
        vae.use_tiling = before


def _image_argument(spec: ModelSpec, request: SampleRequest) -> dict[str, Any]:
    if (request.image is not None) != spec.image_to_video:
        raise ValueError(
            f"the model is {'image' if spec.image_to_video else 'text'}-to-video, "
            f"but an image is {'missing' if request.image is None else 'given'}"
        )
    if request.image is None:
        return {}
    from PIL import Image

    from finetune.datasets.decode_pool import fit_image, load_fitted_image

    fit = load_fitted_image if isinstance(request.image, Path) else fit_image
    image: Tensor = fit(request.image, request.bucket)  # type: ignore[arg-type]
    return {"image": Image.fromarray(image.permute(1, 2, 0).numpy())}


def _to_uint8(video: Any, seed: int) -> Frames:
    """[F, H, W, 3] in 0..1 to bytes; what is not a number becomes black, and is told."""
    if not np.isfinite(video).all():
        _log.warning("the sampled video with seed %d holds values that are not numbers; they are shown black", seed)
    frames: Frames = (np.nan_to_num(video, nan=0.0) * 255).round().astype(np.uint8)
    return frames


# ------------------------------------------------------------------------------------------------------------- generate


@dataclass(frozen=True)
class GenerateReport:
    """What was written."""

    videos: tuple[Path, ...]
    sheet: Path
    """All videos as rows of frames in one PNG."""
    bucket: Bucket
    frames: tuple[Frames, ...] = field(repr=False)
    """The videos before compression, each uint8 [F, H, W, 3], in the order of the prompts."""
    notes: tuple[str, ...] = ()
    """What was remarked on the request before it began."""

    def __str__(self) -> str:
        return "\n".join([*(f"wrote {path}" for path in self.videos), f"wrote {self.sheet} (all of them at a glance)"])


@dataclass(frozen=True)
class _Plan:
    """A request that can be met."""

    model: ModelConfig
    """The base, at one commit."""
    transformer: ModelConfig
    """Where the transformer's weights are: the base, or a full fine-tuning of it."""
    spec: ModelSpec
    sources: list[AdapterSource]
    bucket: Bucket
    fps: float
    device: torch.device
    notes: tuple[str, ...]


def generate(request: GenerateRequest) -> GenerateReport:
    """Sample every prompt to ``<out>/<number>-<words of the prompt>-seed<seed>.mp4``, and all of them to ``sheet.png``.

    Everything that can be checked is checked before a weight is loaded. One component is loaded after the other, so
    that T5 and the transformer are never in memory together.

    Raises:
        ModelError: if the base cannot be found or loaded.
        ConfigError: for a prompt, image, adapter, size or number that cannot be used; all of them at once.
        DataError: if an image cannot be read.
        FinetuneError: if a video cannot be written.
    """
    plan = _plan(request)
    dtype = plan.model.torch_dtype()
    start_device = torch.device("cpu") if request.offload else plan.device
    texts = [*(prompt.prompt for prompt in request.prompts), request.negative_prompt]
    embeds = _embed(plan.model, plan.spec, texts, plan.device)
    transformer = load_transformer(plan.transformer, device=start_device, dtype=dtype)
    if plan.transformer == plan.model:  # an adapter that is put on another transformer is so on purpose
        require_same_base(transformer, plan.model.pretrained, plan.sources)
    scheduler = load_scheduler(plan.model)
    load_adapters(plan.spec, transformer, scheduler, plan.sources)
    vae = load_vae(plan.model, device=start_device, dtype=dtype)
    modules = SampleModules(plan.spec, transformer, scheduler, vae)
    settings = SampleSettings(request.num_inference_steps, request.guidance_scale, request.dynamic_cfg)

    paths: list[Path] = []
    rows: list[tuple[str, Frames]] = []
    for index, prompt in enumerate(request.prompts):
        (frames,) = sample_videos(
            modules,
            [SampleRequest(embeds[index], embeds[-1], prompt.seed, plan.bucket, prompt.image)],
            settings,
            progress=True,
            offload_to=plan.device if request.offload else None,
        )
        words = re.sub(r"\W+", "-", prompt.prompt.lower())[:40].strip("-") or "video"
        # Each as soon as it is sampled: an interrupted batch keeps what is done.
        paths.append(write_mp4(request.out / f"{index:03d}-{words}-seed{prompt.seed}.mp4", frames, plan.fps))
        rows.append((f"{prompt.prompt} (seed {prompt.seed})", frames))
    sheet = contact_sheet(rows, request.out / "sheet.png")
    return GenerateReport(tuple(paths), sheet, plan.bucket, tuple(frames for _, frames in rows), plan.notes)


_Record = tuple[str, Path, TrainingRecord]
"""Which option, its folder, and what its training says of itself."""


def _plan(request: GenerateRequest) -> _Plan:
    """Find base, adapters, size and rate, and refuse what cannot be sampled; no weight is loaded."""
    tuned = None if request.transformer is None else transformer_root(request.transformer)
    sources, faults = read_sources(request.adapters)
    records = [(s.where, s.adapter.path, s.record) for s in sources if s.adapter.strength and s.record is not None]
    if request.transformer is not None and (record := read_record(request.transformer)) is not None:
        records.append((f"--transformer {request.transformer}", request.transformer, record))
    base, revision = _base(request, records, faults)
    revision = pin_revision(base, revision)
    spec = read_spec(base, revision)
    first = records[0][2] if records else TrainingRecord()
    bucket = request.bucket or _recorded_bucket(first, spec) or spec.training_bucket
    folder = tuned or json_folder(base, revision)
    faults = [*request_faults(request, spec, bucket), *faults, *_misfits(base, folder, spec, sources, records)]
    raise_all(ConfigError, faults, what="{n} things are wrong with the request")
    device = _device(request)
    # Sampling takes minutes per video.
    require_writable(request.out, kind=ConfigError, what="the videos", where=f"--output {request.out}")
    model = ModelConfig(pretrained=base, revision=revision, dtype=request.dtype)
    choices = [source.note for source in sources if source.note]
    warnings = [note for where, _, record in records for note in trigger_notes(record, where, request.prompts)]
    warnings += _unread(model, spec, [*(prompt.prompt for prompt in request.prompts), request.negative_prompt])
    for choice in choices:
        _log.info("note: %s", choice)
    for warning in warnings:  # now, not after minutes of sampling
        _log.warning("%s", warning)
    return _Plan(
        model=model,
        transformer=model if tuned is None else ModelConfig(pretrained=str(tuned)),
        spec=spec,
        sources=sources,
        bucket=bucket,
        fps=request.fps or first.fps or float(spec.native_fps),
        device=device,
        notes=(*choices, *warnings),
    )


def _base(request: GenerateRequest, records: Sequence[_Record], faults: list[FinetuneError]) -> tuple[str, str | None]:
    """The base to sample with and its revision: as asked for, or as the first record that names one has it."""
    if request.base is not None:
        return request.base, request.revision
    for _, folder, record in records:
        if base := named_base(record, folder):
            return base[0], request.revision or base[1]
    names = [record.base_model for _, _, record in records if record.base_model]
    named = f": the record names {names[0]!r}, a folder of the machine that trained it" if names else ""
    missing = ConfigError(f"there is no base model{named}", where="--model", fix="name it: a folder, a hub id, 5b, ...")
    raise_all(ConfigError, [*faults, missing], what="{n} things are wrong with the request")
    raise missing


def _misfits(
    base: str, folder: Path, spec: ModelSpec, sources: Sequence[AdapterSource], records: Sequence[_Record]
) -> Iterator[FinetuneError]:
    """Where the base, or the transformer in its place, is not what an adapter was made for."""
    faults = [fault for where, _, record in records for fault in base_faults(record, where, base, spec)]
    yield from faults
    active = [source for source in sources if source.adapter.strength]
    if active and not faults:
        shapes = empty_transformer(folder, dtype=torch.float32, device="meta")
        for source in active:
            yield from shape_faults(source, shapes)


def _unread(model: ModelConfig, spec: ModelSpec, texts: Sequence[str]) -> list[str]:
    """A note on each prompt of which the text encoder does not get every character."""
    tokenized = tokenize(load_tokenizer(model), texts, spec)
    return [
        f"{tokens.unknown} characters of the prompt {text!r:.80} are unknown to the text encoder, which reads one mark"
        " for each run of them"
        for text, tokens in zip(texts, tokenized, strict=True)
        if tokens.unknown
    ]


def _embed(model: ModelConfig, spec: ModelSpec, prompts: Sequence[str], device: torch.device) -> list[Tensor]:
    """T5 embeddings [L, D] on the CPU; the encoder is gone from memory afterwards."""
    tokenizer, encoder = load_text(model, device=device)
    embeds = [encode_prompts(tokenizer, encoder, [prompt], spec)[0].cpu() for prompt in prompts]
    del tokenizer, encoder
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return embeds


def _recorded_bucket(record: TrainingRecord, spec: ModelSpec) -> Bucket | None:
    """The first bucket of a training record, if this base can sample it."""
    try:
        bucket = parse_bucket(record.buckets[0])
    except (IndexError, ValueError):
        return None
    return None if spec.check_bucket(bucket) else bucket


def _device(request: GenerateRequest) -> torch.device:
    try:
        device = compute_device(request.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        if is_out_of_memory(error):  # another program holds all of it
            raise
        raise ConfigError(
            f"the device cannot be used: {str(error).splitlines()[0]}", where=f"--device {request.device or 'cuda'}"
        ) from None
    if request.offload and device.type == "cpu":
        raise ConfigError("there is no GPU to offload from", where="--offload", fix="leave --offload out")
    return device
