"""A configuration as a form: a field for every option of the schema, with its help, its default and what is written.

The form holds no rule of its own. Which fields there are follows from ``config.schema``; a change is a change of the
YAML text (``yaml_edit``), and whether it makes sense is for ``load_config`` to say.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined, to_jsonable_python

from finetune.config.document import Document, Keys, dotted
from finetune.config.messages import bare, is_section, is_union
from finetune.config.schema import RunConfig
from finetune.web.yaml_edit import on_one_line


@dataclass(frozen=True)
class Field:
    """An option."""

    path: str
    """Dotted, as ``--set`` takes it."""
    name: str
    help: str
    value: str | None
    """As YAML, or as text where it is ``plain``; None where nothing is written."""
    default: str
    """As YAML; empty where there is none."""
    choices: tuple[str, ...] = ()
    plain: bool = False
    """Whether it is text, which stands in the form as it is."""

    def as_yaml(self, typed: str) -> str:
        """What was typed, as ``yaml_edit.put`` takes it."""
        return on_one_line(typed.strip()) if self.plain and typed.strip() else typed


@dataclass(frozen=True)
class Section:
    """Options that stand together."""

    path: str
    """Empty for the outermost."""
    help: str
    fields: tuple[Field, ...]

    @property
    def written(self) -> int:
        """How many of the fields stand in the file."""
        return sum(field.value is not None for field in self.fields)


def form_of(document: Document) -> list[Section]:
    """The form of a configuration file, in the order of the schema; lists of sections have a part for each item."""
    return list(_sections((RunConfig,), document, (), ""))


def _sections(members: Sequence[type[BaseModel]], document: Document, path: Keys, help: str) -> Iterator[Section]:
    """A section, or the one of a union that is written, and those in it."""
    chosen = _chosen(members, document, path)
    fields: list[Field] = []
    inner: list[tuple[list[type[BaseModel]], Keys, str]] = []
    for name, info in chosen.model_fields.items():
        place = (*path, name)
        parts, listed = _parts(info.annotation)
        if name == "kind" and len(members) > 1:
            kinds = tuple(_kind_of(member) for member in members)
            fields.insert(0, _field(document, place, info, kinds))
        elif not parts and (name != "kind" or len(_choices(info)) > 1):
            fields.append(_field(document, place, info, _choices(info)))
        elif parts and not listed:
            inner.append((parts, place, info.description or ""))
        elif parts:
            items = document.value(place)
            places = [(*place, index) for index in range(len(items) if isinstance(items, list) else 0)]
            if not places:  # there is nothing to take apart
                fields.append(_field(document, place, info, ()))
            inner += [(parts, item, info.description or "") for item in places]
    if fields:
        yield Section(dotted(path), _words(help), tuple(fields))
    for parts, place, text in inner:
        yield from _sections(parts, document, place, text)


def _parts(annotation: Any) -> tuple[list[type[BaseModel]], bool]:
    """The sections that a field is one of, if it is one; and whether it is a list of them."""
    annotation = bare(annotation)
    listed = get_origin(annotation) is tuple
    if listed:
        annotation = bare(get_args(annotation)[0])
    members = [bare(member) for member in get_args(annotation)] if is_union(annotation) else [annotation]
    return (members, listed) if all(is_section(member) for member in members) else ([], False)


def _kind_of(member: type[BaseModel]) -> str:
    info = member.model_fields.get("kind")
    return str(get_args(info.annotation)[0]) if info else ""


def _chosen(members: Sequence[type[BaseModel]], document: Document, path: Keys) -> type[BaseModel]:
    """The member of a union that is written, or that holds where none is."""
    written = document.value((*path, "kind"))
    default = RunConfig.model_fields[str(path[0])].default if len(path) == 1 else None
    kind = getattr(default, "kind", None) if written is None else written
    return next((member for member in members if _kind_of(member) == kind), members[0])


def _choices(info: FieldInfo) -> tuple[str, ...]:
    annotation = bare(info.annotation)
    if annotation is bool:
        return ("true", "false")
    return tuple(map(str, get_args(annotation))) if get_origin(annotation) is Literal else ()


def _field(document: Document, path: Keys, info: FieldInfo, choices: tuple[str, ...]) -> Field:
    outer, name = document.value(path[:-1]) if len(path) > 1 else document.values, str(path[-1])
    written = isinstance(outer, dict) and name in outer
    default = info.get_default(call_default_factory=True)
    plain = not choices and bare(info.annotation) in (str, Path)

    def shown(value: Any) -> str:
        return value if plain and isinstance(value, str) else on_one_line(value)

    return Field(
        path=dotted(path),
        name=name,
        help=_words(info.description or ""),
        value=shown(document.value(path)) if written else None,
        default="" if default is PydanticUndefined else shown(to_jsonable_python(default, fallback=str)),
        choices=choices,
        plain=plain,
    )


def _words(text: str) -> str:
    return " ".join(text.replace("``", "").split())
