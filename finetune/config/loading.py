"""From a file and its overrides to a ``RunConfig``."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from finetune.config.document import Document
from finetune.config.schema import RunConfig, build
from finetune.core.errors import ConfigError, raise_all


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
    path = as_path(path, "load_config")
    assignments = list(_assignments(overrides))
    document = Document.read(path)
    faults: list[ConfigError] = []
    for assignment in assignments:
        try:
            document.override(*assignment)
        except ConfigError as fault:
            faults.append(fault)
    raise_all(ConfigError, faults, what="{n} overrides cannot be applied", limit=100)
    return build(document, base=path.absolute().parent)


def as_path(value: str | os.PathLike[str], what: str) -> Path:
    """``value`` as a path with ``~`` expanded: what a public function does with a path that it is given.

    Raises:
        ConfigError: if it is none; ``what`` names the argument.
    """
    try:
        return Path(value).expanduser()
    except (TypeError, RuntimeError) as error:
        raise ConfigError(f"{value!r:.200} is no path: {error}", where=what, fix="give a str or a Path") from None


def as_config(config: RunConfig | Mapping[str, Any] | str | Path) -> RunConfig:
    """What a public function takes for a run's configuration: one that is built, the values of one, or its file.

    Raises:
        ConfigError: if it is none of these, or as ``load_config`` and ``RunConfig.from_dict``.
    """
    if isinstance(config, RunConfig):
        return config
    if isinstance(config, Mapping):
        return RunConfig.from_dict(config)
    if isinstance(config, str | os.PathLike):
        return load_config(config)
    raise ConfigError(
        f"a {type(config).__name__} is no configuration", fix="give a RunConfig, a YAML file's path, or a mapping"
    )


def _assignments(overrides: Any) -> Iterator[tuple[str] | tuple[str, Any]]:
    """Arguments of ``Document.override``, one tuple for each assignment."""
    if isinstance(overrides, Mapping):
        yield from _leaves(overrides, "")
        return
    listed = [overrides] if isinstance(overrides, str) else overrides
    listed = list(listed) if isinstance(listed, Iterable) else [None]
    if not all(isinstance(item, str) for item in listed):
        raise ConfigError(
            f"{overrides!r:.200} are no overrides", fix='give ["optimizer.lr=2e-4", ...] or {"optimizer.lr": 2e-4, ...}'
        )
    yield from ((item,) for item in listed)


def _leaves(values: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
