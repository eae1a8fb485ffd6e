"""What is wrong with a clip, or merely worth knowing: from its header, from what was measured, from its caption.

Thresholds stand here, each with what it means; docs/data.md lists them. None of them stops a training.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from finetune.cogvideox.captions import TokenizedCaption
from finetune.core.types import CORRECTIONS, ClipPlan, VideoProbe
from finetune.datasets.geometry import picture_kept
from finetune.diagnosis.frames import Measures, sampled_positions
from finetune.diagnosis.page import Fault

UNEVEN = 0.3
"""Part by which an interval between two frames may differ from the usual one."""

MOST_UNEVEN = 0.01
"""Part of the intervals that may differ by more, before a frame rate is called variable."""

KEPT = 0.8
"""Of a picture; below it a clip is called cropped."""

HIGH_RATE, TIMES_THE_MODEL = 48, 4
"""Frames per second, and times the clips' own: a video at or above both may be meant as slow motion."""

BLACK_MEAN, BLACK_BRIGHT = 20, 48
"""Levels of 255: a frame is black if its mean and all but 1 % of its pixels are below."""

STILL = 0.6
"""Levels of 255 by which two frames far apart differ at most, on average, if the picture stands still: a still one
that was compressed changes by half a level."""

STATIC = 1.2
"""The same between any two sampled frames, of a clip in which nothing moves."""

BAR = 0.015
"""Part of the height or width that is black at both ends."""

BLURRED = 12
"""Variance of the Laplacian at training size."""

FLASH = 25
"""Levels of 255 by which the whole picture becomes brighter or darker from one frame to the next."""

ALIKE = 10
"""Bits of 64 in which the perceptual hashes of two clips' frames differ at most, on average."""

WELL_ENCODED = 25
"""dB: below it a clip is said to suffer in the VAE. CogVideoX's gives most clips back at 30 and more."""

_CORRECTED = {
    "turned": "rotated",
    "bwdif": "interlaced",
    "on": "transparent",
    "pq": "HDR",
    "hlg": "HDR",
    "sdr": "colours",
}
"""First word of a correction's name -> what it is called."""


def header_faults(probe: VideoProbe, fps: float) -> Iterator[Fault]:
    """What a video's header says.

    Args:
        probe: the header.
        fps: of the clips.
    """
    names = dict.fromkeys(probe.corrections)
    for name in names:
        yield Fault("note", _CORRECTED[name.split("-")[0]], CORRECTIONS[name])
    if probe.orientation != 1 and "turned-1" not in names:
        yield Fault("note", "rotated", "turned upright, as the file states")
    intervals = np.diff(np.asarray(probe.frame_times_s, np.float64))
    if len(intervals) > 1:
        usual = float(np.median(intervals))
        uneven = float(np.mean(np.abs(intervals - usual) > UNEVEN * usual))
        if uneven > MOST_UNEVEN:
            rates = f"{1 / intervals.max():.3g} to {1 / intervals.min():.3g} frames per second"
            yield Fault("note", "variable rate", f"{rates}: frames are chosen by their time, so it plays as filmed")
    if probe.fps >= HIGH_RATE and probe.fps >= TIMES_THE_MODEL * fps:
        text = f"{probe.fps:.4g} fps: if it is meant as slow motion, its motion is too fast at {fps:g} fps"
        yield Fault("warning", "high rate", text, "convert it to the rate at which it should be seen, if so")


def plan_faults(probe: VideoProbe, plan: ClipPlan, fps: float, *, padded: bool) -> Iterator[Fault]:
    """What cutting a clip to its bucket does to it; ``padded``: its last frame is repeated (``geometry.is_padded``)."""
    kept = picture_kept((probe.height, probe.width), plan.bucket)
    if kept < KEPT:
        text = f"{kept:.0%} of its picture of {probe.height}x{probe.width} is kept"
        yield Fault("warning", "cropped", text, "add a bucket nearer to its shape")
    missing = len(plan.frame_indices) - len(set(plan.frame_indices))
    if missing and padded:
        text = f"{missing} of {plan.bucket.frames} frames are its last one, repeated"
        yield Fault("warning", "short", text, "add a bucket of fewer frames, or set data.short_clips: skip")
    elif missing:
        text = f"{missing} of {plan.bucket.frames} frames repeat another: it has {probe.fps:.4g} fps"
        yield Fault("note", "slow", f"{text}, {fps:g} are wanted")
    scale = max(plan.resize_hw[0] / probe.height, plan.resize_hw[1] / probe.width)
    if scale > 1.001:
        yield Fault("note", "enlarged", f"enlarged {scale:.2f} times from {probe.height}x{probe.width}")


def picture_faults(measures: Measures, plan: ClipPlan) -> Iterator[Fault]:
    """What the sampled frames of a clip show.

    Args:
        measures: of them.
        plan: of the clip, which may repeat a source frame.
    """
    black = [
        mean < BLACK_MEAN and bright < BLACK_BRIGHT for mean, bright in zip(measures.luma, measures.bright, strict=True)
    ]
    if all(black):
        yield Fault("warning", "black", "every sampled frame is black", "leave it out")
        return
    if any(black):
        where = "at its start" if black[0] else "at its end" if black[-1] else "in between"
        yield Fault("warning", "black frames", f"{sum(black)} of {len(black)} sampled frames are black, {where}")
    motion = measures.motion
    jumps = [jump >= FLASH for jump in measures.flicker]
    flashes = sum(jumps) >= min(2, len(jumps)) > 0
    shown, _ = sampled_positions(len(plan.frame_indices))
    others = [plan.frame_indices[a] != plan.frame_indices[b] for a, b in pairwise(shown)]
    still = sum(change <= STILL and other for change, other in zip(motion, others, strict=True))
    if motion and max(motion) < STATIC:
        text = f"nothing moves: sampled frames differ by {max(motion):.1f} of 255 levels at most"
        yield Fault("warning", "static", text, "leave it out, unless a still camera on a still scene is meant")
    elif still and not flashes and not any(black):
        text = f"the picture stands still over {still} of {len(motion)} stretches"
        yield Fault("warning", "frozen", text, "cut the clip where it stops")
    top, bottom, left, right = measures.bars
    for one, other, names in ((top, bottom, "top and bottom"), (left, right, "left and right")):
        if min(one, other) >= BAR:
            text = f"black bars at {names}: {one:.1%} and {other:.1%} of the picture"
            yield Fault("warning", "bars", text, "crop them: they are learnt like everything else")
    if not any(black) and measures.sharpness < BLURRED and max(measures.luma) > BLACK_MEAN:
        yield Fault("warning", "blurred", f"hardly any detail (sharpness {measures.sharpness:.1f}, under {BLURRED})")
    if flashes:
        text = f"its brightness jumps by up to {max(measures.flicker):.0f} of 255 levels from frame to frame"
        yield Fault("warning", "flashing", text, "leave it out")


def caption_faults(caption: str, tokens: TokenizedCaption | None, limit: int) -> Iterator[Fault]:
    """What a caption says, and what of it the model reads.

    Args:
        caption: as it is trained on.
        tokens: of it; None where the tokenizer is not at hand.
        limit: tokens that the model reads.
    """
    if tokens is None:
        return
    if tokens.length > limit:
        text = (
            f"{tokens.length} tokens, of which {limit} are read: {_quoted(caption[tokens.read :].strip())} is cut off"
        )
        yield Fault("warning", "caption cut", text, "shorten it")
    if tokens.lost:
        words = sorted({word for word in caption.split() if any(part in word for part in tokens.lost)})
        text = f"the text encoder does not know {', '.join(map(_quoted, words[:5] or tokens.lost[:5]))}"
        yield Fault("warning", "unknown words", text)


def _quoted(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


def alike(hashes: Sequence[Sequence[int]]) -> list[tuple[int, int, float]]:
    """Pairs of clips that look alike over time: (one, another, bits of 64 in which their frames differ on average).

    Frames are compared in order, so a clip shifted by seconds is another one. Clips with fewer frames than others are
    compared among themselves.

    Args:
        hashes: of every clip, ``Measures.hashes``.
    """
    pairs: list[tuple[int, int, float]] = []
    for length in sorted({len(one) for one in hashes} - {0}):
        members = [index for index, one in enumerate(hashes) if len(one) == length]
        table = np.array([hashes[index] for index in members], np.uint64)
        for row, index in enumerate(members):
            bits = np.bitwise_count(table[row + 1 :] ^ table[row]).sum(1, dtype=np.int64) / length
            pairs += [(index, members[row + 1 + at], float(bits[at])) for at in np.flatnonzero(bits <= ALIKE).tolist()]
    return pairs


def groups(pairs: Sequence[tuple[int, int, float]]) -> dict[int, list[int]]:
    """For each clip that is like another, the others, the nearest first."""
    near: dict[int, list[tuple[float, int]]] = {}
    for one, other, bits in pairs:
        near.setdefault(one, []).append((bits, other))
        near.setdefault(other, []).append((bits, one))
    return {index: [other for _, other in sorted(others)] for index, others in near.items()}
