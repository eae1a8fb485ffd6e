"""Every limit on media files, in one place: what a file may claim, and what a worker process may use to find out.

A few hundred bytes of a header can promise a thousand million frames, for which a demuxer reserves an index entry each.
So a claim is compared with a limit before a decoding library acts on it; and because no list of claims is complete, the
process that decodes has limits of its own, which hold whatever the file says.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

from finetune.core.errors import DataError

MAX_FRAMES = 2_000_000
"""More frames than nine hours at 60 per second: a longer video is refused."""

MAX_PIXELS = 2**25
"""Pixels of one frame or image: a little more than 8K UHD (7680x4320). A larger one is refused."""

MAX_FPS = 1000.0
"""The most that a configuration can ask for, and more than cameras play back at."""

MAX_DURATION_S = 7 * 24 * 3600.0
"""A week. ``span: all`` lays clips over the whole length, so a false time stamp would cost memory, not only sense."""

MAX_STREAMS = 128
"""Tracks of any kind in one file; a film with every language has fifty."""

MAX_EDITS = 1_000
"""Entries of an edit list. FFmpeg goes through the whole track for each of them."""

MAX_BOXES = 1_000_000
"""Boxes in an MP4 file. A live recording has four for every fragment of a second or so."""

WORKER_MEMORY = 4 * 2**30
"""Bytes that a worker may allocate, beside the clip it was asked for. Ten 8K frames of 10 bits, as many as a decoder
keeps for reference, are 1 GiB, and at 4:4:4 two; and a limit on memory has to hold for four workers on one machine."""

WORKER_LOG = 2**20
"""Bytes that a worker may write to a file. It writes none; libraries complain on its standard error, which is one."""

WORKER_FILES = 64
"""Files that a worker may have open: its pipes, one video, and what importing a library takes."""

START_TIMEOUT_S = 120.0
"""For a worker to start. It imports NumPy and Pillow, which takes a minute from a slow network disk."""

PROBE_TIMEOUT_S = 60.0
"""To read the header and list the frames of a small file, and then one second more for every ``PROBE_BYTES_PER_S``."""

PROBE_BYTES_PER_S = 2 * 2**20
"""Slow, because a file without time stamps (AVI) has to be decoded to be listed."""

DECODE_TIMEOUT_S = 600.0
"""To decode one clip, and the most for anything."""

MAX_MESSAGE = 2**16
"""Bytes of what a worker may say beside pixels and times: a sentence or two and a file name."""

MAX_REQUEST = 2**18
"""Bytes of what a worker is asked: 4096 frame numbers and a file name."""


def probe_timeout_s(size: int) -> float:
    """How long a file of ``size`` bytes may take to be probed."""
    return min(DECODE_TIMEOUT_S, PROBE_TIMEOUT_S + size / PROBE_BYTES_PER_S)


def check_frame_size(height: int, width: int, where: str) -> None:
    """Refuse a picture without area, or with more than ``MAX_PIXELS``, before memory is taken for it."""
    if height < 1 or width < 1 or height * width > MAX_PIXELS:
        raise DataError(
            f"a picture of {height}x{width} (height x width) is outside what is read: 1 to {MAX_PIXELS:,} pixels",
            where=where,
            fix="scale it down first, or leave it out",
        )


def check_frame_count(frames: int, where: str) -> None:
    """Refuse more than ``MAX_FRAMES`` frames."""
    if frames > MAX_FRAMES:
        raise DataError(
            f"the header promises {frames:,} frames; at most {MAX_FRAMES:,} are read",
            where=where,
            fix="split the video into shorter files, or leave it out",
        )


def check_count(count: int, most: int, what: str, where: str) -> None:
    """Refuse more of ``what`` (streams, edits, boxes) than any video needs."""
    if count > most:
        raise DataError(
            f"the file has {count:,} {what}; at most {most:,} are read",
            where=where,
            fix="re-encode it, or leave it out",
        )


def check_times(times_s: Sequence[float], where: str) -> None:
    """Refuse presentation times that no camera made: not ascending from zero, over a week, or too close together.

    Args:
        times_s: of every frame, in seconds from the first.
        where: the file.
    """
    fix = "re-encode it with a constant frame rate, or leave it out"
    last = times_s[-1]
    if not math.isfinite(last) or last > MAX_DURATION_S:
        raise DataError(
            f"its time stamps span {last:.4g} s; at most {MAX_DURATION_S:,.0f} s (a week) are read",
            where=where,
            fix=fix,
        )
    if len(times_s) > 1 and len(times_s) - 1 > MAX_FPS * last:
        rate = (len(times_s) - 1) / last if last > 0 else math.inf
        raise DataError(
            f"its time stamps say {rate:.4g} frames per second; at most {MAX_FPS:g} are read", where=where, fix=fix
        )
    if not ascending(times_s):
        raise DataError("its time stamps do not ascend", where=where, fix=fix)


def ascending(times_s: Sequence[float]) -> bool:
    """Whether times start at zero and each is later than the one before."""
    return times_s[0] == 0 and all(a < b for a, b in pairwise(times_s))


def too_much_memory(where: str) -> DataError:
    """The error of a file for which an allocation failed."""
    return DataError(
        f"reading the file takes more memory than a worker is given ({WORKER_MEMORY / 2**30:g} GiB)",
        where=where,
        fix="scale it down or re-encode it, or leave it out",
    )


def limit_process() -> None:
    """Put this worker process under its limits, before it meets a file. On Linux in full; elsewhere what there is."""
    with suppress(OSError):  # Linux only. If the machine runs out of memory, a worker goes and not the training
        Path("/proc/self/oom_score_adj").write_text("1000")
    try:
        import resource
    except ImportError:  # Windows has none of this; time is limited from outside
        return
    for kind, most in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, WORKER_LOG),
        (resource.RLIMIT_NOFILE, WORKER_FILES),
    ):
        _lower(kind, most)
    limit_memory(0)


def limit_memory(beside: int) -> None:
    """Let this process allocate ``WORKER_MEMORY`` and ``beside`` bytes; beyond it an allocation fails."""
    try:
        import resource
    except ImportError:
        return
    # Not RLIMIT_AS: libraries map files and reserve addresses that they never touch. On Linux RLIMIT_DATA counts
    # what is private and writable, however it was allocated.
    _lower(resource.RLIMIT_DATA, WORKER_MEMORY + beside)


def _lower(kind: int, most: int) -> None:
    import resource

    hard = resource.getrlimit(kind)[1]
    with suppress(OSError, ValueError):
        resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def as_times(values: Sequence[float]) -> Sequence[float]:
    """Times as ``VideoProbe`` holds them: eight bytes each instead of thirty-two, for hours of video."""
    return array("d", values)
