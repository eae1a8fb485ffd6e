"""Which weights an export is made of: from a run's folder or one checkpoint to verified tensors and their history."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from torch import Tensor

from finetune.checkpoint.folders import (
    FOLDER,
    HISTORY,
    Measurement,
    best_of,
    checkpoint_path,
    list_checkpoints,
    read_history,
    step_folders,
)
from finetune.checkpoint.load import load_checkpoint, read_head
from finetune.config.rules import pin_model
from finetune.config.schema import RunConfig
from finetune.core.errors import CacheError, CheckpointError, ExportError
from finetune.core.types import DtypeName, RunState
from finetune.datasets.cache import Cache
from finetune.inference.adapters import base_now

_CAPTIONS = 5
"""How many are shown."""


@dataclass(frozen=True)
class DataSummary:
    """What a run was trained on, as its cache remembers it."""

    clips: int
    heldout: int
    by_bucket: Mapping[str, int]
    """Training clips per bucket."""
    captions: tuple[str, ...]
    """A few distinct captions, as they were encoded."""


@dataclass(frozen=True)
class ExportSource:
    """A checkpoint to export, read and verified."""

    checkpoint: Path
    config: RunConfig
    """Of the run, with the base model where it is now, at one commit."""
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
    def run_dir(self) -> Path | None:
        """The run's folder; None where the checkpoint was moved out of it."""
        return _run_of(self.checkpoint)

    @property
    def trains_adapter(self) -> bool:
        """Whether the run trained an adapter, not the whole transformer."""
        return self.config.method.kind != "full"

    @property
    def kind(self) -> str:
        """Of what was trained, for people."""
        return {"lora": "LoRA", "lokr": "LoKr", "full": "Full fine-tuning"}[self.config.method.kind]

    @property
    def is_lokr(self) -> bool:
        """Whether that adapter is a LoKr, which not all load that load a LoRA."""
        return self.config.method.kind == "lokr"

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
    def better_checkpoint(self) -> str:
        """A note on the checkpoint with a lower held-out loss that stands in the run's folder; empty without one."""
        checkpoints = dict(list_checkpoints(self.run_dir)) if self.run_dir else {}
        best = best_of((row for step, row in self.history.items() if step in checkpoints), self.state)
        if best is None or best[0] not in checkpoints or best[0] == self.state.step:
            return ""
        (step, loss), own_loss = best, self.heldout[1]
        if own_loss is not None and loss >= own_loss:
            return ""
        is_newest = self.state.step == max(checkpoints) and self.state.best_step == step
        own = "was not measured" if own_loss is None else f"has {own_loss:.4f}"
        how = "add --checkpoint best" if is_newest else f"name {checkpoints[step]}"
        return f"step {step} has a lower held-out loss, {loss:.4f}; step {self.state.step} {own}: {how}"

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
        items = next((each["items"] for each in contents if each.get("digest") == self.state.cache_digest), None)
        if items is None:
            return None
        training = [item for item in items if not item["holdout"]]
        captions = tuple(dict.fromkeys(item["caption"] for item in training))
        buckets = Counter(item["bucket"] for item in training)
        return DataSummary(
            len(training), len(items) - len(training), dict(sorted(buckets.items())), captions[:_CAPTIONS]
        )


def default_folder(checkpoint: Path, name: str) -> Path:
    """Where an export goes unless told otherwise: in the run's folder, or beside a checkpoint without one."""
    run_dir = _run_of(checkpoint)
    return checkpoint.with_name(f"{checkpoint.name}-{name}") if run_dir is None else run_dir / name


def _run_of(checkpoint: Path) -> Path | None:
    return checkpoint.parent.parent if checkpoint.parent.name == FOLDER else None


def find_checkpoint(path: Path, which: Literal["latest", "best"]) -> Path:
    """Which checkpoint is meant by a run's folder, or by one checkpoint's.

    Raises:
        CheckpointError: if there is none in the folder.
        ExportError: if the run has no best one.
    """
    checkpoints = dict(step_folders(path))  # the incomplete ones too: the newest must not be passed over in silence
    if not checkpoints:
        if path.is_dir() and not (path / "state.json").is_file():
            raise CheckpointError(
                "the folder holds no complete checkpoint",
                where=str(path),
                fix="give a run's folder (output_dir) or one of its checkpoints/step-... folders",
            )
        return path
    newest = checkpoints[max(checkpoints)]
    if which == "latest":
        return newest
    best_step = read_head(newest).state.best_step  # its weights may be damaged, and are not what is wanted
    if best_step is None or best_step not in checkpoints:
        why = "no held-out loss was measured" if best_step is None else f"step {best_step} is not there any more"
        raise ExportError(
            f"the run has no best checkpoint: {why}",
            where=str(path),
            fix="export the latest one; a best one needs data.holdout, validation.every and checkpoint.keep_best",
        )
    return checkpoint_path(path, best_step)


def read_source(
    path: Path, weights: Literal["auto", "ema", "raw"], pretrained: str | None, dtype: DtypeName | None = None
) -> ExportSource:
    """Read a checkpoint that is to be exported.

    Args:
        path: its folder, as ``find_checkpoint`` finds it.
        weights: the moving average, the trained weights, or ``auto``: the average if there is one.
        pretrained: where the base model is now; None for where the run had it.
        dtype: what the base is loaded in, and an adapter merged; None for what the run trained in.

    Raises:
        CheckpointError: if it is no complete checkpoint, or damaged.
        ModelError: if the base model or its revision cannot be found.
        ExportError: if it has no average.
    """
    loaded = load_checkpoint(path, optimizer=False)
    if weights == "ema" and loaded.ema is None:
        raise ExportError(
            "the run kept no moving average of its weights", where=str(path), fix="export with --weights raw"
        )
    trained_with = RunConfig.from_dict(loaded.config)
    values = loaded.config
    if pretrained is None and (now := base_now(loaded)) != loaded.config["model"]["pretrained"]:
        pretrained = now
    if pretrained is not None:
        values = {**values, "model": {**values["model"], "pretrained": pretrained, "revision": None}}
    if dtype is not None:
        values = {**values, "model": {**values["model"], "dtype": dtype}}
    averaged = weights != "raw" and loaded.ema is not None
    return ExportSource(
        checkpoint=path,
        config=pin_model(RunConfig.from_dict(values)),
        trained_on=trained_with.model.pretrained,
        revision=trained_with.model.revision,
        state=loaded.state,
        tensors=loaded.ema if averaged and loaded.ema is not None else loaded.trainable,
        weights="ema" if averaged else "raw",
        measured="raw" if loaded.ema is None else "ema",
    )
