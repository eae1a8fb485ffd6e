"""What a replay found, as a table and a diagnosis for a person."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from finetune.text import shown
from finetune.trainers.fault_report import Report, ReportedSample

EXTREME_LATENTS = 100.0
"""Scaled latents have about unit variance; beyond this one is no picture any more."""
EXTREME_WEIGHTS = 1e3
"""No weight of a model that still works is as large."""
SAME = 1e-2
"""Relative difference between two losses that are taken for the same: bf16 in micro-batches of another size."""


@dataclass(frozen=True)
class TensorRange:
    """Smallest and largest finite value, and how many values are not finite."""

    low: float
    high: float
    non_finite: int

    @classmethod
    def of(cls, *tensors: Tensor) -> TensorRange:
        """Over all of ``tensors``."""
        finite = [tensor.detach()[torch.isfinite(tensor.detach())] for tensor in tensors]
        present = [values for values in finite if values.numel()]
        return cls(
            low=min((float(values.min()) for values in present), default=math.nan),
            high=max((float(values.max()) for values in present), default=math.nan),
            non_finite=sum(tensor.numel() for tensor in tensors) - sum(values.numel() for values in finite),
        )

    def exceeds(self, limit: float) -> bool:
        """Whether a value is not finite or larger than ``limit``."""
        return bool(self.non_finite) or max(abs(self.low), abs(self.high)) > limit

    def __str__(self) -> str:
        return f"{self.low:.3g} to {self.high:.3g}" + (f", {self.non_finite} not finite" if self.non_finite else "")


@dataclass(frozen=True)
class Replayed:
    """One sample, run alone."""

    sample: ReportedSample
    loss: float
    grad_norm: float
    """Of this sample's own loss, over everything that trains."""
    bad_gradients: tuple[str, ...]
    """Parameters whose gradient is not finite, in the model's order."""
    bad_module: str
    """The first module, in the order of the forward pass, whose output is not finite; empty where all are."""
    peak_module: str
    peak: float
    """The largest finite output of a module."""
    latents: TensorRange
    """In model space, as they enter the noising."""
    conditions: TensorRange
    """Caption embedding and image latents."""

    @property
    def is_finite(self) -> bool:
        """Whether loss and gradient are."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)

    @property
    def has_bad_input(self) -> bool:
        """Whether the clip itself is the fault."""
        return self.latents.exceeds(EXTREME_LATENTS) or bool(self.conditions.non_finite)


@dataclass(frozen=True)
class Replay:
    """What a replay found; ``str`` is the table and the diagnosis."""

    path: Path
    report: Report
    dtype: str
    device: str
    has_weights: bool
    weights: TensorRange
    """Of everything that trains, as it was in the step."""
    samples: tuple[Replayed, ...]

    @property
    def bad(self) -> tuple[Replayed, ...]:
        """The samples that are not finite here."""
        return tuple(sample for sample in self.samples if not sample.is_finite)

    @property
    def reproduced(self) -> bool | None:
        """Whether this shows what was recorded; None where it cannot: without the weights, or in another dtype."""
        if not self.has_weights or self.dtype != self.report.dtype:
            return None
        return bool(self.bad) and all(_same(each.sample.loss, each.loss) for each in self.samples)

    @property
    def kind(self) -> str:
        """``weights``, ``clip``, ``overflow``, ``overflow?``, ``unexplained`` or ``gone``."""
        if self.weights.exceeds(EXTREME_WEIGHTS):
            return "weights"
        if any(sample.has_bad_input for sample in self.samples):
            return "clip"
        if self.bad:
            return "overflow?" if self.dtype == "float16" else "unexplained"
        return "overflow" if self.dtype == "float32" != self.report.dtype else "gone"

    @property
    def diagnosis(self) -> str:
        """What went wrong, and what to do, in words."""
        clips = ", ".join(shown(each.sample.item.clip) for each in self.samples if each.has_bad_input)
        where = next((each.bad_module for each in self.bad if each.bad_module), "")
        place = f"first in {where}" if where else "in the backward pass only"
        return {
            "weights": f"the weights have diverged ({self.weights}), before this step: continue from a checkpoint in"
            " which they had not, with a lower optimizer.lr or a longer lr_schedule.warmup_steps",
            "clip": f"bad clip: what the cache holds for {clips} is extreme or not finite. Look at the video; encode it"
            " in another precision (model.dtype, cache.latents_dtype) or leave it out",
            "overflow": f"overflow: not finite in {self.report.dtype}, finite in {self.dtype}, with sane latents and"
            " weights. Train with model.dtype bf16 or fp32",
            "overflow?": f"most likely an overflow of {self.dtype} ({place}): latents and weights are sane. Replay with"
            " --dtype fp32; if all is finite there, train with model.dtype bf16 or fp32",
            "unexplained": f"not finite {place}, although latents and weights are sane. Please report it",
            "gone": "every sample is finite here. Either the fault is in no single sample, or it was the machine's (an"
            " unstable GPU, a kernel that is not deterministic). Continue from the last checkpoint",
        }[self.kind]

    def __str__(self) -> str:
        report = self.report
        rest = "" if report.measured else f", learning rate {report.lr:g}, gradient norm {report.grad_norm}"
        lines = [
            f"{'measured after step' if report.measured else 'step'} {report.step} of {report.config['output_dir']}:"
            f" samples: {len(self.samples)}, processes: {report.processes}{rest}",
            f"recorded in {report.dtype} on {report.device} ({report.engine})",
            f"replayed in {self.dtype} on {self.device}",
            "weights: "
            + (f"of the step, {self.weights}" if self.has_weights else f"as at step 0, because {report.weights_note}"),
            "",
            *_table(self.samples),
            "",
        ]
        if report.non_finite_gradients:
            names = report.non_finite_gradients
            lines.append(
                f"recorded gradients not finite: {len(names)} of {len(report.gradient_norms)}, {names[-1]} last"
            )
        said = {True: "yes", False: "no", None: "cannot be said (other weights or another dtype)"}[self.reproduced]
        return "\n".join([*lines, f"reproduced: {said}", f"diagnosis: {self.diagnosis}"])


def _same(recorded: float, replayed: float) -> bool:
    if not math.isfinite(recorded) or not math.isfinite(replayed):
        return math.isfinite(recorded) == math.isfinite(replayed)
    return math.isclose(recorded, replayed, rel_tol=SAME)


def _table(samples: tuple[Replayed, ...]) -> list[str]:
    header = ("clip", "timestep", "recorded", "loss", "gradient", "finite", "latents", "first module not finite")
    rows = [
        (
            shown(each.sample.item.clip),
            str(each.sample.timestep),
            f"{each.sample.loss:.4g}",
            f"{each.loss:.4g}",
            f"{each.grad_norm:.4g}",
            "yes" if each.is_finite else "no",
            str(each.latents),
            each.bad_module or f"none; largest output {each.peak:.3g} in {each.peak_module}",
        )
        for each in samples
    ]
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [header, *rows]
    ]
