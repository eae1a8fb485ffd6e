"""Who uses a cache: leases, so that garbage collection takes nothing away from a job, and jobs wait for a collection.

``docs/cache.md`` holds the argument that no order of events loses an entry which a job counts on.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from finetune.datasets.manifest import KINDS, Kind, Manifest
from finetune.leases import Holder, Lease, hold, live

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


class Job:
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
def take_part(root: Path, verb: str) -> Iterator[Job]:
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
        yield Job(verb, lease)


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
