"""Precompute in N commands that know nothing of each other, and the proof that together they made all of it.

Each takes every n-th clip of the dataset and files a manifest of its own, under the request with its part named. Any
scheduler, or none, may start them, at any time and in any order, also again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from finetune.core.errors import CacheError, ConfigError
from finetune.core.terminal import Bar
from finetune.datasets.cache import Cache
from finetune.datasets.manifests import KINDS, Kind, Manifest

T = TypeVar("T")

LEFT_OUT = "left out: "
"""How the note on a clip that could not be decoded begins; its name and row follow."""


@dataclass(frozen=True)
class Part:
    """One of several parts of a dataset."""

    number: int
    """From 1."""
    of: int

    @classmethod
    def parse(cls, text: str) -> Part:
        """From ``3/16``.

        Raises:
            ConfigError: if it is none.
        """
        match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text.strip())
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            fix = "write it as 3/16, from 1/16 to 16/16"
            raise ConfigError(f"{text!r} is no part of a dataset", where="--shard", fix=fix)
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def take(self, clips: Sequence[T]) -> tuple[T, ...]:
        """Its share of all clips."""
        return tuple(clips[self.number - 1 :: self.of])

    def request(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """What its manifest answers: that of the whole dataset, and which part."""
        return {**request, "shard": str(self)}


def filed_parts(cache: Cache, request: Mapping[str, Any]) -> dict[Part, tuple[Path, Manifest]]:
    """The manifests of a dataset's parts, whose paths start nowhere.

    Raises:
        CacheError: if a manifest cannot be read.
    """
    parts = {}
    for path, content in cache.manifests():
        name = content["request"].get("shard")
        if name is not None and content["request"] == {**request, "shard": name}:
            parts[Part.parse(name)] = (path, Manifest.from_content(content, Path()))
    return parts


def all_finished(parts: Mapping[Part, tuple[Path, Manifest]], of: int) -> bool:
    """Whether each of ``of`` parts has ended."""
    return sum(manifest.complete for part, (_, manifest) in parts.items() if part.of == of) == of


def require_whole(
    manifest: Manifest, cache: Cache, parts: Mapping[Part, object], failed: set[str], *, progress: bool
) -> None:
    """Read every entry of a manifest and compare it with its checksum.

    Args:
        manifest: of the whole dataset.
        cache: where its entries are. Damaged ones are moved aside.
        parts: those that were begun, for the message.
        failed: keys of clips that could not be decoded, and may be missing.
        progress: draw a bar.

    Raises:
        CacheError: naming every entry that is missing or damaged, and the parts to run again.
    """
    entries = [(kind, key) for kind in KINDS for key in sorted(manifest.keys(kind) - failed)]
    faults: dict[tuple[Kind, str], str] = {}
    for kind, key in Bar(entries, desc="verifying entries", disable=not progress):
        try:
            cache.check(kind, key)
        except CacheError as error:
            faults[kind, key] = error.what
    if not faults:
        return
    totals = {part.of for part in parts}
    lines, again = [], set()
    for (kind, key), fault in faults.items():
        rows = [n for n, item in enumerate(manifest.items) if key in (*item.latents_keys, *item.prompt_keys)]
        whose = f" ({manifest.items[rows[0]].clip}, {manifest.items[rows[0]].where})" if rows else ""
        lines.append(f"  {kind}/{key}{whose}: {fault}")
        again |= {str(Part((rows[0] if rows else 0) % of + 1, of)) for of in totals}
    commands = " and ".join(f"`finetune precompute --shard {part}`" for part in sorted(again))
    raise CacheError(
        f"{len(faults)} of {len(entries)} entries are not there or not whole\n" + "\n".join(lines),
        where=str(cache.root),
        fix=f"run {commands or '`finetune precompute`'} again, which encodes them, and then `--merge`",
    )


def remove_parts(parts: Mapping[Part, tuple[Path, Manifest]]) -> None:
    """Delete the manifests of parts that are merged; where that cannot be, they only keep their entries."""
    for path, _ in parts.values():
        with suppress(OSError):
            path.unlink()
