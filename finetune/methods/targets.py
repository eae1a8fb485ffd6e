"""Which linear layers an adapter changes: presets, and patterns for their names."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

import regex
from pydantic import AfterValidator

from finetune.core.errors import ConfigError
from finetune.methods.adapter import some

if TYPE_CHECKING:
    from torch import nn

PRESETS: Mapping[str, str] = {
    "attention": r"transformer_blocks\.\d+\.attn1\.(to_q|to_k|to_v|to_out\.0)",
    "attention+ff": r"transformer_blocks\.\d+\.(attn1\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.(0\.proj|2))",
    "all-linear": r".*",
}
"""Module names that a preset selects; like every pattern it must match a whole name, and only linear layers count."""

_MOST_PATTERNS, _LONGEST_PATTERN = 100, 1_000

_MOST_COUNTED = 1_000
"""Product of a pattern's counts: ``(a{50}){50}`` becomes 2500 parts when it is compiled, which takes memory."""

_PATIENCE_S = 0.5
"""For one pattern on one name, which takes microseconds. Some patterns take time exponential in the name's length."""


def _patterns_compile(targets: str | tuple[str, ...]) -> str | tuple[str, ...]:
    if not targets:
        raise ValueError(f"name at least one target: {', '.join(PRESETS)}, or a regular expression")
    if len(patterns := _as_tuple(targets)) > _MOST_PATTERNS:
        raise ValueError(f"there are {len(patterns):,} targets; at most {_MOST_PATTERNS} are read")
    for target in patterns:
        if len(target) > _LONGEST_PATTERN:
            raise ValueError(f"a target has {len(target):,} characters; at most {_LONGEST_PATTERN:,} are read")
        if math.prod(max(int(count), 1) for count in re.findall(r"\{\s*(\d+)", target)) > _MOST_COUNTED:
            raise ValueError(f"{target!r:.100} repeats a part more than {_MOST_COUNTED:,} times")
        try:
            re.compile(PRESETS.get(target, target))
            regex.compile(PRESETS.get(target, target))
        except (re.error, regex.error, OverflowError, RecursionError, MemoryError) as error:
            raise ValueError(f"{target!r:.100} is not a regular expression: {error!s:.100}") from None
    return targets


Targets = Annotated[str | tuple[str, ...], AfterValidator(_patterns_compile)]
"""Presets or regular expressions that must match a module's whole name; a list takes the union."""


def selects(targets: str | tuple[str, ...], name: str) -> bool:
    """Whether a linear layer of this name is among ``targets``.

    Raises:
        ConfigError: if a pattern takes too long.
    """
    return any(_matches(target, name) for target in _as_tuple(targets))


def select(targets: str | tuple[str, ...], linear: Sequence[str]) -> list[str]:
    """Which of a model's ``linear`` layers, by their names, are among ``targets``; in the order they are given in.

    Raises:
        ConfigError: if a target matches none; the message lists the names that come closest.
    """
    chosen: set[str] = set()
    for target in _as_tuple(targets):
        matched = [name for name in linear if _matches(target, name)]
        if not matched:
            raise _nothing_matched(target, linear)
        chosen.update(matched)
    return [name for name in linear if name in chosen]


def linear_layers(transformer: nn.Module) -> list[str]:
    """Names of the linear layers that can get an adapter, in the model's order."""
    from torch import nn

    from finetune.cogvideox.control import widened

    projection = widened(transformer)  # all its weights train
    layers = [(name, layer) for name, layer in transformer.named_modules() if layer is not projection]
    return [name for name, layer in layers if isinstance(layer, nn.Linear)]


def listed(targets: str | tuple[str, ...]) -> str:
    """For people."""
    return ", ".join(_as_tuple(targets))


def _matches(target: str, name: str) -> bool:
    try:
        return regex.fullmatch(PRESETS.get(target, target), name, timeout=_PATIENCE_S) is not None
    except TimeoutError:
        raise ConfigError(
            f"the target {target!r:.100} takes more than {_PATIENCE_S:g} s on the name {name}",
            where="method.targets",
            fix="write it without repetitions inside repetitions",
        ) from None


def _as_tuple(targets: str | tuple[str, ...]) -> tuple[str, ...]:
    return (targets,) if isinstance(targets, str) else targets


def _nothing_matched(target: str, linear: Sequence[str]) -> ConfigError:
    # One block stands for all, and a bare layer name is what people usually mean.
    close = difflib.get_close_matches(target, linear, n=4, cutoff=0.3)
    close += [name for name in linear if name.endswith(f".{target}")]
    near = some(dict.fromkeys(close or linear[:4]))
    return ConfigError(
        f"the target {target!r} selects nothing: no linear layer has such a name",
        where="method.targets",
        fix=f"use {', '.join(PRESETS)}, or a regular expression for whole names such as {near}",
    )
