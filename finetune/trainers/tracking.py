"""What a run tells of itself: numbers of each step over all processes, to its folder and to a tracker.

``docs/training.md`` lists the names of the metrics. A step in them is the number of completed optimizer steps.
"""

from __future__ import annotations

import json
import logging
import math
import shlex
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.checkpoint.compare import flat
from finetune.checkpoint.folders import METRICS
from finetune.config.schema import RunConfig, TrackingConfig
from finetune.core.errors import ConfigError, first_line
from finetune.core.files import atomic_write_bytes, from_here
from finetune.core.text import shown
from finetune.inference.videos import Frames, gif_bytes

_log = logging.getLogger(__name__)

# ----------------------------------------------------------------------------------------------------- timestep buckets

TIMESTEP_BUCKETS = 4
"""How many parts the schedule is cut into. The loss at a low timestep (little noise, fine detail) and at a high one
(almost pure noise, layout) differ several-fold: one mean over random timesteps is mostly the luck of the draw."""


def timestep_bucket(timestep: int, num_train_timesteps: int) -> str:
    """The label of the bucket that holds ``timestep``, such as ``t000-249``; labels sort in order of time.

    Raises:
        ValueError: for a timestep outside 0 ... ``num_train_timesteps - 1``.
    """
    if not 0 <= timestep < num_train_timesteps:
        raise ValueError(f"timestep {timestep} is not in 0..{num_train_timesteps - 1}")
    index = timestep * TIMESTEP_BUCKETS // num_train_timesteps
    # ceil, so that buckets that do not divide the schedule still tile it
    first, end = (-(-edge * num_train_timesteps // TIMESTEP_BUCKETS) for edge in (index, index + 1))
    digits = len(str(num_train_timesteps - 1))
    return f"t{first:0{digits}d}-{end - 1:0{digits}d}"


def loss_by_timestep_bucket(
    losses: Sequence[float], timesteps: Sequence[int], num_train_timesteps: int
) -> dict[str, float]:
    """Mean loss per bucket, in order of time; a bucket that no sample fell into is absent."""
    grouped: dict[str, list[float]] = {}
    for loss, timestep in zip(losses, timesteps, strict=True):
        grouped.setdefault(timestep_bucket(timestep, num_train_timesteps), []).append(loss)
    return {bucket: mean(members) for bucket, members in sorted(grouped.items())}


def mean(losses: Sequence[float]) -> float:
    """Summed exactly, so that neither the order of samples nor their split over processes moves the last digit."""
    return math.fsum(losses) / len(losses)


# ------------------------------------------------------------------------------------------- one step, of all processes


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
    grad_norm: float = 0.0
    """Of this process's gradient, before clipping."""

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
    prior: tuple[bool, ...] = ()
    """Which samples are for prior preservation: their loss is the distance to the base model's prediction. Empty where
    none is."""

    @property
    def loss(self) -> float:
        """Mean over the samples of the step, each counted once, without those for prior preservation; NaN without
        others.
        """
        losses, _ = self._of(prior=False)
        return mean(losses) if losses else math.nan

    @property
    def prior_loss(self) -> float:
        """Mean over the samples for prior preservation; NaN without any."""
        losses, _ = self._of(prior=True)
        return mean(losses) if losses else math.nan

    def _of(self, *, prior: bool) -> tuple[list[float], list[int]]:
        """Losses and timesteps of one kind of samples."""
        flags = self.prior or (False,) * len(self.losses)
        rows = [row for row, flag in enumerate(flags) if flag == prior]
        return [self.losses[row] for row in rows], [self.timesteps[row] for row in rows]

    def shown_losses(self, num_train_timesteps: int) -> dict[str, float]:
        """The metrics ``train/loss``, the same by timestep bucket, and ``train/prior_loss``: those that there are."""
        by_bucket = loss_by_timestep_bucket(*self._of(prior=False), num_train_timesteps)
        metrics = {"train/loss": self.loss, **{f"train/loss/{bucket}": loss for bucket, loss in by_bucket.items()}}
        metrics["train/prior_loss"] = self.prior_loss
        return {name: loss for name, loss in metrics.items() if not math.isnan(loss)}


_PADDING, _FLAGS = -2.0, -1.0
"""In place of a timestep: rows that hold no sample, and the row with what a process has to tell."""
_STOP, _FAULT = 1, 2


@dataclass
class StepMetrics:
    """Collects one process's part of a step and exchanges it in a single collective.

    Args:
        rows: most samples a process can have in a step (accumulation x batch size); shorter parts are padded, because a
            collective needs equal shapes.
        gather: concatenates a [rows + 1, 2] tensor over processes, such as ``accelerate.utils.gather``.
        counts: whether this process's samples are told; not those that another process has too.
    """

    rows: int
    gather: Callable[[Tensor], Tensor]
    counts: bool = True
    _losses: list[Tensor] = field(default_factory=list)
    _timesteps: list[Tensor] = field(default_factory=list)

    def add(self, losses: Tensor, timesteps: Tensor) -> None:
        """Note one pass: per-sample losses [B] and timesteps [B]. Nothing is read from the device yet."""
        self._losses.append(losses.detach().double())
        self._timesteps.append(timesteps.double())

    def exchange(self, norm: Tensor | float = 0.0, *, stop: bool = False, fault: bool = False) -> GatheredStep:
        """Share the step with every process. This is where a step waits for the device, once, and it has to: a step
        that is not finite is found here, before it is taken.

        Args:
            norm: of this process's gradient, which is read along if it is on the device.
            stop: this process was asked to stop.
            fault: this process cannot go on after this step.
        """
        own = torch.stack([torch.cat(self._losses), torch.cat(self._timesteps)], dim=1)
        table = own.new_full((self.rows + 1, 2), _PADDING)
        if self.counts:
            table[: len(own)] = own
        # Numbers one by one: a tensor of the host's would be copied, and waited for.
        table[-1, 0], table[-1, 1] = float(_STOP * stop + _FAULT * fault), _FLAGS
        everyone = self.gather(table)
        norms = torch.zeros_like(everyone[:1]) + norm
        *rows, (grad_norm, _) = torch.cat([everyone, norms]).tolist()
        samples = [(loss, int(timestep)) for loss, timestep in rows if timestep >= 0]
        flags = [int(value) for value, kind in rows if kind == _FLAGS]
        return GatheredStep(
            losses=tuple(loss for loss, _ in samples),
            timesteps=tuple(timestep for _, timestep in samples),
            stop=any(flag & _STOP for flag in flags),
            fault=any(flag & _FAULT for flag in flags),
            grad_norm=grad_norm,
        )

    def reset(self) -> None:
        """Forget the step, or what there is of one that is begun again."""
        self._losses.clear()
        self._timesteps.clear()


# -------------------------------------------------------------------------------------------------------------- tracker

PROJECT = "cogvideox-finetune"
"""Where a tracker keeps runs by project."""

EVENTS = "tensorboard"
"""Folder of TensorBoard's event files inside the run's folder."""

_RUN_NAME = {"wandb": "name", "trackio": "name", "mlflow": "run_name", "swanlab": "experiment_name"}
"""How a tracker's constructor calls the name of one run."""


def tensorboard_command(run_dir: Path) -> str:
    """What to type to see the curves and videos of a run."""
    return shlex.join(["tensorboard", "--logdir", from_here(run_dir)])


def hparams(settings: Mapping[str, Any]) -> dict[str, str | int | float | bool]:
    """A nested configuration as TensorBoard's hparams take it: it crashes the run on anything but text, numbers and
    booleans, such as a path or a list; those become text.
    """

    def plain(value: Any) -> str | int | float | bool:
        if isinstance(value, list | tuple):
            return ", ".join(map(str, value))
        return "null" if value is None else value if isinstance(value, str | int | float) else str(value)

    return {name: plain(value) for name, value in flat(settings).items() if value != {}}


def require_tracker(config: RunConfig, accelerator: Any) -> None:
    """Refuse a tracker that accelerate has left out.

    Raises:
        ConfigError: if its package is not installed.
    """
    kind = config.tracking.kind
    if kind != "none" and kind not in {str(name) for name in accelerator.log_with}:
        raise ConfigError(
            f"{kind} is not installed",
            where=config.where("tracking.kind"),
            fix=f"pip install {kind.replace('_', '-')}, or set tracking.kind: tensorboard",
        )


class MetricsFile:
    """Every record of metrics as a line of JSON in the run's folder, for reports and programs.

    A run that goes on keeps the lines up to the step it continues from. The first error is a warning, and the last.

    Args:
        path: the file.
        resumed_step: completed steps of the checkpoint that the run continues; 0 for a new run.
    """

    def __init__(self, path: Path, *, resumed_step: int = 0) -> None:
        self._path = path
        self._active = True
        try:
            lines = path.read_bytes().splitlines(keepends=True) if resumed_step and path.exists() else []
            kept = [line for line in lines if _step_of(line) is not None and (_step_of(line) or 0) <= resumed_step]
            atomic_write_bytes(path, b"".join(kept))
        except OSError as error:
            self._failed(error)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append a record; what is not finite is left out."""
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        if self._active and finite:
            try:
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"step": step, **finite}) + "\n")
            except OSError as error:
                self._failed(error)

    def _failed(self, error: OSError) -> None:
        self._active = False
        _log.warning("metrics are no longer written to %s; training goes on: %s", self._path.name, error)


def _step_of(line: bytes) -> int | None:
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return step if isinstance(step, int) else None


class Tracker:
    """Writes metrics and videos of one run to its folder, and through accelerate; does nothing on other processes.

    A full disk, a lost network drive or a service that does not answer must not end a run of days: the first error of
    the tracker is printed as a warning, and from then on nothing more is tracked.

    Args:
        config: the section.
        accelerator: made with ``config.accelerator_options(run_dir)``.
        settings: the resolved configuration, recorded once, at the start of a new run.
        resumed_step: completed steps of the checkpoint that this run continues; 0 for a new run. What an interrupted
            run logged after it is then hidden by TensorBoard, so that no step shows twice.
    """

    def __init__(
        self, config: TrackingConfig, accelerator: Any, *, settings: Mapping[str, Any], resumed_step: int = 0
    ) -> None:
        self._kind = config.kind
        self._accelerator = accelerator
        main = bool(accelerator.is_main_process)
        self._active = config.kind != "none" and main
        self._file = MetricsFile(Path(accelerator.project_dir) / METRICS, resumed_step=resumed_step) if main else None
        self._thread_hook: Callable[[threading.ExceptHookArgs], object] = threading.excepthook
        if self._active:
            threading.excepthook = self._thread_failed
            self._guarded(lambda: self._start(settings, resumed_step))

    def _start(self, settings: Mapping[str, Any], resumed_step: int) -> None:
        run_name = Path(self._accelerator.project_dir).name
        options: dict[str, dict[str, Any]] = {
            # TensorBoard then hides what earlier event files in this folder say of later steps.
            "tensorboard": {"purge_step": resumed_step + 1 if resumed_step else 0},
            **{kind: {name: run_name} for kind, name in _RUN_NAME.items()},
        }
        self._accelerator.init_trackers(
            EVENTS if self._kind == "tensorboard" else PROJECT,
            # Once per run: each record of hparams is a run of its own in TensorBoard's list.
            config=hparams(settings) if resumed_step == 0 else None,
            init_kwargs=options,
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record metrics at ``step`` (completed optimizer steps)."""
        if metrics and self._file is not None:
            self._file.write(step, metrics)
            self._guarded(lambda: self._accelerator.log(dict(metrics), step=step))

    def log_video(self, tag: str, frames: Frames, step: int, fps: float) -> None:
        """Record a video, uint8 [F, H, W, 3], as an animated GIF, which TensorBoard's Images tab plays.

        TensorBoard's own ``add_video`` does the same through moviepy, a dependency that this avoids. Other trackers
        have no form for it in common; the files are in the run's folder.
        """
        if self._kind == "tensorboard":
            self._guarded(lambda: self._write_gif(" ".join(shown(tag).split()), frames, step, fps))

    def _write_gif(self, tag: str, frames: Frames, step: int, fps: float) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        image = Summary.Image(
            height=frames.shape[1], width=frames.shape[2], colorspace=3, encoded_image_string=gif_bytes(frames, fps)
        )
        writer = self._accelerator.get_tracker("tensorboard", unwrap=True)
        writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)
        writer.flush()

    def close(self) -> None:
        """Flush and close; safe to call twice."""
        self._guarded(lambda: [tracker.finish() for tracker in self._accelerator.trackers])
        if threading.excepthook == self._thread_failed:
            threading.excepthook = self._thread_hook

    def _guarded(self, action: Callable[[], object]) -> None:
        if not self._active:
            return
        try:
            action()
        except Exception as error:
            self._active = False
            _log.warning("metrics are no longer written to %s; training goes on: %s", self._kind, first_line(error))

    def _thread_failed(self, failure: threading.ExceptHookArgs) -> None:
        """Print no traceback of a failed write: TensorBoard's thread leaves its error to the next call."""
        if "tensorboard." not in type(failure.thread).__module__:
            self._thread_hook(failure)
