"""Fine-tune CogVideoX: LoRA and full, from clips and captions to a verified diffusers export.

    from finetune import export, load_config, precompute, train

    config = load_config("run.yaml", ["train.steps=500"])
    precompute(config)
    report = train(config)
    export(report.run_dir)

``import finetune`` costs nothing: a verb loads what it needs when it is called.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.core.version import __version__ as __version__
from finetune.export import export as export
from finetune.precompute import precompute as precompute

if TYPE_CHECKING:
    from finetune.config.schema import RunConfig
    from finetune.trainers.loop import TrainReport

__all__ = ["__version__", "export", "load_config", "precompute", "train"]


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
    from finetune.config.loading import load_config

    return load_config(path, overrides)


def train(config: RunConfig | Mapping[str, Any] | str | Path) -> TrainReport:
    """Train as ``config`` says: fill the cache if need be, continue or begin the run, and save what was learnt.

    Args:
        config: a configuration, the values of one, or its file.

    Raises:
        ConfigError, DataError, CacheError, CheckpointError, ModelError: before any training, with what to mend.
        CacheError: in training, if an entry turned out to be damaged; the steps before it are saved.
        TrainingError: a loss or gradient was not finite, gradient checkpointing did not recompute, or the GPU's memory
            does not hold a step.
        LaunchError: another process of the launch failed or is gone.
    """
    from finetune.trainers.loop import train

    return train(config)
