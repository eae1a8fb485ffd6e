"""What does not validate, as errors that name the line, the nearest valid word and the fix."""

from __future__ import annotations

import difflib
import math
import re
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from finetune.config.document import Document, Keys
from finetune.core.errors import ConfigError, raise_all
from finetune.core.text import text_fault

M = TypeVar("M", bound=BaseModel)

_MOST_FAULTS = 200

_MOST_SHOWN = 200
"""Characters of a value, and of what is said of it."""


def validate(kind: type[M], document: Document) -> M:
    """Validate a document as a ``kind``.

    Raises:
        ConfigError: one for all faults, each with its place in the file.
    """
    headline = "{n} faults in " + (document.name or "the configuration")
    raise_all(ConfigError, list(_damaged_text(document.values, document, ())), what=headline)
    try:
        model = kind.model_validate(document.values)
    except ValidationError as error:
        raise_all(ConfigError, explain(kind, error, document), what=headline, limit=1000)
        raise
    raise_all(ConfigError, list(_odd_numbers(model, document, ())), what=headline, limit=1000)
    return model


def explain(kind: type[BaseModel], error: ValidationError, document: Document) -> list[ConfigError]:
    """Every fault of a pydantic error as a ``ConfigError``, in the order of the file where it is known.

    Of thousands of faults, which is what a file of another kind gives, the first ``_MOST_FAULTS`` are explained.
    """
    faults: list[tuple[Keys, ConfigError]] = []
    alternatives: dict[Keys, list[ErrorDetails]] = {}
    all_details = error.errors(include_url=False)
    if len(all_details) > _MOST_FAULTS:
        rest = len(all_details) - _MOST_FAULTS
        faults.append(
            ((), ConfigError(f"there are {rest:,} faults more: is this the right file?", where=document.name))
        )
        del all_details[_MOST_FAULTS:]
    for details in all_details:
        spot = _locate(kind, details["loc"])
        # pydantic counts a list's valid items only: "too short" beside faults of the items is their echo.
        if details["type"] == "too_short" and any(_is_inside(other["loc"], details["loc"]) for other in all_details):
            continue
        if spot.alternative:  # one value, refused once by every member of a plain union
            alternatives.setdefault(spot.path, []).append(details)
        else:
            path = (*spot.path, "kind") if details["type"].startswith("union_tag") else spot.path
            where = _fields_named(details, document) or document.place(path)
            faults.append((path, _fault(kind, spot, details, where)))
    for path, refused in alternatives.items():
        wants = "; or ".join(dict.fromkeys(_wants(details) for details in refused))
        shown = document.value(path)
        faults.append((path, ConfigError(f"{_dotted(path)} is {_quoted(shown)}: {wants}", where=document.place(path))))
    order = {path: index for index, path in enumerate(document.places) if path}

    def position(path: Keys) -> int:
        written = (path[:end] for end in range(len(path), 0, -1) if path[:end] in order)
        return order.get(next(written, ()), len(order))  # a missing section stands nowhere: it comes last

    return [fault for _, fault in sorted(faults, key=lambda item: position(item[0]))]


def _fields_named(details: ErrorDetails, document: Document) -> str:
    """The places of those fields that a fault of several of them names, as far as they are written; else empty."""
    if details["type"] != "value_error":
        return ""
    names = dict.fromkeys(re.findall(r"\b[a-z_]+(?:\.[a-z_]+)+\b", details["msg"][:_MOST_SHOWN]))
    written = {name: document.places.get(tuple(name.split("."))) for name in names}
    return ", ".join(f"{place} ({name})" for name, place in written.items() if place)


def _is_inside(loc: tuple[int | str, ...], outer: tuple[int | str, ...]) -> bool:
    return len(loc) > len(outer) and loc[: len(outer)] == outer


@dataclass(frozen=True)
class _Spot:
    path: Keys
    """Where in the document."""
    holder: type[BaseModel] | None
    """The section that the last part of the path is, or should be, a field of."""
    union: tuple[type[BaseModel], ...] = ()
    """The section's fellow members, where it is one of a union."""
    alternative: bool = False
    """Whether the error came from one branch of a plain union such as ``int | list[int]``."""


def _locate(kind: type[BaseModel], loc: tuple[int | str, ...]) -> _Spot:
    """Turn pydantic's location, which also names union members, into a path of the document."""
    annotation: Any = kind
    path: list[str | int] = []
    holder: type[BaseModel] | None = None
    union: tuple[type[BaseModel], ...] = ()
    for part in loc:
        annotation = bare(annotation)
        if is_section(annotation):
            if holder is None or annotation not in union:
                union = union if annotation in union else ()
            holder = annotation
            path.append(part)
            info = annotation.model_fields.get(str(part))
            annotation = info.annotation if info else None
        elif is_union(annotation):
            members = tuple(member for member in map(bare, get_args(annotation)) if is_section(member))
            chosen = [member for member in members if part in _kinds(member)]
            if not chosen:
                return _Spot(tuple(path), holder, alternative=True)
            annotation, union = chosen[0], members
        else:
            arguments = get_args(annotation)
            path.append(part)
            annotation = arguments[-1] if get_origin(annotation) is dict else (arguments or (None,))[0]
    return _Spot(tuple(path), holder, union)


def bare(annotation: Any) -> Any:
    """Without ``Annotated`` and without ``| None``."""
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if is_union(annotation):
        members = [member for member in get_args(annotation) if member is not type(None)]
        if len(members) == 1:
            return bare(members[0])
    return annotation


def is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType)


def is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _kinds(member: type[BaseModel]) -> tuple[Any, ...]:
    info = member.model_fields.get("kind")
    return get_args(info.annotation) if info and get_origin(info.annotation) is Literal else ()


# ------------------------------------------------------------------------------------------------------ the sentences


def _fault(root: type[BaseModel], spot: _Spot, details: ErrorDetails, where: str) -> ConfigError:
    name = _dotted(spot.path[-2:] if spot.path and isinstance(spot.path[-1], int) else spot.path[-1:])
    match details["type"]:
        case "extra_forbidden":
            return _unknown(root, spot, name, where)
        case "missing":
            info = spot.holder.model_fields.get(name) if spot.holder else None
            meaning = _first_sentence(info.description if info else "")
            return ConfigError(f"'{name}' is missing", where=where, fix=f"add it: {meaning}" if meaning else "add it")
        case "union_tag_not_found":
            return ConfigError(f"{_dotted(spot.path)} needs a field 'kind'", where=where, fix=_wants(details))
        case "union_tag_invalid":
            tag, expected = f"{details['ctx']['tag']!s:.60}", str(details["ctx"]["expected_tags"])
            known = [word.strip(" '") for word in expected.split(",")]
            return ConfigError(
                f"unknown kind '{tag}'{did_you_mean(tag, known)}", where=where, fix=f"use one of {', '.join(known)}"
            )
        case "literal_error":
            expected = str(details["ctx"]["expected"])
            known = [word.strip(" '") for word in expected.replace(" or ", ",").split(",")]
            near = did_you_mean(str(details["input"]), known)
            what = f"'{name}' is {_quoted(details['input'])}, which is not possible{near}"
            return ConfigError(what, where=where, fix=f"use one of {', '.join(known)}")
        case "string_type" if isinstance(details["input"], int | float):
            return ConfigError(
                f"'{name}' is the number or truth value {_quoted(details['input'])}, and text is wanted",
                where=where,
                fix=f'put it in quotes: {name}: "{details["input"]!s:.40}"',
            )
        case "value_error" | "assertion_error":
            return ConfigError(f"{details['ctx']['error']!s:.{_MOST_SHOWN}}", where=where)
    given = details["input"]
    shown = "a list" if isinstance(given, list | tuple) else _quoted(given)
    shown = "a mapping" if isinstance(given, Mapping | BaseModel) else shown
    return ConfigError(f"'{name}' is {'empty' if given is None else shown}: {_wants(details)}", where=where)


_PLAIN_WORDS: Mapping[str, str] = {
    **dict.fromkeys(("model_type", "model_attributes_type", "dict_type"), "should be a mapping of fields"),
    **dict.fromkeys(("tuple_type", "list_type"), "should be a list, in brackets: [first, second]"),
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "should be a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "should be a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "should be true or false"),
    "string_type": "should be text",
    "path_type": "should be a path",
}
"""By pydantic's kind of error: what is wanted, where its own words are those of a programmer."""


def _wants(details: ErrorDetails) -> str:
    message = details["msg"].removeprefix("Value error, ").removeprefix("Input ")
    message = _PLAIN_WORDS.get(details["type"], message)
    return message[0].lower() + message[1:]


def _unknown(root: type[BaseModel], spot: _Spot, name: str, where: str) -> ConfigError:
    fields = list(spot.holder.model_fields) if spot.holder else []
    what = f"unknown field '{name}'{did_you_mean(name, fields)}"
    fellows = [kind for member in spot.union if name in member.model_fields for kind in _kinds(member)]
    elsewhere = [path for path in field_paths(root) if path.rpartition(".")[2] == name]
    if fellows:
        fix = f"'{name}' belongs to kind {' and '.join(dict.fromkeys(fellows))}"
    elif elsewhere:
        fix = f"'{name}' is written as {' or '.join(dict.fromkeys(elsewhere))}"
    else:
        fix = f"the fields here are {', '.join(fields)}"
    return ConfigError(what, where=where, fix=fix)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``; did you mean 'seed'?``, or nothing where no known word is near."""
    near = difflib.get_close_matches(word[:60].lower(), list(known), n=1, cutoff=0.6)
    return f"; did you mean '{near[0]}'?" if near else ""


def field_paths(kind: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The dotted paths of all fields below a section; items of lists are not entered."""
    for name, info in kind.model_fields.items():
        yield prefix + name
        annotation = bare(info.annotation)
        for member in map(bare, get_args(annotation) if is_union(annotation) else [annotation]):
            if is_section(member):
                yield from field_paths(member, f"{prefix}{name}.")


def _first_sentence(text: str | None) -> str:
    return " ".join((text or "").split()).split(". ")[0].rstrip(".")


def _dotted(path: Keys) -> str:
    return ".".join(f"{part!s:.60}" for part in path)


def _quoted(value: Any) -> str:
    """A value as Python writes it, as much of it as anyone would read."""
    try:
        text = repr(value[:_MOST_SHOWN] if isinstance(value, str) else value)
    except ValueError:  # Python refuses to write down an integer of more than 4300 digits
        text = "a number of thousands of digits"
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def _damaged_text(value: Any, document: Document, path: Keys) -> Iterator[ConfigError]:
    """Texts that hold control characters or the like: no path, prompt or name of ours has a use for them."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _damaged_text(item, document, (*path, key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _damaged_text(item, document, (*path, index))
    elif isinstance(value, str) and (fault := text_fault(value)):
        yield ConfigError(f"{_dotted(path)} is damaged: {fault}", where=document.place(path))


def _odd_numbers(value: Any, document: Document, path: Keys) -> Iterator[ConfigError]:
    """Numbers that pydantic accepts and nobody means: infinities, NaN, and ``true`` where a number is wanted."""
    if isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from _odd_numbers(getattr(value, name), document, (*path, name))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _odd_numbers(item, document, (*path, index))
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _odd_numbers(item, document, (*path, key))
    elif isinstance(value, float) and not math.isfinite(value):
        yield ConfigError(f"{_dotted(path)} is {value}, and a finite number is wanted", where=document.place(path))
    elif isinstance(value, int | float) and type(value) is not bool and isinstance(document.value(path), bool):
        yield ConfigError(
            f"{_dotted(path)} is {document.value(path)}, and a number is wanted", where=document.place(path)
        )
