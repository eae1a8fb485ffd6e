"""One value of a YAML file changed, every other byte of it left as a person wrote it: comments, quotes, order.

PyYAML says at which character each value begins and ends. What is written there is replaced, or a line is added where a
section ends. The result is read again and compared with the same change made to the values, so that a file which is
written in a way that this cannot edit (anchors, for instance) is refused and not damaged.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import yaml

from finetune.config.document import Document, Dumper, YamlReader, dotted
from finetune.core.errors import ConfigError

_STEP = 2
"""Spaces that a new section is indented by."""


def read_text(text: str, name: str) -> Document:
    """The document that a text is.

    Raises:
        ConfigError: as ``Document.read``.
    """
    reader = YamlReader(name)
    values = reader.read(text)
    if not isinstance(values, dict):
        raise ConfigError("the file is not a mapping of sections (`model:`, `data:`, ...)", where=name)
    return Document(values, reader.places, name)


def put(text: str, path: str, value: str, *, name: str) -> str:
    """The text with a value put at a path.

    Args:
        text: a YAML mapping.
        path: dotted, such as ``optimizer.lr`` or ``data.sources.0.path``; sections that are not there are added.
        value: as YAML; nothing takes the field out, and its default holds.
        name: of the file, for messages.

    Raises:
        ConfigError: if the text or the value is no YAML, or the place cannot be edited.
    """
    keys = path.split(".")
    wanted = read_text(text, name)
    if value.strip():
        wanted.override(f"{path}={value}")
        inner = YamlReader(f"{path}: {value:.200}", one_line=True)
        number = re.fullmatch(r"[-+.\deE]+", value.strip())  # 2e-4 stays as it was typed
        edited = _put(text, keys, value.strip() if number else on_one_line(inner.read(value)))
    else:
        _forget(wanted.values, keys)
        edited = _remove(text, keys)
    if read_text(edited, name).values != wanted.values:
        fix = "change it in the text"
        raise ConfigError(f"{path} is written in a way that the form cannot edit", where=name, fix=fix)
    return edited


def on_one_line(value: Any) -> str:
    """A value on one line."""
    text = yaml.dump(value, Dumper=Dumper, default_flow_style=True, allow_unicode=True, width=1 << 20)
    return text.removesuffix("...\n").strip()


def _forget(values: Any, keys: list[str]) -> None:
    """Take a field out, and sections that are empty then."""
    *outer, last = keys
    holders = [values]
    for key in outer:
        holder = holders[-1]
        known = isinstance(holder, list) and key.isdecimal() and int(key) < len(holder)
        if not known and not (isinstance(holder, dict) and key in holder):
            return
        holders.append(holder[int(key)] if isinstance(holder, list) else holder[key])
    for holder, key in zip(reversed(holders), [last, *reversed(outer)], strict=True):
        if isinstance(holder, dict):
            holder.pop(key, None)
        elif isinstance(holder, list) and key.isdecimal() and int(key) < len(holder):
            holder.pop(int(key))
        if holder:
            return


@dataclass
class _Step:
    """A node on the way to a value."""

    node: yaml.Node
    entry: yaml.Node | None = None
    """The key, or the item itself, that leads to the next node."""


def _walk(text: str, keys: list[str]) -> tuple[list[_Step], list[str]]:
    """The nodes that are there, from the root on, and the keys that are not."""
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    if node is None:
        raise ConfigError("the file is empty", fix="write one with `finetune init`")
    steps = [_Step(node)]
    for depth, key in enumerate(keys):
        entry, value = _child(steps[-1].node, key)
        if value is None:
            return steps, keys[depth:]
        steps[-1].entry = entry
        steps.append(_Step(value))
    return steps, []


def _child(node: yaml.Node, key: str) -> tuple[yaml.Node | None, yaml.Node | None]:
    if isinstance(node, yaml.MappingNode):
        return next(((name, value) for name, value in node.value if name.value == key), (None, None))
    if isinstance(node, yaml.SequenceNode) and key.isdecimal() and int(key) < len(node.value):
        return node.value[int(key)], node.value[int(key)]
    return None, None


def _end(text: str, node: yaml.Node) -> int:
    """Where a value's last character is; a block ends where the last value in it does."""
    while isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        node = last[1] if isinstance(last, tuple) else last
    start, end = node.start_mark.index, node.end_mark.index
    return start + len(text[start:end].rstrip())


def _line_start(text: str, at: int) -> int:
    return text.rfind("\n", 0, at) + 1


def _line_end(text: str, at: int) -> int:
    """After the line's end."""
    end = text.find("\n", at)
    return len(text) if end < 0 else end + 1


def _put(text: str, keys: list[str], value: str) -> str:
    steps, missing = _walk(text, keys)
    node = steps[-1].node
    start, end = node.start_mark.index, _end(text, node)
    if not missing or (isinstance(node, yaml.ScalarNode) and len(steps) > 1):  # an empty section becomes one on a line
        written = _flow(missing, value) if missing else value
        if (
            isinstance(node, yaml.CollectionNode) and not node.flow_style
        ):  # from the colon on: a block has lines of its own
            key = steps[-2].entry
            assert key is not None
            start = key.end_mark.index + 1 if isinstance(steps[-2].node, yaml.MappingNode) else start
        space = " " if text[start - 1 : start] in (":", "-") else ""
        return text[:start] + space + written + _aligned(text[end:], len(space + written) - (end - start))
    if isinstance(node, yaml.CollectionNode) and node.flow_style:
        close = node.end_mark.index - 1
        before = text[:close].rstrip()
        comma = "" if before[-1] in "{[," else ","
        added = _flow(missing, value)[1:-1] if isinstance(node, yaml.MappingNode) else _flow(missing[1:], value)
        return f"{before}{comma}{' ' if comma else ''}{added}{text[close:]}"
    at = _line_end(text, end)
    indent = " " * node.start_mark.column
    lines = []
    if isinstance(node, yaml.SequenceNode):
        lines.append(f"{indent}- {_flow(missing[1:], value)}")
    else:
        for depth, name in enumerate(missing):
            ending = f" {value}" if depth == len(missing) - 1 else ""
            lines.append(f"{indent}{' ' * _STEP * depth}{name}:{ending}")
    gap = "" if text[:at].endswith("\n") else "\n"
    return text[:at] + gap + "\n".join(lines) + "\n" + text[at:]


def _aligned(rest: str, longer: int) -> str:
    """What follows a value that grew by so many characters, its comment in the column where it was if that can be."""
    gap = len(rest) - len(rest.lstrip(" "))
    return " " * max(1, gap - longer) + rest[gap:] if rest[gap : gap + 1] == "#" else rest


def _flow(keys: list[str], value: str) -> str:
    """A value in mappings on one line."""
    return "".join(f"{{{key}: " for key in keys) + value + "}" * len(keys)


def _remove(text: str, keys: list[str]) -> str:
    steps, missing = _walk(text, keys)
    if missing:
        return text
    holder = len(steps) - 2
    while holder > 0 and isinstance(node := steps[holder].node, yaml.CollectionNode) and len(node.value) == 1:
        holder -= 1
    node, entry, value = steps[holder].node, steps[holder].entry, steps[holder + 1].node
    assert entry is not None and isinstance(node, yaml.CollectionNode)
    start, end = entry.start_mark.index, _end(text, value)
    if node.flow_style:
        after = text[end:].lstrip(" ")
        if after.startswith(","):
            return text[:start] + after[1:].lstrip(" ")
        return text[:start].rstrip(", ") + text[end:]
    if isinstance(node, yaml.SequenceNode):
        start = text.rfind("-", 0, start)
    first = _line_start(text, start)
    if text[first:start].strip():  # behind a dash: the item's next field takes its place
        if isinstance(node, yaml.MappingNode) and len(node.value) > 1:
            following = next((key for key, _ in node.value if key.start_mark.index > end), None)
            if following is not None:
                return text[:start] + text[following.start_mark.index :]
        raise ConfigError(f"{dotted(tuple(keys))} cannot be taken out by the form", fix="change it in the text")
    return text[:first] + text[_line_end(text, end) :]
