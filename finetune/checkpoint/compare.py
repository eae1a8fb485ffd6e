"""What may change in the configuration when a run goes on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finetune.cogvideox.model_files import canonical_name, is_commit
from finetune.core.errors import CheckpointError
from finetune.datasets.sources import source_since


@dataclass(frozen=True)
class Difference:
    """One field that is not as it was."""

    field: str
    """Dotted, such as ``optimizer.lr``."""
    old: Any
    new: Any
    allowed: bool
    """Whether a run can go on with it."""
    reason: str

    def __str__(self) -> str:
        return f"{self.field}: {_shown(self.old)} -> {_shown(self.new)} ({self.reason})"


_RULES: Mapping[str, tuple[bool, str]] = {
    "": (False, "what a step trains on or computes follows from it"),
    "model": (False, "the trained weights belong to the base model and its dtype"),
    "model.adapters": (False, "they are a part of the base model that the trained weights belong to"),
    "model.attention": (True, "another kernel computes the same, but for the last digits"),
    "method": (False, "it decides which tensors are trained"),
    "method.dropout": (True, "holds from the next step"),
    "method.compute": (True, "holds from the next step"),
    "method.init_from": (True, "read at step 0 only"),
    "objective": (True, "holds from the next step"),
    "optimizer": (False, "the optimizer's accumulated state belongs to its kind"),
    "optimizer.lr": (True, "holds from the next step"),
    "optimizer.betas": (True, "holds from the next step"),
    "optimizer.eps": (True, "holds from the next step"),
    "optimizer.weight_decay": (True, "holds from the next step"),
    "optimizer.lr_scales": (True, "holds from the next step"),
    "lr_schedule": (True, "the learning rate is a function of the step"),
    "train": (False, "the order of samples or the meaning of a step follows from it"),
    "train.steps": (True, "the length of the run; a linear or cosine schedule is stretched to it"),
    "train.epochs": (True, "the length of the run; a linear or cosine schedule is stretched to it"),
    "train.max_grad_norm": (True, "holds from the next step"),
    "train.deterministic": (True, "holds from the next step"),
    "train.check_ranks": (True, "it does not touch training"),
    "train.ema_decay": (False, "the average in the checkpoint was made with it"),
    # Clips, captions, buckets and their encoding are compared through the cache's digest, which sees their content.
    "data": (True, "the training data are compared by content"),
    "data.condition_frames": (True, "holds from the next step; which frames are stored is compared by content"),
    "cache": (True, "the training data are compared by content"),
    "parallel": (True, "it does not change what is computed"),
    "memory": (True, "it does not change what is computed"),
    "memory.base": (False, "the weights in another format are another model"),
    "validation": (True, "it does not touch training"),
    "checkpoint": (True, "it does not touch training"),
    "tracking": (True, "it does not touch training"),
    "output_dir": (True, "it does not touch training"),
}
"""What may change when a run goes on, by dotted prefix; the longest one that fits decides."""

_SINCE: Mapping[str, object] = {
    "objective.weighting.kind": "velocity",
    "objective.timesteps.kind": "uniform",
    "optimizer.weights": "master",
    "memory.base": "native",
    "method.compute": "float32",
    "method.ranks": {},
    "parallel.context": 1,
    "model.adapters": [],
    "model.attention": "auto",
    "model.control": False,
    "optimizer.lr_scales": {},
    "memory.compile": "off",
    "cache.decoder": "pyav",
    "data.unreadable_captions": "warn",
    "data.image_buckets": None,
    "data.condition_frames.kind": "first",
}
"""Fields that configurations did not always have, and what was done before."""


def compare_configs(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Difference]:
    """Every field in which two resolved configurations differ, in the order of their names."""
    before, after = _filled(old), _filled(new)
    for values in (before, after):
        if isinstance(name := values.get("model.pretrained"), str):
            values["model.pretrained"] = canonical_name(name)
    return [
        Difference(field, before.get(field), after.get(field), *_rule(field))
        for field in sorted(before.keys() | after.keys())
        if before.get(field) != after.get(field)
    ]


def _filled(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration of any age, flat, with what was done before there was a choice."""
    # As a file would give it back, so that a path equals its text and a tuple its list.
    values = json.loads(json.dumps(config, default=str))
    if sources := values.get("data", {}).get("sources"):
        values["data"]["sources"] = [{**source_since(source.get("kind")), **source} for source in sources]
    if samples := values.get("validation", {}).get("samples"):
        values["validation"]["samples"] = [{"last_image": None, "keyframes": None, **sample} for sample in samples]
    for adapter in values.get("model", {}).get("adapters", ()):
        if adapter.get("sha256"):  # wherever its file is now
            adapter.pop("path", None)
    return {**_SINCE, **flat(values)}


def require_same_run(
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    *,
    where: str,
    processes: tuple[int, int] = (1, 1),
    identified: bool = False,
) -> list[Difference]:
    """Refuse to continue a run under a configuration that would make it another run.

    Args:
        old: the checkpoint's configuration.
        new: this run's.
        where: the checkpoint, for the message.
        processes: how many processes trained then, and train now. ``train.accumulation`` and ``parallel.context``
            may change along with them, as long as the micro-batches of a step do not.
        identified: whether the checkpoint records the digest of its base, which decides then; a folder may have moved.

    Returns:
        The differences it can continue with, to be told to the user.

    Raises:
        CheckpointError: listing the differences it cannot continue with, each with its reason.
    """
    differences = compare_configs(old, new)
    before, after = (
        _number(config, "train", "accumulation", where) * count // _number(config, "parallel", "context", where)
        for config, count in zip((old, new), processes, strict=True)
    )
    excuses = {
        change.field: "the run did not record which commit it began with"
        for change in differences
        if change.field == "model.revision" and not is_commit(change.old)
    }
    if identified:
        reason = "the base's weights are compared by their digest"
        excuses |= {"model.pretrained": reason, "model.revision": reason}
    if before == after:
        excuses["train.accumulation"] = "with that many processes a step has the same micro-batches"
    elif all(change.field != "train.accumulation" for change in differences):
        reason = f"a step would have {after} micro-batches, not {before}; train.accumulation can make up for it"
        differences.append(Difference("number of processes", *processes, allowed=False, reason=reason))
    differences = [
        dataclasses.replace(change, allowed=True, reason=excuses[change.field]) if change.field in excuses else change
        for change in differences
    ]
    refused = [f"  {change}" for change in differences if not change.allowed]
    if refused:
        raise CheckpointError(
            "the configuration changed in what a run cannot change on its way:\n" + "\n".join(refused),
            where=where,
            fix="restore it to continue, or train anew into another output_dir (method.init_from keeps the adapter)",
        )
    return differences


def _number(config: Mapping[str, Any], section: str, field: str, where: str) -> int:
    values = config.get(section, {})
    value = values.get(field, 1) if isinstance(values, Mapping) else None
    if not isinstance(value, int) or value < 1:
        raise CheckpointError(
            f"the checkpoint's configuration is not of this version of the package: {section}.{field} is no number",
            where=where,
            fix="continue with the version that wrote it",
        )
    return value


def _rule(field: str) -> tuple[bool, str]:
    parts = field.split(".")
    prefixes = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((_RULES[prefix] for prefix in prefixes if prefix in _RULES), _RULES[""])


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested configuration as ``{"optimizer.lr": 1e-4}``.

    A list is a leaf: an inserted entry is one difference, not a shift of all after it.
    """
    leaves: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        leaves |= flat(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
    return leaves


def _shown(value: Any) -> str:
    text = "not set" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else f"{text[:160]} ... ({len(text)} letters)"
