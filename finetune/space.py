"""Room on a disk, in bytes and in files, and what can be done where there is none."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path


def human_size(size: int) -> str:
    """Bytes for a person: GiB from a tenth of one up, MiB below."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.3f} MiB"


def require_space(
    path: Path, needed: int, *, kind: Callable[..., Exception], what: str, fix: str, files: int = 32
) -> None:
    """Refuse to begin what the disk has no room for, in bytes or in files.

    Args:
        path: what will be written, or where; it need not exist yet.
        needed: bytes that must be free.
        kind: the error to raise: any ``FinetuneError``.
        what: the subject of the message, such as ``the checkpoint``.
        fix: how to make room.
        files: how many files and folders will be made, at most.

    Raises:
        Exception: of ``kind``, with the path, what is needed and what is free.
    """
    free = free_space(path)
    if free < needed:
        raise kind(
            f"{what} needs {human_size(needed)} and the disk has {human_size(free)} free", where=str(path), fix=fix
        )
    room = free_files(path)
    if room is not None and room < files:
        raise kind(
            f"{what} makes up to {files:,} files and the disk has room for {room:,} more (`df -i`), whatever its bytes",
            where=str(path),
            fix=fix,
        )


def free_space(path: Path) -> int:
    """Bytes that this user may still write on the disk of ``path`` or of the nearest folder above that exists."""
    return shutil.disk_usage(_existing(path)).free


def free_files(path: Path) -> int | None:
    """Files that may still be made there (inodes); None where the file system does not count them."""
    if not hasattr(os, "statvfs"):
        return None
    status = os.statvfs(_existing(path))
    return status.f_favail if status.f_files > 0 else None


def _existing(path: Path) -> Path:
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())


def disk_fix(error: OSError) -> str:
    """What a person can do about a failed write, by its error number."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "make room, in bytes or in files (`df -h`, `df -i`, quotas of either), and run the same command again"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return "let the process open more files (`ulimit -n`) and run the same command again"
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return "make the folder writable, or choose another one, and run the same command again"
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return "a part of the path is a file: choose another folder"
    return "look at the disk or the network drive (the kernel's log says more), then run the same command again"
