"""Locks of the operating system: who holds one, who is kept out, and that death lets go."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from broken_disk import forked, mount_small_disk, remount_read_only
from waiting import HANG_S, until

from finetune.core import locks
from finetune.core.locks import HeldError, NoLocksError, hold

HOLDER = """
import os, sys, time
from pathlib import Path
from finetune.core.locks import hold
with hold(Path(sys.argv[1]), "train", shared=sys.argv[2] == "shared"):
    if sys.argv[3] == "fork" and os.fork() == 0:
        sys.stdout = open(os.devnull, "w")
    elif sys.argv[3] == "spawn":
        import subprocess
        child = [sys.executable, "-c", "import time; time.sleep(600)"]
        subprocess.Popen(child, close_fds=False, stdout=subprocess.DEVNULL)
    print("held", flush=True)
    time.sleep(600)
"""


@contextmanager
def holder(path: Path, mode: str = "exclusive", child: str = "") -> Iterator[subprocess.Popen[str]]:
    """A process of its own that holds a lock, with a child that outlives it if ``fork`` or ``spawn``."""
    command = [sys.executable, "-c", HOLDER, str(path), mode, child]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


def is_free(path: Path, *, shared: bool = False) -> bool:
    try:
        with hold(path, "probe", shared=shared):
            return True
    except HeldError:
        return False


@pytest.mark.parametrize("mode", ["shared", "exclusive"])
@pytest.mark.parametrize("shared", [True, False])
def test_only_those_who_share_hold_a_lock_together(tmp_path, mode, shared):
    with holder(tmp_path / "lock", mode):
        assert is_free(tmp_path / "lock", shared=shared) == (mode == "shared" and shared)
    assert is_free(tmp_path / "lock")


def test_who_is_kept_out_is_told_who_holds_it(tmp_path):
    path = tmp_path / "made" / "lock"
    with holder(path) as process, pytest.raises(HeldError) as caught, hold(path, "gc"):
        pytest.fail("two hold it")
    assert re.match(rf"train on \S+, process {process.pid}, since 20\d\d-", str(caught.value))


@pytest.mark.parametrize("child", ["", "fork", "spawn"])
def test_a_lock_ends_with_its_process_whatever_its_children_do(tmp_path, child):
    with holder(tmp_path / "lock", child=child) as process:
        assert not is_free(tmp_path / "lock")
        process.kill()
        process.wait()
        until(lambda: is_free(tmp_path / "lock"), "free")  # a fork that has not run yet has not closed it yet


def test_without_closing_it_a_fork_would_keep_the_lock_of_its_dead_parent(tmp_path):
    """The canary of the test above."""
    descriptor = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    release, wait = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(wait)
        os.read(release, 1)
        os._exit(0)
    os.close(descriptor)
    assert not is_free(tmp_path / "lock")
    os.close(wait)
    os.waitpid(child, 0)
    assert is_free(tmp_path / "lock")


def test_a_fork_does_not_end_the_lock_of_its_parent(tmp_path):
    def child() -> None:
        with hold(tmp_path / "other", "child"):
            pass

    with hold(tmp_path / "lock", "parent"):
        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        process.join(HANG_S)
        assert process.exitcode == 0 and not is_free(tmp_path / "lock")


def test_a_lock_ends_with_the_error_that_ends_its_block(tmp_path):
    with pytest.raises(RuntimeError), hold(tmp_path / "lock", "train"):
        raise RuntimeError
    assert is_free(tmp_path / "lock") and not locks._descriptors


def test_who_waits_is_told_for_whom_and_comes_next(tmp_path):
    told: list[str] = []
    come = threading.Event()

    def wait() -> None:
        with hold(tmp_path / "lock", "train", shared=True, waiting=told.append):
            come.set()

    with hold(tmp_path / "lock", "cache gc"):
        thread = threading.Thread(target=wait)
        thread.start()
        until(lambda: told, "the waiting one is told")
        assert not come.is_set()
    thread.join(HANG_S)
    assert come.is_set() and len(told) == 1 and told[0].startswith("cache gc on ")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_locks_is_told_apart(tmp_path, monkeypatch, number):
    def refused(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(locks.fcntl, "flock", refused)
    with pytest.raises(NoLocksError), hold(tmp_path / "lock", "gc"):
        pytest.fail("nothing was locked")


def test_on_a_drive_that_is_read_only_a_lock_can_be_shared(tmp_path):
    def work() -> object:
        if not mount_small_disk(tmp_path):
            return None
        (tmp_path / "lock").touch()
        remount_read_only(tmp_path)
        with hold(tmp_path / "lock", "train", shared=True):
            pass
        with pytest.raises(OSError, match="Read-only"), hold(tmp_path / "lock", "gc"):
            pass
        with pytest.raises(OSError, match="Read-only"), hold(tmp_path / "other", "train", shared=True):
            pass
        return True

    if forked(work) is None:
        pytest.skip("nothing can be mounted here")
