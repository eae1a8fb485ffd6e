"""``generate``: from a request to files. What cannot be met is refused before a weight is loaded."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from finetune.cogvideox.captions import load_tokenizer, tokenize
from finetune.cogvideox.config import ModelConfig
from finetune.cogvideox.load import empty_transformer, load_scheduler, load_vae
from finetune.cogvideox.model_files import json_folder, pin_revision
from finetune.cogvideox.spec import ModelSpec, read_spec
from finetune.core.distributed import ProcessGroup, usable_device
from finetune.core.errors import ConfigError, FinetuneError, raise_all
from finetune.core.files import atomic_write_bytes, require_writable
from finetune.core.types import Bucket
from finetune.datasets.geometry import parse_bucket
from finetune.inference.adapters import (
    AdapterSource,
    LoadedAdapters,
    TrainingRecord,
    base_faults,
    named_base,
    read_record,
    read_sources,
    require_same_base,
    shape_faults,
    transformer_root,
    trigger_notes,
)
from finetune.inference.context_parallel import Division, divide, division_faults
from finetune.inference.continuation import sample_continued
from finetune.inference.loading import embed_prompts, load_denoiser, start_device
from finetune.inference.placement import Placement, Sampling, choose
from finetune.inference.postprocess import Postprocess
from finetune.inference.preview import Preview, load_decoder
from finetune.inference.request import AdapterArgument, GenerateRequest, VideoPrompt, mode_of, request_faults
from finetune.inference.sample import SampleModules, SampleRequest, SampleSettings, sample_videos
from finetune.inference.videos import Frames, contact_sheet, gif_bytes, write_mp4

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GenerateReport:
    """What was written."""

    videos: tuple[Path, ...]
    sheet: Path
    """All videos as rows of frames in one PNG."""
    bucket: Bucket
    frames: tuple[Frames, ...] = field(repr=False)
    """The videos as they were sampled, each uint8 [F, H, W, 3], in the order of the prompts."""
    notes: tuple[str, ...] = ()
    """What was remarked on the request before it began."""

    def __str__(self) -> str:
        return "\n".join([*(f"wrote {path}" for path in self.videos), f"wrote {self.sheet} (all of them at a glance)"])


@dataclass(frozen=True)
class _Shot:
    """One video to make."""

    prompt: VideoPrompt
    """With the seed of this video."""
    bucket: Bucket
    adapters: tuple[AdapterArgument, ...]
    path: Path


@dataclass(frozen=True)
class _Plan:
    """A request that can be met."""

    model: ModelConfig
    """The base, at one commit."""
    transformer: ModelConfig
    """Where the transformer's weights are: the base, or a full fine-tuning of it."""
    spec: ModelSpec
    sources: Mapping[Path, AdapterSource]
    shots: tuple[_Shot, ...]
    bucket: Bucket
    fps: float
    device: torch.device
    placement: Placement
    division: Division | Literal["prompts"]
    """What the processes divide."""
    postprocess: Postprocess
    preview: Preview | None
    notes: tuple[str, ...]


def generate(request: GenerateRequest) -> GenerateReport:
    """Sample every prompt to ``<out>/<number>-<words of the prompt>-seed<seed>.mp4``, and all of them to ``sheet.png``.

    Everything that can be checked is checked before a weight is loaded. One component is loaded after the other, so
    that T5 and the transformer are never in memory together.

    Raises:
        ModelError: if the base cannot be found or loaded.
        ConfigError: for a prompt, image, adapter, size or number that cannot be used; all of them at once.
        DataError: if an image or a video cannot be read.
        FinetuneError: if a video cannot be written.
    """
    ranks = _processes(request)
    try:
        return _generate(request, ranks)
    finally:
        ranks.close()


def _generate(request: GenerateRequest, ranks: ProcessGroup) -> GenerateReport:
    plan = _plan(request, ranks)
    texts = dict.fromkeys([request.negative_prompt, *(shot.prompt.prompt for shot in plan.shots)])
    # One T5 for all processes, which share the host's memory.
    encoded = ranks.run_on_main(lambda: embed_prompts(plan.model, plan.spec, [*texts], plan.placement, plan.device))
    embeds = dict(zip(texts, encoded, strict=True))
    modules = _load_modules(plan, request)
    if plan.division in ("cfg", "context"):
        divide(modules.transformer, plan.division, ranks)
    shots = plan.shots[ranks.rank :: ranks.world] if plan.division == "prompts" else plan.shots
    adapters = LoadedAdapters(plan.spec, modules.transformer, modules.scheduler, plan.sources)
    rows: list[tuple[Path, str, Frames]] = []
    for index, shot in enumerate(shots):
        adapters.use(shot.adapters, later=[one for other in shots[index + 1 :] for one in other.adapters])
        frames = _sample(plan, request, modules, shot, embeds)
        rows.append((shot.path, f"{shot.prompt.prompt} (seed {shot.prompt.seed})", frames))
        if plan.division != "prompts" and not ranks.is_main:  # which has the same video
            continue
        # Each as soon as it is sampled: an interrupted batch keeps what is done.
        finished, fps = plan.postprocess(frames, plan.fps)
        write_mp4(shot.path, finished, fps)
        if request.gif:
            atomic_write_bytes(shot.path.with_suffix(".gif"), gif_bytes(finished, fps))
    if plan.division == "prompts":
        rows = sorted(ranks.gather(rows), key=lambda row: row[0])
    pictures = [(label, frames) for _, label, frames in rows]
    sheet = ranks.run_on_main(lambda: contact_sheet(pictures, request.out / "sheet.png"))
    paths = tuple(shot.path for shot in plan.shots)
    return GenerateReport(paths, sheet, plan.bucket, tuple(frames for _, frames in pictures), plan.notes)


def _load_modules(plan: _Plan, request: GenerateRequest) -> SampleModules:
    """Transformer, scheduler and VAE, in the state in which they sample; without adapters."""
    dtype = plan.model.torch_dtype()
    transformer = load_denoiser(plan.transformer, plan.placement, plan.device, dtype)
    # An adapter that is put on another transformer is so on purpose.
    if plan.transformer == plan.model and request.gguf is None:
        require_same_base(transformer, plan.model.pretrained, plan.sources.values())
    scheduler = _scheduler(load_scheduler(plan.model), request.scheduler)
    vae = load_vae(plan.model, device=start_device(plan.placement, plan.device), dtype=dtype)
    return SampleModules(plan.spec, transformer, scheduler, vae)


def _scheduler(own: Any, kind: str | None) -> Any:
    """The base's own scheduler, or the one of this kind with the same numbers."""
    from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler

    wanted = {"ddim": CogVideoXDDIMScheduler, "dpm": CogVideoXDPMScheduler, None: type(own)}[kind]
    return own if wanted is type(own) else wanted.from_config(own.config)


def _sample(
    plan: _Plan, request: GenerateRequest, modules: SampleModules, shot: _Shot, embeds: Mapping[str, Tensor]
) -> Frames:
    """One video, from its first part to its last."""
    watch = None if plan.preview is None else plan.preview.attach
    settings = SampleSettings(request.num_inference_steps, request.guidance_scale, request.dynamic_cfg, watch)

    def sample(part: SampleRequest) -> Frames:
        how, device = plan.placement.offload, plan.device
        (frames,) = sample_videos(modules, [part], settings, progress=True, offload=how, device=device)
        return frames

    first = SampleRequest(
        embeds[shot.prompt.prompt],
        embeds[request.negative_prompt],
        shot.prompt.seed,
        shot.bucket,
        mode_of(shot.prompt, shot.bucket, plan.fps, request.strength),
    )
    strength = shot.prompt.strength or request.strength
    return sample_continued(sample, plan.spec, first, parts=request.extend, strength=strength)


_Record = tuple[str, Path, TrainingRecord]
"""Which option, its folder, and what its training says of itself."""


def _plan(request: GenerateRequest, ranks: ProcessGroup) -> _Plan:
    """Find base, adapters, size and rate, and refuse what cannot be sampled; no weight is loaded."""
    tuned = None if request.transformer is None or request.gguf else transformer_root(request.transformer)
    shown = [prompt.adapters for prompt in request.prompts if prompt.adapters is not None]
    sources, faults = read_sources([*request.adapters, *(adapter for adapters in shown for adapter in adapters)])
    active = {path: source for path, source in sources.items() if source.adapter.strength}
    records = [(s.where, path, s.record) for path, s in active.items() if s.record is not None]
    if request.transformer is not None and (record := read_record(request.transformer)) is not None:
        records.append((f"--transformer {request.transformer}", request.transformer, record))
    base, revision = _base(request, records, faults)
    revision = pin_revision(base, revision)
    spec = read_spec(base, revision)
    first = records[0][2] if records else TrainingRecord()
    bucket = request.bucket or _recorded_bucket(first, spec) or spec.training_bucket
    folder = tuned or json_folder(base, revision)
    fps = request.fps or first.fps or float(spec.native_fps)
    misfits = _misfits(base, folder, spec, [*active.values()], records)
    faults = [*request_faults(request, spec, bucket, fps), *faults, *misfits]
    raise_all(ConfigError, faults, what="{n} things are wrong with the request")
    device = ranks.device if ranks.world > 1 else usable_device(request.device)
    model = ModelConfig(pretrained=base, revision=revision, dtype=request.dtype)
    shots = _shots(request, bucket)
    division = request.parallel or ("context" if len(shots) == 1 < ranks.world else "prompts")
    guided = request.guidance_scale > 1
    buckets = dict.fromkeys(shot.bucket for shot in shots)
    if division != "prompts":
        ring = device.type == "cpu" or model.torch_dtype() != torch.float32
        undivided = [
            fault
            for size in buckets
            for fault in division_faults(division, spec, size, ranks.world, guided=guided, ring=ring)
        ]
        if request.compile and division == "context":
            what = "blocks that talk to other processes are not compiled"
            undivided.append(ConfigError(what, where="--compile, --parallel context", fix="leave --compile out"))
        raise_all(ConfigError, undivided, what="{n} things keep the processes from one video")
    sampling = Sampling(
        folder=json_folder(base, revision),
        spec=spec,
        bucket=max(buckets, key=spec.tokens),
        dtype=model.torch_dtype(),
        guided=guided and division != "cfg",
        adapter_bytes=sum(tensor.nbytes for source in active.values() for tensor in source.tensors.values()),
        processes=ranks.world if division == "context" else 1,
    )
    placement = choose(request, sampling, device)
    postprocess = Postprocess(request.upscale, request.interpolate, device)
    preview = None
    if request.preview is not None and (ranks.is_main or division == "prompts"):
        preview = Preview(load_decoder(request.preview), spec, request.out / f"preview{ranks.rank or ''}.png")
    # Sampling takes minutes per video.
    require_writable(request.out, kind=ConfigError, what="the videos", where=f"--output {request.out}")
    choices = [source.note for source in sources.values() if source.note]
    warnings: list[str] = []
    for where, path, record in records:
        concerned = [shot.prompt for shot in shots if tuned or path in {adapter.path for adapter in shot.adapters}]
        warnings += trigger_notes(record, where, concerned)
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
        shots=shots,
        bucket=bucket,
        fps=fps,
        device=device,
        placement=placement,
        division=division,
        postprocess=postprocess,
        preview=preview,
        notes=(*choices, *warnings),
    )


def _shots(request: GenerateRequest, bucket: Bucket) -> tuple[_Shot, ...]:
    """The videos of a request, in the order of its prompts."""
    shots: list[_Shot] = []
    for prompt in request.prompts:
        words = re.sub(r"\W+", "-", prompt.prompt.lower())[:40].strip("-") or "video"
        for number in range(request.videos):
            seed = prompt.seed + number
            shots.append(
                _Shot(
                    prompt=prompt.model_copy(update={"seed": seed}),
                    bucket=prompt.bucket or bucket,
                    adapters=request.adapters if prompt.adapters is None else prompt.adapters,
                    path=request.out / f"{len(shots):03d}-{words}-seed{seed}.mp4",
                )
            )
    return tuple(shots)


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
    if sources and not faults:
        shapes = empty_transformer(folder, dtype=torch.float32, device="meta")
        for source in sources:
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


def _recorded_bucket(record: TrainingRecord, spec: ModelSpec) -> Bucket | None:
    """The first bucket of a training record, if this base can sample it."""
    try:
        bucket = parse_bucket(record.buckets[0])
    except (IndexError, ValueError):
        return None
    return None if spec.check_bucket(bucket) else bucket


def _processes(request: GenerateRequest) -> ProcessGroup:
    """Those that ``accelerate launch`` or ``torchrun`` started; one, where none did."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if request.device is not None:
            what = "several processes compute on a device each, which the launcher chooses"
            raise ConfigError(what, where=f"--device {request.device}", fix="leave it out")
        return ProcessGroup.current()
    if request.parallel is not None:
        raise ConfigError(
            "there is one process, and nothing to divide",
            where=f"--parallel {request.parallel}",
            fix="start several with `accelerate launch` (docs/inference.md)",
        )
    return ProcessGroup()
