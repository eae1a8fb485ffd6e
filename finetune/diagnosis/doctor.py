"""``finetune doctor``: reads headers, looks at frames and captions, and says what is wrong with them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.caching.check import cpu_cores, identities, row_files_of, split_clips
from finetune.caching.planned_clips import PlannedClip, clip_labels, companions_of, kept_by_bucket, kept_warnings
from finetune.cogvideox.captions import TokenizedCaption, load_tokenizer, tokenize
from finetune.cogvideox.model_files import local_folder, published_variant
from finetune.cogvideox.spec import ModelSpec, spec_of
from finetune.config.rules import require_valid
from finetune.config.schema import RunConfig
from finetune.config.starting_points import word_on_length
from finetune.core.errors import DataError
from finetune.core.files import atomic_write_text
from finetune.core.gpu import amount, card_size
from finetune.core.terminal import Bar
from finetune.core.text import holds_word
from finetune.core.types import Bucket, Sample, VideoProbe
from finetune.datasets.decode_pool import DecodePool, probe_memory
from finetune.datasets.geometry import is_padded, picture_kept, plan_clips, seconds_kept, seconds_of
from finetune.datasets.manifests import portable
from finetune.datasets.rows import MediaPlace
from finetune.datasets.samples import captions_of, read_samples
from finetune.datasets.schedule import Item, StepPlan
from finetune.diagnosis import outlook as outlooks
from finetune.diagnosis.faults import (
    WELL_ENCODED,
    alike,
    caption_faults,
    groups,
    header_faults,
    picture_faults,
    plan_faults,
)
from finetune.diagnosis.frames import (
    SHOWN,
    ClipRequest,
    Encoded,
    InspectedClip,
    Reconstruction,
    inspect_clips,
    inspection_memory,
)
from finetune.diagnosis.outlook import Outlook
from finetune.diagnosis.page import Fault, Level, Picture, render
from finetune.diagnosis.report import MOST_CARDS, BucketReport, ClipReport, DoctorReport, page_of

if TYPE_CHECKING:
    from finetune.planner.plan import BackgroundPrediction

EXACT_PICTURES = 160
"""At training size and without loss, on a page: some 40 MB at 480x720."""


@dataclass(frozen=True)
class DoctorOptions:
    """What is looked at beside the clips; ``finetune.doctor`` says what each word means."""

    page: Path | None = None
    card: str | None = None
    device: str | None = None
    predict: bool = False
    vae: bool = False


def doctor(config: RunConfig, options: DoctorOptions, *, progress: bool = True) -> DoctorReport:
    """Look at everything that a run would train on; errors stand at ``finetune.doctor``."""
    spec = spec_of(config.model, shipped=True)
    warnings = require_valid(config, spec)
    card_bytes = card_size(options.card) or amount("memory.budget", config.memory.budget)
    dataset = _read(config, spec, progress)
    with _Prediction(config, card_bytes, options.device) if dataset.planned else nullcontext() as prediction:
        inspected = _inspect(config, dataset.planned, progress)
        captions = list(dict.fromkeys(text for clip in dataset.planned for text in clip.sample.captions))
        tokens = _read_captions(config, spec, captions)
        report = _report(
            config, spec, dataset, _Inspections(inspected, tokens, _reconstruct(config, dataset, options.vae, progress))
        )
        if report.buckets and prediction is not None:
            outlook = outlooks.look_ahead(
                config,
                spec,
                {bucket.bucket: bucket.entries for bucket in report.buckets},
                len(captions),
                (report.steps, sum(clip.holdout for clip in report.clips)),
                options.device or "",
            )
            report = replace(report, outlook=prediction.added_to(outlook, patient=options.predict))
    report = replace(report, notes=(*report.notes, *warnings), page=options.page)
    if options.page is not None:
        atomic_write_text(options.page, render(page_of(report, config.model.pretrained)))
    return report


# ------------------------------------------------------------------------------------------------ what is to be trained


@dataclass(frozen=True)
class _Dataset:
    planned: tuple[PlannedClip, ...]
    left_out: tuple[ClipReport, ...]
    notes: tuple[str, ...]
    fps: float


def _read(config: RunConfig, spec: ModelSpec, progress: bool) -> _Dataset:
    """Rows and headers: as ``check_dataset`` reads them, but what is wrong is kept beside what is right."""
    data = config.data
    streams = [source.path for source in data.sources if source.stream(config.base) is not None]
    if streams:
        raise DataError(
            "it is read as a stream, so no frame of it is on this disk that could be looked at",
            where=", ".join(map(str, streams)),
            fix="name a part of it that the disk holds, without stream_room (docs/data.md); of what was encoded,"
            " `finetune check` says all but what pictures show",
        )
    media = MediaPlace.of(config.cache.dir)
    read = read_samples(
        data.sources, data, row_files=row_files_of(config, spec), base=config.base, skip=True, media=media
    )
    rows = [(sample, False) for sample in read.train] + [(sample, True) for sample in read.holdout]
    level = _level(config)
    left_out = [
        ClipReport(error.where, error.where, faults=(Fault(level, "caption", error.what, error.fix),))
        for error in read.unusable
    ]
    fps = data.fps or spec.native_fps
    files = sorted({path for sample, _ in rows for path in (sample.video, *(path for _, path in sample.companions))})
    with DecodePool(_workers(config, len(files))) as pool, probe_memory(config.cache.dir) as memory:
        probed = pool.probe_many(files, memory)
        bar = Bar(probed, total=len(files), desc="reading headers of videos", disable=not progress)
        probes: dict[Path, VideoProbe | DataError] = dict(bar)
    planned: list[PlannedClip] = []
    for sample, holdout in rows:
        name, probe = portable(sample.video, config.base), probes[sample.video]
        if isinstance(probe, DataError):
            left_out.append(_left_out(name, sample, holdout, Fault(level, "undecodable", probe.what, probe.fix)))
            continue
        try:
            plans = plan_clips(probe, data, fps, "", sample.span_s)
            fault = Fault("warning", "short", "too short for every bucket of its shape: left out")
        except DataError as error:
            plans, fault = [], Fault("error", "short" if "frames" in error.what else "shape", error.what, error.fix)
        if not plans:
            left_out.append(_left_out(name, sample, holdout, fault, *header_faults(probe, fps)))
        for label, plan in zip(clip_labels(name, sample, len(plans)), plans, strict=True):
            try:
                companions = companions_of(sample, probe, plan, probes, name)
            except DataError as error:
                fault = Fault(level, "control or mask", f"{error.where}: {error.what}", error.fix)
                left_out.append(_left_out(label, sample, holdout, fault))
                continue
            planned.append(PlannedClip(label, sample, probe, plan, holdout, companions))
    return _Dataset(tuple(planned), tuple(left_out), read.notes, fps)


def _workers(config: RunConfig, jobs: int) -> int:
    """Decode processes: nothing else is done meanwhile, so every core has one."""
    wanted = config.cache.decode_workers
    return min(jobs, cpu_cores() if wanted is None else wanted)


def _left_out(name: str, sample: Sample, holdout: bool, *faults: Fault) -> ClipReport:
    return ClipReport(name, sample.where, sample.caption, holdout=holdout, faults=faults)


def _inspect(config: RunConfig, clips: Sequence[PlannedClip], progress: bool) -> list[InspectedClip | DataError]:
    exact = min(SHOWN, EXACT_PICTURES // max(1, len(clips)))
    exact = max(1, exact) if len(clips) <= MOST_CARDS else 0
    jobs = [ClipRequest(clip.sample.video, clip.probe, clip.plan, clip.sample.image, exact) for clip in clips]
    inspected: list[InspectedClip | DataError] = []
    with inspection_memory(config.cache.dir) as memory:
        inspecting = inspect_clips(jobs, _workers(config, len(jobs)), memory)
        for inspection in Bar(inspecting, total=len(jobs), desc="looking at clips", disable=not progress):
            plan = clips[len(inspected)].plan
            if (
                isinstance(inspection, InspectedClip)
                and len(inspected) >= MOST_CARDS
                and not any(picture_faults(inspection.measures, plan))
            ):
                inspection = replace(inspection, frames=())  # it will have no card, and there may be a million
            inspected.append(inspection)
    return inspected


def _read_captions(config: RunConfig, spec: ModelSpec, captions: Sequence[str]) -> dict[str, TokenizedCaption]:
    """What the model reads of each caption; nothing where its tokenizer is not on this machine."""
    folder = local_folder(config.model.pretrained, config.model.revision)
    names = ("spiece.model", "tokenizer.json")
    if not captions or folder is None or not any((folder / "tokenizer" / name).is_file() for name in names):
        return {}
    return dict(zip(captions, tokenize(load_tokenizer(config.model), captions, spec), strict=True))


@dataclass(frozen=True)
class _Inspections:
    """What was seen of each planned clip, in their order, and of each caption."""

    inspected: Sequence[InspectedClip | DataError]
    tokens: Mapping[str, TokenizedCaption]
    losses: Sequence[Reconstruction | DataError | None]


def _reconstruct(
    config: RunConfig, dataset: _Dataset, wanted: bool, progress: bool
) -> Sequence[Reconstruction | DataError | None]:
    if not wanted:
        return [None] * len(dataset.planned)
    from finetune.diagnosis.reconstruction import reconstruct  # which imports torch and the VAE's library

    exact = 2 * len(dataset.planned) <= EXACT_PICTURES
    return list(reconstruct(dataset.planned, config, exact=exact, progress=progress))


class _Prediction:
    """The planner at work in a process of its own while clips are looked at; a context manager.

    It is begun in a thread: that imports torch, which takes seconds.
    """

    def __init__(self, config: RunConfig, card_bytes: int | None, device: str | None) -> None:
        self._config, self._card_bytes, self._device = config, card_bytes, device
        self._threads = ThreadPoolExecutor(1)

    def __enter__(self) -> _Prediction:
        self._begun = self._threads.submit(self._begin)
        return self

    def __exit__(self, *_: object) -> None:
        if (running := self._begun.result()) is not None:
            running.close()
        self._threads.shutdown()

    def _begin(self) -> BackgroundPrediction | None:
        from finetune.planner.cost_model import card_here, device_here
        from finetune.planner.plan import predict_async

        if self._config.memory.kind == "auto":  # a search of minutes, for the card that it will run on
            return None
        self._card_bytes = self._card_bytes or card_here()
        model = self._config.model
        here = local_folder(model.pretrained, model.revision)
        if model.dtype == "auto" and here is None and published_variant(model.pretrained):
            model = model.model_copy(update={"dtype": "bf16"})  # which is what the published ones are
        config = self._config.model_copy(update={"model": model})
        return predict_async(config, self._card_bytes, device=self._device or device_here())

    def added_to(self, outlook: Outlook, *, patient: bool) -> Outlook:
        """The outlook with the memory that is predicted, as far as it is by now."""
        if (running := self._begun.result()) is None:
            return outlooks.with_memory(outlook, None, "chosen to fit (memory.kind: auto)", None)
        prediction = running.result(24 * 3600.0 if patient else outlooks.PATIENCE_S)
        if prediction is None:
            message = "not predicted yet: half a minute with --predict, remembered from then on"
            return outlooks.with_memory(outlook, None, message, None)
        return outlooks.with_memory(outlook, prediction.nbytes, prediction.message, self._card_bytes)


# --------------------------------------------------------------------------------------------------------- the findings


def _report(config: RunConfig, spec: ModelSpec, dataset: _Dataset, inspections: _Inspections) -> DoctorReport:
    planned, fps, tokens = dataset.planned, dataset.fps, inspections.tokens
    held_out: tuple[bool, ...] = ()
    if planned:
        held_out = split_clips(planned, identities(config, planned, progress=False), config.data.holdout)
    limit = spec.max_text_seq_length
    faults = [
        [
            *_clip_faults(config, clip, fps, inspection, loss),
            *(fault for text in clip.sample.captions for fault in caption_faults(text, tokens.get(text), limit)),
        ]
        for clip, inspection, loss in zip(planned, inspections.inspected, inspections.losses, strict=True)
    ]
    _add_likenesses(planned, inspections.inspected, held_out, faults)
    _add_duplicates(planned, faults)
    clips = tuple(
        _with_loss(_clip_report(clip, inspection, holdout, tuple(named), tokens, fps), loss)
        for clip, inspection, holdout, named, loss in zip(
            planned, inspections.inspected, held_out, faults, inspections.losses, strict=True
        )
    )
    buckets, steps, epochs = _buckets(config, spec, planned, held_out, fps)
    notes = list(dataset.notes)
    if flipped := sum(bucket.flipped for bucket in buckets):
        notes.append(f"{flipped} clips are encoded mirrored as well, and shown so half of the time (random_flip)")
    if planned and not tokens:
        notes.append("captions were not counted in tokens: the model's tokenizer is not on this machine")
    if len(planned) > MOST_CARDS:
        notes.append(f"with more than {MOST_CARDS} clips all pictures are small ones, and none is exact")
    return DoctorReport(
        clips=(*dataset.left_out, *clips),
        buckets=buckets,
        faults=(
            *_run_faults(config, planned, held_out, steps, epochs),
            *(Fault("warning", "little kept", text) for text in kept_warnings(planned, config.data, spec, fps)),
        ),
        steps=steps,
        epochs=epochs,
        tokens=tuple(one.length for one in tokens.values()),
        token_limit=limit,
        outlook=None,
        notes=tuple(notes),
    )


def _clip_faults(
    config: RunConfig,
    clip: PlannedClip,
    fps: float,
    inspection: InspectedClip | DataError,
    loss: Reconstruction | DataError | None,
) -> Iterator[Fault]:
    if error := next((one for one in (inspection, loss) if isinstance(one, DataError)), None):
        yield Fault(_level(config), "undecodable", error.what, error.fix)
    yield from header_faults(clip.probe, fps)
    yield from plan_faults(clip.probe, clip.plan, fps, padded=is_padded(clip.part, clip.plan, fps, config.data.span))
    if isinstance(inspection, InspectedClip):
        yield from picture_faults(inspection.measures, clip.plan)
    if isinstance(loss, Reconstruction) and loss.psnr < WELL_ENCODED:
        text = f"the VAE gives it back at {loss.psnr:.1f} dB, its worst frame at {loss.worst_psnr:.1f}"
        yield Fault("warning", "lost in the VAE", text)


def _level(config: RunConfig) -> Level:
    """Of a file or row that cannot be used."""
    return "warning" if config.data.unreadable_clips == "skip" else "error"


def _run_faults(
    config: RunConfig, clips: Sequence[PlannedClip], held_out: Sequence[bool], steps: int, epochs: float
) -> Iterator[Fault]:
    """Of the run as a whole."""
    training = list(compress(clips, (not one for one in held_out)))
    if not training:
        yield Fault("error", "no clips", "no clip is left to train on")
        return
    if word := word_on_length(len(training), epochs * max(clip.sample.repeats for clip in training), steps):
        option = "train.steps" if config.train.steps else "train.epochs"
        yield Fault("warning", "length", f"{steps} steps are {epochs:.4g} epochs: {word}", f"change {option}")
    if not any(held_out):
        text = "no clip is held out, so overfitting stays unseen"
        yield Fault("warning", "no holdout", text, "set data.holdout")
    prompts = [sample.prompt for sample in config.validation.samples]
    sources = [source for source in config.data.sources if source.split == "train"]
    for trigger in dict.fromkeys(captions_of(source, config.data).trigger.strip() for source in sources):
        if trigger and prompts and not any(holds_word(prompt, trigger) for prompt in prompts):
            text = f"no prompt of validation.samples holds the trigger word {trigger!r}"
            yield Fault("warning", "trigger missing", text, "write it into one: prompts are taken as they stand")


def _add_likenesses(
    clips: Sequence[PlannedClip],
    inspected: Sequence[InspectedClip | DataError],
    held_out: Sequence[bool],
    faults: Sequence[list[Fault]],
) -> None:
    hashes = [() if isinstance(inspection, DataError) else inspection.measures.hashes for inspection in inspected]

    def is_same(one: int, other: int) -> bool:  # parts of one video look alike, and a clip may have two captions
        return clips[one].sample.video == clips[other].sample.video and held_out[one] == held_out[other]

    pairs = [pair for pair in alike(hashes) if not is_same(*pair[:2])]
    for index, others in groups(pairs).items():
        names = ", ".join(clips[other].name for other in others[:3])
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        across = [other for other in others if held_out[other] != held_out[index]]
        if across:
            sides = "held out and looks like the training clip" if held_out[index] else "looks like the held-out clip"
            text = f"{sides} {clips[across[0]].name}: the held-out loss measures memory"
            faults[index].append(Fault("warning", "leak", text, "hold out both, or leave one out"))
        faults[index].append(Fault("warning", "near-duplicate", f"looks like {names}{more}", "leave one out"))


def _add_duplicates(clips: Sequence[PlannedClip], faults: Sequence[list[Fault]]) -> None:
    videos: dict[str, set[Path]] = {}
    for clip in clips:
        videos.setdefault(clip.sample.caption, set()).add(clip.sample.video)
    for clip, own in zip(clips, faults, strict=True):
        if (count := len(videos[clip.sample.caption])) > 1:
            own.append(Fault("note", "same caption", f"{count} videos have this caption"))


def _clip_report(
    clip: PlannedClip,
    inspection: InspectedClip | DataError,
    holdout: bool,
    faults: tuple[Fault, ...],
    tokens: Mapping[str, TokenizedCaption],
    fps: float,
) -> ClipReport:
    probe, plan, caption = clip.probe, clip.plan, clip.sample.caption
    (text, cut_text), *variants = (_as_read(text, tokens.get(text)) for text in clip.sample.captions)
    values: dict[str, float | str | None] = {
        "picture": picture_kept((probe.height, probe.width), plan.bucket),
        "seconds": None if probe.still else seconds_kept(probe, [plan], fps) / seconds_of(clip.part),
        "length_s": None if probe.still else seconds_of(clip.part),
        "fps": None if probe.still else probe.fps,
        "size": f"{probe.height}x{probe.width}",
        "tokens": tokens[caption].length if caption in tokens else None,
    }
    if isinstance(inspection, InspectedClip):
        measures = inspection.measures
        values |= {
            "motion": None if probe.still else sum(measures.motion) / max(1, len(measures.motion)),
            "sharpness": measures.sharpness,
            "brightness": sum(measures.luma) / len(measures.luma),
        }
    return ClipReport(
        name=clip.name,
        where=clip.sample.where,
        caption=text,
        bucket=str(plan.bucket),
        holdout=holdout,
        values=values,
        faults=faults,
        pictures=() if isinstance(inspection, DataError) else tuple(_pictures(clip, inspection)),
        cut_caption=cut_text,
        variants=tuple(variants),
    )


def _as_read(text: str, tokens: TokenizedCaption | None) -> tuple[str, str]:
    """What the model reads of a caption, and its end, which it does not."""
    read = len(text) if tokens is None else tokens.read
    return text[:read], text[read:]


def _with_loss(clip: ClipReport, loss: Reconstruction | DataError | None) -> ClipReport:
    """The clip with its values and its worst frame after the VAE."""
    if not isinstance(loss, Reconstruction):
        return clip
    label = f"worst frame, {loss.original.frame + 1}"
    pictures = (
        _picture(loss.original, label),
        _picture(loss.reconstructed, f"{label}, after the VAE: {loss.worst_psnr:.1f} dB"),
    )
    return replace(clip, values={**clip.values, "psnr": loss.psnr}, pictures=(*clip.pictures, *pictures))


def _pictures(clip: PlannedClip, inspected: InspectedClip) -> Iterator[Picture]:
    (top, left), (height, width), bucket = clip.plan.crop_yx, clip.plan.resize_hw, clip.plan.bucket
    cut = (top / height, left / width, bucket.height / height, bucket.width / width)
    yield _picture(inspected.source, f"source, {clip.probe.height}x{clip.probe.width}", cut)
    for encoded in inspected.frames:
        label = "first-frame image" if encoded.frame < 0 else f"frame {encoded.frame + 1} of {bucket.frames}"
        yield _picture(encoded, f"{label}, exact" if encoded.exact else label)


def _picture(encoded: Encoded, label: str, cut: tuple[float, float, float, float] | None = None) -> Picture:
    return Picture(encoded.content, encoded.height, encoded.width, label, encoded.exact, cut)


def _buckets(
    config: RunConfig, spec: ModelSpec, clips: Sequence[PlannedClip], held_out: Sequence[bool], fps: float
) -> tuple[tuple[BucketReport, ...], int, float]:
    """The buckets; optimizer steps in all, and epochs."""
    train = config.train
    training = list(compress(clips, (not one for one in held_out)))
    if not training:
        return (), 0, 0.0
    items = tuple(Item(clip.plan.bucket, clip.sample.repeats) for clip in training)
    plan = StepPlan(items, train.seed, train.batch_size, train.accumulation)
    steps = train.steps or plan.steps_for_epochs(train.epochs or 1)
    kept = kept_by_bucket(clips, fps)
    counts = Counter(item.bucket for item in items)
    flipped = Counter(clip.plan.bucket for clip in training if clip.sample.random_flip)
    samples: Counter[Bucket] = Counter()
    for item in items:
        samples[item.bucket] += item.repeats  # type: ignore[assignment]  # a fraction
    reports = tuple(
        BucketReport(
            bucket=bucket,
            clips=counts[bucket],
            held_out=sum(clip.plan.bucket == bucket for clip in clips) - counts[bucket],
            tokens=spec.tokens(bucket),
            steps_per_epoch=math.ceil(samples[bucket] / train.batch_size) / train.accumulation,
            picture=share.picture,
            seconds=share.seconds,
            flipped=flipped[bucket],
        )
        for bucket, share in kept.items()
    )
    return reports, steps, steps / plan.steps_per_epoch
