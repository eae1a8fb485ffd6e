"""Advisory locks of the operating system: shared by those who use a folder, exclusive for who changes it.

The kernel lets go when the process that holds a lock ends, however it ends, so nothing is ever left that blocks. Over
NFS, and Lustre mounted with ``flock``, locks hold among machines too. A lock file stays where it is: were it removed,
two processes could lock two files of one name.
"""

from __future__ import annotations

import errno
import math
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path

from finetune.core.text import shown

try:
    import fcntl
except ImportError:  # Windows, which counts as a file system without locks
    fcntl = None  # type: ignore[assignment]

_POLL_S = 0.2

NFS_LEASE_S = 90.0
"""How long an NFS server may keep the locks of a machine that is gone: Linux's default, also after the server's own
restart."""

_descriptors: set[int] = set()
"""Of locks that this process holds."""


class HeldError(Exception):
    """Another process holds the lock; the text names it, as far as it is known."""

    @property
    def is_elsewhere(self) -> bool:
        """Whether the holder is on another machine: if that is gone, its lock stays for up to ``NFS_LEASE_S``."""
        return " on " in str(self) and f" on {socket.gethostname()}, " not in str(self)


class NoLocksError(OSError):
    """The file system has no locks."""


@contextmanager
def hold(
    path: Path,
    user: str,
    *,
    shared: bool = False,
    on_full_disk: bool = False,
    waiting: Callable[[str], object] | None = None,
    limit_s: float = math.inf,
) -> Iterator[None]:
    """Hold a lock for as long as the block runs. Child processes do not inherit it.

    Args:
        path: the lock file; made if need be, with its folders.
        user: what this process does, for the messages of others.
        shared: whether others may hold it too, if they share; the file may then lie on a drive that is read-only.
        on_full_disk: whether an exclusive lock is held also where the disk has no room to say by whom.
        waiting: called once with who holds it, before that is waited for; None does not wait.
        limit_s: how long is waited at most.

    Raises:
        HeldError: if another process holds it, and ``waiting`` is None or the wait was in vain.
        NoLocksError: if the file system has no locks.
        OSError: if the file cannot be made, opened or, for an exclusive lock, written to.
    """
    descriptor = _open(path, shared)
    _descriptors.add(descriptor)
    try:
        if not _try_lock(descriptor, shared):
            holder = shown(path.read_text(encoding="utf-8", errors="replace")) or "another process"
            if waiting is None:
                raise HeldError(holder)
            waiting(holder)
            end_s = time.monotonic() + limit_s
            while not _try_lock(descriptor, shared):
                if time.monotonic() > end_s:
                    raise HeldError(holder)
                time.sleep(_POLL_S)
        _write_holder(descriptor, user, shared, on_full_disk)
        yield
    finally:
        _close(descriptor)


@contextmanager
def hold_alone(path: Path, user: str, note: Callable[[str], object]) -> Iterator[None]:
    """``hold`` for the only one who may write somewhere: who comes second is refused.

    A holder on another machine may be dead, and its lock kept by a file server (NFS): it is waited for, with a note, as
    long as such a server does that.

    Raises:
        HeldError, NoLocksError, OSError: as ``hold``.
    """
    with ExitStack() as lock:
        try:
            lock.enter_context(hold(path, user))
        except HeldError as holder:
            if not holder.is_elsewhere:
                raise
            note(
                f"{path.parent}: waiting up to {NFS_LEASE_S:.0f} s for {holder}: if that machine is gone, a file server"
                " keeps its lock for so long"
            )
            lock.enter_context(hold(path, user, waiting=lambda _: None, limit_s=NFS_LEASE_S))
        yield


def _open(path: Path, shared: bool) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if not shared or error.errno not in (errno.EACCES, errno.EROFS) or not path.exists():
            raise
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def _try_lock(descriptor: int, shared: bool) -> bool:
    if fcntl is None:
        raise NoLocksError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise NoLocksError(error.errno, error.strerror) from None
        raise
    return True


def _write_holder(descriptor: int, user: str, shared: bool, on_full_disk: bool) -> None:
    """Say in the lock file who holds it; of several that share, the last to come."""
    since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    text = f"{user} on {socket.gethostname()}, process {os.getpid()}, since {since}".encode()
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text, 0)
    except OSError as error:
        if not shared and not (on_full_disk and error.errno in (errno.ENOSPC, errno.EDQUOT)):
            raise


def _close(descriptor: int) -> None:
    if descriptor in _descriptors:  # a fork has closed it already, and may have given its number to another file
        _descriptors.discard(descriptor)
        os.close(descriptor)


def _close_in_child() -> None:
    """A fork shares the lock with its parent, and would keep it when that one is killed."""
    for descriptor in list(_descriptors):
        with suppress(OSError):
            _close(descriptor)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
