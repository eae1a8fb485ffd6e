"""A handful of frames of every clip, as training will see them: measured and made small in worker processes.

Only frames of the plan are decoded, by the code that precomputing decodes with, so a picture marked exact is what the
VAE will be given. A worker does not import torch.
"""

from __future__ import annotations

import io
import json
import math
import queue
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.Image import Resampling

from finetune.core.errors import DataError
from finetune.core.types import ClipPlan, VideoProbe
from finetune.datasets import decode, decode_pool
from finetune.datasets.pictures import read_fitted_image, resize_crop, turn_upright
from finetune.datasets.worker import Worker

SHOWN = 6
"""Frames of a clip on its contact sheet, evenly spread from the first to the last."""

TILE_HEIGHT = 112
"""Of the small pictures, in pixels."""

_WORKER = "from finetune.datasets import worker; from finetune.diagnosis import frames; worker.serve(frames.handle)"

_TIMEOUT_S = 600.0

_MOST_BYTES = 64 * 2**20

_HASH_SIDE = 8

MEASURED_HEIGHT = 180
"""Rows of what is kept of a frame, when it is measured."""

_SMALL_HW = 48, 72
"""Of the grey pictures that brightness, motion and likeness are measured on."""

Frame = NDArray[np.uint8]


@dataclass(frozen=True)
class Look:
    """One clip to look at."""

    path: Path
    probe: VideoProbe
    plan: ClipPlan
    image: Path | None = None
    """The file that stands for its first frame."""
    exact: int = 1
    """How many of the shown frames are wanted at training size, without loss."""


@dataclass(frozen=True)
class Encoded:
    """A picture as a file's bytes (WebP)."""

    content: bytes
    height: int
    width: int
    frame: int
    """Its number in the clip, from 0; -1 for the image that stands for the first frame."""
    exact: bool
    """Whether its pixels are those of the decoded clip."""


@dataclass(frozen=True)
class Measures:
    """What was measured on the sampled frames of a clip, in levels of 0 to 255, at training size unless said otherwise.

    Brightness, motion and hashes are lists in order of time; what ``beside`` holds compares a frame with the very next
    one of the clip.
    """

    luma: tuple[float, ...]
    """Mean brightness of each frame."""
    bright: tuple[float, ...]
    """Of each frame, the level that 1 % of its pixels exceed."""
    motion: tuple[float, ...]
    """Mean absolute difference between a sampled frame and the one sampled before."""
    beside: tuple[float, ...]
    """The same between frames that follow each other in the clip."""
    flicker: tuple[float, ...]
    """How much the mean brightness jumps between frames that follow each other."""
    sharpness: float
    """Variance of the Laplacian of the sharpest of the first, middle and last frame."""
    bars: tuple[float, float, float, float]
    """Black at the top, bottom, left and right in every sampled frame, as shares of the height or width."""
    hashes: tuple[int, ...]
    """A perceptual hash of 64 bits for each shown frame of the uncut picture."""


@dataclass(frozen=True)
class Seen:
    """What a look at a clip gave."""

    measures: Measures
    source: Encoded
    """The first frame, uncut."""
    frames: tuple[Encoded, ...]


@dataclass(frozen=True)
class Reconstruction:
    """How well the VAE gives a clip back."""

    psnr: float
    """Of the whole clip, in dB, of uint8 pixels."""
    worst_psnr: float
    """Of its worst frame."""
    original: Encoded
    """That frame, as it went in."""
    reconstructed: Encoded
    """And as it came out."""


def sampled_positions(frames: int) -> tuple[list[int], list[tuple[int, int]]]:
    """Which frames of a clip are shown, and the pairs of neighbours whose difference is measured."""
    shown = sorted({round(i * (frames - 1) / (SHOWN - 1)) for i in range(SHOWN)})
    last = frames - 1
    starts = {0, shown[len(shown) // 2], last - 1} if last else set()
    return shown, [(start, start + 1) for start in sorted(starts) if 0 <= start < last]


# --- in a worker ------------------------------------------------------------------------------------------------------


def handle(fields: dict[str, Any]) -> tuple[dict[str, Any], Sequence[Any]]:
    """Answer a request of ``look_at`` in a worker."""
    job = decode_pool.job_of(fields)
    assert isinstance(job, decode_pool.DecodeJob)
    seen = look(Look(job.path, job.probe, job.plan, job.image, fields["exact"]))
    pictures = (seen.source, *seen.frames)
    places = [[picture.height, picture.width, picture.frame, picture.exact] for picture in pictures]
    sizes = [len(picture.content) for picture in pictures]
    answer = {"measures": asdict(seen.measures), "places": places, "sizes": sizes}
    return answer, [np.frombuffer(picture.content, np.uint8) for picture in pictures]


def look(job: Look) -> Seen:
    """Decode, measure and show a clip in this process. Raises DataError if one of its frames cannot be decoded."""
    plan, header = job.plan, job.probe
    shown, pairs = sampled_positions(len(plan.frame_indices))
    wanted = sorted({*shown, *(position for pair in pairs for position in pair)})
    sharp = {shown[0], shown[len(shown) // 2], shown[-1]}
    indices = [plan.frame_indices[position] for position in wanted]
    glances: dict[int, _Glance] = {}
    tiles: dict[int, Encoded] = {}
    source: Encoded | None = None
    for frame_index, frame in decode.read_frames(job.path, indices, header):
        upright = np.ascontiguousarray(turn_upright(frame, header.orientation))
        source = source or encoded(upright, 0, exact=False)
        for position in (position for position in wanted if plan.frame_indices[position] == frame_index):
            cut = _cut(upright, plan, MEASURED_HEIGHT)
            glances[position] = _glance(upright, cut, plan, sharp=position in sharp, hashed=position in shown)
            if position in shown[: job.exact]:
                size_hw = plan.bucket.height, plan.bucket.width
                whole = resize_crop(upright, plan.resize_hw, plan.crop_yx, size_hw)
                tiles[position] = encoded(whole, position, exact=True)
            elif position in shown:
                tiles[position] = encoded(cut, position, exact=False)
    pictures = [tiles[position] for position in shown]
    if job.image is not None:
        image = read_fitted_image(job.image, plan.bucket).transpose(1, 2, 0)
        pictures.insert(0, encoded(image, -1, exact=job.exact > 0))
    assert source is not None
    return Seen(_measured([glances[position] for position in wanted], wanted, shown, pairs), source, tuple(pictures))


def _cut(upright: Frame, plan: ClipPlan, height: int) -> Frame:
    """What the plan keeps of a frame, made small: ``height`` rows."""
    return _resized(
        upright, _kept_box(upright, plan), (height, max(1, height * plan.bucket.width // plan.bucket.height))
    )


def _kept_box(upright: Frame, plan: ClipPlan) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of what the plan keeps, in pixels of the source."""
    down, across = (size / resized for size, resized in zip(upright.shape[:2], plan.resize_hw, strict=True))
    top, left = plan.crop_yx
    return left * across, top * down, (left + plan.bucket.width) * across, (top + plan.bucket.height) * down


def _resized(frame: Frame, box: tuple[float, float, float, float], hw: tuple[int, int]) -> Frame:
    return np.asarray(Image.fromarray(frame).resize(hw[::-1], Resampling.BICUBIC, box, reducing_gap=2.0))


def encoded(frame: Frame, number: int, *, exact: bool) -> Encoded:
    """A frame [H, W, 3] as a picture: at its own size without loss, or small."""
    picture = Image.fromarray(np.ascontiguousarray(frame))
    if not exact:
        picture.thumbnail((4 * TILE_HEIGHT, TILE_HEIGHT), Resampling.BILINEAR)
    file = io.BytesIO()
    # Without loss, quality says how hard to try.
    picture.save(file, "WEBP", method=0, **({"lossless": True, "quality": 10} if exact else {"quality": 75}))
    return Encoded(file.getvalue(), picture.height, picture.width, number, exact)


class _Glance(NamedTuple):
    """What is measured on one frame."""

    small: NDArray[np.float32]
    """Its grey picture, of ``_SMALL_HW``."""
    rows: NDArray[np.uint8]
    """Of each row, the brightest mean of eight neighbouring pixels."""
    columns: NDArray[np.uint8]
    sharpness: float
    """0 where it is not measured."""
    hash: int


def _glance(upright: Frame, cut: Frame, plan: ClipPlan, *, sharp: bool, hashed: bool) -> _Glance:
    grey = Image.fromarray(cut).convert("L")
    # Means of eight pixels along a bar: specks of compression beside the picture are no picture.
    along = grey.resize((max(1, grey.width // 8), grey.height), Resampling.BOX)
    across = grey.resize((grey.width, max(1, grey.height // 8)), Resampling.BOX)
    return _Glance(
        small=np.asarray(grey.resize(_SMALL_HW[::-1], Resampling.BOX), np.float32),
        rows=np.asarray(along).max(1),
        columns=np.asarray(across).max(0),
        sharpness=_sharpness(upright, plan) if sharp else 0.0,
        hash=_hash(upright) if hashed else 0,
    )


def _hash(upright: Frame) -> int:
    import imagehash

    small = Image.fromarray(upright).resize((64, 64), Resampling.BILINEAR, reducing_gap=2.0).convert("L")
    return int(str(imagehash.phash(small, _HASH_SIDE)), 16)


def _sharpness(upright: Frame, plan: ClipPlan) -> float:
    """Variance of the Laplacian of the middle of what is kept, a quarter of its area, at training size."""
    left, top, right, bottom = _kept_box(upright, plan)
    width, height = (right - left) / 4, (bottom - top) / 4
    middle = (left + width, top + height, right - width, bottom - height)
    hw = max(4, plan.bucket.height // 2), max(4, plan.bucket.width // 2)
    grey = np.asarray(Image.fromarray(_resized(upright, middle, hw)).convert("L"), np.int16)
    around = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:]
    return float((around - 4 * grey[1:-1, 1:-1]).var())


def _measured(
    glances: Sequence[_Glance], positions: Sequence[int], shown: Sequence[int], pairs: Sequence[tuple[int, int]]
) -> Measures:
    at = dict(zip(positions, glances, strict=True))

    def difference(one: int, other: int) -> float:
        return float(np.abs(at[one].small - at[other].small).mean())

    return Measures(
        luma=tuple(float(glance.small.mean()) for glance in glances),
        bright=tuple(float(np.percentile(glance.small, 99)) for glance in glances),
        motion=tuple(difference(*pair) for pair in pairwise(shown)),
        beside=tuple(difference(*pair) for pair in pairs),
        flicker=tuple(abs(float(at[one].small.mean() - at[other].small.mean())) for one, other in pairs),
        sharpness=max(glance.sharpness for glance in glances),
        bars=_bars(glances),
        hashes=tuple(at[position].hash for position in shown),
    )


_BLACK_BAR = 40
"""Of 255: no pixel of a black bar is brighter; limited range and compression lift black a little."""


def _bars(glances: Sequence[_Glance]) -> tuple[float, float, float, float]:
    """What is black in every frame at the top, bottom, left and right."""
    edges = []
    for levels in (np.max([glance.rows for glance in glances], 0), np.max([glance.columns for glance in glances], 0)):
        visible = np.flatnonzero(levels > _BLACK_BAR)
        if not len(visible):  # black all over, which is another fault
            return 0.0, 0.0, 0.0, 0.0
        edges += [int(visible[0]) / len(levels), (len(levels) - 1 - int(visible[-1])) / len(levels)]
    return edges[0], edges[1], edges[2], edges[3]


# --- in the main process ----------------------------------------------------------------------------------------------


def look_at(jobs: Sequence[Look], workers: int) -> Iterator[Seen | DataError]:
    """Look at every clip, in the order given; one that cannot be decoded gives its error.

    Args:
        jobs: the clips.
        workers: processes; 0 looks in this one, for files that are trusted.
    """
    idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
    started = [Worker("decoder", _WORKER) for _ in range(workers)]
    for worker in started:
        idle.put(worker)

    def answer(job: Look) -> Seen | DataError:
        try:
            if not workers:
                return look(job)
            worker = idle.get()
            try:
                return ask(worker, job)
            finally:
                idle.put(worker)
        except DataError as error:
            return error

    threads = ThreadPoolExecutor(max(1, workers), thread_name_prefix="look")
    try:
        yield from threads.map(answer, jobs)
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
        for worker in started:
            worker.close()
        threads.shutdown(wait=True)


def ask(worker: Worker, job: Look) -> Seen:
    """Have a worker look at a clip. Raises its DataError, and one where its answer is none."""
    request = decode_pool.fields_of(decode_pool.DecodeJob(job.path, job.probe, job.plan, job.image))
    fields, body = worker.ask(job.path, {**request, "exact": job.exact}, most_bytes=_MOST_BYTES, timeout_s=_TIMEOUT_S)
    try:
        pictures, end = [], 0
        for size, (height, width, frame, exact) in zip(fields["sizes"], fields["places"], strict=True):
            pictures.append(Encoded(bytes(body[end : end + size]), int(height), int(width), int(frame), bool(exact)))
            end += size
        return Seen(_checked(fields["measures"]), pictures[0], tuple(pictures[1:]))
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise DataError(f"the decoder answered with nonsense ({error})", where=str(job.path)) from None


def _checked(fields: Mapping[str, Any]) -> Measures:
    numbers = {name: tuple(map(float, value)) for name, value in fields.items() if name not in ("hashes", "sharpness")}
    if not all(math.isfinite(number) for values in numbers.values() for number in values):
        raise ValueError(json.dumps(fields)[:60])
    top, bottom, left, right = numbers.pop("bars")
    hashes = tuple(int(value) & (2 ** (_HASH_SIDE**2) - 1) for value in fields["hashes"])
    sharpness = float(fields["sharpness"])
    return Measures(**numbers, sharpness=sharpness, bars=(top, bottom, left, right), hashes=hashes)
