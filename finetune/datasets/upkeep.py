"""Looking after a cache: is every entry whole, what does nobody need, what does it hold."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.datasets.entries import split, tensors_digest
from finetune.datasets.manifest import KINDS, Kind, Manifest
from finetune.files import digest_of

if TYPE_CHECKING:
    from finetune.datasets.cache import Cache

PARTIAL_AGE_S = 3600.0
"""A ``*.partial`` file that nobody has written to for this long belongs to a process that died."""


def human_size(size: int) -> str:
    """Bytes for a person: GiB from a tenth of one up, MiB below."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.3f} MiB"


@dataclass(frozen=True)
class Damage:
    """One entry that is not what it says."""

    path: Path
    reason: str


@dataclass(frozen=True)
class VerifyReport:
    """What ``verify`` found."""

    checked: int
    """Entries read."""
    checked_bytes: int
    damaged: tuple[Damage, ...]
    missing: tuple[str, ...]
    """Entries that a complete manifest refers to and that are not there, in words."""
    deleted: bool
    """Whether the damaged entries were deleted."""

    @property
    def ok(self) -> bool:
        """Whether nothing is damaged or missing."""
        return not self.damaged and not self.missing

    def __str__(self) -> str:
        lines = [f"{self.checked} entries read ({human_size(self.checked_bytes)}): "]
        lines[0] += "all whole" if self.ok else f"{len(self.damaged)} damaged, {len(self.missing)} missing"
        lines += [f"  damaged{', deleted' if self.deleted else ''}: {one.path}: {one.reason}" for one in self.damaged]
        lines += [f"  missing: {one}" for one in self.missing]
        if self.damaged and not self.deleted:
            lines.append("delete the damaged entries with `finetune cache verify --delete`")
        if not self.ok:
            lines.append("`finetune precompute` encodes what is missing")
        return "\n".join(lines)


@dataclass(frozen=True)
class GcReport:
    """What ``gc`` removed, or would remove."""

    entries: int
    """That no manifest refers to."""
    manifests: int
    """Not used for as long as was asked, or of an older format."""
    partials: int
    """Left over by processes that died."""
    bytes: int
    deleted: bool

    def __str__(self) -> str:
        verb = "removed" if self.deleted else "would remove"
        what = f"{self.entries} entries, {self.manifests} manifests, {self.partials} unfinished files"
        return f"{verb} {what}: {human_size(self.bytes)}"


@dataclass(frozen=True)
class ManifestStats:
    """One manifest in figures."""

    name: str
    clips: int
    complete: bool
    last_used: datetime
    bytes: int
    """Of the entries it refers to and that are there; entries may be shared with other manifests."""


@dataclass(frozen=True)
class CacheStats:
    """What a cache holds."""

    entries: dict[Kind, int]
    bytes: dict[Kind, int]
    manifests: tuple[ManifestStats, ...]

    def __str__(self) -> str:
        lines = [f"{kind:<9} {self.entries[kind]:>8} entries {human_size(self.bytes[kind]):>14}" for kind in KINDS]
        for one in self.manifests:
            state = "" if one.complete else ", not finished"
            used = one.last_used.strftime("%Y-%m-%d %H:%M")
            lines.append(
                f"manifest {one.name[:12]}: {one.clips} clips, {human_size(one.bytes)}, last used {used}{state}"
            )
        return "\n".join(lines)


def verify(cache: Cache, *, delete: bool = False, progress: bool = False) -> VerifyReport:
    """Read every entry and compare it with the digest and the address it carries; look for entries that are missing.

    Args:
        cache: which cache.
        delete: delete damaged entries, so that the next precompute makes them again.
        progress: draw a bar.

    Raises:
        CacheError: if a manifest cannot be read.
    """
    from tqdm import tqdm

    damaged: list[Damage] = []
    checked, size = 0, 0
    paths = [(kind, path) for kind in KINDS for path in sorted(cache.entries(kind))]
    for kind, path in tqdm(paths, desc="verify", unit=" entries", disable=not progress):
        checked += 1
        size += path.stat().st_size
        if reason := _fault(kind, path):
            damaged.append(Damage(path, reason))
    if delete:
        for one in damaged:
            one.path.unlink(missing_ok=True)
    there = {kind: cache.keys(kind) for kind in KINDS}
    missing = [
        f"{kind}/{key} of manifest {path.stem[:12]}"
        for path, manifest in _manifests(cache)
        if manifest.complete
        for kind in KINDS
        for key in sorted(manifest.keys(kind) - there[kind])
    ]
    return VerifyReport(checked, size, tuple(damaged), tuple(missing), deleted=delete)


def _fault(kind: Kind, path: Path) -> str:
    """Why an entry is not whole; empty if it is."""
    try:
        header, metadata, data = split(path.read_bytes())
        address = json.loads(metadata["address"])
        if metadata["key"] != path.stem or digest_of(address) != path.stem or address["kind"] != kind:
            return "it is another entry under this name"
        if tensors_digest(header, data) != metadata["digest"]:
            return "its tensors are not what was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"it cannot be read: {error}"
    return ""


def gc(
    cache: Cache,
    *,
    delete: bool = False,
    unused_days: float | None = None,
    keep: Collection[str] | None = None,
    partial_age_s: float = PARTIAL_AGE_S,
) -> GcReport:
    """Find, and on demand delete, what no manifest refers to.

    Do not run it beside a precompute of the same cache that has only begun: until its manifest stands, an old entry
    that it means to use again still looks unused.

    Args:
        cache: which cache.
        delete: False only reports.
        unused_days: also drop manifests that nothing has used for this long, and with them what only they refer to.
        keep: names of the manifests to keep (``Manifest.name``), dropping all others; None keeps every one.
        partial_age_s: how old an unfinished file must be.

    Raises:
        CacheError: if a manifest cannot be read: what it refers to must not be taken for garbage.
    """
    now = time.time()
    # Entries first: one that is written after this line cannot be taken for garbage.
    entries = {(kind, path.stem): path for kind in KINDS for path in cache.entries(kind)}
    partials = [path for path in cache.root.rglob("*.partial") if now - _mtime(path, now) > partial_age_s]
    kept: set[Path] = set()
    for path, manifest in _manifests(cache):
        idle_days = (now - _mtime(path, now)) / 86_400
        if (keep is None or path.stem in keep) and (unused_days is None or idle_days <= unused_days):
            kept.add(path)
            for kind in KINDS:
                for key in manifest.keys(kind):
                    entries.pop((kind, key), None)
    manifests = [path for path in (cache.root / "manifests").glob("*.json") if path not in kept]
    doomed = [*manifests, *entries.values(), *partials]
    size = sum(path.stat().st_size for path in doomed if path.exists())
    if delete:
        for path in doomed:  # manifests first: none may be left that promises what is gone
            path.unlink(missing_ok=True)
    return GcReport(len(entries), len(manifests), len(partials), size, deleted=delete)


def stats(cache: Cache) -> CacheStats:
    """Count what a cache holds.

    Raises:
        CacheError: if a manifest cannot be read.
    """
    sizes = {(kind, path.stem): path.stat().st_size for kind in KINDS for path in cache.entries(kind)}
    counts, totals = Counter[Kind](), Counter[Kind]()
    for (kind, _), size in sizes.items():
        counts[kind] += 1
        totals[kind] += size
    manifests = tuple(
        ManifestStats(
            name=path.stem,
            clips=len(manifest.items),
            complete=manifest.complete,
            last_used=datetime.fromtimestamp(path.stat().st_mtime),
            bytes=sum(sizes.get((kind, key), 0) for kind in KINDS for key in manifest.keys(kind)),
        )
        for path, manifest in _manifests(cache)
    )
    return CacheStats({kind: counts[kind] for kind in KINDS}, {kind: totals[kind] for kind in KINDS}, manifests)


def _manifests(cache: Cache) -> Iterator[tuple[Path, Manifest]]:
    for path, _ in cache.manifests():
        yield path, cache.read_manifest(path, Path())


def _mtime(path: Path, default: float) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # renamed by its writer since it was listed
        return default
