"""Functions of the library for a run: its configuration, its plan, the training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from finetune.arguments import checked

if TYPE_CHECKING:
    from finetune.config.schema import RunConfig
    from finetune.planner.plan import Planned
    from finetune.trainers.loop import TrainReport
    from finetune.trainers.lr_find import LrReport
    from finetune.trainers.strength import StrengthReport
    from finetune.trainers.tracking import StepRecord


def load_config(path: str | Path, overrides: str | Iterable[str] | Mapping[str, Any] = ()) -> RunConfig:
    """Read a YAML configuration.

    Args:
        path: the file. Relative paths in it, and in the overrides, start at its folder.
        overrides: assignments such as ``optimizer.lr=2e-4``, applied in order as though the file had said so; the value
            is YAML, and ``data.sources.0.path=clips`` reaches into a list. A single string is one assignment. A mapping
            holds values instead of YAML: ``{"optimizer.lr": 2e-4}``, or nested, ``{"optimizer": {"lr": 2e-4}}``.

    Raises:
        ConfigError: if the file is unreadable or says something that a run cannot be; all faults are reported together,
            each with its line and column.
    """
    from finetune.config.schema import load_config

    return load_config(path, overrides)


@checked
def plan(
    config: RunConfig | Mapping[str, Any] | str | Path,
    *,
    card: str | None = None,
    ram: str | None = None,
    budget: str | None = None,
    device: str | None = None,
    processes: int = 1,
    quantize: bool = False,
    plot: str | Path | None = None,
    exact: bool = False,
    as_json: bool = False,
) -> Planned:
    """Predict a run's memory, phase by phase, from its model's JSON; with ``budget``, choose its memory section first.

    Args:
        config: a configuration, the values of one, or its file.
        card: memory of the GPU, such as ``24GB``; None for the one that is here, if any.
        ram: host memory that the run may take.
        budget: search for the fastest memory section within this much GPU memory.
        device: name of the GPU to reckon seconds for; None for the one that is here, or an A100.
        processes: how many train a whole model each (DDP); the figures are of one of them.
        quantize: whether the search may quantise the base to be faster.
        plot: a PNG to draw the training step's curve into.
        exact: run every block, where two short models would do.
        as_json: a JSON document in place of tables.

    Raises:
        ConfigError: if an amount is none, the configuration does not fit the model, or nothing fits the budget.
        ModelError: if the model's JSON cannot be found or used.
    """
    from finetune.config.schema import as_config
    from finetune.planner.plan import PlanOptions
    from finetune.planner.plan import plan as plan_run

    drawing = None if plot is None else Path(plot)
    options = PlanOptions(card, ram, budget, device, processes, quantize, drawing, exact, as_json)
    return plan_run(as_config(config), options)


@checked
def train(
    config: RunConfig | Mapping[str, Any] | str | Path, *, on_step: Callable[[StepRecord], None] | None = None
) -> TrainReport:
    """Train as ``config`` says: fill the cache if need be, continue or begin the run, and save what was learnt.

    Args:
        config: a configuration, the values of one, or its file.
        on_step: called on the main process after each optimizer step, with its number, losses and times; what it raises
            ends the run as it is.

    Raises:
        ConfigError, DataError, CacheError, CheckpointError, ModelError: before any training, with what to mend.
        CacheError: in training, if an entry turned out to be damaged; the steps before it are saved.
        TrainingError: a loss or gradient was not finite, gradient checkpointing did not recompute, or the GPU's memory
            does not hold a step.
        LaunchError: another process of the launch failed or is gone.
    """
    from finetune.trainers.loop import train

    return train(config, on_step)


@checked
def report(
    runs: str | Path | Sequence[str | Path], output: str | Path | None = None, *, read_clips: bool = True
) -> Path:
    """Write a page of what a run came to, or of several side by side: curves, samples, clips, settings.

    Args:
        runs: a run's folder, or several.
        output: the page; None for ``report.html`` in the run's folder, of several in the working folder.
        read_clips: read the dataset of a single run for pictures of its clips, where no earlier report has.

    Returns:
        The page's path.

    Raises:
        ConfigError: if a folder is no run's, or none is given.
    """
    from finetune.core.errors import ConfigError
    from finetune.reports.report import REPORT, write_report

    folders = [Path(run).expanduser() for run in ([runs] if isinstance(runs, str | Path) else runs)]
    if not folders:
        raise ConfigError("no run is named", where="report()", fix="give a run's folder, or several")
    page = (folders[0] if len(folders) == 1 else Path()) / REPORT if output is None else Path(output).expanduser()
    return write_report(folders, page, read_clips=read_clips)


@checked
def strength(
    source: str | Path,
    *,
    checkpoint: Literal["latest", "best"] = "latest",
    strengths: Sequence[float] = (0.5, 1.5),
    clips: int | None = None,
    device: str | None = None,
    pretrained: str | Path | None = None,
    cache: str | Path | None = None,
) -> StrengthReport:
    """Measure the held-out loss with an adapter at several strengths, and how much it changes each block.

    Args:
        source: a run's folder, or one checkpoint's.
        checkpoint: which of a run's checkpoints.
        strengths: factors on the adapter, from 0 to 10; 0 and 1 are always measured.
        clips: how many at most; None for ``validation.clips``.
        device: where; None for a GPU if there is one.
        pretrained: where the base model is now; None for where the run had it.
        cache: where the cache is now; None for where the run had it.

    Raises:
        ConfigError: if the run trained no LoRA, or a strength makes no sense.
        CheckpointError, ExportError: if there is no such checkpoint, or it is damaged.
        CacheError: if the clips that the run trained on are not in the cache.
        ModelError: if the base model cannot be found.
    """
    from finetune.trainers.strength import StrengthOptions
    from finetune.trainers.strength import strength as measure

    base = None if pretrained is None else str(pretrained)
    where = None if cache is None else Path(cache).expanduser()
    return measure(Path(source).expanduser(), StrengthOptions(checkpoint, strengths, clips, device, base, where))


@checked
def ui(
    folder: str | Path = ".",
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    token: str = "",
    allow: Sequence[str | Path] = (),
    most_upload: str = "1GB",
) -> None:
    """Serve the commands as a page in a browser, until SIGINT or SIGTERM; what it started goes on.

    Args:
        folder: where configurations, clips and runs are; the page reads and writes nothing outside.
        host: the address to listen on. Where other machines can connect, a token is asked for.
        port: to listen on; 0 for a free one.
        token: what a browser has to know; empty for none on this machine, and for a new one elsewhere.
        allow: further folders that may be read and written.
        most_upload: of one request, such as ``500MB``.

    Raises:
        ConfigError: if the extra ``ui`` is missing, a folder is none, an amount is none, or the port is taken.
    """
    from importlib.util import find_spec

    from finetune.core.errors import ConfigError
    from finetune.core.gpu import amount

    if missing := [name for name in ("starlette", "uvicorn", "python_multipart", "psutil") if find_spec(name) is None]:
        fix = "pip install 'cogvideox-finetune[ui]'"
        raise ConfigError(f"the page needs {' and '.join(missing)}", where="finetune ui", fix=fix)
    from finetune.web.access import AccessPolicy
    from finetune.web.server import serve

    policy = AccessPolicy(host, token, amount("--max-upload", most_upload) or 0)
    serve(Path(folder), [Path(other) for other in allow], policy, port)


@checked
def lr_find(
    config: RunConfig | Mapping[str, Any] | str | Path,
    *,
    lowest: float = 1e-6,
    highest: float = 1e-2,
    steps: int = 60,
    every: int = 3,
) -> LrReport:
    """Train a little with a growing learning rate, and see at which the held-out loss falls and at which it breaks.

    Args:
        config: a configuration, the values of one, or its file. Its run is not touched: this one has the folder
            ``lr-find`` in ``output_dir``.
        lowest: learning rate of the first step.
        highest: of the last one.
        steps: optimizer steps.
        every: steps between two measurements.

    Raises:
        ConfigError: if no clip is held out, the numbers make no sense, or an earlier search stands in the folder.
        TrainingError: if it was stopped before it had measured twice.
        Exception: what ``train`` raises.
    """
    from finetune.config.schema import as_config
    from finetune.trainers.lr_find import lr_find as find

    return find(as_config(config), lowest=lowest, highest=highest, steps=steps, every=every)
