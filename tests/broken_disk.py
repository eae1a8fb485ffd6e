"""Disks that fail: at the k-th call of ``core.files`` to the operating system, or because they are really full."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from finetune.core import files

CALLS = ("_create", "_write", "_sync", "_rename", "_mkdir")
"""Every call through which ``finetune.core.files`` changes the disk."""


class Disk:
    """Counts the calls, and fails one of them."""

    def __init__(self) -> None:
        self.calls: list[str] = []


@contextmanager
def disk(*, fail_at: int | None = None, error: int = 28, half: bool = True) -> Iterator[Disk]:
    """Inside, call number ``fail_at`` (from 0) raises ``OSError(error)``, once; None only counts.

    Args:
        fail_at: which call, over all of ``CALLS`` together.
        error: an errno, by default ENOSPC.
        half: whether a failing write puts half of its bytes onto the disk first, as full disks do.
    """
    seen = Disk()

    def breaking(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            seen.calls.append(name)
            if len(seen.calls) - 1 == fail_at:
                if name == "_write" and half:
                    real(args[0], args[1][: len(args[1]) // 2])
                raise OSError(error, os.strerror(error))
            return real(*args)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in CALLS:
            patch.setattr(files, name, breaking(name, getattr(files, name)))
        yield seen


def forked(work: Callable[[], Any]) -> Any:
    """Run ``work`` in a child of its own, whose limits and mounts end with it; returns its result."""
    context = multiprocessing.get_context("fork")
    theirs, ours = context.Pipe()

    def run() -> None:
        ours.send(work())

    child = context.Process(target=run)
    child.start()
    ours.close()
    try:
        return theirs.recv()
    except EOFError:
        child.join()
        return pytest.fail(f"the child ended with {child.exitcode}; its traceback stands above")
    finally:
        child.join(60)


def mount_small_disk(folder: Path, size: str = "3m") -> bool:
    """Give this process, which must have one thread, a file system of its own at ``folder``; False if it may not."""
    libc, everything_private, namespace, user = ctypes.CDLL(None), 0x44000, 0x20000, 0x10000000
    uid = os.getuid()
    if libc.unshare(namespace if uid == 0 else namespace | user) != 0:
        return False
    if uid != 0:
        Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
    libc.mount(None, b"/", None, everything_private, None)
    return libc.mount(b"none", bytes(folder), b"tmpfs", 0, f"size={size}".encode()) == 0


def remount_read_only(folder: Path) -> None:
    """Take the right to write away from what ``mount_small_disk`` mounted."""
    remount, read_only = 0x20, 0x1
    assert ctypes.CDLL(None).mount(b"none", bytes(folder), b"tmpfs", remount | read_only, None) == 0
