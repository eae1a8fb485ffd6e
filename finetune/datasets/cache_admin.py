"""Looking after a cache: delete what nobody needs, verify that every file is whole, count what is there."""

from __future__ import annotations

import errno
import os
import time
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from finetune.core import locks
from finetune.core.errors import CacheError
from finetune.core.files import disk_fix, human_size
from finetune.core.terminal import Bar
from finetune.datasets.cache import Cache
from finetune.datasets.entries import fault_of
from finetune.datasets.manifests import KINDS, DamagedManifestError, Kind, Manifest, read_content
from finetune.datasets.shards import (
    ENDING,
    INDEX_ENDING,
    SHARD_BYTES,
    Packed,
    Row,
    groups,
    index_fault,
    index_of,
    remove,
)
from finetune.datasets.streams import wanted_entries

LEFTOVER_AGE_S = 3600.0
"""An unfinished file that nobody has written to for this long belongs to a process that died; a damaged one that was
moved aside has been looked at, or will not be."""

GRACE_S = 3600.0
"""Entries younger than this stay. Without locks their writer may be at work still, and file its manifest later."""

MANY_FILES = 20_000
"""Files of entries, of some 10 000 clips, above which copying and listing a folder becomes tedious."""

FORMER_STALE_S = 900.0
"""Jobs of earlier versions touch their file in ``jobs`` every ten seconds; one that was not for so long is dead."""


# ------------------------------------------------------------------------------------------------------------- garbage


@dataclass(frozen=True)
class GcReport:
    """What ``gc`` removed, or would remove."""

    entries: int
    """That no manifest refers to."""
    manifests: int
    """Not used for as long as was asked, or of an older format."""
    leftovers: int
    """Unfinished files of processes that died, damaged files that were moved aside, files of earlier versions."""
    bytes: int
    deleted: bool
    young: int = 0
    """Further entries that nothing refers to, and that are too young to be deleted."""
    packed: int = 0
    """Further entries that nothing refers to, in shards of which at least half is needed."""
    packed_bytes: int = 0
    held_back: str = ""
    """Why nothing was deleted although that was asked; empty otherwise."""

    def __str__(self) -> str:
        verb = "removed" if self.deleted else "would remove"
        what = f"{self.entries} entries, {self.manifests} manifests, {self.leftovers} unfinished or damaged files"
        lines = [f"{verb} {what}: {human_size(self.bytes)}"]
        if self.young:
            lines.append(f"{self.young} more entries are unused and younger than {GRACE_S / 3600:g} h: they stay")
        if self.packed:
            size = human_size(self.packed_bytes)
            lines.append(f"{self.packed} more entries are unused ({size}) in shards of which half is needed: they stay")
        if self.held_back:
            lines.append(f"nothing was deleted: {self.held_back}; run it again later")
        return "\n".join(lines)


def gc(
    cache: Cache,
    *,
    delete: bool = False,
    unused_days: float | None = None,
    alone: bool = False,
    leftover_age_s: float = LEFTOVER_AGE_S,
    grace_s: float = GRACE_S,
) -> GcReport:
    """Find, and on demand delete, what no manifest refers to.

    Deleting takes the cache's lock for itself: while a job uses the cache, nothing is deleted, and the report says so.
    A shard of which more than half is not needed is written anew with the rest, or deleted where there is none.

    Args:
        cache: which cache.
        delete: False only reports, and changes nothing.
        unused_days: also drop manifests that nothing has used for this long, and with them what only they refer to.
        alone: the caller knows that no job uses the cache; asked for where the file system has no locks.
        leftover_age_s: how old an unfinished or damaged file must be.
        grace_s: how old an entry must be.

    Raises:
        CacheError: if a manifest cannot be read, or is damaged: what it refers to must not be taken for garbage; or if
            the cache cannot be locked or written to.
    """
    root = cache.root
    delete = delete and root.is_dir()
    try:
        with ExitStack() as lock:
            held_back = lock_out_jobs(lock, cache, "cache gc", alone=alone) if delete else ""
            now = _file_system_time(root / "manifests") if delete and not held_back else time.time()
            if delete and not held_back and not alone:
                held_back = _former_job(root, now)
            deleting = delete and not held_back
            if deleting:
                _bring_back(root)
            # Before the manifests: what is written after this line cannot be taken for garbage.
            listed = {kind: cache.files(kind) for kind in KINDS}
            shards = cache.shards.by_shard()
            _require_none_aside(cache)
            manifests = dict(cache.manifests())
            most_s = float("inf") if unused_days is None else unused_days * 86_400
            unused = [path for path in cache.manifest_paths() if path not in manifests or _age_s(path, now) > most_s]
            needed = needed_entries([content for path, content in manifests.items() if path not in unused])
            for record in (root / "streams").glob("*/*.jsonl"):
                if _age_s(record, now) <= most_s:
                    needed["latents"] |= wanted_entries(record)
            orphans = [path for kind, paths in listed.items() for path in paths if path.stem not in needed[kind]]
            entries = [path for path in orphans if _age_s(path, now) >= grace_s]
            leftovers = [path for path in _leftovers(root) if _age_s(path, now) > leftover_age_s]
            doomed = [*unused, *entries, *leftovers]  # no manifest may stand that promises what is gone
            sparse = [_Sparse.of(shard, rows, needed, _age_s(shard, now) >= grace_s) for shard, rows in shards.items()]
            emptied = [one for one in sparse if one.is_rewritten]
            size = sum(map(_size, doomed)) + sum(one.unused_bytes for one in emptied)
            if deleting:
                for path in doomed:
                    path.unlink(missing_ok=True)
                _rewrite(cache, emptied)
                cache.shards.mend_indexes()
                _remove_empty(root / "jobs", root / "trash")
    except OSError as error:
        what = f"garbage cannot be collected: {error.strerror}"
        raise CacheError(what, where=str(root), fix=disk_fix(error)) from error
    staying = [one for one in sparse if not one.is_rewritten]
    return GcReport(
        entries=len(entries) + sum(one.unused for one in emptied),
        manifests=len(unused),
        leftovers=len(leftovers),
        bytes=size,
        deleted=deleting,
        young=len(orphans) - len(entries) + sum(one.unused for one in staying if not one.is_old),
        packed=sum(one.unused for one in staying if one.is_old),
        packed_bytes=sum(one.unused_bytes for one in staying if one.is_old),
        held_back=held_back,
    )


@dataclass(frozen=True)
class _Sparse:
    """A shard of which something may not be needed."""

    shard: Path
    needed: list[Row]
    unused: int
    """Entries that nothing refers to, or that count elsewhere or no more."""
    unused_bytes: int
    is_old: bool

    @classmethod
    def of(cls, shard: Path, rows: list[Row], needed: Mapping[Kind, Collection[str]], is_old: bool) -> _Sparse:
        rest = [row for row in rows if row.key in needed[row.kind]]
        return cls(shard, rest, len(rows) - len(rest), _size(shard) - sum(row.size for row in rest), is_old)

    @property
    def is_rewritten(self) -> bool:
        return self.is_old and 2 * self.unused_bytes > _size(self.shard)


def _rewrite(cache: Cache, sparse: list[_Sparse]) -> None:
    """Lay what is needed of shards into new ones, and delete the old ones. Copies are not verified: readers do that."""
    places = {row.key: Packed(one.shard, row.offset, row.size) for one in sparse for row in one.needed}
    for group in groups((row for one in sparse for row in one.needed), SHARD_BYTES):
        cache.shards.write((row.kind, row.key, places[row.key].read()) for row in group)
    for one in sparse:
        remove(one.shard)


def lock_out_jobs(lock: ExitStack, cache: Cache, user: str, *, alone: bool) -> str:
    """Keep jobs out until ``lock`` is closed; why that cannot be, where a job is in.

    Args:
        lock: takes the cache's lock.
        cache: which one.
        user: what takes it, for messages.
        alone: the caller knows that no job uses the cache; asked for where the file system has no locks.

    Raises:
        CacheError: if the file system has no locks, and ``alone`` is not said.
    """
    try:
        lock.enter_context(locks.hold(cache.lock, user, on_full_disk=True))
    except locks.HeldError as holder:
        return f"the cache is in use ({holder})"
    except locks.NoLocksError:
        if not alone:
            raise CacheError(
                "the file system has no locks, so it is not known whether a job uses the cache",
                where=str(cache.root),
                fix="see to it that none does, on any machine, and say so with --alone",
            ) from None
    return ""


def _former_job(root: Path, now: float) -> str:
    """Why nothing may be deleted where a job of an earlier version runs, which takes no lock; empty if none does."""
    for path in (root / "jobs").glob("*.json"):
        if _age_s(path, now) <= FORMER_STALE_S:
            return f"the cache is in use (a job of an earlier version, which keeps {path})"
    return ""


def _file_system_time(folder: Path) -> float:
    """The time by which the files there are old, in seconds.

    It is that of a new file, which also makes a network drive's client list the folder afresh.
    """
    folder.mkdir(exist_ok=True)
    probe = folder / f"{uuid.uuid4().hex[:8]}.partial"
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):  # a full disk, on which room is to be made
            raise
        return time.time()
    finally:
        probe.unlink(missing_ok=True)


def _bring_back(root: Path) -> None:
    """Put back what a collection of an earlier version, killed half-way, had taken away: it may be needed."""
    for path in (root / "trash").glob("*/*/??/*.safetensors"):
        target = root.joinpath(*path.relative_to(root / "trash").parts[1:])
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)


def _require_none_aside(cache: Cache) -> None:
    for aside in (cache.root / "manifests").glob("*.damaged"):
        raise CacheError(
            "a manifest was damaged and moved aside, and nobody knows which entries it needs",
            where=str(aside),
            fix="run `finetune precompute` with its configuration, which makes it anew and encodes nothing twice; or"
            " delete the file and give its entries up",
        )


def needed_entries(contents: Iterable[Mapping[str, Any]]) -> dict[Kind, set[str]]:
    """Every entry that manifests refer to, which are given as ``read_content`` reads them."""
    manifests = [Manifest.from_content(content, Path()) for content in contents]
    return {kind: {key for manifest in manifests for key in manifest.keys(kind)} for kind in KINDS}


def _leftovers(root: Path) -> Iterator[Path]:
    """Files of writers that died, damaged files, and what earlier versions kept in ``jobs`` and ``trash``."""
    for path in root.rglob("*"):
        folder = path.relative_to(root).parts[0]
        damaged = path.suffix == ".damaged" and folder != "manifests"
        index = folder == "shards" and path.suffix == INDEX_ENDING and not path.with_suffix(ENDING).exists()
        if (path.suffix == ".partial" or damaged or index or folder in ("jobs", "trash")) and path.is_file():
            yield path


def _age_s(path: Path, now: float) -> float:
    try:
        return now - path.stat().st_mtime
    except FileNotFoundError:  # renamed by its writer since it was listed
        return 0.0


def _size(path: Path) -> int:
    with suppress(OSError):
        return path.stat().st_size
    return 0


def _remove_empty(*folders: Path) -> None:
    for folder in folders:
        for path in (*sorted(folder.rglob("*"), reverse=True), folder):
            with suppress(OSError):
                path.rmdir()


# -------------------------------------------------------------------------------------------------------- verification


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
    with cache.in_use("cache verify") if cache.root.is_dir() else nullcontext():
        files = [(kind, path.stem, path, path.read_bytes) for kind in KINDS for path in cache.files(kind)]
        packed = [
            (row.kind, row.key, shard, Packed(shard, row.offset, row.size).read)
            for shard, rows in cache.shards.by_shard().items()
            for row in rows
        ]
        for kind, key, path, read in Bar([*files, *packed], desc="verifying entries", disable=not progress):
            try:
                content = read()
                reason = fault_of(content, kind, key)
            except FileNotFoundError:
                continue  # found damaged by a job that read it meanwhile
            except OSError as error:
                content, reason = b"", f"it cannot be read: {error.strerror}"
            checked += 1
            size += len(content)
            if reason:
                is_packed = path.suffix == ENDING
                damaged.append(Damage(path, f"{kind}/{key}: {reason}" if is_packed else reason))
                if delete:
                    with _deleting(path):
                        if is_packed:
                            cache.shards.drop(kind, key)
                        else:
                            cache.move_entry_aside(path, kind).unlink(missing_ok=True)
        for shard in cache.shards.paths():
            if reason := index_fault(shard):
                damaged.append(Damage(index_of(shard), reason))
        if delete:
            with _deleting(cache.shards.folder):
                cache.shards.mend_indexes()
        there = cache.all_keys()
        missing: list[str] = []
        for path in cache.manifest_paths():
            try:
                missing += missing_entries(path, there)
            except DamagedManifestError as error:
                damaged.append(Damage(path, error.what))
                if delete:
                    with _deleting(path):  # moved aside, for it alone knew what it referred to
                        cache.move_manifest_aside(path)
    return VerifyReport(checked, size, tuple(damaged), tuple(missing), deleted=delete)


def missing_entries(path: Path, there: Mapping[Kind, Collection[str]]) -> list[str]:
    """Entries that a complete manifest promises and that are not there, in words. Raises as ``read_content``."""
    content = read_content(path)
    if content is None or not content["complete"]:
        return []
    missing = {kind: keys.difference(there[kind]) for kind, keys in needed_entries([content]).items()}
    return [f"{kind}/{key} of manifest {path.stem[:12]}" for kind, keys in missing.items() for key in sorted(keys)]


@contextmanager
def _deleting(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CacheError(
            f"a damaged file cannot be deleted: {error.strerror}", where=str(path), fix=disk_fix(error)
        ) from error


# ------------------------------------------------------------------------------------------------------------- figures


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
    packed: int = 0
    """Of the entries, those that lie in shards."""
    shards: int = 0

    def __str__(self) -> str:
        lines = [f"{kind:<9} {self.entries[kind]:>8} entries {human_size(self.bytes[kind]):>14}" for kind in KINDS]
        if self.packed:
            lines.append(f"{self.packed} of them in {self.shards} shards")
        if (loose := sum(self.entries.values()) - self.packed) > MANY_FILES:
            lines.append(f"{loose} of them have files of their own: `finetune cache pack` lays them into shards")
        for one in self.manifests:
            state = "" if one.complete else ", not finished"
            used = one.last_used.strftime("%Y-%m-%d %H:%M")
            lines.append(
                f"manifest {one.name[:12]}: {one.clips} clips, {human_size(one.bytes)}, last used {used}{state}"
            )
        return "\n".join(lines)


def stats(cache: Cache) -> CacheStats:
    """Count what a cache holds.

    Raises:
        CacheError: if a manifest cannot be read.
    """
    sizes = {kind: cache.sizes(kind) for kind in KINDS}
    manifests = []
    for path, content in cache.manifests():
        manifest = Manifest.from_content(content, Path())
        used = datetime.fromtimestamp(path.stat().st_mtime)
        size = sum(sizes[kind].get(key, 0) for kind in KINDS for key in manifest.keys(kind))
        manifests.append(ManifestStats(path.stem, len(manifest.items), manifest.complete, used, size))
    return CacheStats(
        {kind: len(entries) for kind, entries in sizes.items()},
        {kind: sum(entries.values()) for kind, entries in sizes.items()},
        tuple(manifests),
        sum(map(len, cache.shards.entries().values())),
        len(cache.shards.paths()),
    )
