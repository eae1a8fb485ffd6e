"""A run as its folder tells it: configuration, metrics, measurements, sampled videos."""

from __future__ import annotations

import json
import logging
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from finetune.checkpoint.compare import flat
from finetune.checkpoint.folders import HISTORY, METRICS, Measurement, list_checkpoints, read_history
from finetune.config.schema import RunConfig, load_config
from finetune.core.errors import ConfigError

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SampledVideo:
    """A video that training sampled."""

    step: int
    number: int
    """Of its prompt, among ``validation.samples``."""
    path: Path


@dataclass(frozen=True)
class RunRecord:
    """Everything that a report says of one run."""

    folder: Path
    name: str
    """What tells it from others in a report."""
    config: RunConfig
    metrics: dict[str, list[tuple[int, float]]]
    """By name, as (step, value) in the order of steps."""
    history: tuple[Measurement, ...]
    samples: tuple[SampledVideo, ...]
    checkpoints: tuple[int, ...]
    """Steps whose checkpoint stands."""

    @property
    def step(self) -> int:
        """The last one that anything was recorded for."""
        steps = [rows[-1][0] for rows in self.metrics.values()] + [row.step for row in self.history]
        return max([*steps, *self.checkpoints], default=0)

    def latest(self, name: str) -> float | None:
        """The last value of a metric."""
        rows = self.metrics.get(name)
        return rows[-1][1] if rows else None

    @property
    def changed(self) -> dict[str, Any]:
        """Settings that are not their defaults, dotted."""
        return flat(changed_settings(self.config))


def changed_settings(section: BaseModel) -> dict[str, Any]:
    """The values of a section that are not its defaults, JSON types; ``kind``, which decides them, always stays."""
    values: dict[str, Any] = {}
    plain = section.model_dump(mode="json", exclude_defaults=True)
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            values[name] = changed_settings(value)
        elif name == "kind" or name in plain:
            values[name] = plain.get(name, value)
    return values


def read_runs(folders: Sequence[Path]) -> list[RunRecord]:
    """Read runs, named by as many of their folders' last parts as tell them apart.

    Raises:
        ConfigError: if one is no run's folder.
    """
    places = [folder.resolve().parts for folder in folders]
    depths = range(1, max(map(len, places), default=0) + 1)
    shortest = next((depth for depth in depths if len({place[-depth:] for place in places}) == len({*places})), 1)
    names = [Path(*place[-shortest:]).as_posix() for place in places]
    return [read_run(folder, name) for folder, name in zip(folders, names, strict=True)]


def read_run(folder: Path, name: str = "") -> RunRecord:
    """Read a run's folder.

    Args:
        folder: as training wrote it.
        name: of the run in a report; the folder's where none is given.

    Raises:
        ConfigError: if it is no run's folder.
    """
    if not (folder / "config.yaml").is_file():
        raise ConfigError(
            "there is no run", where=str(folder), fix="give the output_dir of a training, which holds its config.yaml"
        )
    config = load_config(folder / "config.yaml")
    return RunRecord(
        folder=folder,
        name=name or folder.name,
        config=config,
        metrics=_metrics(folder / METRICS),
        history=tuple(read_history(folder / HISTORY)),
        samples=tuple(_samples(folder)),
        checkpoints=tuple(step for step, _ in list_checkpoints(folder)),
    )


def _metrics(path: Path) -> dict[str, list[tuple[int, float]]]:
    """What ``METRICS`` holds; a line that is damaged, as the last one of a killed run, is passed over."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return {}
    series: dict[str, dict[int, float]] = defaultdict(dict)
    damaged = 0
    for line in lines:
        try:
            record = json.loads(line)
            step = int(record.pop("step"))
            for name, value in record.items():
                series[name][step] = float(value)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            damaged += 1
    if damaged:
        _log.warning("%s: %d damaged lines are passed over", path, damaged)
    return {name: sorted(values.items()) for name, values in series.items()}


def _samples(folder: Path) -> Sequence[SampledVideo]:
    found = []
    for path in sorted((folder / "samples").glob("step-*/*.mp4")):
        step, number = re.fullmatch(r"step-(\d+)", path.parent.name), re.match(r"(\d+)-", path.name)
        if step and number:
            found.append(SampledVideo(int(step[1]), int(number[1]), path))
    return found
