"""A configuration as values and places: what a file and the overrides of the command line say together."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from finetune.config.plain_yaml import MAX_DEPTH, Keys, Reader, compose, place_of, read_text
from finetune.errors import ConfigError, raise_all


@dataclass
class Document:
    """The values of a configuration and where each was written.

    ``places`` is keyed by the path as a tuple, such as ``("data", "sources", 0, "path")``; the empty path is the file.
    """

    values: dict[str, Any]
    places: dict[Keys, str] = field(default_factory=dict)
    name: str = ""

    @classmethod
    def of(cls, values: Mapping[str, Any], name: str = "") -> Document:
        """Wrap values made in code; they have no places."""
        return cls(dict(values), {}, name)

    @classmethod
    def read(cls, path: Path) -> Document:
        """Read a YAML file.

        Raises:
            ConfigError: if it cannot be read, is not YAML, is empty, is not a mapping, or repeats a key; all repeated
                keys are reported together.
        """
        name = str(path)
        node = compose(read_text(path), name)
        if node is None:
            raise ConfigError("the file is empty", where=name, fix="write one with `finetune init`")
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(
                "the file is not a mapping of sections (`model:`, `data:`, ...)", where=place_of(node, name)
            )
        reader = Reader(name)
        values = reader.value(node, ())
        raise_all(ConfigError, reader.errors, what="{n} faults in " + name, limit=100)
        return cls(values, reader.places, name)

    def place(self, path: Keys) -> str:
        """Where ``path`` was written, or its nearest written parent; then the dotted path, for messages."""
        dotted = ".".join(f"{part!s:.60}" for part in path)
        for end in range(len(path), -1, -1):
            if place := self.places.get(path[:end]):
                return f"{place} ({dotted})" if dotted and not place.startswith("--set") else place
        return f"{self.name} ({dotted})" if self.name and dotted else self.name or dotted

    def value(self, path: Keys) -> Any:
        """The value at ``path``, or None where nothing is written there."""
        value: Any = self.values
        for part in path:
            known = isinstance(value, list) and isinstance(part, int) and part < len(value)
            if not known and not (isinstance(value, dict) and part in value):
                return None
            value = value[part]
        return value

    def override(self, assignment: str, *made: Any) -> None:
        """Apply one ``a.b=value`` as though the file had said so; ``value`` is YAML, ``a.0.b`` is an item of a list.

        In code the value may be ``made`` already: ``override("a.b", value)``.

        A path that no section knows is not found here but by the validation, like a typo in the file.

        Raises:
            ConfigError: if it is not an assignment, the value is not YAML, or the path leads through a plain value.
        """
        dotted, equals, text = (assignment, "=", "") if made else assignment.partition("=")
        where = f"--set {assignment:.200}" + (f"={made[0]!r:.200}" if made else "")
        parts = _parts(dotted)
        if not equals or not parts or "" in parts:
            raise ConfigError(
                f"'{assignment:.200}' is not an assignment", where="--set", fix="write --set section.field=value"
            )
        if len(parts) > MAX_DEPTH:
            raise ConfigError(f"a path of {len(parts)} parts leads nowhere", where=where)
        node = None if made else compose(text, where)
        reader = Reader(where, one_line=True)
        value = copy.deepcopy(made[0]) if made else None if node is None else reader.value(node, ())
        raise_all(ConfigError, reader.errors, what="{n} faults in " + where)
        path = self._assign(parts, value, where)
        self.places = {known: place for known, place in self.places.items() if known[: len(path)] != path}
        self.places.update({path + inner: where for inner in [(), *reader.places]})
        for end in range(1, len(path)):  # sections that the file does not have
            self.places.setdefault(path[:end], where)

    def _assign(self, parts: Sequence[str], value: Any, where: str) -> Keys:
        holder: Any = self.values
        path: list[str | int] = []
        for depth, part in enumerate(parts):
            outer = ".".join(parts[:depth])
            if isinstance(holder, list):
                if not part.isdecimal() or int(part) > len(holder):
                    raise ConfigError(
                        f"'{part:.60}' is no index into '{outer:.200}', which has {len(holder)} items",
                        where=where,
                        fix=f"use 0 to {len(holder) - 1}, or {len(holder)} to append",
                    )
                path.append(int(part))
                holder.extend([None] if int(part) == len(holder) else [])
            elif isinstance(holder, dict):
                path.append(part)
                holder.setdefault(part, None)
            else:
                raise ConfigError(
                    f"'{outer:.200}' is {holder!r:.100} in the file and has no field '{part:.60}'", where=where
                )
            key = path[-1]
            if depth == len(parts) - 1:
                holder[key] = value
            elif holder[key] is None:
                holder[key] = [] if parts[depth + 1] == "0" else {}
            holder = holder[key]
        return tuple(path)


def _parts(dotted: str) -> list[str]:
    return re.sub(r"\[(\d+)\]", r".\1", dotted.strip()).split(".") if dotted.strip() else []
