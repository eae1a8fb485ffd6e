"""Looking after a cache: is every file whole, is one missing, what does it hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.datasets import jobs
from finetune.datasets.entries import fault_of
from finetune.datasets.manifest import KINDS, DamagedManifestError, Kind, Manifest, manifest_fault, read_content
from finetune.datasets.sealed import move_aside
from finetune.errors import CacheError
from finetune.progress import Bar
from finetune.space import disk_fix, human_size

if TYPE_CHECKING:
    from finetune.datasets.cache import Cache


@dataclass(frozen=True)
class Damage:
    """One file that is not what was written."""

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
    """Whether what is damaged was taken out of the cache."""

    @property
    def ok(self) -> bool:
        """Whether nothing is damaged or missing."""
        return not self.damaged and not self.missing

    def __str__(self) -> str:
        lines = [f"{self.checked} entries read ({human_size(self.checked_bytes)}): "]
        lines[0] += "all whole" if self.ok else f"{len(self.damaged)} damaged, {len(self.missing)} missing"
        lines += [
            f"  damaged{' and taken out' if self.deleted else ''}: {one.path}: {one.reason}" for one in self.damaged
        ]
        lines += [f"  missing: {one}" for one in self.missing]
        if self.damaged and not self.deleted:
            lines.append("take the damaged files out with `finetune cache verify --delete`")
        if not self.ok:
            lines.append("`finetune precompute` encodes what is missing")
        return "\n".join(lines)


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
    """Read every entry and manifest, compare it with its checksum and its name, and look for entries that are missing.

    Args:
        cache: which cache.
        delete: delete damaged entries, so that the next precompute makes them again, and move damaged manifests aside.
        progress: draw a bar.

    Raises:
        CacheError: if a manifest is of a newer format, or what is damaged cannot be deleted.
    """
    damaged: list[Damage] = []
    checked, size = 0, 0
    # A collection that is under way would make entries look missing.
    with jobs.take_part(cache.root, "verify") if cache.root.is_dir() else nullcontext():
        paths = [(kind, path) for kind in KINDS for path in sorted(cache.entries(kind))]
        for kind, path in Bar(paths, desc="verifying entries", disable=not progress):
            try:
                content = path.read_bytes()
                reason = fault_of(content, kind, path.stem)
            except FileNotFoundError:
                continue  # found damaged by a job that read it meanwhile
            except OSError as error:
                content, reason = b"", f"it cannot be read: {error.strerror}"
            checked += 1
            size += len(content)
            if reason:
                damaged.append(Damage(path, reason))
                if delete:
                    _take_out(path, kind)
        there = {kind: cache.keys(kind) for kind in KINDS}
        missing: list[str] = []
        for path in cache.manifest_paths():
            try:
                missing += _missing(path, there)
            except DamagedManifestError as error:
                damaged.append(Damage(path, error.what))
                if delete:
                    _take_out(path, None)
    return VerifyReport(checked, size, tuple(damaged), tuple(missing), deleted=delete)


def _missing(path: Path, there: dict[Kind, set[str]]) -> Iterator[str]:
    """Entries that a manifest promises and that are not there."""
    content = read_content(path)
    if content is None or not content["complete"]:
        return
    manifest = Manifest.from_content(content, Path())
    for kind in KINDS:
        for key in sorted(manifest.keys(kind) - there[kind]):
            yield f"{kind}/{key} of manifest {path.stem[:12]}"


def _take_out(path: Path, kind: Kind | None) -> None:
    """Delete a damaged entry, or move a damaged manifest (``kind`` None) aside: it alone knew what it referred to."""
    try:
        if kind is None:
            move_aside(path, lambda content: manifest_fault(content, path.stem))
        else:
            move_aside(path, lambda content: fault_of(content, kind, path.stem)).unlink(missing_ok=True)
    except OSError as error:
        raise CacheError(
            f"a damaged file cannot be deleted: {error.strerror}", where=str(path), fix=disk_fix(error)
        ) from error


def stats(cache: Cache) -> CacheStats:
    """Count what a cache holds.

    Raises:
        CacheError: if a manifest cannot be read.
    """
    sizes: dict[tuple[Kind, str], int] = {}
    for kind in KINDS:
        for path in cache.entries(kind):
            with suppress(FileNotFoundError):  # deleted since it was listed
                sizes[kind, path.stem] = path.stat().st_size
    counts, totals = Counter[Kind](), Counter[Kind]()
    for (kind, _), size in sizes.items():
        counts[kind] += 1
        totals[kind] += size
    manifests = []
    for path, content in cache.manifests():
        manifest = Manifest.from_content(content, Path())
        manifests.append(
            ManifestStats(
                name=path.stem,
                clips=len(manifest.items),
                complete=manifest.complete,
                last_used=datetime.fromtimestamp(path.stat().st_mtime),
                bytes=sum(sizes.get((kind, key), 0) for kind in KINDS for key in manifest.keys(kind)),
            )
        )
    return CacheStats({kind: counts[kind] for kind in KINDS}, {kind: totals[kind] for kind in KINDS}, tuple(manifests))
