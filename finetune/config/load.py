"""From a file and its overrides to a ``RunConfig``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from finetune.config.document import Document
from finetune.config.schema import RunConfig, build
from finetune.errors import ConfigError, raise_all


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML configuration.

    Args:
        path: the file. Relative paths in it, and in the overrides, start at its folder.
        overrides: assignments such as ``optimizer.lr=2e-4``, applied in order as though the file had said so; the value
            is YAML, and ``data.sources.0.path=clips`` reaches into a list.

    Raises:
        ConfigError: if the file is unreadable or says something that a run cannot be; all faults are reported together,
            each with its line and column.
    """
    path = Path(path).expanduser()
    document = Document.read(path)
    faults: list[ConfigError] = []
    for assignment in overrides:
        try:
            document.override(assignment)
        except ConfigError as fault:
            faults.append(fault)
    raise_all(ConfigError, faults, what="{n} overrides cannot be applied", limit=100)
    return build(document, base=path.absolute().parent)
