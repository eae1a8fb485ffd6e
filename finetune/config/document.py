"""YAML as a person wrote it: plain values, and for every value the line and column it stands at.

Scalars follow YAML 1.2 (its "core" schema), not PyYAML's 1.1: ``1e-4`` is a number, ``off`` and ``no`` are words,
``1:30`` and ``2024-05-01`` are text. Only plain mappings, lists, strings, numbers, booleans and null are read; no tag
constructs an object. Size, depth and number of values are bounded, so that no file takes more than seconds to refuse.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
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

MAX_NODES = 20_000
"""Values and keys as they are written."""

MAX_DEPTH = 50
"""Of sections and lists in each other; a run has six."""

MAX_WORK = 4 * MAX_BYTES
"""Characters that a file may unfold to: aliases are gone through once for each place that they stand at, and so nested
ones are an attack. A file within the bounds above that has no aliases is within this one."""

_NODE_WORK = 128
"""Characters' worth of work for a value or a key, whatever it holds."""

_MAX_DIGITS = 100
"""Of a number. Longer ones take Python time out of proportion, and nothing counts so far."""

MOST_SHOWN = 200
"""Characters of a value in a message."""

Keys = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML's own protocol; replaced per class below)
    _depth = _nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self._depth += 1
        self._nodes += 1
        if self._depth > MAX_DEPTH or self._nodes > MAX_NODES:
            limit = f"{MAX_DEPTH} levels" if self._depth > MAX_DEPTH else f"{MAX_NODES} values"
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem=f"it holds more than {limit}", problem_mark=mark)
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


def _text_of(path: Path) -> str:
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


def _few_digits(text: str) -> str:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return text


_SCALARS: dict[str, Callable[[str], Any]] = {
    _STR: str,
    _NULL: lambda text: None,
    _BOOL: lambda text: {"true": True, "false": False}[text.lower()],
    _INT: lambda text: int(_few_digits(text), 0 if text[:2] in ("0o", "0x") else 10),
    _FLOAT: lambda text: float(re.sub(r"\.(?=inf|nan)", "", _few_digits(text).lower())),
}


class YamlReader:
    """Turns YAML into plain values, noting where each stands.

    Args:
        name: of the file, for messages, or a whole ``--set`` assignment.
        one_line: whether all of it stands at ``name``: there are no lines to tell apart.
    """

    def __init__(self, name: str, *, one_line: bool = False) -> None:
        self.places: dict[Keys, str] = {}
        self._name = name
        self._one_line = one_line
        self._errors: list[ConfigError] = []
        self._open: set[int] = set()
        self._work = 0

    def read(self, text: str) -> Any:
        """The values of the one document in ``text``, or None.

        Raises:
            ConfigError: if it is not YAML or is beyond a bound; or one for all repeated keys, tags and damaged texts.
        """
        try:
            node = yaml.compose(text, Loader=_Loader)
        except yaml.MarkedYAMLError as error:
            problem = " ".join(part for part in (error.context, error.problem) if part)
            where = self._at(error.problem_mark or error.context_mark)
            raise ConfigError(f"not valid YAML: {problem:.300}", where=where) from None
        except yaml.reader.ReaderError as error:
            where = self._name if self._one_line else f"{self._name}:{text[: error.position].count(chr(10)) + 1}"
            raise ConfigError(f"not valid YAML: U+{error.character:04X} is no text", where=where) from None
        except (yaml.YAMLError, ValueError) as error:  # ValueError: an escape beyond the last character
            raise ConfigError(f"not valid YAML: {error!s:.300}", where=self._name) from None
        value = None if node is None else self._value(node, ())
        raise_all(ConfigError, self._errors, what="{n} faults in " + self._name, limit=100)
        return value

    def _at(self, mark: Any) -> str:
        return self._name if self._one_line or not mark else f"{self._name}:{mark.line + 1}:{mark.column + 1}"

    def _spend(self, node: yaml.Node) -> None:
        """Count the work that a value, a key or a fault makes, each time that it stands somewhere."""
        self._work += _NODE_WORK + (len(node.value) if isinstance(node, yaml.ScalarNode) else 0)
        if self._work > MAX_WORK:
            limit = f"{MAX_WORK // _NODE_WORK:,} values, or {MAX_WORK:,} characters"
            raise ConfigError(f"it unfolds to more than {limit}", where=self._at(node.start_mark))

    def _fault(self, node: yaml.Node, what: str, **more: str) -> None:
        self._spend(node)
        self._errors.append(ConfigError(what, **{"where": self._at(node.start_mark), **more}))

    def _value(self, node: yaml.Node, path: Keys) -> Any:
        self._spend(node)
        at = self._at(node.start_mark)
        self.places.setdefault(path, at)
        scalar = isinstance(node, yaml.ScalarNode)
        if node.tag not in (_SCALARS if scalar else _COLLECTIONS):
            self._fault(node, f"the tag {_short(node.tag)} is not supported; write plain values, lists and mappings")
            return None
        if scalar:
            return self._scalar(node)
        if len(self._open) > MAX_DEPTH:  # aliases can nest deeper than the text does
            raise ConfigError(f"it unfolds to more than {MAX_DEPTH} levels", where=at)
        if id(node) in self._open:
            raise ConfigError("an alias refers to the value that it stands in", where=at)
        self._open.add(id(node))
        try:
            if isinstance(node, yaml.SequenceNode):
                return [self._value(item, (*path, index)) for index, item in enumerate(node.value)]
            return self._mapping(node, path)
        finally:
            self._open.discard(id(node))

    def _scalar(self, node: yaml.Node) -> Any:
        if node.tag == _STR and (fault := text_fault(node.value)):
            self._fault(node, f"the text is damaged: {fault}")
            return None
        try:
            return _SCALARS[node.tag](node.value)
        except (ValueError, KeyError):
            self._fault(node, f"the tag {_short(node.tag)} cannot read '{node.value:.60}'")
            return None

    def _mapping(self, node: yaml.Node, path: Keys) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        own: dict[str, Any] = {}
        for base in reversed([base for key, item in node.value if key.tag == _MERGE for base in _merge_bases(item)]):
            # The first base that says something wins, and the mapping's own keys win over all bases.
            if isinstance(base, yaml.MappingNode):
                merged |= self._value(base, path) or {}
            else:
                self._fault(base, "'<<' takes a mapping or a list of mappings")
        for key, item in node.value:
            self._spend(key)
            inner = (*path, key.value)
            if key.tag == _MERGE:
                continue
            if not isinstance(key, yaml.ScalarNode):
                self._fault(key, "a key must be a plain word")
            elif fault := text_fault(key.value, one_line=True):
                self._fault(key, f"a key is damaged: {fault}")
            elif key.value in own:
                what = f"'{key.value:.60}' stands twice; the first is at {self.places[inner]}"
                where = f"{self._at(key.start_mark)} ({dotted(inner)})"
                self._fault(key, what, where=where, fix="keep one of the two")
            else:
                self.places[inner] = self._at(key.start_mark)
                own[key.value] = self._value(item, inner)
        return {**merged, **own}


def _short(tag: str) -> str:
    return tag.replace("tag:yaml.org,2002:", "!!")[:80]


def _merge_bases(node: yaml.Node) -> list[yaml.Node]:
    return list(node.value) if isinstance(node, yaml.SequenceNode) else [node]


# ----------------------------------------------------------------------- a file and its overrides, as values and places


@dataclass
class Document:
    """The values of a configuration and where each was written; values made in code have no places.

    ``places`` is keyed by the path as a tuple, such as ``("data", "sources", 0, "path")``; the empty path is the file.
    """

    values: dict[str, Any]
    places: dict[Keys, str] = field(default_factory=dict)
    name: str = ""

    @classmethod
    def read(cls, path: Path) -> Document:
        """Read a YAML file.

        Raises:
            ConfigError: if it cannot be read, is not YAML, is empty, is not a mapping, or repeats a key; all repeated
                keys are reported together.
        """
        reader = YamlReader(str(path))
        values = reader.read(_text_of(path))
        if values is None:
            raise ConfigError("the file is empty", where=str(path), fix="write one with `finetune init`")
        if not isinstance(values, dict):
            raise ConfigError("the file is not a mapping of sections (`model:`, `data:`, ...)", where=reader.places[()])
        return cls(values, reader.places, str(path))

    def place(self, path: Keys) -> str:
        """Where ``path`` was written, or its nearest written parent; then the dotted path, for messages."""
        written = (self.places[path[:end]] for end in range(len(path), -1, -1) if path[:end] in self.places)
        place, name = next(written, self.name), dotted(path)
        if not place or not name or place.startswith(f"--set {name}="):
            return place or name
        return f"{place} ({name})"

    def value(self, path: Keys) -> Any:
        """The value at ``path``, or None where nothing is written there."""
        value: Any = self.values
        for part in path:
            known = isinstance(value, list) and isinstance(part, int) and part < len(value)
            if not known and not (isinstance(value, dict) and part in value):
                return None
            value = value[part]
        return value

    def override(self, assignment: str) -> None:
        """Apply one ``a.b=value`` as though the file had said so; ``value`` is YAML, ``a.0.b`` is an item of a list.

        A path that no section knows is not found here but by the validation, like a typo in the file.

        Raises:
            ConfigError: if it is not an assignment, the value is not YAML, or the path leads through a plain value.
        """
        target, equals, text = assignment.partition("=")
        reader = YamlReader(f"--set {assignment:.200}", one_line=True)
        value = reader.read(text)
        self.assign(target if equals else "", value, where=f"--set {assignment:.200}", inner=reader.places)

    def assign(self, target: str, value: Any, *, where: str, inner: Iterable[Keys] = ()) -> None:
        """As ``override``, of a ``value`` that is made already; ``inner`` are the paths in it that stand ``where``."""
        parts = re.sub(r"\[(\d+)\]", r".\1", target.strip()).split(".")
        if "" in parts:
            what = f"'{where.removeprefix('--set ')}' is not an assignment"
            raise ConfigError(what, where="--set", fix="write --set section.field=value")
        if len(parts) > MAX_DEPTH:
            raise ConfigError(f"a path of {len(parts)} parts leads nowhere", where=where)
        path = self._put(parts, value, where)
        self.places = {known: place for known, place in self.places.items() if known[: len(path)] != path}
        self.places.update({path + rest: where for rest in [(), *inner]})
        for end in range(1, len(path)):  # sections that the file does not have
            self.places.setdefault(path[:end], where)

    def _put(self, parts: Sequence[str], value: Any, where: str) -> Keys:
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
                    f"'{outer:.200}' is {quoted(holder)} in the file and has no field '{part:.60}'", where=where
                )
            key = path[-1]
            if depth == len(parts) - 1:
                holder[key] = value
            elif holder[key] is None:
                holder[key] = [] if parts[depth + 1] == "0" else {}
            holder = holder[key]
        return tuple(path)


def dotted(path: Keys) -> str:
    """``data.sources.0.path``."""
    return ".".join(f"{part!s:.60}" for part in path)


def quoted(value: Any) -> str:
    """A value as Python writes it, as much of it as anyone would read."""
    try:
        text = repr(value[:MOST_SHOWN] if isinstance(value, str) else value)
    except ValueError:  # Python refuses to write down an integer of more than 4300 digits
        text = "a number of thousands of digits"
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."
