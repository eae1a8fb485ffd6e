"""RIFLEx: rotary positions in time that do not repeat within a longer video (Zhao et al. 2025, arXiv 2502.15894).

Component j of d/2, counted from 1, turns by ``theta_j = 10000 ** (-2 (j - 1) / d)`` per position and so repeats after
``N_j = 2 pi / theta_j`` positions; d is the quarter of a head that stands for time. Of CogVideoX's d = 16 the periods
are 6.3, 19.9, 62.8, 198.7, ... Short ones came round within the clips that the model was trained on, and long ones do
not come round; one in between makes a longer video begin again after its period. It is the *intrinsic* component: the
one whose period is nearest to the length after which too long a video is first seen to repeat (eq. 7). For CogVideoX-5B
the authors' own code has k = 2, N_2 = 20. All published models have the same d and base, and so the same k here; in the
second generation, of which the paper says nothing, a position is two latent frames.

RIFLEx gives that component, and no other, a period that a video of L positions stays within (eq. 8). As in the authors'
code the video takes 90 % of it, because some still repeated in their last frames: ``theta_k = 0.9 * 2 pi / L``.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING

from finetune.cogvideox.spec import ModelSpec
from finetune.core.types import Bucket

if TYPE_CHECKING:
    from torch import Tensor

_BASE = 10_000.0
"""Of diffusers' ``get_3d_rotary_pos_embed``; no checkpoint states another."""

_FIRST_REPETITION = 20
"""Positions after which CogVideoX-5B is first seen to repeat; the nearest period is what counts."""

_SHARE = 0.9
"""Of the lowered component's period that the longest video takes."""


def periods(spec: ModelSpec) -> list[float]:
    """After how many positions each temporal component repeats, ascending."""
    width = spec.attention_head_dim // 4
    return [2 * math.pi * _BASE ** (first / width) for first in range(0, width, 2)]


def intrinsic_component(spec: ModelSpec) -> int:
    """k, counted from 0: the component whose period is nearest to the first repetition."""
    own = periods(spec)
    return min(range(len(own)), key=lambda component: abs(own[component] - _FIRST_REPETITION))


def angle(spec: ModelSpec, frames: int) -> float:
    """``theta_k`` in radians per position, with which a video of ``frames`` pixel frames does not repeat."""
    return _SHARE * 2 * math.pi / spec.positions(frames)


def lower(spec: ModelSpec, cos: Tensor, sin: Tensor) -> None:
    """Put the lowered component into a table of rotary positions, in place; nothing else of it changes.

    Args:
        spec: with ``riflex``, and without ``riflex_fault``.
        cos: [frames, tokens of a frame, attention_head_dim]; time has the first quarter of the columns, two for each
            component.
        sin: likewise.
    """
    import torch

    assert spec.riflex is not None
    angles = torch.arange(len(cos), dtype=torch.float64)[:, None, None] * angle(spec, spec.riflex)
    first = 2 * intrinsic_component(spec)
    cos[..., first : first + 2] = angles.cos().to(cos)
    sin[..., first : first + 2] = angles.sin().to(sin)


def riflex_fault(spec: ModelSpec) -> tuple[str, str] | None:
    """What is wrong with ``spec.riflex`` for this model, and the fix; None where it is off or can be used."""
    frames, remove = spec.riflex, "leave riflex out"
    if frames is None:
        return None
    if not spec.use_rotary:
        return "RIFLEx lowers a frequency of rotary positions, and this model has sine positions instead", remove
    if spec.use_learned_positions:
        fixed = f"beside its rotary positions it has learned ones, for {spec.stated_bucket.frames} frames alone"
        return f"this model makes no longer videos: {fixed}", remove
    own, component, positions = periods(spec), intrinsic_component(spec), spec.positions(frames)
    if positions <= _SHARE * own[component]:
        what = f"{frames} frames already lie within one period of the temporal positions, so there is nothing to lower"
        return what, f"give {_frames_beyond(spec, own[component])} frames or more, or {remove}"
    if component + 1 < len(own) and positions > _SHARE * own[component + 1]:
        what = f"in {frames} frames another component of the temporal positions repeats, which RIFLEx leaves alone"
        return what, f"give at most {_frames_beyond(spec, own[component + 1]) - spec.frames_step} frames"
    return None


def _frames_beyond(spec: ModelSpec, period: float) -> int:
    """The least frame count that takes more than RIFLEx's share of a period."""
    return next(frames for frames in count(1, spec.frames_step) if spec.positions(frames) > _SHARE * period)


def makes_possible(spec: ModelSpec, bucket: Bucket) -> bool:
    """Whether a bucket is impossible for a model, and possible with ``riflex`` of its frames."""
    longer = replace(spec, riflex=bucket.frames)
    return bool(spec.check_bucket(bucket)) and riflex_fault(longer) is None and not longer.check_bucket(bucket)
