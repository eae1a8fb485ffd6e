"""Timestep bands: the same cut of the noise schedule for the training loss, the held-out loss and every chart.

The loss at a low timestep (little noise, fine detail) and at a high one (almost pure noise, layout) differ
several-fold, so one mean over random timesteps is mostly the luck of the draw. By band, a curve says what is learnt.
"""

from __future__ import annotations

import logging
import math
import shlex
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from finetune.config.schema import TrackingConfig
from finetune.core.files import from_here
from finetune.core.text import shown
from finetune.inference.videos import Frames, gif_bytes

TIMESTEP_BUCKETS = 4
"""How many bands the schedule is cut into."""


def timestep_bucket(timestep: int, num_train_timesteps: int, bands: int = TIMESTEP_BUCKETS) -> str:
    """The label of the band that holds ``timestep``, such as ``t000-249``; labels sort in order of time.

    Raises:
        ValueError: for a timestep outside 0 ... ``num_train_timesteps - 1``.
    """
    if not 0 <= timestep < num_train_timesteps:
        raise ValueError(f"timestep {timestep} is not in 0..{num_train_timesteps - 1}")
    index = timestep * bands // num_train_timesteps
    # The first t with t * bands // T == index; ceil, so that bands that do not divide T still tile it.
    first, end = (-(-edge * num_train_timesteps // bands) for edge in (index, index + 1))
    digits = len(str(num_train_timesteps - 1))
    return f"t{first:0{digits}d}-{end - 1:0{digits}d}"


def loss_by_timestep_bucket(
    losses: Sequence[float], timesteps: Sequence[int], num_train_timesteps: int, bands: int = TIMESTEP_BUCKETS
) -> dict[str, float]:
    """Mean loss per band, in order of time; a band no sample fell into is absent.

    Args:
        losses: one per sample.
        timesteps: one per sample, in the same order.
        num_train_timesteps: length of the schedule.
        bands: how many bands.
    """
    grouped: dict[str, list[float]] = {}
    for loss, timestep in zip(losses, timesteps, strict=True):
        grouped.setdefault(timestep_bucket(timestep, num_train_timesteps, bands), []).append(loss)
    # fsum is exact, so neither the order of samples nor their split over processes moves the last digit.
    return {band: math.fsum(members) / len(members) for band, members in sorted(grouped.items())}


# -------- What one optimizer step was like, over all processes: losses by sample, and what any of them has to tell
# the others.
#
# Leaf: arithmetic on plain tensors, so that the loop keeps to what happens and this keeps to what it amounted to.

_PADDING = -2.0

_FLAGS = -1.0

_STOP, _FAULT = 1, 2
"""Bits of the row that stands under ``_FLAGS``."""


@dataclass(frozen=True)
class GatheredStep:
    """What all processes report of a step before it is taken: samples by rank, and in each rank's own order."""

    losses: tuple[float, ...]
    """One per sample."""
    timesteps: tuple[int, ...]
    """One per sample."""
    stop: bool
    """Whether any process was asked to stop."""
    fault: bool
    """Whether any process cannot go on after this step."""

    def is_finite(self, grad_norm: float) -> bool:
        """Whether the step may be taken: every loss, and the norm of the gradient, is a number."""
        return math.isfinite(grad_norm) and all(math.isfinite(loss) for loss in self.losses)


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step that was taken, over all processes."""

    step: int
    """Completed optimizer steps, this one included."""
    losses: tuple[float, ...]
    """One per sample of the step, by rank, and in each rank's own order."""
    timesteps: tuple[int, ...]
    """One per sample, in the same order."""
    grad_norm: float
    """Global L2 norm of the gradient, before clipping."""
    lr: float
    samples_seen: int
    """By the whole run so far."""
    s_per_step: float
    """Seconds this step took on the main process."""
    data_wait_s: float
    """Seconds of them in which the main process waited for a batch."""
    peak_gib: float
    """Most memory the main process has held: allocated on its GPU, or resident where there is none."""

    @property
    def loss(self) -> float:
        """Mean over the samples of the step, each counted once."""
        return math.fsum(self.losses) / len(self.losses)


@dataclass
class StepMetrics:
    """Collects one process's part of a step and exchanges it in a single collective.

    Args:
        rows: most samples a process can have in a step (accumulation x batch size); shorter parts are padded, because a
            collective needs equal shapes.
        gather: concatenates a [rows + 1, 2] tensor over processes, such as ``Accelerator.gather``.
    """

    rows: int
    gather: Callable[[Tensor], Tensor]
    _losses: list[Tensor] = field(default_factory=list)
    _timesteps: list[Tensor] = field(default_factory=list)

    def add(self, losses: Tensor, timesteps: Tensor) -> None:
        """Note one pass: per-sample losses [B] and timesteps [B]. Nothing is read from the device yet."""
        self._losses.append(losses.detach().double())
        self._timesteps.append(timesteps.double())

    def exchange(self, *, stop: bool = False, fault: bool = False) -> GatheredStep:
        """Share the step with every process. This is where a step waits for the device, once.

        Args:
            stop: this process was asked to stop.
            fault: this process cannot go on after this step.
        """
        mine = torch.stack([torch.cat(self._losses), torch.cat(self._timesteps)], dim=1)
        table = mine.new_full((self.rows + 1, 2), _PADDING)
        table[: len(mine)] = mine
        table[-1] = torch.tensor([_STOP * stop + _FAULT * fault, _FLAGS], dtype=mine.dtype)
        every = self.gather(table).tolist()
        samples = [(loss, int(timestep)) for loss, timestep in every if timestep >= 0]
        flags = [int(value) for value, kind in every if kind == _FLAGS]
        return GatheredStep(
            losses=tuple(loss for loss, _ in samples),
            timesteps=tuple(timestep for _, timestep in samples),
            stop=any(flag & _STOP for flag in flags),
            fault=any(flag & _FAULT for flag in flags),
        )

    def reset(self) -> None:
        """Forget the step, or what there is of one that is begun again."""
        self._losses.clear()
        self._timesteps.clear()


# -------- Metrics to TensorBoard (through accelerate) and to the console; on the main process only.
#
# Names in use: ``train/loss`` (mean over processes and micro-batches), ``train/loss/t000-249`` ... (by timestep band),
# ``train/grad_norm`` (before clipping), ``train/lr``, ``train/samples_seen``, ``perf/s_per_step``, ``perf/data_wait_s``
# (time the device waited for a batch), ``perf/peak_gib``, ``perf/predicted_peak_gib`` (at the end of a run on one GPU),
# ``perf/oom_notches`` (notches gone along the memory plan, where a step ran out of memory), ``train/epoch`` and
# ``train/samples_in_epoch`` (as an epoch ends); ``heldout/loss``, ``heldout/loss/t000-249`` ..., ``trainsubset/loss``
# and
# ``heldout/gap`` (held-out minus training subset: it grows when the run memorises). Steps are completed optimizer
# steps.

_log = logging.getLogger(__name__)

RUN_NAME = "tensorboard"
"""Folder of the event files inside the run's folder."""


def tensorboard_command(run_dir: Path) -> str:
    """What to type to see the curves and videos of a run."""
    return shlex.join(["tensorboard", "--logdir", from_here(run_dir)])


def flatten_settings(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str | int | float | bool]:
    """A nested configuration as ``{"optimizer.lr": 1e-4}``.

    TensorBoard's hparams take only text, numbers and booleans and crash the run on anything else, such as a path or a
    list; those become text here.
    """
    flat: dict[str, str | int | float | bool] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= flatten_settings(value, f"{name}.")
        elif isinstance(value, str | int | float):
            flat[name] = value
        elif isinstance(value, list | tuple):
            flat[name] = ", ".join(str(member) for member in value)
        else:
            flat[name] = "null" if value is None else str(value)
    return flat


class Tracker:
    """Writes metrics and videos of one run to TensorBoard; does nothing on other processes, or with ``kind: none``.

    A full disk or a lost network drive must not end a run of days: the first error of the file system is printed as a
    warning, and from then on nothing more is tracked. Events are written by a thread of TensorBoard's; what fails there
    comes to light at the next call or at ``close``. Anything else is a bug and is raised.

    Args:
        config: the section.
        accelerator: made with ``config.accelerator_options(run_dir)``.
        settings: the resolved configuration, recorded once, at the start of a new run.
        resumed_step: completed steps of the checkpoint that this run continues; 0 for a new run. What an interrupted
            run logged after it is then hidden by TensorBoard, so that no step shows twice.

    Raises:
        ValueError: if the accelerator was made without the options.
    """

    def __init__(
        self, config: TrackingConfig, accelerator: Any, *, settings: Mapping[str, Any], resumed_step: int = 0
    ) -> None:
        self._accelerator = accelerator
        self._active = config.kind != "none" and bool(accelerator.is_main_process)
        self._hook: Callable[[threading.ExceptHookArgs], object] = threading.excepthook
        if not self._active:
            return
        if config.kind not in {str(backend) for backend in accelerator.log_with}:
            raise ValueError("make the Accelerator with TrackingConfig.accelerator_options()")
        threading.excepthook = self._thread_failed
        self._guarded(lambda: self._start(settings, resumed_step))

    def _start(self, settings: Mapping[str, Any], resumed_step: int) -> None:
        self._accelerator.init_trackers(
            RUN_NAME,
            # Once per run: each record of hparams is a run of its own in TensorBoard's list.
            config=flatten_settings(settings) if resumed_step == 0 else None,
            # TensorBoard then hides what earlier event files in this folder say of later steps.
            init_kwargs={"tensorboard": {"purge_step": resumed_step + 1 if resumed_step else 0}},
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record metrics at ``step`` (completed optimizer steps)."""
        if self._active and metrics:
            self._guarded(lambda: self._accelerator.log(dict(metrics), step=step))

    def log_video(self, tag: str, frames: Frames, step: int, fps: float) -> None:
        """Record a video, uint8 [F, H, W, 3], as an animated GIF, which the Images tab plays.

        TensorBoard's own ``add_video`` does the same through moviepy, a dependency that this avoids.
        """
        if not self._active:
            return
        from tensorboard.compat.proto.summary_pb2 import Summary

        image = Summary.Image(
            height=frames.shape[1], width=frames.shape[2], colorspace=3, encoded_image_string=gif_bytes(frames, fps)
        )
        summary = Summary(value=[Summary.Value(tag=" ".join(shown(tag).split()), image=image)])
        writer = self._accelerator.get_tracker("tensorboard", unwrap=True)

        def write() -> None:
            writer.file_writer.add_summary(summary, step)
            writer.flush()

        self._guarded(write)

    def close(self) -> None:
        """Flush and close the event file; safe to call twice."""
        if self._active:
            self._guarded(lambda: self._accelerator.get_tracker("tensorboard", unwrap=True).close())
        if threading.excepthook == self._thread_failed:
            threading.excepthook = self._hook

    def _guarded(self, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:
            if not _of_the_disk(error):
                raise
            self._active = False
            _log.warning("metrics are no longer written to TensorBoard; training goes on: %s", error)

    def _thread_failed(self, failure: threading.ExceptHookArgs) -> None:
        """Print no traceback of what ``_guarded`` will tell in a line: the thread leaves its error to the next call."""
        writer = "tensorboard." in type(failure.thread).__module__
        if not (writer and failure.exc_value is not None and _of_the_disk(failure.exc_value)):
            self._hook(failure)


def _of_the_disk(error: BaseException) -> bool:
    """Whether the file system failed; where TensorFlow is installed TensorBoard writes through it, with its errors."""
    return isinstance(error, OSError) or type(error).__module__.startswith("tensorflow.")


class Console:
    """One progress line: rewritten after every step on a terminal, printed at intervals elsewhere.

    Args:
        total_steps: optimizer steps of the whole run.
        first_step: steps completed before this process began.
        interval_s: least seconds between two lines where ``stream`` is no terminal.
        stream: where to print; None is standard output.
        enabled: False on every process but the main one.
        clock: seconds from any origin.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        first_step: int = 0,
        interval_s: float = 10.0,
        stream: TextIO | None = None,
        enabled: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total = total_steps
        self._first = first_step
        self._interval_s = interval_s
        self._stream = stream or sys.stdout
        self._enabled = enabled
        self._clock = clock
        self._terminal = self._stream.isatty()
        self._origin: tuple[int, float] | None = None
        self._last_line_s: float | None = None
        self._open_line = False

    def step(self, record: StepRecord) -> None:
        """Show a step that is complete."""
        step, now = record.step, self._clock()
        if self._origin is None:
            # The first step is slow (allocator, kernel selection), so the estimate starts after it.
            self._origin = (step, now)
        if not self._enabled or not self._is_due(step, now):
            return
        parts = [
            f"step {step:>{len(str(self._total))}}/{self._total}",
            f"loss {record.loss:.4f}",
            f"lr {record.lr:.2e}",
        ]
        parts += [f"{record.s_per_step:.2f} s/step", f"peak {record.peak_gib:.2f} GiB"]
        if (left_s := self._left_s(step, now)) is not None:
            parts.append(f"ETA {duration(left_s)}")
        self._write("  ".join(parts))
        self._last_line_s = now

    def _is_due(self, step: int, now: float) -> bool:
        if self._terminal or self._last_line_s is None or step >= self._total:
            return True
        return now - self._last_line_s >= self._interval_s

    def _left_s(self, step: int, now: float) -> float | None:
        if self._origin is None or step <= self._origin[0] or step >= self._total:
            return None
        return (now - self._origin[1]) / (step - self._origin[0]) * (self._total - step)

    def _write(self, line: str) -> None:
        if self._terminal:
            # A line wider than the terminal wraps, and a wrapped line cannot be rewritten.
            width = shutil.get_terminal_size().columns - 1
            self._stream.write(f"\r{line[:width]}\x1b[K")
            self._open_line = True
        else:
            self._stream.write(line + "\n")
        self._stream.flush()

    def note(self, text: str) -> None:
        """Print whole lines without tearing the progress line."""
        if self._enabled:
            self.close()
            self._stream.write(text + "\n")
            self._stream.flush()

    def close(self) -> None:
        """End a progress line that is still open."""
        if self._open_line:
            self._stream.write("\n")
            self._stream.flush()
            self._open_line = False


def duration(seconds: float) -> str:
    """``45s``, ``7m 38s`` or ``3h 02m``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
