"""One job writes to a run's folder, a killed one is no hindrance, and all processes continue from one checkpoint."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from broken_disk import forked, mount_small_disk
from waiting import HANG_S

from finetune.checkpoint.folders import CheckpointConfig, list_checkpoints
from finetune.checkpoint.load import checkpoint_to_continue
from finetune.checkpoint.save import CheckpointContent, CheckpointManager, save_checkpoint
from finetune.core import files, locks
from finetune.core.distributed import ProcessGroup
from finetune.core.errors import CheckpointError
from finetune.core.types import RunState
from finetune.trainers.setup import LEASES, hold_run_folder

FORK = multiprocessing.get_context("fork")
FAST = {"beat_s": 0.1, "stale_s": 1.0}


def held(run_dir: Path, **times: float) -> Any:
    """As the only process of a launch holds it."""
    return hold_run_folder(run_dir, ProcessGroup(), print, **times)


def write(run_dir: Path, step: int) -> Path:
    return save_checkpoint(
        run_dir,
        CheckpointContent(
            RunState(step, "cache"),
            trainable={"a": torch.full((8,), float(step))},
            optimizer=({}, {}),
            ema=None,
            config={},
        ),
        CheckpointConfig(keep_last=9),
    )


def damage(path: Path) -> None:
    content = bytearray((path / "trainable.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "trainable.safetensors").write_bytes(content)


# ---------------------------------------------------------------------------------------------------- one job at a time


@contextlib.contextmanager
def somebody_holds(run_dir: Path, work: Callable[[], None] = lambda: time.sleep(60)) -> Iterator[Any]:
    """Another process of this machine that holds the folder."""

    def run(ready: Any) -> None:
        with held(run_dir):
            ready.set()
            work()

    ready = FORK.Event()
    process = FORK.Process(target=run, args=(ready,))
    process.start()
    assert ready.wait(30)
    try:
        yield process
    finally:
        process.kill()
        process.join()


def from_another_machine(run_dir: Path) -> Path:
    """A lease as a job on another host leaves it."""
    folder = run_dir / LEASES
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "node7-4711-00aa11bb.json"
    about = {"since": "2026-11-23 10:15:00+00:00", "writes": True}
    theirs = {"host": "node7", "machine": "node7 boot pid:[1]", "pid": 4711, "started": "1", "about": about}
    path.write_text(json.dumps(theirs))
    return path


def test_a_second_job_is_refused_at_once_and_told_who_is_there(tmp_path):
    with somebody_holds(tmp_path) as holder:
        with pytest.raises(CheckpointError) as caught, held(tmp_path):
            pytest.fail("two jobs write to one folder")
        assert caught.value.what.startswith("another training writes to this run folder: host ")
        assert f"process {holder.pid}, since 20" in caught.value.what and socket.gethostname() in caught.value.what
        assert caught.value.where == str(tmp_path) and "another output_dir" in caught.value.fix


def test_another_folder_is_nobodys_business(tmp_path):
    with somebody_holds(tmp_path / "a"), held(tmp_path / "b"):
        assert len(locks.live(tmp_path / "b" / LEASES)) == 1


def test_a_finished_job_leaves_nothing_in_the_way(tmp_path):
    for _ in range(2):
        with held(tmp_path):
            assert len(list((tmp_path / LEASES).iterdir())) == 1
        assert list((tmp_path / LEASES).iterdir()) == []


def test_a_killed_job_is_succeeded_at_once(tmp_path, capsys):
    with somebody_holds(tmp_path) as holder:
        os.kill(holder.pid, signal.SIGKILL)
        while holder.is_alive():
            time.sleep(0.01)
        with held(tmp_path):
            assert len(list((tmp_path / LEASES).glob("*.json"))) == 1, "the dead job's lease is cleared away"
        assert capsys.readouterr().out == ""


def test_without_asking_the_system_a_killed_job_would_stand_in_the_way(tmp_path, monkeypatch):
    """The canary of the test above: only the age of its lease is left then, and that is young."""
    with somebody_holds(tmp_path) as holder:
        holder.kill()
        holder.join()
        monkeypatch.setattr(locks, "_running", lambda *_: True)
        with pytest.raises(CheckpointError), held(tmp_path):
            pytest.fail("it was believed dead")


def test_a_silent_job_of_another_machine_is_waited_for_and_then_succeeded(tmp_path):
    lease, said = from_another_machine(tmp_path), []
    with hold_run_folder(tmp_path, ProcessGroup(), said.append, **FAST):
        assert not lease.exists()
    assert len(said) == 1 and said[0].startswith(f"waiting up to 1 s for the job that wrote to {tmp_path} before: host")
    assert "node7, process 4711, since 2026-11-23 10:15" in said[0]


def test_a_job_of_another_machine_that_shows_itself_is_alive(tmp_path):
    lease = from_another_machine(tmp_path)
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(0.1):
            os.utime(lease)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(CheckpointError, match="node7, process 4711"), held(tmp_path, **FAST):
            pytest.fail("two jobs write to one folder")
    finally:
        ended.set()
        thread.join()
    assert lease.exists()


def test_an_unreadable_lease_is_no_traceback(tmp_path):
    path = from_another_machine(tmp_path)
    path.write_bytes(b"\xff{")
    said: list[str] = []
    with hold_run_folder(tmp_path, ProcessGroup(), said.append, **FAST):
        assert "host unknown" in said[0]


def _race(run_dir: Path, start: Any, inside: Any, number: int, outcomes: Any) -> None:
    start.wait()
    try:
        with held(run_dir):
            with inside.get_lock():
                inside.value += 1
                together = inside.value
            time.sleep(0.05)
            with inside.get_lock():
                inside.value -= 1
            outcomes.put((number, together))
    except CheckpointError:
        outcomes.put((number, 0))


def test_of_many_that_start_together_never_two_write(tmp_path):
    start, inside, outcomes = FORK.Event(), FORK.Value("i", 0), FORK.Queue()
    racers = [FORK.Process(target=_race, args=(tmp_path, start, inside, number, outcomes)) for number in range(5)]
    for racer in racers:
        racer.start()
    start.set()
    together = [outcomes.get(timeout=HANG_S)[1] for _ in racers]
    for racer in racers:
        racer.join(HANG_S)
    assert max(together) == 1 and together.count(0) < len(racers), together


def test_looking_before_saying_would_let_two_in(tmp_path, monkeypatch):
    """The canary of the test above: who does not see the others gets in beside them."""
    monkeypatch.setattr(locks, "live", lambda *_, **__: [])
    monkeypatch.setattr(locks, "clear_dead", lambda *_, **__: 0)
    with somebody_holds(tmp_path), held(tmp_path):
        assert len(list((tmp_path / LEASES).glob("*.json"))) == 2


def test_a_full_disk_at_the_start_is_an_error_in_words(tmp_path):
    def full() -> str | None:
        if not mount_small_disk(tmp_path, "64k"):
            return None
        with contextlib.suppress(OSError):
            (tmp_path / "ballast").write_bytes(bytes(1 << 20))
        with pytest.raises(CheckpointError) as caught, held(tmp_path):
            pytest.fail("nothing can be written here")
        return str(caught.value)

    said = forked(full)
    if said is None:
        pytest.skip("no file system can be mounted here")
    assert "cannot be written to: No space left on device" in said and "make room" in said and str(tmp_path) in said


def test_a_folder_that_cannot_be_written_to_is_an_error_in_words(tmp_path):
    (tmp_path / "run").write_text("a file")
    with (
        pytest.raises(CheckpointError, match="the run folder cannot be written to"),
        held(tmp_path / "run"),
    ):
        pytest.fail("it is a file")


# ---------------------------------------------------------------------------------------- what a killed job left behind


def test_what_a_killed_job_left_half_done_is_cleared_away(tmp_path):
    path = write(tmp_path, 10)
    half = path.with_name("step-00000020.123-0011aabb.partial")
    half.mkdir()
    (half / "trainable.safetensors").write_bytes(b"half")
    path.rename(path.with_name(f"{path.name}.0011aabb.old.partial"))
    with held(tmp_path):
        assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    assert [step for step, _ in list_checkpoints(tmp_path)] == [10]


def test_pruning_leaves_another_writers_unfinished_files_alone(tmp_path):
    half = tmp_path / "checkpoints" / "step-00000099.123-0011aabb.partial"
    half.mkdir(parents=True)
    for step in (10, 20, 30):
        save_checkpoint(
            tmp_path,
            CheckpointContent(
                RunState(step, ""),
                trainable={},
                optimizer=({}, {}),
                ema=None,
                config={},
            ),
            CheckpointConfig(keep_last=1),
        )
    assert half.is_dir() and [step for step, _ in list_checkpoints(tmp_path)] == [30]
    with somebody_holds(tmp_path), pytest.raises(CheckpointError), held(tmp_path):
        pytest.fail("somebody is there")


# ---------------------------------------------------------------------------------------------------- several processes


def _as_rank(rank: int, folder: Path, outcomes: Any) -> None:
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2, init_method=f"file://{folder}/meet")
    ranks = ProcessGroup(rank, 2, group=torch.distributed.new_group(backend="gloo"))
    run = folder / "run"
    try:
        with hold_run_folder(run, ranks, print):
            held = len(locks.live(run / LEASES))
            found = checkpoint_to_continue(run, "latest", ranks)
            outcomes.put((rank, held, None if found is None else float(found.trainable["a"][0])))
            torch.distributed.barrier()
    except CheckpointError as error:
        outcomes.put((rank, 0, error.what))
    torch.distributed.destroy_process_group()


def _saving_as_rank(rank: int, folder: Path, outcomes: Any) -> None:
    """Steps 1 to 4, a checkpoint after each; the disk of the main process has no room for those after 2 and 3."""
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2, init_method=f"file://{folder}/meet")
    ranks = ProcessGroup(rank, 2, group=torch.distributed.new_group(backend="gloo"))

    def save(state: RunState) -> Path:
        if rank == 0 and state.step > 1:
            files.shutil.disk_usage = lambda _: type("usage", (), {"free": 0})
        return ranks.run_on_main(lambda: write(folder / "run", state.step))

    saver = CheckpointManager(save, 1, lambda _: None, RunState(0, "cache"))
    seen: list[Any] = []
    try:
        for step in range(1, 5):
            _, path = saver.after_step(RunState(step, "cache"), due=True, must=False)
            seen.append(path and path.name)
    except CheckpointError as error:
        seen.append(error.what[:20])
    outcomes.put((rank, seen))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_a_checkpoint_that_one_process_cannot_write_is_the_same_fault_on_all(tmp_path):
    seen = two_ranks(tmp_path, _saving_as_rank)
    expected = ["step-00000001", None, "the checkpoint needs"]
    assert seen == [(0, expected), (1, expected)] and [step for step, _ in list_checkpoints(tmp_path / "run")] == [1]


def two_ranks(folder: Path, work: Callable[..., None] = _as_rank) -> list[Any]:
    outcomes = FORK.Queue()
    processes = [FORK.Process(target=work, args=(rank, folder, outcomes)) for rank in range(2)]
    for process in processes:
        process.start()
    seen = sorted(outcomes.get(timeout=HANG_S) for _ in processes)
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    (folder / "meet").unlink(missing_ok=True)
    return seen


def test_all_processes_of_a_job_are_one_holder_and_continue_from_one_checkpoint(tmp_path):
    run = tmp_path / "run"
    for step in (10, 20):
        write(run, step)
    damage(write(run, 30))
    assert two_ranks(tmp_path) == [(0, 1, 20.0), (1, 1, 20.0)]
    assert [step for step, _ in list_checkpoints(run)] == [10, 20], "renamed once, by one of them"
    for _, path in list_checkpoints(run):
        damage(path)
    seen = two_ranks(tmp_path)
    assert [rank for rank, _, _ in seen] == [0, 1]
    assert all("no checkpoint of this run is whole" in what for _, _, what in seen), "and all of them stop"


def test_a_new_run_begins_on_all_processes(tmp_path):
    assert two_ranks(tmp_path) == [(0, 1, None), (1, 1, None)]


def test_the_main_process_reads_its_checkpoint_once(tmp_path, monkeypatch):
    from finetune.core.checksums import ChecksummedFolder as Sealed

    write(tmp_path, 10)
    read: list[str] = []
    real = Sealed.read_bytes
    monkeypatch.setattr(Sealed, "read_bytes", lambda self, name: (read.append(name), real(self, name))[1])
    found = checkpoint_to_continue(tmp_path, "latest", ProcessGroup())
    assert found is not None and len(read) == len(set(read)) == 5
