"""``generate``: from a request to files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from finetune.cogvideox.load import base_digest, load_scheduler, load_vae
from finetune.core.distributed import ProcessGroup
from finetune.core.errors import ConfigError, FinetuneError
from finetune.core.files import atomic_write_bytes, atomic_write_text
from finetune.core.precision import without_reduced_precision
from finetune.core.types import Bucket
from finetune.inference.adapters import (
    LoadedAdapters,
    require_same_base,
)
from finetune.inference.compare import write_comparison
from finetune.inference.context_parallel import divide
from finetune.inference.continuation import sample_continued
from finetune.inference.loading import embed_prompts, load_denoiser, start_device
from finetune.inference.modes import read_frames
from finetune.inference.plan import Plan, Shot, plan_request
from finetune.inference.record import read_video_record
from finetune.inference.request import GenerateRequest, mode_of
from finetune.inference.sample import SampleModules, SampleRequest, SampleSettings, sample_videos
from finetune.inference.videos import Frames, contact_sheet, gif_bytes, write_mp4


@dataclass(frozen=True)
class GenerateReport:
    """What was written."""

    videos: tuple[Path, ...]
    sheet: Path
    """All videos as rows of frames in one PNG."""
    bucket: Bucket
    frames: tuple[Frames, ...] = field(repr=False)
    """The videos before compression, each uint8 [F, H, W, 3], in their order; ``kept`` ones as decoded."""
    notes: tuple[str, ...] = ()
    """What was remarked on the request before it began."""
    kept: tuple[Path, ...] = ()
    """Those of ``videos`` that were there already, made by an equal request."""
    comparisons: tuple[Path, ...] = ()
    """Videos whose columns are compared, one per prompt and seed."""

    def __str__(self) -> str:
        lines = [f"{'kept' if path in self.kept else 'wrote'} {path}" for path in (*self.videos, *self.comparisons)]
        return "\n".join([*lines, f"wrote {self.sheet} (all of them at a glance)"])


@without_reduced_precision()
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
    plan = plan_request(request, ranks)
    if request.compare is None:  # a comparison's files have the names of its columns
        places = ranks.run_on_main(lambda: [_place(shot) for shot in plan.shots])
        shots = (replace(shot, path=place) for shot, place in zip(plan.shots, places, strict=True))
        plan = replace(plan, shots=tuple(shots))
    kept = ranks.run_on_main(lambda: _finished(plan, request))
    frames = kept | _sample_all(plan, request, [shot for shot in plan.shots if shot.path not in kept], ranks)
    comparisons, sheet = ranks.run_on_main(lambda: _overview(plan, request, frames))
    paths = tuple(shot.path for shot in plan.shots)
    videos = tuple(frames[path] for path in paths)
    return GenerateReport(paths, sheet, plan.bucket, videos, plan.notes, tuple(kept), comparisons)


def _place(shot: Shot) -> Path:
    """Where a video goes: beside one that was made with other settings, never in its place."""
    path, number = shot.path, 1
    while path.exists():
        with suppress(FinetuneError):  # of another program, or damaged
            if read_video_record(path).describes(shot.record):
                break
        number += 1
        path = shot.path.with_name(f"{shot.path.stem}-{number}{shot.path.suffix}")
    return path


def _finished(plan: Plan, request: GenerateRequest) -> dict[Path, Frames]:
    """The frames of the videos that an equal request has made already, which may have had no GIF."""
    kept = {}
    for shot in plan.shots:
        with suppress(FinetuneError):  # not there, of another program, or damaged
            if read_video_record(shot.path).describes(shot.record):
                kept[shot.path] = read_frames(shot.path)
    fps = plan.fps * (1 if request.interpolate is None else request.interpolate.factor)
    for path, frames in kept.items() if request.gif else ():
        atomic_write_bytes(path.with_suffix(".gif"), gif_bytes(frames, fps))
    return kept


def _sample_all(
    plan: Plan, request: GenerateRequest, missing: Sequence[Shot], ranks: ProcessGroup
) -> dict[Path, Frames]:
    """Sample and write videos, each as soon as it is sampled: an interrupted batch keeps what is done."""
    if not missing:
        return {}
    texts = dict.fromkeys([request.negative_prompt, *(shot.prompt.prompt for shot in missing)])
    # One T5 for all processes, which share the host's memory.
    encoded = ranks.run_on_main(lambda: embed_prompts(plan.model, plan.spec, [*texts], plan.placement, plan.device))
    embeds = dict(zip(texts, encoded, strict=True))
    modules, base = _load_modules(plan, request)
    if plan.division in ("cfg", "context"):
        divide(modules.transformer, plan.division, ranks)
    shots = missing[ranks.rank :: ranks.world] if plan.division == "prompts" else missing
    adapters = LoadedAdapters(plan.spec, modules.transformer, modules.scheduler, plan.sources)
    videos: list[tuple[Path, Frames]] = []
    for index, shot in enumerate(shots):
        adapters.use(shot.adapters, later=[one for other in shots[index + 1 :] for one in other.adapters])
        frames = _sample(plan, request, modules, shot, embeds)
        videos.append((shot.path, frames))
        if plan.division == "prompts" or ranks.is_main:  # the others have the same video
            _write(plan, shot, frames, base, gif=request.gif)
    return dict(ranks.gather(videos) if plan.division == "prompts" else videos)


def _write(plan: Plan, shot: Shot, frames: Frames, base: str, *, gif: bool) -> None:
    finished, fps = plan.postprocess(frames, plan.fps)
    record = shot.record.model_copy(update={"base": base}).model_dump_json(exclude_none=True)
    write_mp4(shot.path, finished, fps, {"title": shot.prompt.prompt, "comment": record})
    atomic_write_text(shot.path.with_suffix(".json"), f"{record}\n")
    if gif:
        atomic_write_bytes(shot.path.with_suffix(".gif"), gif_bytes(finished, fps))


def _overview(plan: Plan, request: GenerateRequest, frames: Mapping[Path, Frames]) -> tuple[tuple[Path, ...], Path]:
    """What shows all videos: the comparisons, where there are any, and the sheet."""
    rows: dict[str, tuple[str, list[Frames]]] = {}
    for shot in plan.shots:
        title = f"{shot.prompt.prompt} (seed {shot.prompt.seed})"
        rows.setdefault(shot.path.name, (title, []))[1].append(frames[shot.path])
    if request.compare is not None:
        labels = [*dict.fromkeys(shot.column.label for shot in plan.shots)]
        return write_comparison(rows, labels, request.out, plan.fps)
    return (), contact_sheet([(title, video) for title, (video,) in rows.values()], request.out / "sheet.png")


def _load_modules(plan: Plan, request: GenerateRequest) -> tuple[SampleModules, str]:
    """Transformer, scheduler and VAE, in the state in which they sample, without adapters; and the base's digest."""
    dtype = plan.model.torch_dtype()
    transformer = load_denoiser(plan.transformer, plan.placement, plan.device, dtype)
    # An adapter that is put on another transformer is so on purpose.
    if plan.transformer == plan.model and request.gguf is None:
        require_same_base(transformer, plan.model.pretrained, plan.sources.values())
    # What other libraries read has no digest of ours.
    read_here = plan.placement.gguf is None and plan.placement.quantization in (None, "fp8-cast")
    base = base_digest(transformer) if read_here else ""
    if request.base_digest and base and base != request.base_digest:
        raise ConfigError(
            "the transformer's weights are not those that the video was made with",
            where=f"{plan.transformer.pretrained}: {base}, recorded {request.base_digest}",
            fix="bring the old weights back, or name the model with --model to use these on purpose",
        )
    scheduler = _scheduler(load_scheduler(plan.model), request.scheduler)
    vae = load_vae(plan.model, device=start_device(plan.placement, plan.device), dtype=dtype)
    return SampleModules(plan.spec, transformer, scheduler, vae), base


def _scheduler(own: Any, kind: str | None) -> Any:
    """The base's own scheduler, or the one of this kind with the same numbers."""
    from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler

    wanted = {"ddim": CogVideoXDDIMScheduler, "dpm": CogVideoXDPMScheduler, None: type(own)}[kind]
    return own if wanted is type(own) else wanted.from_config(own.config)


def _sample(
    plan: Plan, request: GenerateRequest, modules: SampleModules, shot: Shot, embeds: Mapping[str, Tensor]
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
