"""Video frames through decord 0.6, where it can be relied on.

decord gives *wrong* frames without an error after a seek into an open group of pictures (x265's default), in transport
streams, and where an edit list hides frames; ``media.frames`` keeps it from those. It also decodes ahead without limit
while nobody reads: a reader left idle in a 7 s clip of 1080p held 1.3 GB. So a reader here lives for one batch, a
batch has a size, and large pictures go to PyAV.

Everything decord raises becomes ``DecordError``, upon which the caller turns to PyAV.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Frame = NDArray[np.uint8]

MAX_FRAME_BYTES = 8 * 2**20
"""1080p has 6 MiB. Of larger frames a batch would hold so few that most of the time went into seeking."""

_BATCH_BYTES = 256 * 2**20
_TIME_TOLERANCE_S = 1e-3


class DecordError(Exception):
    """decord cannot do it: it is missing, or cannot open the file, or failed at a frame."""


def agrees(path: Path, frame_times_s: Sequence[float], size_hw: tuple[int, int]) -> bool:
    """Whether decord opens the file and lists the same frames: as many, at the same times, of the same upright size."""
    try:
        reader = _opened(path)
        if len(reader) != len(frame_times_s) or tuple(reader[0].shape[:2]) != size_hw:
            return False
        starts_s = np.asarray(reader.get_frame_timestamp(range(len(reader))))[:, 0].astype(np.float64)
    except DecordError:
        return False
    except _failures():
        return False
    # decord's times are float32: past two hours their step is itself half a millisecond.
    tolerance_s = _TIME_TOLERANCE_S + 1e-6 * frame_times_s[-1]
    return bool(np.all(np.abs(starts_s - starts_s[0] - np.asarray(frame_times_s)) <= tolerance_s))


def read_frames(
    path: Path, frame_indices: Sequence[int], frames: int, size_hw: tuple[int, int]
) -> Iterator[tuple[int, Frame]]:
    """Decode the named frames upright (decord turns them itself), a batch at a time.

    Args:
        path: a video that ``agrees`` accepted.
        frame_indices: ascending frame numbers; repeated ones are given once.
        frames: how many frames the file had when it was probed.
        size_hw: height and width of its upright frames, which decide how many are in a batch.

    Yields:
        The frame's number and its RGB pixels, uint8 [H, W, 3].

    Raises:
        DecordError: if decord cannot.
    """
    wanted = sorted(set(frame_indices))
    step = max(1, _BATCH_BYTES // (size_hw[0] * size_hw[1] * 3))
    try:
        for start in range(0, len(wanted), step):
            batch = wanted[start : start + step]
            reader = _opened(path)
            if len(reader) != frames:
                raise DecordError(f"{len(reader)} frames, not {frames}")
            pixels = reader.get_batch(batch).asnumpy()
            if pixels.shape[1:3] != size_hw:
                raise DecordError(f"frames of {pixels.shape[1:3]}, not {size_hw}")
            del reader  # before the consumer takes its time
            yield from zip(batch, pixels, strict=True)
    except DecordError:
        raise
    except _failures() as error:
        raise DecordError(str(error)) from error


def _opened(path: Path) -> Any:
    try:
        import decord
    except (ImportError, OSError) as error:  # there is no wheel for Arm
        raise DecordError(f"decord is not installed: {error}") from error
    decord.logging.set_level(decord.logging.QUIET)
    try:
        # Absolute, because FFmpeg takes what stands before a colon for a protocol.
        return decord.VideoReader(os.path.abspath(path), ctx=decord.cpu(0), num_threads=2)  # noqa: PTH100
    except _failures() as error:
        raise DecordError(str(error)) from error


def _failures() -> tuple[type[Exception], ...]:
    """What decord raises: its own class, but also RuntimeError for a file, AssertionError for a frame count,
    UnicodeError for a name that is not UTF-8.
    """
    import decord

    return decord.DECORDError, RuntimeError, AssertionError, IndexError, OSError, UnicodeError
