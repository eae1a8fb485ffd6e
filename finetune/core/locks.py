"""Files that say who is using a folder. No locks and no exclusive creation: renames alone, so network drives will do.

A process that uses a folder keeps a small JSON file there and touches it from time to time. Nobody is kept out by it;
it lets others see who is there and decide what they leave alone. Whether a holder still lives is asked of the operating
system where both run on the same machine, and told from the age of its last touch elsewhere.
"""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

BEAT_S = 10.0
"""How often a lease is touched."""

STALE_S = 60.0
"""A lease of another machine that nobody has touched for this long belongs to a process that died."""


@dataclass(frozen=True)
class Holder:
    """One lease as others see it."""

    about: Mapping[str, Any] = field(repr=False)
    """What the holder says of itself; empty where the file cannot be read, which is no reason to think it dead."""
    host: str
    pid: int
    age_s: float
    """Since it was last touched, by the clock of the file system."""
    path: Path
    here: bool = False
    """Whether it runs on this machine, so that the operating system knows that it lives."""


class Lease:
    """A lease that this process holds; made by ``hold``."""

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        self._pid = os.getpid()
        self.path = folder / f"{_host()}-{self._pid}-{uuid.uuid4().hex[:8]}.json"
        self._about = dict(about)
        self._lock = threading.Lock()
        self._ended = threading.Event()
        folder.mkdir(parents=True, exist_ok=True)
        self._write()

    def update(self, about: Mapping[str, Any]) -> None:
        """Say something else; whoever looks sees the old text or the new one.

        Raises:
            OSError: if it cannot be written; the old text then stands.
        """
        with self._lock:
            before, self._about = self._about, dict(about)
            try:
                self._write()
            except OSError:
                self._about = before
                raise

    def _write(self) -> None:
        content = {
            "host": _host(),
            "machine": _machine(),
            "pid": self._pid,
            "started": _started(self._pid),
            "about": self._about,
        }
        partial = self.path.with_suffix(f".{uuid.uuid4().hex[:8]}.partial")
        try:
            partial.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
            os.replace(partial, self.path)
        finally:
            partial.unlink(missing_ok=True)

    def _beat(self, beat_s: float) -> None:
        while not self._ended.wait(beat_s):
            with self._lock, suppress(OSError):  # a drive that is away for a moment; the next beat tries again
                if not self._ended.is_set():
                    self._touch()

    def _touch(self) -> None:
        try:
            os.utime(self.path)  # unlike a rewrite this works on a full disk, and takes a server's own time
        except FileNotFoundError:  # taken for dead and cleared away, after a suspend for instance
            self._write()

    def _end(self) -> None:
        self._ended.set()
        if os.getpid() != self._pid:  # a fork inherits the object, not the lease
            return
        with self._lock, suppress(OSError):
            self.path.unlink(missing_ok=True)


@contextmanager
def hold(folder: Path, about: Mapping[str, Any], *, beat_s: float = BEAT_S) -> Iterator[Lease]:
    """Hold a lease on a folder for as long as the block runs.

    Args:
        folder: where leases lie; created if need be. It should hold nothing else.
        about: what to tell others, JSON types only.
        beat_s: how often it is touched.

    Raises:
        OSError: if the folder cannot be written to.
    """
    lease = Lease(folder, about)
    try:
        threading.Thread(target=lease._beat, args=(beat_s,), name="lease", daemon=True).start()
        yield lease
    finally:
        lease._end()


def live(folder: Path, *, stale_s: float = STALE_S) -> list[Holder]:
    """Who holds a lease now, this process included, in order of their files' names.

    A process of this machine counts for as long as it runs, however old its last touch, and not a moment longer. One of
    another machine counts while its last touch is at most ``stale_s`` old by the file system's own clock, so that
    clocks which disagree do no harm.

    Raises:
        OSError: if the folder is there and cannot be listed.
    """
    now = clock(folder)
    holders = []
    for path in _leases(folder):
        try:
            with path.open("rb") as lease:  # opened first: a network drive then asks the server for time and text
                age_s = max(0.0, now - os.fstat(lease.fileno()).st_mtime)
                content = _parsed(lease.read())
        except FileNotFoundError:
            continue  # let go since it was listed
        except OSError:
            content, age_s = {}, 0.0
        if _alive(content, age_s, stale_s):
            about = content.get("about")
            host, pid = str(content.get("host", "unknown")), content.get("pid")
            holders.append(
                Holder(
                    about if isinstance(about, dict) else {},
                    host,
                    pid if isinstance(pid, int) else 0,
                    age_s,
                    path,
                    here=_is_here(content),
                )
            )
    return holders


def clear_dead(folder: Path, *, stale_s: float = STALE_S) -> int:
    """Remove the leases of processes that died, and return how many there were."""
    alive = {holder.path for holder in live(folder, stale_s=stale_s)}
    dead = [path for path in _leases(folder) if path not in alive]
    for path in dead:
        with suppress(OSError):
            path.unlink()
    return len(dead)


def clock(folder: Path) -> float:
    """The time that a file written in ``folder`` now would get, in seconds; this machine's where it cannot be written.

    As a side effect a network drive shows the folder as it is: a directory that changed is not listed from memory.
    """
    probe = folder / f"clock-{_host()}-{uuid.uuid4().hex[:8]}.partial"
    try:
        probe.write_bytes(b"?")
        os.utime(probe)
        with probe.open("rb") as opened:
            return os.fstat(opened.fileno()).st_mtime
    except OSError:
        return time.time()
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)


def _leases(folder: Path) -> list[Path]:
    try:
        return sorted(Path(entry.path) for entry in os.scandir(folder) if entry.name.endswith(".json"))
    except FileNotFoundError:
        return []


def _parsed(content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _alive(content: Mapping[str, Any], age_s: float, stale_s: float) -> bool:
    return _running(content["pid"], content.get("started")) if _is_here(content) else age_s <= stale_s


def _is_here(content: Mapping[str, Any]) -> bool:
    machine = content.get("machine")
    return bool(machine) and machine == _machine() and isinstance(content.get("pid"), int)


def _running(pid: int, started: object) -> bool:
    """Whether a process of this machine still runs and is the one that began then: numbers are given out again."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True  # another user's, so it is there
    now = _started(pid)
    return not now or not started or now == started


@cache
def _host() -> str:
    return re.sub(r"[^A-Za-z0-9.-]", "_", socket.gethostname())[:64] or "unknown"


@cache
def _machine() -> str:
    """Names the numbering that process numbers belong to: one boot of one machine, one container of it.

    Empty where the system does not tell; nothing is then asked of it.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{_host()} {boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    """When a process began, in the kernel's ticks since boot; ``"ended"`` for one that only waits to be collected."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    fields = text[text.rindex(")") + 2 :].split()  # the name in brackets may hold spaces and brackets
    return "ended" if fields[0] in "ZX" else fields[19]
