"""Held-out loss at fixed clips, timesteps and noise, measured without touching a bit of the training state.

Nothing here draws a random number: the loop hands in ready batches, so two evaluations of the same weights give the
same number, and a difference between two numbers is a difference between weights.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import Field, FiniteFloat, TypeAdapter, ValidationError
from torch import Tensor, nn

from finetune.bands import loss_by_band
from finetune.geometry import BucketField
from finetune.section import MOST_STEPS, Strict
from finetune.types import Batch, RunState

_log = logging.getLogger(__name__)

HISTORY = "heldout.jsonl"
"""In the run's folder: one JSON line per measurement (``step``, ``heldout``, ``trainsubset``, ``by_band``)."""


class SamplePrompt(Strict):
    """One video to sample: what for, from which image, with which noise."""

    prompt: str
    """The text to sample for, as it stands: caption prefix, suffix and trigger word are not added."""
    image: Path | None = None
    """First frame, for image-to-video models; a relative path starts at the configuration file's folder."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Of the noise that sampling starts from: the same at every step, so that only the weights differ."""


def round_folder(run_dir: Path, step: int) -> Path:
    """Where a run's videos sampled after ``step`` optimizer steps stand."""
    return run_dir / "samples" / f"step-{step:08d}"


def sample_name(number: int, sample: SamplePrompt) -> str:
    """The file of one video of a round; ``number`` counts ``ValidationConfig.samples``."""
    return f"{number:02d}-seed{sample.seed}.mp4"


class ValidationConfig(Strict):
    """What is measured and sampled while training, and how often."""

    every: int | None = Field(200, ge=1, le=MOST_STEPS)
    """Optimizer steps between two measurements of the held-out loss, and one after the last step; null for none."""
    at_start: bool = True
    """Measure, and sample, before the first step as well: what the base model does is what the run is compared with."""
    clips: int = Field(8, ge=1, le=1_000_000)
    """At most this many held-out clips are measured, and as many training clips, whose difference is the
    generalisation gap. A measurement takes ``2 x clips x timesteps`` forward passes, a training step about four."""
    timesteps: int = Field(4, ge=1, le=1000)
    """Each clip is measured at this many timesteps, spread evenly over the noise schedule."""
    samples: tuple[SamplePrompt, ...] = ()
    """Videos to sample, each from its prompt (and image) and seed."""
    sample_every: int | None = Field(500, ge=1, le=MOST_STEPS)
    """Optimizer steps between two rounds of sampling, and one after the last step; null for none."""
    num_inference_steps: int = Field(50, ge=1, le=1000)
    """Denoising steps per sampled video."""
    guidance_scale: float = Field(6.0, ge=1, le=1_000)
    """Classifier-free guidance; 1 for none, which halves the time."""
    dynamic_cfg: bool = False
    """Let the guidance grow with the denoising steps, as CogVideoX's demo does with the DPM scheduler."""
    bucket: BucketField | None = None
    """Frames x height x width of the sampled videos; left out: the first of ``data.buckets``."""


@dataclass(frozen=True)
class Measurement:
    """One line of ``HISTORY``: the held-out loss after ``step`` optimizer steps, and the same on training clips."""

    step: int
    heldout: FiniteFloat
    trainsubset: FiniteFloat
    by_band: dict[str, FiniteFloat]
    """Held-out loss by timestep band."""


_MEASUREMENT = TypeAdapter(Measurement)


def read_history(path: Path) -> list[Measurement]:
    """The measurements in a run's ``HISTORY``, oldest first; none where there is no such file.

    Nothing that is computed follows from them, so a damaged line is passed over with a warning that counts it.
    """
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        _log.warning("%s cannot be read, and its measurements are not shown: %s", path, error)
        return []
    rows: dict[int, Measurement] = {}
    damaged = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = _MEASUREMENT.validate_json(line, strict=True)
            rows[row.step] = row
        except ValidationError:
            damaged.append(number)
    if damaged:
        shown = ", ".join(map(str, damaged[:5])) + (", ..." if len(damaged) > 5 else "")
        _log.warning("%s: %d damaged lines are passed over (line %s)", path, len(damaged), shown)
    return [rows[step] for step in sorted(rows)]


def best_of(history: Iterable[Measurement], state: RunState) -> tuple[int, float] | None:
    """The step with the lowest held-out loss, and that loss; None where no step was measured.

    Args:
        history: what was measured; the base model's own loss, at step 0, is passed over.
        state: remembers the best step also where ``HISTORY`` was lost.
    """
    losses = {row.step: row.heldout for row in history if row.step > 0 and math.isfinite(row.heldout)}
    if state.best_step is not None and state.best_heldout_loss is not None:
        losses.setdefault(state.best_step, state.best_heldout_loss)
    return min(losses.items(), key=lambda item: (item[1], item[0]), default=None)


def verdict(history: Sequence[Measurement], best: tuple[int, float]) -> str:
    """Which step was best by held-out loss, and what became of the gap to the training clips since.

    Args:
        history: oldest first, not empty.
        best: as ``best_of`` gives it.
    """
    rows = {row.step: row for row in history}
    last, (step, loss) = history[-1], best
    if loss >= last.heldout:
        text = f"best by held-out loss: the last step measured, {last.step}, with {last.heldout:.4f}"
    else:
        text = f"best by held-out loss: step {step} with {loss:.4f}; step {last.step} has {last.heldout:.4f}"
        if then := rows.get(step):
            gaps = [row.heldout - row.trainsubset for row in (then, last)]
            text += (
                f"\nsince then the gap (held-out minus training clips) went from {gaps[0]:+.4f} to {gaps[1]:+.4f}: "
                + (
                    "training clips went on improving, which is memorising"
                    if last.trainsubset < then.trainsubset
                    else "training clips got worse as well, so rather a smaller learning rate than fewer steps"
                )
            )
    if 0 in rows and rows[0].heldout <= loss:
        text += f"\nno step was better than the base model, with {rows[0].heldout:.4f}"
    return text


Pair = tuple[float, int]
"""Loss and timestep of one sample."""


@dataclass(frozen=True)
class HeldoutLoss:
    """One evaluation: the mean over every (clip, timestep) pair, and by timestep band."""

    mean: float
    by_band: dict[str, float]
    losses: tuple[float, ...]
    """Of every (clip, timestep) pair, in the order of the processes and of their batches."""

    @property
    def is_finite(self) -> bool:
        """Whether every loss is."""
        return all(math.isfinite(loss) for loss in self.losses)


def fixed_timesteps(count: int, num_train_timesteps: int) -> tuple[int, ...]:
    """``count`` timesteps at the midpoints of equal parts of the schedule, ascending: 4 of 1000 are 125, 375, 625, 875.

    Midpoints, so that the mean over them estimates the mean over all timesteps, which is what training minimises.

    Raises:
        ValueError: if more are wanted than there are.
    """
    if not 1 <= count <= num_train_timesteps:
        raise ValueError(f"{count} of {num_train_timesteps} timesteps")
    return tuple((2 * part + 1) * num_train_timesteps // (2 * count) for part in range(count))


def evaluate(
    loss_of: Callable[[Batch], Tensor],
    batches: Iterable[Batch],
    num_train_timesteps: int,
    *,
    gather: Callable[[list[Pair]], list[Pair]] | None = None,
) -> HeldoutLoss:
    """Mean loss over ready batches, summed exactly, so that neither their order nor their size matters.

    Args:
        loss_of: per-sample losses [B] of a batch; call ``evaluate`` inside ``training_state_untouched``.
        batches: fixed clips at fixed timesteps with fixed noise; an iterable, so that they need not be in memory at
            once. With several processes, this one's share, which may be empty.
        num_train_timesteps: length of the schedule, for the bands.
        gather: joins the (loss, timestep) lists of all processes; None for one process.

    Raises:
        ValueError: if no process has anything to measure, or a loss is not [B].
    """
    pairs: list[Pair] = []
    for batch in batches:
        losses = loss_of(batch)
        if losses.shape != batch.timesteps.shape:
            raise ValueError(f"loss_of gave {tuple(losses.shape)} for {len(batch.timesteps)} samples")
        pairs += zip(losses.detach().to("cpu", torch.float64).tolist(), batch.timesteps.tolist(), strict=True)
    if gather is not None:
        pairs = gather(pairs)
    if not pairs:
        raise ValueError("there is no batch to measure")
    every_loss = [loss for loss, _ in pairs]
    return HeldoutLoss(
        mean=math.fsum(every_loss) / len(every_loss),
        by_band=loss_by_band(every_loss, [timestep for _, timestep in pairs], num_train_timesteps),
        losses=tuple(every_loss),
    )


@contextmanager
def training_state_untouched(*modules: nn.Module) -> Iterator[None]:
    """Measure or sample inside; on leaving, also through an exception, training goes on as if nothing had happened.

    Inside, ``modules`` are in eval mode (LoRA dropout off) and no gradient is recorded. Afterwards the train/eval flag
    of every submodule is what it was, and so is the state of the global random generators of the CPU and of every CUDA
    device. Parameters, buffers and gradients are not copied: what runs inside must not write to them.
    """
    flags = {module: module.training for root in modules for module in root.modules()}
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        try:
            for root in modules:
                root.eval()
            yield
        finally:
            # Flag by flag: `train()` on the root would also wake a submodule that was in eval mode on purpose.
            for module, training in flags.items():
                module.training = training
