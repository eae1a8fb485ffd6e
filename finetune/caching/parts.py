"""Precompute in N commands that know nothing of each other, and the proof that together they made all of it.

Each takes every n-th row of the dataset (of a stream every n-th file, where there are so many) and files a manifest of
its own, under the request with its part named. Any scheduler, or none, may start them, at any time and in any order,
also again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from finetune.core.errors import CacheError
from finetune.core.terminal import Bar
from finetune.datasets.cache import Cache
from finetune.datasets.manifests import KINDS, Kind, Manifest
from finetune.datasets.parts import Part

LEFT_OUT = "left out: "
"""How the note on a clip that could not be decoded begins; its name and row follow."""


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
    manifest: Manifest,
    cache: Cache,
    parts: Mapping[Part, tuple[Path, Manifest]],
    failed: set[str],
    *,
    progress: bool,
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
    whose = {key: item for item in reversed(manifest.items) for key in (*item.latents_keys, *item.prompt_keys)}
    lines, again = [], set()
    for (kind, key), fault in faults.items():
        clip = f" ({whose[key].clip}, {whose[key].where})" if key in whose else ""
        lines.append(f"  {kind}/{key}{clip}: {fault}")
        # Which part a row belongs to, its manifest says; a part that has none has not come so far.
        again |= {part for part, (_, its) in parts.items() if key in its.keys(kind)} or _absent(parts)
    ordered = sorted(again, key=lambda part: (part.of, part.number))
    commands = " and ".join(f"`finetune precompute --shard {part}`" for part in ordered)
    raise CacheError(
        f"{len(faults)} of {len(entries)} entries are not there or not whole\n" + "\n".join(lines),
        where=str(cache.root),
        fix=f"run {commands or '`finetune precompute`'} again, which encodes them, and then `--merge`",
    )


def _absent(parts: Iterable[Part]) -> set[Part]:
    """Parts that were never begun, beside those that were."""
    return {Part(number, of) for of in {part.of for part in parts} for number in range(1, of + 1)} - set(parts)


def remove_parts(parts: Mapping[Part, tuple[Path, Manifest]]) -> None:
    """Delete the manifests of parts that are merged; where that cannot be, they only keep their entries."""
    for path, _ in parts.values():
        with suppress(OSError):
            path.unlink()
