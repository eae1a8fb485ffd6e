"""Reading entries: each is verified, to the bit, when a process first reads it."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from finetune.datasets import jobs
from finetune.datasets.entries import fault_of, read_metadata, read_tensors
from finetune.datasets.manifest import Kind
from finetune.datasets.sealed import move_aside
from finetune.errors import CacheError

_ANEW = (
    "run the same command again: it encodes that entry anew. With cache.mode: require, run `finetune precompute` where"
    " the videos and the encoders are, first"
)


class Reader:
    """Reads entries of one cache, from any thread.

    Args:
        root: the cache's folder.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._verified: dict[str, tuple[int, int, int]] = {}
        """Of every entry found whole: inode, size and time of change, by its key."""

    def tensors(self, kind: Kind, key: str, path: Path, of: str, *, again: bool = True) -> dict[str, Tensor]:
        """The tensors of an entry.

        Args:
            kind: of entry.
            key: its key.
            path: its file.
            of: the clip it belongs to, for messages.
            again: whether to read once more where another machine has put an equal file in its place (NFS).

        Raises:
            CacheError: if it is missing, cannot be read, or is damaged; it is then moved aside, so that it counts as
                missing from now on.
        """
        where = f"{path} ({of})" if of else str(path)
        with self._open(path, where) as entry:
            try:
                status = os.fstat(entry.fileno())
                identity = (status.st_ino, status.st_size, status.st_mtime_ns)
                tensors = read_tensors(entry, key, verify=self._verified.get(key) != identity)
            except ValueError as error:
                raise _damaged(path, kind, key, str(error), where) from None
            except OSError as error:
                if error.errno == errno.ESTALE and again:
                    return self.tensors(kind, key, path, of, again=False)
                raise _unreadable(error, where) from None
        self._verified[key] = identity
        return tensors

    def metadata(self, kind: Kind, key: str, path: Path) -> dict[str, str]:
        """The metadata of an entry; its header alone is read, and verified. Raises as ``tensors``."""
        where = str(path)
        try:
            with self._open(path, where) as entry:
                return read_metadata(entry, key)
        except ValueError as error:
            raise _damaged(path, kind, key, str(error), where) from None
        except OSError as error:
            raise _unreadable(error, where) from None

    def size(self, path: Path) -> int:
        """Bytes of an entry's file. Raises as ``tensors`` where it is not there."""
        try:
            return path.stat().st_size
        except OSError:
            with self._open(path, str(path)) as entry:
                return os.fstat(entry.fileno()).st_size

    def _open(self, path: Path, where: str) -> BinaryIO:
        """Open an entry; where it is not there, a collection may have taken it away and be about to bring it back."""
        try:
            try:
                return path.open("rb", buffering=0)
            except FileNotFoundError:
                jobs.await_collection(self._root)
                return path.open("rb", buffering=0)
        except FileNotFoundError:
            raise CacheError("a cache entry is missing", where=where, fix=_ANEW) from None
        except OSError as error:
            raise _unreadable(error, where) from None


def _damaged(path: Path, kind: Kind, key: str, reason: str, where: str) -> CacheError:
    """Move a damaged entry aside and say what is to be done."""
    fix = _ANEW
    try:
        move_aside(path, lambda content: fault_of(content, kind, key))
    except OSError as error:
        fix = (
            f"it cannot be moved aside from here ({error.strerror}): where it can, run `finetune cache verify --delete`"
            " and then `finetune precompute`"
        )
    return CacheError(f"a cache entry is damaged: {reason}", where=where, fix=fix)


def _unreadable(error: OSError, where: str) -> CacheError:
    return CacheError(
        f"a cache entry cannot be read: {error.strerror}",
        where=where,
        fix="look at the disk or the network drive, and at the file's permissions; the same command then continues. A"
        " file that stays unreadable is taken out by `finetune cache verify --delete`",
    )
