"""Clips through decord, a second reader beside PyAV: where it gives the same pixels to the bit, and PyAV elsewhere.

decord gives wrong frames without an error after a seek into an open group of pictures, stretches a picture that changes
its size to the shape of the first, and has no list of allowed formats. So it only reads what begins like MP4 or
Matroska and has the frames that PyAV listed; and the first frame that a clip takes of each group of pictures, which is
where decord seeks to, is decoded by both.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from finetune.core.types import ClipPlan, VideoProbe
from finetune.datasets import containers, decode
from finetune.datasets.pictures import Frame, turn_upright

_MAX_FRAME_BYTES = 8 * 2**20
"""1080p has 6 MiB. A reader decodes ahead of who reads it: in 1080p it takes gigabytes."""

_BATCH_BYTES = 256 * 2**20

_TIME_TOLERANCE_S = 1e-3


class _DisagreementError(RuntimeError):
    """decord sees another video than PyAV."""


def read_clip(path: Path, probe: VideoProbe, plan: ClipPlan) -> Frame:
    """As ``decode.read_clip``, by decord where it can and agrees, else the whole clip by PyAV."""
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    containers.check_container(path)
    # Beside its own error decord raises RuntimeError of a file, AssertionError of a count, UnicodeError of a name.
    failures = decord.DECORDError, RuntimeError, AssertionError, IndexError, OSError, UnicodeError
    try:
        return decode.fitted(_upright_frames(decord, path, probe, sorted(set(plan.frame_indices))), plan)
    except failures:
        return decode.read_clip(path, probe, plan)


def _upright_frames(decord: Any, path: Path, probe: VideoProbe, wanted: list[int]) -> Iterator[tuple[int, Frame]]:
    """The wanted frames, uint8 RGB [H, W, 3], which decord turns by itself."""
    index = decode.read_index(path)
    readable = containers.is_mp4_or_matroska(path) and index.keyframes and not index.open_gop
    if not readable or set(probe.corrections) - {"turned-1"} or probe.height * probe.width * 3 > _MAX_FRAME_BYTES:
        raise _DisagreementError
    groups = {bisect_right(index.keyframes, index.pts[number]): number for number in reversed(wanted)}
    first_of_groups = set(groups.values())
    theirs = decode.read_frames(path, sorted(first_of_groups), probe)
    step = max(1, _BATCH_BYTES // (probe.height * probe.width * 3))
    for start in range(0, len(wanted), step):
        # Absolute, because FFmpeg takes what stands before a colon for a protocol.
        reader = decord.VideoReader(os.path.abspath(path), ctx=decord.cpu(0), num_threads=2)  # noqa: PTH100
        if len(reader) != len(index.pts):
            raise _DisagreementError
        times_s = np.asarray(reader.get_frame_timestamp(range(len(reader))))[:, 0].astype(np.float64)
        expected_s = (np.asarray(index.pts) - index.pts[0]) * index.time_base
        # Its times are float32: past two hours their step is itself half a millisecond.
        if np.any(np.abs(times_s - times_s[0] - expected_s) > _TIME_TOLERANCE_S + 1e-6 * expected_s[-1]):
            raise _DisagreementError
        batch = wanted[start : start + step]
        frames: Frame = reader.get_batch(batch).asnumpy()
        del reader  # it would go on decoding
        for number, frame in zip(batch, frames, strict=True):
            if number in first_of_groups:
                _, stored = next(theirs)
                if not np.array_equal(turn_upright(stored, probe.orientation), frame):
                    raise _DisagreementError
            yield number, frame
