"""Which version of the model a run uses: decided once, recorded, and the same for as long as the run goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune.config.schema import RunConfig
from finetune.facts import canonical_name, is_commit, pin_revision
from finetune.trainers.checkpoint import list_checkpoints


def pin_model(config: RunConfig, decide: Callable[[Callable[[], Any]], Any] = lambda work: work()) -> RunConfig:
    """The same configuration with ``model.revision`` as a commit; nothing changes for a model in a folder.

    A run that goes on uses the commit that it began with, also where its branch has moved since. If the configuration
    names another commit, it is left as it is, and the comparison with the checkpoint refuses it.

    Args:
        config: the run's.
        decide: runs a function where one process has to decide for all (``Ranks.first``).

    Raises:
        ModelError: if the model or the revision cannot be found.
    """
    revision = decide(lambda: _revision_of(config))
    if revision == config.model.revision:
        return config
    return config.model_copy(update={"model": config.model.model_copy(update={"revision": revision})})


def _revision_of(config: RunConfig) -> str | None:
    model = config.model
    if not is_commit(model.revision) and (recorded := recorded_revision(config)) is not None:
        return recorded
    return pin_revision(model.pretrained, model.revision)


def recorded_revision(config: RunConfig) -> str | None:
    """The commit that the run in ``output_dir`` began with; None for a new run, or one of another or a local model.

    What cannot be read is no record here: whoever continues from the checkpoint reads it whole, and says what is wrong.
    """
    resume = config.checkpoint.resume
    if resume == "none":
        return None
    standing = [path for _, path in reversed(list_checkpoints(config.output_dir))]
    for folder in standing if resume == "latest" else [Path(resume)]:
        file = folder / "config.json"
        if not file.is_file():  # a pipe would keep us waiting
            continue
        try:
            recorded = json.loads(file.read_text(encoding="utf-8"))["model"]
            if canonical_name(str(recorded["pretrained"])) == config.model.pretrained and is_commit(
                recorded["revision"]
            ):
                return str(recorded["revision"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
    return None
