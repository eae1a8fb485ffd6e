"""Who is using a folder: told right while a process lives, and soon after it died, here and on other machines."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from waiting import until

from finetune.core import locks
from finetune.core.locks import Lease, clear_dead, hold, live

HOLDER = """
import sys, time
from pathlib import Path
from finetune.core.locks import hold
with hold(Path(sys.argv[1]), {"verb": "train"}, beat_s=0.05):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process of its own that holds a lease on ``tmp_path``."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLDER), str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def elsewhere(path: Path, **changes) -> None:
    """Make a lease look as if another machine wrote it."""
    content = {**json.loads(path.read_text()), "host": "node7", "machine": "node7 boot-2 pid:[1]", **changes}
    path.write_text(json.dumps(content))


def aged(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


def test_a_lease_is_there_for_as_long_as_it_is_held(tmp_path):
    folder = tmp_path / "jobs"
    assert live(folder) == []
    with hold(folder, {"verb": "train"}) as lease:
        (one,) = live(folder)
        assert one.about == {"verb": "train"} and one.path == lease.path and one.pid == os.getpid() and one.age_s < 500
        lease.update({"verb": "train", "phase": "running"})
        assert live(folder)[0].about["phase"] == "running"
        with hold(folder, {"verb": "gc"}):
            assert {holder.about["verb"] for holder in live(folder)} == {"train", "gc"}
    assert live(folder) == [] and list(folder.iterdir()) == []


def test_a_lease_ends_with_the_error_that_ends_its_block(tmp_path):
    with pytest.raises(RuntimeError), hold(tmp_path, {}):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_is_not_live_at_once_and_can_be_cleared_away(tmp_path, holder):
    (one,) = live(tmp_path)
    assert one.pid == holder.pid and one.about == {"verb": "train"}
    assert clear_dead(tmp_path) == 0
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert len(list(tmp_path.glob("*.json"))) == 1 and live(tmp_path) == []
    assert clear_dead(tmp_path) == 1 and list(tmp_path.glob("*.json")) == []


def test_a_zombie_is_dead(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    until(lambda: not live(tmp_path), "a zombie is dead")  # not waited for: it stays in the process table
    assert holder.returncode is None


def test_a_stopped_process_of_this_machine_is_live_however_old_its_last_touch(tmp_path, holder):
    holder.send_signal(signal.SIGSTOP)
    (path,) = tmp_path.glob("*.json")
    aged(path, 10_000)
    (one,) = live(tmp_path)
    assert one.age_s > 5_000


def test_a_process_number_that_was_given_out_again_is_another_process(tmp_path):
    lease = Lease(tmp_path, {})
    assert len(live(tmp_path)) == 1
    content = json.loads(lease.path.read_text())
    lease.path.write_text(json.dumps({**content, "started": "17"}))
    assert live(tmp_path) == []


@pytest.mark.parametrize("change", ["boot", "container"])
def test_numbers_of_another_boot_or_container_are_not_asked_of_this_kernel(tmp_path, change):
    lease = Lease(tmp_path, {})
    host, boot, space = json.loads(lease.path.read_text())["machine"].split()
    other = f"{host} other {space}" if change == "boot" else f"{host} {boot} pid:[7]"
    elsewhere(lease.path, machine=other, pid=2**22 + 1)  # no process here has that number
    assert len(live(tmp_path)) == 1
    aged(lease.path, 100)
    assert live(tmp_path, stale_s=60) == [] and len(live(tmp_path, stale_s=200)) == 1


def test_age_is_told_by_the_clock_of_the_file_system(tmp_path, monkeypatch):
    lease = Lease(tmp_path, {})
    elsewhere(lease.path)
    monkeypatch.setattr(time, "time", lambda: 10**6)  # a machine whose clock is decades behind
    assert live(tmp_path)[0].age_s < 1e5
    monkeypatch.setattr(locks, "clock", lambda _: time.time() + 10**10)  # canary: by another clock it seems dead
    assert live(tmp_path) == []


def test_a_lease_is_touched_while_it_is_held(tmp_path):
    with hold(tmp_path, {}, beat_s=0.02) as lease:
        aged(lease.path, 1000)
        until(lambda: live(tmp_path)[0].age_s < 500, "it is touched")


def test_a_lease_that_was_cleared_away_comes_back(tmp_path):
    with hold(tmp_path, {"verb": "train"}, beat_s=0.02) as lease:
        lease.path.unlink()
        until(lambda: live(tmp_path), "it comes back")
        assert live(tmp_path)[0].about == {"verb": "train"}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b'{"about": 3, "pid": "x", "machine": 7}'])
def test_a_lease_that_cannot_be_understood_counts_until_it_is_old(tmp_path, content):
    path = tmp_path / "node7-1-ab.json"
    path.write_bytes(content)
    (one,) = live(tmp_path)
    assert one.about == {} and one.path == path
    aged(path, 100)
    assert live(tmp_path) == []


def test_a_folder_that_cannot_be_written_to_can_be_asked_but_not_held(tmp_path, monkeypatch):
    other = Lease(tmp_path, {"verb": "train"})
    elsewhere(other.path)

    def refused(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_bytes", refused)
    monkeypatch.setattr(Path, "write_text", refused)
    assert [holder.about for holder in live(tmp_path)] == [{"verb": "train"}]
    with pytest.raises(PermissionError), hold(tmp_path, {}):
        pytest.fail("held without a file")


def test_a_failed_update_leaves_what_was_said(tmp_path, monkeypatch):
    with hold(tmp_path, {"phase": "planning"}) as lease:
        monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space"):
            lease.update({"phase": "running"})
        assert live(tmp_path)[0].about == {"phase": "planning"}
        assert list(tmp_path.glob("*.partial")) == []


def test_a_fork_does_not_end_the_lease_of_its_parent(tmp_path):
    with hold(tmp_path, {}) as lease:
        child = os.fork()
        if child == 0:
            lease._end()
            os._exit(0)
        os.waitpid(child, 0)
        assert len(live(tmp_path)) == 1
