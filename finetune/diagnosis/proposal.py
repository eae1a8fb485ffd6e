"""What ``finetune init --data`` proposes for clips that are there: sizes, length, rank, what is held out, prompts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from finetune.caching.planned_clips import ENOUGH
from finetune.cogvideox.spec import ModelSpec
from finetune.config.starting_points import StartingPoint, starting_point, suited
from finetune.core.errors import DataError
from finetune.core.types import Bucket, Sample, VideoProbe
from finetune.datasets.decode_pool import DecodePool
from finetune.datasets.geometry import (
    ClipConfig,
    Span,
    better_size,
    part_of,
    picture_kept,
    plan_clips,
    seconds_fitting,
    seconds_kept,
    seconds_of,
)
from finetune.datasets.rows import MediaPlace
from finetune.datasets.samples import CaptionConfig, SourceRead, read_samples
from finetune.datasets.sources import AutoSource
from finetune.diagnosis.frames import ClipRequest, Encoded, InspectedClip, inspect_clips

MOST_BUCKETS = 3
"""Sizes that are proposed; each has shorter clips beside it where there are some."""

WORTH = 0.05
"""Of all picture or footage that a further bucket has to keep more."""

PROMPTS = 2
"""Captions that become validation prompts."""


@dataclass(frozen=True)
class Prompt:
    """A validation sample."""

    text: str
    image: Path | Encoded | None
    """The row's own first-frame image, or the clip's first frame, for image-to-video."""


@dataclass(frozen=True)
class Proposal:
    """What suits a dataset."""

    videos: int
    images: int
    """Still images among them, each a clip of one frame; with some, the source wants ``images: true``."""
    clips: int
    buckets: tuple[Bucket, ...]
    image_buckets: tuple[Bucket, ...]
    """Of still images, where they want others than the height and width of ``buckets``."""
    span: Span
    picture: float
    """What is kept of pictures, on average, 0 to 1."""
    seconds: float | None
    """What is kept of all seconds, 0 to 1; None for still images alone."""
    left_out: int
    """Videos too short for every bucket, or that cannot be read."""
    point: StartingPoint
    steps: int
    prompts: tuple[Prompt, ...]

    @property
    def loss(self) -> str:
        """What is kept, in words."""
        seconds = "" if self.seconds is None else f" and {self.seconds:.0%} of the seconds"
        return f"keep {self.picture:.0%} of the picture{seconds} of {self.files}"

    @property
    def files(self) -> str:
        """How many there are, in words."""
        counts = {"videos": self.videos, "still images": self.images}
        return " and ".join(f"{count} {kind}" for kind, count in counts.items() if count)


def propose(clips: Path, spec: ModelSpec, workers: int, media: MediaPlace) -> Proposal:
    """Read rows and headers, and the first frames of prompts for image-to-video.

    Args:
        clips: a folder or a metadata file.
        spec: of the model.
        workers: decode processes.
        media: where media inside a dataset's own files go.

    Raises:
        DataError: if the dataset cannot be read, or no clip can be cut from it.
    """
    read = _read(clips, spec, media)
    paths = sorted({sample.video for sample in read.train})
    with DecodePool(min(workers, len(paths))) as pool:
        probed = dict(pool.probe_many(paths))
    rows = {(sample.video, sample.span_s) for sample in read.train}
    parts = dict(_parts(read.train, probed))
    if not parts:
        raise DataError("none of its videos can be read", where=str(clips), fix="`finetune doctor` names each")
    moving, stills = ([probe for probe in parts.values() if probe.still is still] for still in (False, True))
    sizes, image_sizes = (_sizes(some, spec) if some else [] for some in (moving, stills))
    buckets = [bucket for size in sizes for bucket in _lengths(size, moving, sizes, spec)] or image_sizes
    images = [Bucket(1, size.height, size.width) for size in image_sizes]
    if set(images) <= set(ClipConfig(buckets=tuple(buckets)).still_buckets):  # which need no word
        images = []
    options = [_kept(parts, (buckets, images), span, spec) for span in _SPANS]
    span, kept = _SPANS[0], options[0]
    if options[1].seconds is not None and kept.seconds is not None and options[1].seconds >= kept.seconds + WORTH:
        span, kept = _SPANS[1], options[1]
    if not kept.clips:
        raise DataError("all of its videos are too short for this model", where=str(clips))
    point, videos = starting_point(kept.clips), max(1, len({path for path, _ in kept.planned}))
    held_out = min(point.holdout if point.holdout >= 1 else point.holdout * videos, videos - 1)
    trained = max(1, round(kept.clips * (1 - held_out / videos)))
    low, high = suited(trained)
    steps = math.sqrt(low * high) * trained / point.accumulation
    usable = [sample for sample in read.train if (sample.video, sample.span_s) in kept.planned]
    usable = [sample for sample in usable if not parts[sample.video, sample.span_s].still] or usable
    return Proposal(
        videos=len(rows) - len(stills),
        images=len(stills),
        clips=kept.clips,
        buckets=tuple(bucket for bucket in buckets if bucket in kept.used or not moving),
        image_buckets=tuple(images),
        span=span,
        picture=kept.picture,
        seconds=kept.seconds,
        left_out=len(rows) - len(kept.planned),
        point=point,
        steps=max(10, 10 * round(steps / 10)),
        prompts=tuple(_prompts(usable, probed, buckets, spec)),
    )


def _read(clips: Path, spec: ModelSpec, media: MediaPlace) -> SourceRead:
    """The dataset, for text-to-video with its still images where each has a caption."""

    def read(*, images: bool) -> SourceRead:
        sources = [AutoSource(path=clips.absolute(), images=images)]
        return read_samples(sources, CaptionConfig(), row_files=spec.row_files, base=Path.cwd(), skip=True, media=media)

    if not spec.image_to_video:
        with suppress(DataError):  # pictures beside the clips that are none of the dataset
            return read(images=True)
    return read(images=False)


_Part = tuple[Path, tuple[float, float] | None]
"""A video, and the seconds of it that a row means."""


def _parts(
    samples: Sequence[Sample], probes: Mapping[Path, VideoProbe | DataError]
) -> Iterator[tuple[_Part, VideoProbe]]:
    """Every part of a video that can be read, with the header that it would have as a file of its own."""
    for sample in samples:
        probe = probes[sample.video]
        if isinstance(probe, VideoProbe):
            with suppress(DataError):  # the video has no frame there
                yield (sample.video, sample.span_s), part_of(probe, sample.span_s)[0]


_SPANS: tuple[Span, ...] = ("head", "all")


@dataclass(frozen=True)
class _Kept:
    clips: int
    picture: float
    seconds: float | None
    planned: frozenset[_Part]
    used: frozenset[Bucket]


def _kept(
    parts: Mapping[_Part, VideoProbe],
    buckets: tuple[Sequence[Bucket], Sequence[Bucket]],
    span: Span,
    spec: ModelSpec,
) -> _Kept:
    """What is kept with buckets of clips, and of still images."""
    sizes = {"buckets": tuple(buckets[0]), "image_buckets": tuple(buckets[1]) or None}
    config = ClipConfig(**sizes, span=span, short_clips="skip")
    fps, planned, used, pictures = float(spec.native_fps), set(), set(), []
    clips, seconds = 0, 0.0
    for part, probe in parts.items():
        try:
            plans = plan_clips(probe, config, fps, "")
        except DataError:  # a shape that no bucket is near to
            continue
        if plans:
            planned.add(part)
            used.add(plans[0].bucket)
            pictures += [picture_kept((probe.height, probe.width), plans[0].bucket)]
            seconds += 0 if probe.still else seconds_kept(probe, plans, fps)
            clips += len(plans)
    whole = sum(seconds_of(probe) for probe in parts.values() if not probe.still)
    picture = sum(pictures) / max(1, len(pictures))
    return _Kept(clips, picture, seconds / whole if whole else None, frozenset(planned), frozenset(used))


def _sizes(probes: Sequence[VideoProbe], spec: ModelSpec) -> list[Bucket]:
    """Sizes that keep most of the pictures, of as many frames as the model was made for."""
    native = spec.training_bucket

    def takes(bucket: Bucket) -> bool:
        return not spec.check_bucket(bucket)

    def best_size(size_hw: tuple[int, int]) -> Bucket:
        # Other sizes train as well, but a model is at its best at its own.
        if picture_kept(size_hw, native) >= ENOUGH:
            return native
        return better_size(size_hw, native, spec.size_multiple, takes) or native

    sizes = Counter((probe.height, probe.width) for probe in probes)
    wanted = {size_hw: best_size(size_hw) for size_hw in sizes}

    def mean(chosen: Sequence[Bucket]) -> float:
        kept = sum(count * max(picture_kept(size, bucket) for bucket in chosen) for size, count in sizes.items())
        return kept / len(probes)

    candidates = list(dict.fromkeys(wanted[size] for size, _ in sizes.most_common()))[:64]
    chosen: list[Bucket] = []
    while candidates and len(chosen) < MOST_BUCKETS:
        best = max(candidates, key=lambda bucket: mean([*chosen, bucket]))
        if chosen and mean([*chosen, best]) < mean(chosen) + WORTH:
            break
        chosen.append(best)
    return chosen


def _lengths(size: Bucket, probes: Sequence[VideoProbe], sizes: Sequence[Bucket], spec: ModelSpec) -> Iterator[Bucket]:
    """A size with the most frames that half of its videos have, and with what nearly all have if that is fewer."""

    def nearest(probe: VideoProbe) -> Bucket:
        shape = math.log(probe.width / probe.height)
        return min(sizes, key=lambda bucket: abs(shape - math.log(bucket.width / bucket.height)))

    fps, own = spec.native_fps, [probe for probe in probes if nearest(probe) == size]
    counts = range(size.frames, 1, -fps)  # whole seconds, and the first frame: what the model was made for
    buckets = [Bucket(count, size.height, size.width) for count in counts]
    legal = [bucket for bucket in buckets if not spec.check_bucket(bucket)] or [size]

    def fitting(bucket: Bucket) -> float:
        return sum(seconds_fitting(probe, bucket.frames, fps, "head") > 0 for probe in own) / max(1, len(own))

    most = next((bucket for bucket in legal if fitting(bucket) >= 0.5), legal[-1])
    nearly_all = next((bucket for bucket in legal if fitting(bucket) >= 1 - WORTH), legal[-1])
    yield most
    if fitting(nearly_all) >= fitting(most) + WORTH:
        yield nearly_all


def _prompts(
    samples: Sequence[Sample],
    probes: Mapping[Path, VideoProbe | DataError],
    buckets: Sequence[Bucket],
    spec: ModelSpec,
) -> Iterator[Prompt]:
    """Captions spread over the dataset, each with its first frame where the model wants one."""
    captions = {sample.caption: sample for sample in reversed(samples)}
    ordered = [sample for sample in samples if captions[sample.caption] is sample]
    for number in range(min(PROMPTS, len(ordered))):
        sample = ordered[number * len(ordered) // PROMPTS]
        if not spec.image_to_video or sample.image is not None:
            yield Prompt(sample.caption, sample.image)
            continue
        config = ClipConfig(buckets=tuple(buckets), short_clips="pad")
        probe = probes[sample.video]
        assert isinstance(probe, VideoProbe)
        plan = plan_clips(probe, config, spec.native_fps, "", sample.span_s)[0]
        (inspected,) = inspect_clips([ClipRequest(sample.video, probe, plan)], workers=1)
        if isinstance(inspected, InspectedClip):
            yield Prompt(sample.caption, inspected.frames[0])
