"""Deleting what nobody needs, beside jobs that come and go: take away, look again, and only then delete.

``docs/cache.md`` holds the argument that no order of events loses an entry which a job counts on.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.datasets import jobs
from finetune.datasets.manifest import KINDS, Kind, Manifest, read_content
from finetune.errors import CacheError
from finetune.leases import Holder, Lease, clear_dead, clock, hold, live
from finetune.space import disk_fix, human_size

if TYPE_CHECKING:
    from finetune.datasets.cache import Cache

LEFTOVER_AGE_S = 3600.0
"""An unfinished file that nobody has written to for this long belongs to a process that died; a damaged one that was
moved aside has been looked at, or will not be."""
GRACE_S = 3600.0
"""Entries younger than this stay, whoever wrote them and whatever that writer says of itself."""
SETTLE_S = 65.0
"""Between taking away and looking again. A network drive's client may list a directory from memory for a minute (NFS:
``acdirmax``), and so believe in an entry that is gone."""


@dataclass(frozen=True)
class GcReport:
    """What ``gc`` removed, or would remove."""

    entries: int
    """That no manifest and no running job refers to."""
    manifests: int
    """Not used for as long as was asked, or of an older format."""
    leftovers: int
    """Unfinished files of processes that died, and damaged files that were moved aside."""
    bytes: int
    deleted: bool
    young: int = 0
    """Further entries that nothing refers to, and that are too young to be deleted."""
    held_back: str = ""
    """Why nothing was deleted although that was asked; empty otherwise."""

    def __str__(self) -> str:
        verb = "removed" if self.deleted else "would remove"
        what = f"{self.entries} entries, {self.manifests} manifests, {self.leftovers} unfinished or damaged files"
        lines = [f"{verb} {what}: {human_size(self.bytes)}"]
        if self.young:
            lines.append(f"{self.young} more entries are unused and younger than {GRACE_S / 3600:g} h: they stay")
        if self.held_back:
            lines.append(f"nothing was deleted: {self.held_back}; run it again later")
        return "\n".join(lines)


@dataclass
class _Findings:
    """One look at a cache."""

    holders: list[Holder]
    """Live jobs but ourselves."""
    entries: dict[tuple[Kind, str], Path]
    manifests: list[Path]
    leftovers: list[Path]
    young: int

    @property
    def doomed(self) -> list[Path]:
        """Manifests first: none may stand that promises what is gone."""
        return [*self.manifests, *self.entries.values()]

    def report(self, *, deleted: bool, size: int, held_back: str = "") -> GcReport:
        counts = (len(self.entries), len(self.manifests), len(self.leftovers))
        return GcReport(*counts, size, deleted, self.young, held_back)


def gc(
    cache: Cache,
    *,
    delete: bool = False,
    unused_days: float | None = None,
    leftover_age_s: float = LEFTOVER_AGE_S,
    grace_s: float = GRACE_S,
    settle_s: float = SETTLE_S,
) -> GcReport:
    """Find, and on demand delete, what no manifest and no running job refers to.

    Any number of jobs may use the cache meanwhile, on this machine and on others. While one of them is only planning,
    nothing is deleted, and the report says so.

    Args:
        cache: which cache.
        delete: False only reports, and changes nothing.
        unused_days: also drop manifests that nothing has used for this long, and with them what only they refer to.
        leftover_age_s: how old an unfinished or damaged file must be.
        grace_s: how old an entry must be.
        settle_s: see ``SETTLE_S``; 0 where no other machine uses the cache.

    Raises:
        CacheError: if a manifest cannot be read, or is damaged: what it refers to must not be taken for garbage; or if
            the cache cannot be written to.
    """
    collection = _Collection(cache, unused_days, leftover_age_s, grace_s)
    if not delete or not cache.root.is_dir():
        found = collection.look()
        return found.report(deleted=delete, size=_size([*found.doomed, *found.leftovers]))
    try:
        with hold(jobs.folder(cache.root), {"verb": "gc", "phase": "running", "manifests": [], "entries": {}}) as lease:
            return collection.run(lease, settle_s)
    except OSError as error:
        raise CacheError(
            f"garbage cannot be collected: {error.strerror}", where=str(cache.root), fix=disk_fix(error)
        ) from error


class _Collection:
    """The steps of one collection. Each may run beside anything that jobs and other collections do."""

    def __init__(self, cache: Cache, unused_days: float | None, leftover_age_s: float, grace_s: float) -> None:
        self._cache = cache
        self._root = cache.root
        self._unused_days = unused_days
        self._leftover_age_s = leftover_age_s
        self._grace_s = grace_s
        self._own: Path | None = None
        """Our lease; None where nothing will be changed, and so nothing written either."""

    def run(self, lease: Lease, settle_s: float) -> GcReport:
        """Take away, wait, look again, bring back what is wanted after all, delete the rest."""
        self._own = lease.path
        name = lease.path.stem
        held_back = _held_back(self._others(), beside_collections=False)
        if not held_back:
            jobs.bring_back(self._root, jobs.taken(self._root))  # of a collection that died
        found = self.look()
        if held_back := held_back or _held_back(found.holders):
            return found.report(deleted=False, size=_size([*found.doomed, *found.leftovers]), held_back=held_back)
        try:
            self.take_away(found.doomed, name)
            if found.doomed and settle_s:
                print(f"waiting {settle_s:g} s before looking again for jobs on other machines", flush=True)
                time.sleep(settle_s)
            wanted, held_back = self.look_again(name)
        except BaseException:
            self.bring_back(jobs.taken(self._root, name))
            raise
        self.bring_back(wanted)
        size = self.delete(found, name)
        clear_dead(jobs.folder(self._root), stale_s=jobs.STALE_S)
        return found.report(deleted=not held_back, size=size, held_back=held_back)

    def look(self) -> _Findings:
        """What nothing refers to now."""
        now = self._now()
        # Entries first: one that is written after this line cannot be taken for garbage.
        entries = {(kind, path.stem): path for kind in KINDS for path in self._cache.entries(kind)}
        leftovers = [path for path in _leftovers(self._root) if now - _mtime(path, now) > self._leftover_age_s]
        holders = self._others()
        kept = self._in_use(self._manifests(), holders, now)
        for needed in _needed(kept.values(), holders):
            entries.pop(needed, None)
        old = {key: path for key, path in entries.items() if now - _mtime(path, now) >= self._grace_s}
        manifests = [path for path in (self._root / "manifests").glob("*.json") if path not in kept]
        return _Findings(holders, old, manifests, leftovers, young=len(entries) - len(old))

    def take_away(self, doomed: Iterable[Path], name: str) -> None:
        """Rename what nothing refers to into a folder of this collection's own."""
        for path in doomed:
            target = jobs.trash(self._root) / name / path.relative_to(self._root)
            target.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):
                os.replace(path, target)

    def look_again(self, name: str) -> tuple[list[tuple[Path, Path]], str]:
        """What of it is wanted after all, and why that is everything, where it is: a job is planning."""
        files = jobs.taken(self._root, name)
        now = self._now()
        # Leases before manifests: a job files its manifest before it lets its lease go.
        holders = self._others()
        if held_back := _held_back(holders):
            return files, held_back
        manifests = {file: inside for file, inside in files if inside.parts[0] == "manifests"}
        kept = self._in_use(_read_all(manifests), holders, now)
        needed = _needed([*self._manifests().values(), *kept.values()], holders)
        wanted = [(file, inside) for file, inside in files if (inside.parts[0], file.stem) in needed]
        # Manifests last: none may stand that promises what is not there.
        return [*wanted, *((file, manifests[file]) for file in kept)], ""

    def bring_back(self, files: Iterable[tuple[Path, Path]]) -> None:
        """Put files of the trash where they were."""
        jobs.bring_back(self._root, files)

    def delete(self, found: _Findings, name: str) -> int:
        """Delete what is still in our trash, and leftovers; say in ``found`` what that was, and return its bytes."""
        left = jobs.taken(self._root, name)
        deleted = {(inside.parts[0], file.stem) for file, inside in left}
        found.entries = {key: path for key, path in found.entries.items() if key in deleted}
        found.manifests = [path for path in found.manifests if ("manifests", path.stem) in deleted]
        doomed = [*(file for file, _ in left), *found.leftovers]
        size = _size(doomed)
        for path in doomed:
            path.unlink(missing_ok=True)
        shutil.rmtree(jobs.trash(self._root) / name, ignore_errors=True)
        for empty in (*jobs.trash(self._root).glob("*"), jobs.trash(self._root)):
            with suppress(OSError):
                empty.rmdir()
        return size

    def _now(self) -> float:
        return clock(jobs.folder(self._root)) if self._own else time.time()

    def _others(self) -> list[Holder]:
        holders = live(jobs.folder(self._root), stale_s=jobs.STALE_S)
        return [holder for holder in holders if holder.path != self._own]

    def _manifests(self) -> dict[Path, Manifest]:
        """Those that stand.

        Raises:
            CacheError: if one is damaged, or was moved aside because it is.
        """
        if self._own:
            clock(self._root / "manifests")  # for its side effect: what was filed on another machine is seen
        for aside in (self._root / "manifests").glob("*.damaged"):
            raise CacheError(
                "a manifest was damaged and moved aside, and nobody knows which entries it needs",
                where=str(aside),
                fix="run `finetune precompute` with its configuration, which makes it anew and encodes nothing twice;"
                " or delete the file and give its entries up",
            )
        return _read_all(self._cache.manifest_paths())

    def _in_use(
        self, manifests: Mapping[Path, Manifest], holders: Iterable[Holder], now: float
    ) -> dict[Path, Manifest]:
        """Of some manifests, those that a running job names, or that were used lately."""
        named = {name for holder in holders if not jobs.is_planning(holder) for name in holder.about["manifests"]}
        limit_s = float("inf") if self._unused_days is None else self._unused_days * 86_400
        return {
            path: manifest
            for path, manifest in manifests.items()
            if path.stem in named or now - _mtime(path, now) <= limit_s
        }


def _read_all(paths: Iterable[Path]) -> dict[Path, Manifest]:
    """Those that are of this format, and still there."""
    manifests = {}
    for path in paths:
        with suppress(FileNotFoundError):
            content = read_content(path)
            if content is not None:
                manifests[path] = Manifest.from_content(content, Path())
    return manifests


def _held_back(holders: Iterable[Holder], *, beside_collections: bool = True) -> str:
    """Why nothing may be deleted now; empty if it may.

    Args:
        holders: live jobs.
        beside_collections: whether to work beside another collection. That is safe, and of no use: to begin with, one
            leaves the field to the other.
    """
    planning = [holder for holder in holders if jobs.is_planning(holder)]
    if planning:
        return f"it is not known yet what {jobs.named(planning)} will use"
    collecting = [holder for holder in holders if holder.about.get("verb") == "gc"]
    if collecting and not beside_collections:
        return f"{jobs.named(collecting)} is at it already"
    return ""


def _needed(manifests: Iterable[Manifest], holders: Iterable[Holder]) -> set[tuple[Kind, str]]:
    """Every entry that manifests or running jobs refer to."""
    needed = {(kind, key) for manifest in manifests for kind in KINDS for key in manifest.keys(kind)}
    for holder in holders:
        if not jobs.is_planning(holder):
            needed |= jobs.entries_of(holder)
    return needed


def _leftovers(root: Path) -> list[Path]:
    aside = [path for path in root.rglob("*.damaged") if path.parent != root / "manifests"]
    return [*root.rglob("*.partial"), *aside]


def _size(paths: Iterable[Path]) -> int:
    total = 0
    for path in paths:
        with suppress(OSError):
            total += path.stat().st_size
    return total


def _mtime(path: Path, default: float) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # renamed by its writer since it was listed
        return default
