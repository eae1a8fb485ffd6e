"""What a request comes to: base, adapters, sizes and videos; what cannot be met is refused, and no weight is loaded."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from finetune.cogvideox.captions import load_tokenizer, tokenize
from finetune.cogvideox.config import ModelConfig
from finetune.cogvideox.load import empty_transformer
from finetune.cogvideox.model_files import json_folder, pin_revision
from finetune.cogvideox.spec import ModelSpec, read_spec
from finetune.core.distributed import ProcessGroup, usable_device
from finetune.core.errors import ConfigError, FinetuneError, raise_all
from finetune.core.files import require_writable
from finetune.core.types import DTYPE_BYTES, Bucket, DtypeName, torch_dtype
from finetune.datasets.geometry import parse_bucket
from finetune.inference.adapters import (
    AdapterSource,
    TrainingRecord,
    base_faults,
    frame_notes,
    lacking_adapters,
    lokr_faults,
    named_base,
    paths_of_base,
    read_record,
    read_sources,
    riflex_of,
    shape_faults,
    transformer_root,
    trigger_notes,
)
from finetune.inference.compare import Column, columns_of
from finetune.inference.context_parallel import Division, division_faults
from finetune.inference.placement import Placement, Sampling, choose
from finetune.inference.postprocess import Postprocess
from finetune.inference.preview import Preview, load_decoder
from finetune.inference.record import ELSEWHERE, VideoRecord, record_of
from finetune.inference.request import AdapterArgument, GenerateRequest, VideoPrompt, request_faults

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shot:
    """One video to make."""

    prompt: VideoPrompt
    """With the seed of this video."""
    bucket: Bucket
    adapters: tuple[AdapterArgument, ...]
    column: Column
    path: Path
    record: VideoRecord
    """What is known of it before it is made."""


@dataclass(frozen=True)
class Plan:
    """A request that can be met."""

    model: ModelConfig
    """The base, at one commit."""
    transformer: ModelConfig
    """Where the transformer's weights are: the base, or a full fine-tuning of it."""
    spec: ModelSpec
    sources: Mapping[Path, AdapterSource]
    shots: tuple[Shot, ...]
    bucket: Bucket
    fps: float
    device: torch.device
    placement: Placement
    division: Division | Literal["prompts"]
    """What the processes divide."""
    postprocess: Postprocess
    preview: Preview | None
    notes: tuple[str, ...]


_OTHER_FOLDER = "write to another folder, with --output"

_Record = tuple[str, Path, TrainingRecord]
"""Which option, its folder, and what its training says of itself."""


def plan_request(request: GenerateRequest, ranks: ProcessGroup) -> Plan:
    """Find base, adapters, size and rate, and refuse what cannot be sampled; no weight is loaded."""
    tuned = None if request.transformer is None or request.gguf else transformer_root(request.transformer)
    shown = [prompt.adapters for prompt in request.prompts if prompt.adapters is not None]
    named = [*request.adapters, *(adapter for adapters in shown for adapter in adapters)]
    columns = columns_of(request.compare, adapters=bool(named))
    if request.compare is not None and (request.upscale or request.interpolate):
        what = "videos are compared as they are sampled"
        raise ConfigError(what, where="--compare, --upscale or --interpolate", fix="leave one of them out")
    sources, faults = read_sources([*named, *(adapter for column in columns for adapter in column.added)])
    active = {path: source for path, source in sources.items() if source.adapter.strength}
    records = [(s.where, path, s.record) for path, s in active.items() if s.record is not None]
    exports = {"--transformer": request.transformer, "--model": Path(request.base) if request.base else None}
    for option, export in exports.items():
        if export is not None and export.is_dir() and (record := read_record(export)) is not None:
            records.append((f"{option} {export}", export, record))
    base, revision = _base(request, records, faults)
    revision = pin_revision(base, revision)
    first = records[0][2] if records else TrainingRecord()
    riflex, choices = riflex_of(request.riflex, [(where, record) for where, _, record in records])
    control = any(record.control for _, _, record in records)
    spec = replace(read_spec(base, revision, control=control), riflex=riflex)
    bucket = request.bucket or _recorded_bucket(first, spec) or spec.training_bucket
    folder = tuned or json_folder(base, revision)
    fps = request.fps or first.fps or float(spec.native_fps)
    misfits = _misfits(base, folder, spec, [*active.values()], records)
    projects = any(source.projection for source in active.values())
    if projects and (request.gguf or request.quantize not in (None, "fp8-cast")):
        what = "an adapter that follows a control video changes weights that are held in fewer bits here"
        fix = "leave it out, or merge the adapter first (`finetune export --to merged --full-pipeline`)"
        faults = [*faults, ConfigError(what, where="--quantize, --transformer", fix=fix)]
    of_base = paths_of_base(sources)
    acting = [column.adapters(own, of_base) for own in [request.adapters, *shown] for column in columns]
    lacking = [fault for group in dict.fromkeys(acting) for fault in lacking_adapters(group, sources)]
    faults = [*request_faults(request, spec, bucket, fps), *faults, *misfits, *lacking]
    faults += lokr_faults(active.values(), quantised=bool(request.gguf or request.quantize))
    raise_all(ConfigError, faults, what="{n} things are wrong with the request")
    device = ranks.device if ranks.world > 1 else usable_device(request.device)
    model = ModelConfig(pretrained=base, revision=revision, dtype=request.dtype, control=spec.control)
    resolved = replace(request, base=base, revision=revision, fps=fps, dtype=_dtype_name(model.torch_dtype()))
    resolved = replace(resolved, riflex=0 if first.riflex and riflex is None else riflex)
    shots = tuple(_shots(resolved, bucket, columns, sources, of_base, device.type))
    replaced = {shot.path.resolve() for shot in shots}
    overwritten = [
        ConfigError("a video would take the place of what it is made from", where=str(video), fix=_OTHER_FOLDER)
        for prompt in request.prompts
        for video in (prompt.video, prompt.control)
        if video is not None and video.resolve() in replaced
    ]
    raise_all(ConfigError, overwritten, what="{n} videos would be lost")
    division = request.parallel or ("context" if len(shots) == 1 < ranks.world else "prompts")
    guided = request.guidance_scale > 1
    buckets = dict.fromkeys(shot.bucket for shot in shots)
    if division != "prompts":
        undivided = [
            fault for size in buckets for fault in division_faults(division, spec, size, ranks.world, guided=guided)
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
    choices += [source.note for source in sources.values() if source.note]
    warnings: list[str] = []
    for where, path, record in records:
        concerned = [shot.prompt for shot in shots if tuned or path in {adapter.path for adapter in shot.adapters}]
        warnings += trigger_notes(record, where, concerned)
    warnings += frame_notes([record for _, _, record in records], request.prompts)
    warnings += _unread(model, spec, [*(prompt.prompt for prompt in request.prompts), request.negative_prompt])
    for choice in choices:
        _log.info("note: %s", choice)
    for warning in warnings:  # now, not after minutes of sampling
        _log.warning("%s", warning)
    return Plan(
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


def _shots(
    request: GenerateRequest,
    bucket: Bucket,
    columns: Sequence[Column],
    sources: Mapping[Path, AdapterSource],
    of_base: Collection[Path],
    device: str,
) -> Iterator[Shot]:
    """The videos of a request, column by column, each in the order of the prompts."""
    prompts = [p.model_copy(update={"seed": p.seed + more}) for p in request.prompts for more in range(request.videos)]
    for column in columns:
        folder = request.out / re.sub(r"\W+", "-", column.label) if column.label else request.out
        for number, prompt in enumerate(prompts):
            adapters = column.adapters(request.adapters if prompt.adapters is None else prompt.adapters, of_base)
            alone = replace(
                request,
                prompts=(prompt.model_copy(update={"adapters": None, "bucket": None, "strength": None}),),
                adapters=tuple(adapter for adapter in adapters if adapter.strength),
                bucket=prompt.bucket or bucket,
                strength=prompt.strength or request.strength,
                videos=1,
                compare=None,
                base_digest=None,
                **ELSEWHERE,
            )
            words = re.sub(r"\W+", "-", prompt.prompt.lower())[:40].strip("-") or "video"
            path = folder / f"{number:03d}-{words}-seed{prompt.seed}.mp4"
            yield Shot(prompt, prompt.bucket or bucket, adapters, column, path, record_of(alone, sources, device))


def _dtype_name(dtype: torch.dtype) -> DtypeName:
    return next(name for name in DTYPE_BYTES if torch_dtype(name) == dtype)


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
