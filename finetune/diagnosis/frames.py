"""A handful of frames of every clip, as training will see them: measured and made small in worker processes.

Only frames of the plan are decoded, by the code that precomputing decodes with, so a picture marked exact is what the
VAE will be given. A worker does not import torch.
"""

from __future__ import annotations

import io
import json
import math
import queue
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.Image import Image as Picture
from PIL.Image import Resampling

from finetune.core.checksums import digest_of
from finetune.core.errors import DataError
from finetune.core.types import ClipPlan, VideoProbe
from finetune.datasets import decode, decode_pool
from finetune.datasets.pictures import read_fitted_image, resize_crop, turn_upright
from finetune.datasets.worker import Worker

if TYPE_CHECKING:
    from finetune.datasets.file_memory import FileMemory

SHOWN = 6
"""Frames of a clip on its contact sheet, evenly spread from the first to the last."""

TILE_HEIGHT = 112
"""Of the small pictures, in pixels."""

_WORKER = "from finetune.datasets import worker; from finetune.diagnosis import frames; worker.serve(frames.handle)"

INSPECTION_RULE = "look-2"
"""Names what is shown and measured of a clip. What was remembered of another rule is looked at again."""

_AHEAD = 16
"""Clips for each worker that are looked at ahead of the caller: one of them may be large."""

_TIMEOUT_S = 600.0

_MOST_BYTES = 64 * 2**20

_HASH_SIDE = 8

MEASURED_HEIGHT = 180
"""Rows of what is kept of a frame, when it is measured."""

_SMALL_HW = 48, 72
"""Of the grey pictures that brightness, motion and likeness are measured on."""


@dataclass(frozen=True)
class ClipRequest:
    """A clip whose frames are shown and measured."""

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
class InspectedClip:
    """What was shown and measured of a clip."""

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
    answer, contents = _parts_of(inspect_clip(ClipRequest(job.path, job.probe, job.plan, job.image, fields["exact"])))
    return answer, [np.frombuffer(content, np.uint8) for content in contents]


def inspect_clip(job: ClipRequest) -> InspectedClip:
    """Decode, measure and show a clip in this process. Raises DataError if one of its frames cannot be decoded."""
    plan, header = job.plan, job.probe
    shown, pairs = sampled_positions(len(plan.frame_indices))
    wanted = sorted({*shown, *(position for pair in pairs for position in pair)})
    sharp = {shown[0], shown[len(shown) // 2], shown[-1]}
    indices = [plan.frame_indices[position] for position in wanted]
    per_frame: dict[int, _FrameMeasures] = {}
    tiles: dict[int, Encoded] = {}
    source: Encoded | None = None
    for frame_index, frame in decode.read_frames(job.path, indices, header):
        upright = np.ascontiguousarray(turn_upright(frame, header.orientation))
        picture = Image.fromarray(upright)
        source = source or encoded(picture, 0, exact=False)
        cut = _cut(picture, plan)
        for position in (position for position in wanted if plan.frame_indices[position] == frame_index):
            per_frame[position] = _measure_frame(picture, cut, plan, sharp=position in sharp, hashed=position in shown)
            if position in shown[: job.exact]:
                size_hw = plan.bucket.height, plan.bucket.width
                pixels = resize_crop(upright, plan.resize_hw, plan.crop_yx, size_hw)
                tiles[position] = encoded(Image.fromarray(np.ascontiguousarray(pixels)), position, exact=True)
            elif position in shown:
                tiles[position] = encoded(cut, position, exact=False)
    pictures = [tiles[position] for position in shown]
    if job.image is not None:
        image = read_fitted_image(job.image, plan.bucket).transpose(1, 2, 0)
        pictures.insert(0, encoded(Image.fromarray(np.ascontiguousarray(image)), -1, exact=job.exact > 0))
    assert source is not None
    return InspectedClip(
        _measured([per_frame[position] for position in wanted], wanted, shown, pairs), source, tuple(pictures)
    )


def _cut(picture: Picture, plan: ClipPlan) -> Picture:
    """What the plan keeps of a frame, made small: ``MEASURED_HEIGHT`` rows."""
    width = max(1, MEASURED_HEIGHT * plan.bucket.width // plan.bucket.height)
    return picture.resize((width, MEASURED_HEIGHT), Resampling.BICUBIC, _kept_box(picture, plan), reducing_gap=1.0)


def _kept_box(picture: Picture, plan: ClipPlan) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of what the plan keeps, in pixels of the source."""
    down, across = picture.height / plan.resize_hw[0], picture.width / plan.resize_hw[1]
    top, left = plan.crop_yx
    return left * across, top * down, (left + plan.bucket.width) * across, (top + plan.bucket.height) * down


def encoded(picture: Picture, number: int, *, exact: bool) -> Encoded:
    """A picture as a file: at its own size without loss, or small."""
    if not exact:
        picture = picture.copy()
        picture.thumbnail((4 * TILE_HEIGHT, TILE_HEIGHT), Resampling.BILINEAR)
    file = io.BytesIO()
    # Without loss, quality says how hard to try.
    picture.save(file, "WEBP", method=0, **({"lossless": True, "quality": 10} if exact else {"quality": 75}))
    return Encoded(file.getvalue(), picture.height, picture.width, number, exact)


class _FrameMeasures(NamedTuple):
    """What is measured on one frame."""

    small: NDArray[np.float32]
    """Its grey picture, of ``_SMALL_HW``."""
    rows: NDArray[np.uint8]
    """Of each row, the brightest mean of eight neighbouring pixels."""
    columns: NDArray[np.uint8]
    sharpness: float
    """0 where it is not measured."""
    hash: int


def _measure_frame(picture: Picture, cut: Picture, plan: ClipPlan, *, sharp: bool, hashed: bool) -> _FrameMeasures:
    grey = cut.convert("L")
    # Means of eight pixels along a bar: specks of compression beside the picture are no picture.
    along = grey.resize((max(1, grey.width // 8), grey.height), Resampling.BOX)
    across = grey.resize((grey.width, max(1, grey.height // 8)), Resampling.BOX)
    return _FrameMeasures(
        small=np.asarray(grey.resize(_SMALL_HW[::-1], Resampling.BOX), np.float32),
        rows=np.asarray(along).max(1),
        columns=np.asarray(across).max(0),
        sharpness=_sharpness(picture, plan) if sharp else 0.0,
        hash=_hash(picture) if hashed else 0,
    )


def _hash(picture: Picture) -> int:
    import imagehash

    small = picture.resize((64, 64), Resampling.BILINEAR, reducing_gap=2.0).convert("L")
    return int(str(imagehash.phash(small, _HASH_SIDE)), 16)


def _sharpness(picture: Picture, plan: ClipPlan) -> float:
    """Variance of the Laplacian of the middle of what is kept, a quarter of its area, at training size."""
    left, top, right, bottom = _kept_box(picture, plan)
    width, height = (right - left) / 4, (bottom - top) / 4
    middle = (left + width, top + height, right - width, bottom - height)
    size = max(4, plan.bucket.width // 2), max(4, plan.bucket.height // 2)
    grey = np.asarray(picture.convert("L").resize(size, Resampling.BICUBIC, middle, reducing_gap=2.0), np.int16)
    around = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:]
    return float((around - 4 * grey[1:-1, 1:-1]).var())


def _measured(
    per_frame: Sequence[_FrameMeasures],
    positions: Sequence[int],
    shown: Sequence[int],
    pairs: Sequence[tuple[int, int]],
) -> Measures:
    at = dict(zip(positions, per_frame, strict=True))

    def difference(one: int, other: int) -> float:
        return float(np.abs(at[one].small - at[other].small).mean())

    return Measures(
        luma=tuple(float(of_frame.small.mean()) for of_frame in per_frame),
        bright=tuple(float(np.percentile(of_frame.small, 99)) for of_frame in per_frame),
        motion=tuple(difference(*pair) for pair in pairwise(shown)),
        beside=tuple(difference(*pair) for pair in pairs),
        flicker=tuple(abs(float(at[one].small.mean() - at[other].small.mean())) for one, other in pairs),
        sharpness=max(of_frame.sharpness for of_frame in per_frame),
        bars=_bars(per_frame),
        hashes=tuple(at[position].hash for position in shown),
    )


_BLACK_BAR = 40
"""Of 255: no pixel of a black bar is brighter; limited range and compression lift black a little."""


def _bars(per_frame: Sequence[_FrameMeasures]) -> tuple[float, float, float, float]:
    """What is black in every frame at the top, bottom, left and right."""
    edges = []
    for levels in (
        np.max([of_frame.rows for of_frame in per_frame], 0),
        np.max([of_frame.columns for of_frame in per_frame], 0),
    ):
        visible = np.flatnonzero(levels > _BLACK_BAR)
        if not len(visible):  # black all over, which is another fault
            return 0.0, 0.0, 0.0, 0.0
        edges += [int(visible[0]) / len(levels), (len(levels) - 1 - int(visible[-1])) / len(levels)]
    return edges[0], edges[1], edges[2], edges[3]


# --- as a worker's answer, and as it is remembered --------------------------------------------------------------------


def _parts_of(inspected: InspectedClip) -> tuple[dict[str, Any], list[bytes]]:
    """Fields for JSON, and the pictures' files."""
    pictures = (inspected.source, *inspected.frames)
    places = [[picture.height, picture.width, picture.frame, picture.exact] for picture in pictures]
    contents = [picture.content for picture in pictures]
    return {"measures": asdict(inspected.measures), "places": places, "sizes": list(map(len, contents))}, contents


def _seen_of(fields: Mapping[str, Any], body: bytes | bytearray) -> InspectedClip:
    """The other way round; raises KeyError, TypeError, ValueError or IndexError for anything else."""
    pictures, end = [], 0
    for size, (height, width, frame, exact) in zip(fields["sizes"], fields["places"], strict=True):
        pictures.append(Encoded(bytes(body[end : end + size]), int(height), int(width), int(frame), bool(exact)))
        end += size
    return InspectedClip(_checked(fields["measures"]), pictures[0], tuple(pictures[1:]))


def _checked(fields: Mapping[str, Any]) -> Measures:
    numbers = {name: tuple(map(float, value)) for name, value in fields.items() if name not in ("hashes", "sharpness")}
    if not all(math.isfinite(number) for values in numbers.values() for number in values):
        raise ValueError(json.dumps(fields)[:60])
    top, bottom, left, right = numbers.pop("bars")
    hashes = tuple(int(value) & (2 ** (_HASH_SIDE**2) - 1) for value in fields["hashes"])
    sharpness = float(fields["sharpness"])
    return Measures(**numbers, sharpness=sharpness, bars=(top, bottom, left, right), hashes=hashes)


# --- in the main process ----------------------------------------------------------------------------------------------


def inspection_memory(cache_dir: Path) -> FileMemory:
    """Where looks at clips are remembered, beside a cache's entries."""
    from finetune.datasets.file_memory import FileMemory

    return FileMemory(cache_dir / "looks.sqlite", f"{INSPECTION_RULE}, {decode_pool.read_rule()}")


def inspect_clips(
    jobs: Iterable[ClipRequest], workers: int, memory: FileMemory | None = None
) -> Iterator[InspectedClip | DataError]:
    """Inspect every clip, in the order given; one that cannot be decoded gives its error.

    Args:
        jobs: the clips.
        workers: processes; 0 looks in this one, for files that are trusted.
        memory: of earlier looks.
    """
    idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
    started = [Worker("decoder", _WORKER) for _ in range(workers)]
    for worker in started:
        idle.put(worker)

    def answer(job: ClipRequest) -> InspectedClip | DataError:
        try:
            if not workers:
                return inspect_clip(job)
            worker = idle.get()
            try:
                return ask(worker, job)
            finally:
                idle.put(worker)
        except DataError as error:
            return error

    threads = ThreadPoolExecutor(max(1, workers), thread_name_prefix="look")
    pending: deque[tuple[ClipRequest, InspectedClip | Future[InspectedClip | DataError]]] = deque()
    try:
        for job in jobs:
            pending.append((job, _recalled(memory, job) or threads.submit(answer, job)))
            if len(pending) > _AHEAD * (workers + 1):
                yield _remembered(memory, *pending.popleft())
        while pending:
            yield _remembered(memory, *pending.popleft())
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
        for worker in started:
            worker.close()
        threads.shutdown(wait=True)


def ask(worker: Worker, job: ClipRequest) -> InspectedClip:
    """Have a worker inspect a clip. Raises its DataError, and one where its answer is none."""
    request = decode_pool.fields_of(decode_pool.DecodeJob(job.path, job.probe, job.plan, job.image))
    fields, body = worker.ask(job.path, {**request, "exact": job.exact}, most_bytes=_MOST_BYTES, timeout_s=_TIMEOUT_S)
    try:
        return _seen_of(fields, body)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise DataError(f"the decoder answered with nonsense ({error})", where=str(job.path)) from None


def _recalled(memory: FileMemory | None, job: ClipRequest) -> InspectedClip | None:
    if memory is None or job.image is not None:  # which is a second file that may change
        return None
    fields, _, body = (memory.recall(job.path, _question(job)) or b"").partition(b"\n")
    try:
        return _seen_of(json.loads(fields), body)
    except (KeyError, TypeError, ValueError, IndexError):  # there is none, or a damaged one
        return None


def _remembered(
    memory: FileMemory | None, job: ClipRequest, answer: InspectedClip | Future[InspectedClip | DataError]
) -> InspectedClip | DataError:
    if isinstance(answer, InspectedClip):
        return answer
    inspected = answer.result()
    if memory is not None and job.image is None and isinstance(inspected, InspectedClip):
        fields, contents = _parts_of(inspected)
        memory.remember(job.path, b"\n".join([json.dumps(fields).encode(), b"".join(contents)]), _question(job))
    return inspected


def _question(job: ClipRequest) -> str:
    return digest_of([asdict(job.plan), job.exact])
