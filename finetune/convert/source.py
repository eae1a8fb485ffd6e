"""Which weights an export is made of: from a run's folder or one checkpoint to verified tensors and their history."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from finetune.checkpoint.folders import FOLDER, checkpoint_path, list_checkpoints, step_folders
from finetune.checkpoint.load import load_checkpoint
from finetune.checkpoint.validation_history import HISTORY, Measurement, best_of, read_history
from finetune.config.schema import RunConfig
from finetune.core.errors import CacheError, CheckpointError, ExportError
from finetune.core.types import RunState
from finetune.datasets.cache import Cache
from finetune.methods.lora import LoraMethod


@dataclass(frozen=True)
class DataSummary:
    """What a run was trained on, as its cache remembers it."""

    clips: int
    heldout: int
    by_bucket: dict[str, int]
    """Training clips per bucket."""
    captions: tuple[str, ...]
    """A few distinct captions, as they were encoded."""


@dataclass(frozen=True)
class Source:
    """A checkpoint to export, read and verified."""

    checkpoint: Path
    run_dir: Path | None
    """The run's folder; None where the checkpoint was moved out of it."""
    config: RunConfig
    """Of the run, with the base model where it is now."""
    trained_on: str
    """The base model as the run had it."""
    revision: str | None
    """Which commit of it, where it is on the hub."""
    state: RunState
    tensors: Mapping[str, Tensor]
    """The chosen weights by the method's names."""
    weights: Literal["raw", "ema"]
    measured: Literal["raw", "ema"] = "raw"
    """The weights that the run measured and sampled with: the average, if it kept one."""

    @property
    def lora(self) -> bool:
        """Whether the run trained an adapter, not the whole transformer."""
        return isinstance(self.config.method, LoraMethod)

    @cached_property
    def history(self) -> dict[int, Measurement]:
        """What the run measured, by step."""
        return {row.step: row for row in read_history(self.run_dir / HISTORY)} if self.run_dir else {}

    @property
    def heldout(self) -> tuple[float | None, float | None]:
        """Held-out loss before the first step and at the exported one, as far as they were measured."""
        losses = {step: row.heldout for step, row in self.history.items()}
        return losses.get(0), losses.get(self.state.step) if self.state.step else None

    @property
    def better(self) -> str:
        """The checkpoint with a lower held-out loss that stands in the run's folder, as a note; empty without one."""
        standing = dict(list_checkpoints(self.run_dir)) if self.run_dir else {}
        best = best_of((row for step, row in self.history.items() if step in standing), self.state)
        own = self.heldout[1]
        if (
            best is None
            or best[0] not in standing
            or best[0] == self.state.step
            or (own is not None and best[1] >= own)
        ):
            return ""
        newest = self.state.step == max(standing) and self.state.best_step == best[0]
        command = [str(self.run_dir), "--checkpoint", "best"] if newest else [str(standing[best[0]])]
        return (
            f"step {best[0]} has a lower held-out loss, {best[1]:.4f}; step {self.state.step}"
            + (" was not measured" if own is None else f" has {own:.4f}")
            + f": {shlex.join(['finetune', 'export', *command])}"
        )

    @cached_property
    def data(self) -> DataSummary | None:
        """What the run was trained on; None where its cache is gone."""
        root = self.config.cache.dir
        if not (root / "manifests").is_dir():
            return None
        try:
            contents = [content for _, content in Cache(root).manifests()]
        except CacheError:  # an export must not fail for a cache that it does not need
            return None
        for content in contents:
            if content.get("digest") == self.state.cache_digest:
                return _summary(content["items"])
        return None


def _summary(items: list[dict[str, Any]]) -> DataSummary:
    training = [item for item in items if not item["holdout"]]
    buckets: dict[str, int] = {}
    for item in training:
        buckets[item["bucket"]] = buckets.get(item["bucket"], 0) + 1
    captions = dict.fromkeys(item["caption"] for item in training)
    return DataSummary(len(training), len(items) - len(training), dict(sorted(buckets.items())), tuple(captions)[:5])


def default_folder(checkpoint: Path, name: str) -> Path:
    """Where an export goes unless told otherwise: in the run's folder, or beside a checkpoint without one."""
    run_dir = _run_of(checkpoint)
    return checkpoint.with_name(f"{checkpoint.name}-{name}") if run_dir is None else run_dir / name


def _run_of(checkpoint: Path) -> Path | None:
    return checkpoint.parent.parent if checkpoint.parent.name == FOLDER else None


def find_source(path: Path, weights: Literal["auto", "ema", "raw"], pretrained: str | None) -> Source:
    """Read a checkpoint that is to be exported.

    Args:
        path: its folder, as ``checkpoint_of`` finds it.
        weights: the moving average, the trained weights, or ``auto``: the average if there is one.
        pretrained: where the base model is now; None for where the run had it.

    Raises:
        CheckpointError: if it is no complete checkpoint, or damaged.
        ExportError: if it has no average.
    """
    loaded = load_checkpoint(path, optimizer=False)
    chosen: Literal["raw", "ema"] = "raw" if weights == "raw" or (weights == "auto" and loaded.ema is None) else "ema"
    if chosen == "ema" and loaded.ema is None:
        raise ExportError(
            "the run kept no moving average of its weights", where=str(path), fix="export with --weights raw"
        )
    values = loaded.config
    config = RunConfig.from_dict(values)
    trained_on, revision = config.model.pretrained, config.model.revision
    if pretrained is not None:
        values = {**values, "model": {**values["model"], "pretrained": pretrained, "revision": None}}
        config = RunConfig.from_dict(values)
    return Source(
        checkpoint=path,
        run_dir=_run_of(path),
        config=config,
        trained_on=trained_on,
        revision=revision,
        state=loaded.state,
        tensors=loaded.trainable if chosen == "raw" or loaded.ema is None else loaded.ema,
        weights=chosen,
        measured="raw" if loaded.ema is None else "ema",
    )


def checkpoint_of(source: Path, checkpoint: Literal["latest", "best"]) -> Path:
    """Which checkpoint is meant by a run's folder, or by one checkpoint's.

    Raises:
        CheckpointError: if there is none in the folder.
        ExportError: if the run has no best one.
    """
    standing = step_folders(source)  # the incomplete ones too: the newest must not be passed over in silence
    if not standing:
        if source.is_dir() and not (source / "state.json").is_file():
            raise CheckpointError(
                "the folder holds no complete checkpoint",
                where=str(source),
                fix="give a run's folder (output_dir) or one of its checkpoints/step-... folders",
            )
        return source
    newest = standing[-1][1]
    if checkpoint == "latest":
        return newest
    best_step = load_checkpoint(newest, optimizer=False).state.best_step
    best = None if best_step is None else checkpoint_path(source, best_step)
    if best is None or best not in [path for _, path in standing]:
        raise ExportError(
            "the run has no best checkpoint: "
            + ("no held-out loss was measured" if best is None else f"step {best_step} is not there any more"),
            where=str(source),
            fix="export the latest one; a best one needs data.holdout, validation.every and checkpoint.keep_best",
        )
    return best
