"""YAML as a person wrote it: plain values, and for every value the line and column it stands at.

Scalars follow YAML 1.2 (its "core" schema), not PyYAML's 1.1: ``1e-4`` is a number, ``off`` and ``no`` are words,
``1:30`` and ``2024-05-01`` are text. Only plain mappings, lists, strings, numbers, booleans and null are read; no tag
constructs an object. Size, depth and number of values are bounded, so that no file takes more than seconds to refuse.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from finetune.core.errors import ConfigError, raise_all
from finetune.core.text import text_fault

_NULL, _BOOL, _INT, _FLOAT, _STR, _MERGE = (
    f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "merge")
)

_CORE: tuple[tuple[str, str, str], ...] = (
    (_NULL, r"~|null|Null|NULL|", "~nN\0"),
    (_BOOL, r"true|True|TRUE|false|False|FALSE", "tTfF"),
    (_INT, r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        _FLOAT,
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf)|\.(nan|NaN)",
        "-+0123456789.",
    ),
    (_MERGE, r"<<", "<"),
)

_COLLECTIONS = ("tag:yaml.org,2002:seq", "tag:yaml.org,2002:map")

MAX_BYTES = 1 << 20
"""Of a configuration file: a hundred times the longest anyone has a use for."""

MAX_VALUES = 10_000
"""A file that unfolds to more values than this is a mistake, or an attack made of nested aliases."""

MAX_DEPTH = 50
"""Of sections and lists in each other; a run has six."""

_MAX_WORK = 4 * MAX_BYTES
"""Characters that a file may unfold to: aliases to one long text would be gone through once for each of them."""

_NODE_WORK = 64
"""Characters' worth of work for a value or a key, whatever it holds."""

_MAX_DIGITS = 100
"""Of a number. Longer ones take Python time out of proportion, and nothing counts so far."""

Keys = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML's own protocol; replaced per class below)
    _depth = _nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self._depth += 1
        self._nodes += 1
        if self._depth > MAX_DEPTH or self._nodes > 2 * MAX_VALUES:  # a key is a node too
            fault = f"more than {MAX_VALUES} values" if self._depth <= MAX_DEPTH else f"more than {MAX_DEPTH} levels"
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem=f"it holds {fault}", problem_mark=mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


class Dumper(yaml.SafeDumper):
    """Writes YAML that readers of 1.1 and of 1.2 take for the same values."""


for _tag, _pattern, _first in _CORE:
    _regex = re.compile(rf"^(?:{_pattern})$")
    _firsts = [letter if letter != "\0" else "" for letter in _first]
    _Loader.add_implicit_resolver(_tag, _regex, _firsts)
    if _tag in (_INT, _FLOAT):
        # A *string* such as "1e-4" must be quoted, or our own loader reads a number where 1.1 reads text.
        Dumper.add_implicit_resolver(_tag, _regex, _firsts)


def read_text(path: Path) -> str:
    """The text of a configuration file. Raises ConfigError if it is none, is too large, or is not UTF-8."""
    try:
        if path.exists() and not path.is_file():
            raise ConfigError("the configuration is a folder, a pipe or a device, not a file", where=str(path))
        with path.open("rb") as source:
            content = source.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(
            f"there is no configuration file {path}", fix="name an existing file, or write one with `finetune init`"
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"the configuration file cannot be read: {reason}", where=str(path)) from None
    if len(content) > MAX_BYTES:
        raise ConfigError(
            f"the file has more than {MAX_BYTES:,} bytes: that is no configuration",
            where=str(path),
            fix="name the run's YAML file; captions belong into a dataset",
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        wide = content.startswith((b"\xff\xfe", b"\xfe\xff")) or content[:64].count(0) > 8
        raise ConfigError(
            f"the file is not UTF-8 text (byte 0x{content[error.start]:02x})",
            where=f"{path}:{line}",
            fix="save it as UTF-8" + ("; it looks like UTF-16" if wide else ""),
        ) from None


def compose(text: str, name: str) -> yaml.Node | None:
    """The one document in ``text``, or None. Raises ConfigError, with the line where ``name`` is a file."""
    try:
        return yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark and not name.startswith("--set") else name
        problem = " ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(f"not valid YAML: {problem:.300}", where=place) from None
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        what = f"not valid YAML: U+{error.character:04X} is no text"
        raise ConfigError(what, where=name if name.startswith("--set") else f"{name}:{line}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an escape beyond the last character
        raise ConfigError(f"not valid YAML: {error!s:.300}", where=name) from None


def place_of(node: yaml.Node, name: str) -> str:
    """``run.yaml:12:3``."""
    return f"{name}:{node.start_mark.line + 1}:{node.start_mark.column + 1}"


def _int(text: str) -> int:
    _require_short(text)
    return int(text, 0) if text[:2] in ("0o", "0x") else int(text)


def _require_short(text: str) -> None:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")


def _text(text: str) -> str:
    if fault := text_fault(text):
        raise ValueError(fault)
    return text


def _float(text: str) -> float:
    _require_short(text)
    return float(re.sub(r"\.(?=inf|nan)", "", text.lower()))


_SCALARS: dict[str, Callable[[str], Any]] = {
    _STR: _text,
    _NULL: lambda text: None,
    _BOOL: lambda text: {"true": True, "false": False}[text.lower()],
    _INT: _int,
    _FLOAT: _float,
}


class YamlReader:
    """Turns nodes into values, noting places and faults."""

    def __init__(self, name: str, *, one_line: bool = False) -> None:
        self.name = name
        self.places: dict[Keys, str] = {}
        self.errors: list[ConfigError] = []
        self._one_line = one_line
        self._open: set[int] = set()
        self._count = 0
        self._work = 0

    def value(self, node: yaml.Node, path: Keys) -> Any:
        self._count += 1
        if self._count > MAX_VALUES:
            raise ConfigError(f"it unfolds to more than {MAX_VALUES} values", where=self._at(node))
        self._spend(node)
        if len(self._open) > MAX_DEPTH:  # aliases can nest deeper than the text does
            raise ConfigError(f"it unfolds to more than {MAX_DEPTH} levels", where=self._at(node))
        self.places.setdefault(path, self._at(node))
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        if node.tag not in _COLLECTIONS:
            self._refuse_tag(node, "is not supported; write a plain list or mapping")
        if id(node) in self._open:
            raise ConfigError("an alias refers to the value that it stands in", where=self._at(node))
        self._open.add(id(node))
        try:
            if isinstance(node, yaml.SequenceNode):
                return [self.value(item, (*path, index)) for index, item in enumerate(node.value)]
            return self._mapping(node, path)
        finally:
            self._open.discard(id(node))

    def _spend(self, node: yaml.Node) -> None:
        """Count the work that a value, a key or a base of a merge makes, each time that it stands somewhere."""
        self._work += _NODE_WORK + (len(node.value) if isinstance(node, yaml.ScalarNode) else 0)
        if self._work > _MAX_WORK:
            raise ConfigError(f"it unfolds to more than {_MAX_WORK:,} characters", where=self._at(node))

    def _at(self, node: yaml.Node) -> str:
        return self.name if self._one_line else place_of(node, self.name)

    def _mapping(self, node: yaml.Node, path: Keys) -> dict[str, Any]:
        found: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for base in reversed([base for key, item in node.value if key.tag == _MERGE for base in _merge_bases(item)]):
            # The first base that says something wins, and the mapping's own keys win over all bases.
            self._spend(base)
            if isinstance(base, yaml.MappingNode):
                merged |= self.value(base, path)
            else:
                self.errors.append(ConfigError("'<<' takes a mapping or a list of mappings", where=self._at(base)))
        for key, item in node.value:
            self._spend(key)
            if key.tag == _MERGE:
                continue
            if not isinstance(key, yaml.ScalarNode):
                self.errors.append(ConfigError("a key must be a plain word", where=self._at(key)))
                continue
            inner = (*path, key.value)
            if fault := text_fault(key.value, one_line=True):
                self.errors.append(ConfigError(f"a key is damaged: {fault}", where=self._at(key)))
                continue
            if key.value in found:
                self.errors.append(
                    ConfigError(
                        f"'{key.value:.60}' stands twice; the first is at {self.places[inner]}",
                        where=f"{self._at(key)} ({'.'.join(map(str, inner))})",
                        fix="keep one of the two",
                    )
                )
                continue
            self.places[inner] = self._at(key)
            found[key.value] = self.value(item, inner)
        return {**merged, **found}

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        read = _SCALARS.get(node.tag)
        try:
            if read:
                return read(node.value)
            problem = "is not supported; write a plain value"
        except (ValueError, KeyError) as error:
            if node.tag == _STR:
                self.errors.append(ConfigError(f"the text is damaged: {error}", where=self._at(node)))
                return None
            problem = f"cannot read '{node.value:.60}'"
        self._refuse_tag(node, problem)
        return None

    def _refuse_tag(self, node: yaml.Node, problem: str) -> None:
        tag = node.tag.replace("tag:yaml.org,2002:", "!!")[:80]
        self.errors.append(ConfigError(f"the tag {tag} {problem}", where=self._at(node)))


def _merge_bases(node: yaml.Node) -> list[yaml.Node]:
    return list(node.value) if isinstance(node, yaml.SequenceNode) else [node]


# ----------------------------------------------------------------------- a file and its overrides, as values and places


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
        reader = YamlReader(name)
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
        reader = YamlReader(where, one_line=True)
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
