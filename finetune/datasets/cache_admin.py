"""Who uses a cache: leases, so that garbage collection takes nothing away from a job, and jobs wait for a collection.

``docs/cache.md`` holds the argument that no order of events loses an entry which a job counts on.
"""

from __future__ import annotations

import os
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.core.errors import CacheError
from finetune.core.files import disk_fix, human_size
from finetune.core.locks import Holder, Lease, clear_dead, clock, hold, live
from finetune.core.terminal import Bar
from finetune.datasets.cache_entries import (
    KINDS,
    DamagedManifestError,
    Kind,
    Manifest,
    fault_of,
    manifest_fault,
    move_aside,
    read_content,
)

if TYPE_CHECKING:
    from finetune.datasets.cache import Cache


PATIENCE_S = 600.0
"""How long a job waits for a collection that is under way; nothing is lost if it then goes on beside it."""

STALE_S = 900.0
"""A collector believes that a job on another machine is dead after so long a silence."""

_POLL_S = 0.2


def folder(root: Path) -> Path:
    """Where the leases of a cache lie."""
    return root / "jobs"


def trash(root: Path) -> Path:
    """Where collections keep what they have taken away until they have looked twice, each in a folder of its own."""
    return root / "trash"


class CacheJob:
    """What a process says of its use of a cache; made by ``take_part``.

    Args:
        verb: what it does, for messages.
        lease: where it says so; None says nothing.
    """

    def __init__(self, verb: str, lease: Lease | None = None) -> None:
        self._verb = verb
        self._lease = lease

    def uses(self, manifest: Manifest, *, writes: int = 0, bytes: int = 0) -> None:
        """Say which entries it needs from now on; until this is said, nothing at all is deleted.

        Args:
            manifest: whose entries.
            writes: how many of them it is about to write.
            bytes: the disk space that they will take.
        """
        if self._lease is None:
            return
        about = {
            "verb": self._verb,
            "phase": "running",
            "manifests": [manifest.name],
            "entries": {kind: sorted(manifest.keys(kind)) for kind in KINDS},
            "space": {"entries": writes, "bytes": bytes},
        }
        # Where this cannot be written, what it said before stands, and keeps more.
        with suppress(OSError):
            self._lease.update(about)


@contextmanager
def take_part(root: Path, verb: str) -> Iterator[CacheJob]:
    """Be known to others as a user of a cache, for as long as the block runs.

    Must be entered before entries are listed. Waits for a collection that is under way, and puts back what one that
    died had taken away. A cache that cannot be written to is used without others knowing, with a note.

    Args:
        root: the cache's folder; it need not exist yet.
        verb: what the process does, for messages.
    """
    with ExitStack() as stack:
        lease = None
        try:
            lease = stack.enter_context(hold(folder(root), {"verb": verb, "phase": "planning"}))
        except OSError as error:
            print(
                f"note: {root} cannot be written to ({error.strerror}), so `finetune cache gc` will not see that it is"
                " used",
                flush=True,
            )
        await_collection(root)
        yield CacheJob(verb, lease)


def await_collection(root: Path, *, patience_s: float | None = None) -> None:
    """Wait until no collection is under way, then put back what one that died, or never ends, has taken away."""
    patience_s = PATIENCE_S if patience_s is None else patience_s
    begun = time.monotonic()
    said = False
    while collectors := [holder for holder in _live(root) if holder.about.get("verb") == "gc"]:
        if time.monotonic() - begun >= patience_s:
            print(f"note: {named(collectors)} is still at it; going on beside it", flush=True)
            break
        if not said:
            print(f"note: waiting for {named(collectors)} in {root}", flush=True)
            said = True
        time.sleep(_POLL_S)
    bring_back(root, taken(root))


def _live(root: Path) -> list[Holder]:
    with suppress(OSError):
        return live(folder(root))
    return []


def named(holders: Iterable[Holder]) -> str:
    """Holders for a message: ``train on node3 (process 812)``."""
    return ", ".join(f"{one.about.get('verb', 'a job')} on {one.host} (process {one.pid})" for one in holders)


def is_planning(holder: Holder) -> bool:
    """Whether nobody knows yet what a job will use. One that says nothing understandable counts as such."""
    about = holder.about
    understood = isinstance(about.get("manifests"), list) and isinstance(about.get("entries"), Mapping)
    return about.get("phase") != "running" or not understood


def entries_of(holder: Holder) -> set[tuple[Kind, str]]:
    """The entries that a running job uses."""
    entries: Mapping[str, Any] = holder.about["entries"]
    return {(kind, key) for kind in KINDS for key in entries.get(kind, ())}


def reserved_bytes(root: Path, there: Mapping[Kind, set[str]]) -> int:
    """The disk space that live jobs have yet to fill with what they are encoding.

    Args:
        root: the cache's folder.
        there: the entries it holds now.
    """
    total = 0
    for holder in _live(root):
        space = holder.about.get("space")
        if is_planning(holder) or not isinstance(space, Mapping) or not space.get("entries"):
            continue
        left = sum(key not in there[kind] for kind, key in entries_of(holder))
        total += int(space["bytes"]) * min(left, int(space["entries"])) // int(space["entries"])
    return total


# -------------------------------------------------------------------------------------------------------------- trash


def taken(root: Path, collection: str = "*") -> list[tuple[Path, Path]]:
    """What lies in the trash, of one collection or of all: (file, the path inside the cache that it was taken from)."""
    bin_ = trash(root)
    files = sorted(path for path in bin_.glob(f"{collection}/**/*") if path.is_file())
    return [(path, Path(*path.relative_to(bin_).parts[1:])) for path in files]


def bring_back(root: Path, files: Iterable[tuple[Path, Path]]) -> int:
    """Put files of the trash where they came from, and return how many there were.

    Any process may do this at any time: a file that another has put back, or deleted, is passed over.
    """
    count = 0
    for path, inside in files:
        target = root / inside
        with suppress(OSError):
            if target.exists():  # written anew since
                path.unlink()
            else:
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, target)
                count += 1
    return count


# -------- Deleting what nobody needs, beside jobs that come and go: take away, look again, and only then delete.
#
# ``docs/cache.md`` holds the argument that no order of events loses an entry which a job counts on.

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
        with hold(folder(cache.root), {"verb": "gc", "phase": "running", "manifests": [], "entries": {}}) as lease:
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
            bring_back(self._root, taken(self._root))  # of a collection that died
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
            self.bring_back(taken(self._root, name))
            raise
        self.bring_back(wanted)
        size = self.delete(found, name)
        clear_dead(folder(self._root), stale_s=STALE_S)
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
            target = trash(self._root) / name / path.relative_to(self._root)
            target.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):
                os.replace(path, target)

    def look_again(self, name: str) -> tuple[list[tuple[Path, Path]], str]:
        """What of it is wanted after all, and why that is everything, where it is: a job is planning."""
        files = taken(self._root, name)
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
        bring_back(self._root, files)

    def delete(self, found: _Findings, name: str) -> int:
        """Delete what is still in our trash, and leftovers; say in ``found`` what that was, and return its bytes."""
        left = taken(self._root, name)
        deleted = {(inside.parts[0], file.stem) for file, inside in left}
        found.entries = {key: path for key, path in found.entries.items() if key in deleted}
        found.manifests = [path for path in found.manifests if ("manifests", path.stem) in deleted]
        doomed = [*(file for file, _ in left), *found.leftovers]
        size = _size(doomed)
        for path in doomed:
            path.unlink(missing_ok=True)
        shutil.rmtree(trash(self._root) / name, ignore_errors=True)
        for empty in (*trash(self._root).glob("*"), trash(self._root)):
            with suppress(OSError):
                empty.rmdir()
        return size

    def _now(self) -> float:
        return clock(folder(self._root)) if self._own else time.time()

    def _others(self) -> list[Holder]:
        holders = live(folder(self._root), stale_s=STALE_S)
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
        named = {name for holder in holders if not is_planning(holder) for name in holder.about["manifests"]}
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
    planning = [holder for holder in holders if is_planning(holder)]
    if planning:
        return f"it is not known yet what {named(planning)} will use"
    collecting = [holder for holder in holders if holder.about.get("verb") == "gc"]
    if collecting and not beside_collections:
        return f"{named(collecting)} is at it already"
    return ""


def _needed(manifests: Iterable[Manifest], holders: Iterable[Holder]) -> set[tuple[Kind, str]]:
    """Every entry that manifests or running jobs refer to."""
    needed = {(kind, key) for manifest in manifests for kind in KINDS for key in manifest.keys(kind)}
    for holder in holders:
        if not is_planning(holder):
            needed |= entries_of(holder)
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


# -------- Looking after a cache: is every file whole, is one missing, what does it hold.


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
    with take_part(cache.root, "verify") if cache.root.is_dir() else nullcontext():
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
