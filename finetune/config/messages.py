"""What does not validate, as errors that name the line, the nearest valid word and the fix."""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from finetune.config.document import MOST_SHOWN, Document, Keys, dotted, quoted
from finetune.core.errors import ConfigError

_MOST_FAULTS = 200
"""Explained; a file of another kind gives thousands."""


def explain(kind: type[BaseModel], error: ValidationError, document: Document) -> list[ConfigError]:
    """Every fault of a pydantic error as a ``ConfigError``, in the order of the file where it is known."""
    faults: list[tuple[Keys, ConfigError]] = []
    alternatives: dict[Keys, list[str]] = {}
    every = error.errors(include_url=False)
    for details in every[:_MOST_FAULTS]:
        loc = details["loc"]
        # pydantic counts a list's valid items only: "too short" beside faults of the items is their echo.
        if details["type"] == "too_short" and any(other["loc"][: len(loc)] == loc != other["loc"] for other in every):
            continue
        spot = _locate(kind, loc)
        if spot.alternative:  # one value, refused once by every member of a plain union
            alternatives.setdefault(spot.path, []).append(_wants(details))
        else:
            path = (*spot.path, "kind") if details["type"].startswith("union_tag") else spot.path
            where = _fields_named(details, document) or document.place(path)
            faults.append((path, _fault(kind, spot, details, where)))
    for path, wants in alternatives.items():
        what = f"{dotted(path)} is {quoted(document.value(path))}: {'; or '.join(dict.fromkeys(wants))}"
        faults.append((path, ConfigError(what, where=document.place(path))))
    order = {path: index for index, path in enumerate(document.places) if path}

    def position(path: Keys) -> int:
        written = (path[:end] for end in range(len(path), 0, -1) if path[:end] in order)
        return order.get(next(written, ()), len(order))  # a missing section stands nowhere: it comes last

    ordered = [fault for _, fault in sorted(faults, key=lambda item: position(item[0]))]
    if (rest := len(every) - _MOST_FAULTS) > 0:
        what = f"there are {rest:,} faults more: is this the right file?"
        ordered.append(ConfigError(what, where=document.name))
    return ordered


def _fields_named(details: ErrorDetails, document: Document) -> str:
    """The places of those fields that a fault of several of them names, as far as they are written; else empty."""
    if details["type"] != "value_error":
        return ""
    names = dict.fromkeys(re.findall(r"\b[a-z_]+(?:\.[a-z_]+)+\b", details["msg"][:MOST_SHOWN]))
    written = {name: document.places.get(tuple(name.split("."))) for name in names}
    return ", ".join(f"{place} ({name})" for name, place in written.items() if place)


class _Spot(NamedTuple):
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
    name = dotted(spot.path[-2:] if spot.path and isinstance(spot.path[-1], int) else spot.path[-1:])
    given, context, fix = details["input"], details.get("ctx", {}), ""
    match details["type"]:
        case _ if given is None and ":" in name:
            what, fix = f"'{name}' has no space behind its colon", f"write {{{name.replace(':', ': ', 1)}}}"
        case "union_tag_not_found":
            what = f"'{name}' has no kind"
            info = spot.holder.model_fields.get(name) if spot.holder else None
            members = get_args(bare(info.annotation)) if info else ()
            fix = f"add kind: one of {', '.join(kind for member in members for kind in _kinds(member))}"
        case "extra_forbidden":
            what, fix = _unknown(root, spot, name)
        case "missing":
            info = spot.holder.model_fields.get(name) if spot.holder else None
            what, fix = f"'{name}' is missing", f"add it: {_first_sentence(info)}".removesuffix(": ")
        case "union_tag_invalid" | "literal_error" as kind:
            expected = str(context.get("expected_tags") or context["expected"]).replace(" or ", ",")
            known = [word.strip(" '") for word in expected.split(",")]
            word = str(context.get("tag", given))
            what = f"unknown kind '{word:.60}'" if kind != "literal_error" else f"'{name}' is {quoted(given)}"
            what += (", which is not possible" if kind == "literal_error" else "") + did_you_mean(word, known)
            fix = f"use one of {', '.join(known)}"
        case "string_type" if isinstance(given, int | float):
            what = f"'{name}' is the number or truth value {quoted(given)}, and text is wanted"
            fix = f'put it in quotes: {name}: "{quoted(given):.40}"'
        case "value_error" | "assertion_error":
            what = f"{context['error']!s:.{MOST_SHOWN}}"
        case _:
            shown = "a list" if isinstance(given, list | tuple) else "empty" if given is None else quoted(given)
            shown = "a mapping" if isinstance(given, Mapping | BaseModel) else shown
            what = f"'{name}' is {shown}: {_wants(details)}"
    return ConfigError(what, where=where, fix=fix)


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


_ABSENT: Mapping[str, str] = {
    "noise_offset": "leave it out: an offset teaches models to change the mean brightness that never see pure noise;"
    " CogVideoX's schedule ends in pure noise (zero terminal SNR), so there is nothing to make up for",
    "min_snr_gamma": "write objective.weighting: {kind: min_snr, gamma: 5}",
}
"""Settings that other trainers have under these names: what to write, or why there is none."""


def _unknown(root: type[BaseModel], spot: _Spot, name: str) -> tuple[str, str]:
    """What is wrong with a name that is no field where it stands, and where it would be one."""
    fields = list(spot.holder.model_fields) if spot.holder else []
    fellows = [kind for member in spot.union if name in member.model_fields for kind in _kinds(member)]
    elsewhere = [path for path in field_paths(root) if path.rpartition(".")[2] == name]
    if name in _ABSENT:
        fix = _ABSENT[name]
    elif fellows:
        fix = f"'{name}' belongs to kind {' and '.join(dict.fromkeys(fellows))}"
    elif elsewhere:
        fix = f"'{name}' is written as {' or '.join(dict.fromkeys(elsewhere))}"
    else:
        fix = f"the fields here are {', '.join(fields)}"
    return f"unknown field '{name}'{did_you_mean(name, fields)}", fix


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


def _first_sentence(info: FieldInfo | None) -> str:
    text = (info.description if info else None) or ""
    return " ".join(text.split()).split(". ")[0].rstrip(".")
