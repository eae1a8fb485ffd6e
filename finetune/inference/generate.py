"""Videos from modules that are loaded already, through the stock diffusers pipeline: for training and for the command.

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

from finetune.cogvideox.config import ModelConfig
from finetune.cogvideox.encode import encode_prompts, tokenize
from finetune.cogvideox.load import (
    build_pipeline,
    empty_transformer,
    load_scheduler,
    load_text,
    load_tokenizer,
    load_transformer,
    load_vae,
    require_base,
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
from finetune.inference.inputs import (
    TRAINING_RECORD,
    AdapterSource,
    GenerateRequest,
    base_faults,
    check_request,
    misfit,
    named_base,
    read_sources,
    recorded_fps,
    shape_faults,
    training_record,
    transformer_root,
    trigger_notes,
)
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


def sample_videos(
    spec: ModelSpec,
    transformer: Any,
    scheduler: Any,
    vae: Any,
    requests: Sequence[SampleRequest],
    *,
    num_inference_steps: int,
    guidance_scale: float,
    dynamic_cfg: bool = False,
    progress: bool = False,
    offload_to: torch.device | None = None,
) -> list[Frames]:
    """Sample each request through the stock pipeline, one at a time, so that none depends on its neighbours.

    The modules are used as they are (dtype, device, adapters) and left as they were: no hook stays on them, their
    train/eval flags and the global random state are restored, and the scheduler's state is a copy's. All randomness
    comes from a CPU generator with the request's seed.

    Args:
        spec: of the model.
        transformer: unwrapped, with or without adapters.
        scheduler: the checkpoint's own.
        vae: in the transformer's dtype.
        requests: what to sample.
        num_inference_steps: denoising steps.
        guidance_scale: 1 for no guidance.
        dynamic_cfg: let the guidance grow with the denoising steps.
        progress: show a bar per video.
        offload_to: keep each module on the CPU but while it runs on this device.

    Returns:
        One uint8 [F, H, W, 3] per request.

    Raises:
        ValueError: if an image is missing or superfluous, or the VAE has another dtype than the transformer.
        DataError: if an image cannot be read.
    """
    # The patch embedding's: LoRA weights come later and may be float32 beside a bfloat16 base.
    dtype = next(parameter.dtype for parameter in transformer.parameters() if parameter.is_floating_point())
    if vae.dtype != dtype:
        raise ValueError(f"the VAE is {vae.dtype} and the transformer {dtype}; the pipeline needs them equal")
    videos = []
    with training_state_untouched(transformer, vae), _no_traces(transformer):
        pipeline = build_pipeline(spec, transformer=transformer, scheduler=_fresh(scheduler), vae=vae)
        pipeline.progress_bar = lambda iterable=None, total=None: Bar(
            iterable, total=total, desc="denoising", disable=not progress
        )
        try:
            if offload_to is not None:
                pipeline.enable_model_cpu_offload(device=offload_to)
            device = pipeline._execution_device
            for request in requests:
                with _tiled(vae, request.bucket):
                    output = pipeline(
                        **_image_argument(spec, request),
                        prompt_embeds=request.prompt_embeds[None].to(device, dtype),
                        negative_prompt_embeds=request.negative_embeds[None].to(device, dtype),
                        num_frames=request.bucket.frames,
                        height=request.bucket.height,
                        width=request.bucket.width,
                        num_inference_steps=num_inference_steps,
                        guidance_scale=guidance_scale,
                        use_dynamic_cfg=dynamic_cfg,
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


def _fresh(scheduler: Any) -> Any:
    return type(scheduler).from_config(scheduler.config)


@contextmanager
def _no_traces(transformer: Any) -> Iterator[None]:
    """Take away the hook registry that a pipeline call leaves on a transformer which had none."""
    had_registry = hasattr(transformer, "_diffusers_hook")
    try:
        yield
    finally:
        if not had_registry and hasattr(transformer, "_diffusers_hook"):
            del transformer._diffusers_hook


@contextmanager
def _tiled(vae: Any, bucket: Bucket) -> Iterator[None]:
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

    if isinstance(request.image, Path):
        image = load_fitted_image(request.image, request.bucket)
    else:
        image = fit_image(request.image, request.bucket)
    return {"image": Image.fromarray(image.permute(1, 2, 0).numpy())}


def _to_uint8(video: Any, seed: int) -> Frames:
    """[F, H, W, 3] in 0..1 to bytes; what is not a number becomes black, and is said."""
    if not np.isfinite(video).all():
        _log.warning("the sampled video with seed %d holds values that are not numbers; they are shown black", seed)
    frames: Frames = (np.nan_to_num(video, nan=0.0) * 255).round().astype(np.uint8)
    return frames


# -------- ``finetune generate``: videos from a base model, any number of adapters, and prompts.
#
# It loads one component after the other, so that T5 and the transformer are never in memory together.


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
    """What was said of the request before it began."""

    def __str__(self) -> str:
        return "\n".join([*(f"wrote {path}" for path in self.videos), f"wrote {self.sheet} (all of them at a glance)"])


def generate(request: GenerateRequest) -> GenerateReport:
    """Sample every prompt to ``<out>/<number>-<words of the prompt>-seed<seed>.mp4``, and all of them to ``sheet.png``.

    Everything that can be checked is checked before a weight is loaded.

    Raises:
        ModelError: if the base cannot be found or loaded.
        ConfigError: for a prompt, image, adapter, size or number that cannot be used; all of them at once.
        DataError: if an image cannot be read.
        FinetuneError: if a video cannot be written.
    """
    tuned = None if request.transformer is None else transformer_root(request.transformer)
    sources, faults = read_sources(request.adapters)
    records = _records(request, sources)
    base, revision = _base(request, records, faults)
    revision = pin_revision(base, revision)
    spec = read_spec(base, revision)
    record = next((record for _, _, record in records if record), {})
    bucket = request.bucket or _recorded_bucket(record, spec) or spec.training_bucket
    check_request(
        request,
        spec,
        bucket,
        [*faults, *_misfits(base, tuned or json_folder(base, revision), spec, sources, records)],
    )
    fps = request.fps or recorded_fps(record) or float(spec.native_fps)
    device = _device(request)
    # Sampling takes minutes per video.
    require_writable(request.out, kind=ConfigError, what="the videos", where=f"--output {request.out}")
    notes = [note for where, _, record in records for note in trigger_notes(record, where, request.prompts)]
    model = ModelConfig(pretrained=base, revision=revision, dtype=request.dtype)
    texts = [*(prompt.prompt for prompt in request.prompts), request.negative_prompt]
    notes += _unread(model, spec, texts)
    chosen = [source.note for source in sources if source.note]
    for choice in chosen:
        _log.info("note: %s", choice)
    for note in notes:  # now, not after minutes of sampling
        _log.warning("%s", note)
    dtype = model.torch_dtype()
    loaded_on = torch.device("cpu") if request.offload else device

    embeds = _embed(model, spec, texts, device)
    own = model if tuned is None else ModelConfig(pretrained=str(tuned))
    transformer = load_transformer(own, device=loaded_on, dtype=dtype)
    if tuned is None:  # an adapter that is put on another transformer is so on purpose
        _require_same_base(transformer, base, sources)
    scheduler = load_scheduler(model)
    load_adapters(spec, transformer, scheduler, sources)
    vae = load_vae(model, device=loaded_on, dtype=dtype)

    paths: list[Path] = []
    rows: list[tuple[str, Frames]] = []
    for index, prompt in enumerate(request.prompts):
        (frames,) = sample_videos(
            spec,
            transformer,
            scheduler,
            vae,
            [SampleRequest(embeds[index], embeds[-1], prompt.seed, bucket, prompt.image)],
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            dynamic_cfg=request.dynamic_cfg,
            progress=True,
            offload_to=device if request.offload else None,
        )
        name = f"{index:03d}-{_slug(prompt.prompt)}-seed{prompt.seed}.mp4"
        # Each as soon as it is sampled: an interrupted batch keeps what is done.
        paths.append(write_mp4(request.out / name, frames, fps))
        rows.append((f"{prompt.prompt} (seed {prompt.seed})", frames))
    sheet = contact_sheet(rows, request.out / "sheet.png")
    return GenerateReport(tuple(paths), sheet, bucket, tuple(frames for _, frames in rows), (*chosen, *notes))


_Record = tuple[str, Path, dict[str, Any]]
"""Which option, its folder, and what its training says of itself (empty: nothing)."""


def _records(request: GenerateRequest, sources: Sequence[AdapterSource]) -> list[_Record]:
    records = [
        (source.where, source.adapter.path, dict(source.record)) for source in sources if source.adapter.strength
    ]
    if request.transformer is not None:
        where = f"--transformer {request.transformer}"
        records.append((where, request.transformer, training_record(request.transformer)))
    return records


def _base(request: GenerateRequest, records: Sequence[_Record], faults: list[FinetuneError]) -> tuple[str, str | None]:
    """The base to sample with and its revision: as asked for, or as the first record that names one has it."""
    if request.base is not None:
        return request.base, request.revision
    for _, folder, record in records:
        if found := named_base(record, folder):
            return found[0], request.revision or found[1]
    names = [str(record["base_model"]) for _, _, record in records if record.get("base_model")]
    told = f": the record names {names[0]!r}, a folder of the machine that trained it" if names else ""
    missing = ConfigError(f"there is no base model{told}", where="--model", fix="name it: a folder, a hub id, 5b, ...")
    raise_all(ConfigError, [*faults, missing], what="{n} things are wrong with the request")
    raise missing


def _misfits(
    base: str, folder: Path, spec: ModelSpec, sources: Sequence[AdapterSource], records: Sequence[_Record]
) -> list[FinetuneError]:
    """Where the base, or the transformer in its place, is not what an adapter was made for."""
    faults = [fault for where, _, record in records for fault in base_faults(record, where, base, spec)]
    if not faults and (active := [source for source in sources if source.adapter.strength]):
        shapes = empty_transformer(folder, dtype=torch.float32, device="meta")
        faults = [fault for source in active for fault in shape_faults(source, shapes)]
    return [*faults]


def _require_same_base(transformer: Any, base: str, sources: Sequence[AdapterSource]) -> None:
    """Refuse adapters that were trained on other weights than these."""
    for source in sources:
        if not source.adapter.strength or not source.record:
            continue
        recorded = source.record.get("base_digest")
        if not isinstance(recorded, str):
            _log.warning("%s: its record does not say which weights of the base it was trained on", source.where)
            continue
        require_base(
            transformer,
            recorded,
            ConfigError,
            by="the adapter",
            where=f"--model {base}, {source.where}",
            fix=f"name them with --model; to try another base on purpose, move the adapter away from {TRAINING_RECORD}",
        )


def load_adapters(spec: ModelSpec, transformer: Any, scheduler: Any, sources: Sequence[AdapterSource]) -> None:
    """Load adapters with the stock pipeline's own loader and set their strengths; one of strength 0 is left out.

    Raises:
        ConfigError: if an adapter does not fit the transformer, in full.
    """
    from peft import get_peft_model_state_dict

    active = [source for source in sources if source.adapter.strength != 0]
    pipeline = build_pipeline(spec, transformer=transformer, scheduler=scheduler)
    names = [f"adapter_{index}" for index in range(len(active))]
    for name, source in zip(names, active, strict=True):
        try:
            if source.settings is None:
                folder, file = str(source.adapter.file.parent), source.adapter.file.name
                pipeline.load_lora_weights(folder, weight_name=file, adapter_name=name, use_safetensors=True)
            else:
                pipeline.load_lora_into_transformer(
                    dict(source.tensors),
                    transformer=transformer,
                    adapter_name=name,
                    metadata=dict(source.settings),
                    _pipeline=pipeline,
                )
        except (ValueError, RuntimeError, KeyError) as error:
            if is_out_of_memory(error):  # says nothing of the adapter
                raise
            raise misfit(source, str(error).strip().splitlines()[0]) from error
        # diffusers only warns of tensors that found no place.
        placed = {f"transformer.{key}" for key in get_peft_model_state_dict(transformer, adapter_name=name)}
        if left_out := source.tensors.keys() - placed:
            raise misfit(source, f"{len(left_out)} tensors have no place, such as {min(left_out)}")
    if active:
        pipeline.set_adapters(names, [source.adapter.strength for source in active])


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


def _recorded_bucket(record: dict[str, Any], spec: ModelSpec) -> Bucket | None:
    """The first bucket of a training record, if this base can sample it."""
    try:
        bucket = parse_bucket(record["buckets"][0])
    except (KeyError, IndexError, TypeError, ValueError):
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


def _slug(prompt: str) -> str:
    return re.sub(r"\W+", "-", prompt.lower())[:40].strip("-") or "video"
