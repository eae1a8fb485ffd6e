"""One job writes to a run's folder, a killed one is no hindrance, and all processes continue from one checkpoint."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from waiting import HANG_S

from finetune.checkpoint.folders import CheckpointConfig, list_checkpoints
from finetune.checkpoint.load import checkpoint_to_continue
from finetune.checkpoint.save import CheckpointContent, CheckpointManager, save_checkpoint
from finetune.core import files, locks
from finetune.core.distributed import ProcessGroup
from finetune.core.errors import CheckpointError
from finetune.core.types import RunState
from finetune.trainers.setup import hold_run_folder

FORK = multiprocessing.get_context("fork")


def held(run_dir: Path) -> Any:
    """As the only process of a launch holds it."""
    return hold_run_folder(run_dir, ProcessGroup(), print)


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


def test_a_second_job_is_refused_at_once_and_told_who_is_there(tmp_path):
    with somebody_holds(tmp_path) as holder:
        with pytest.raises(CheckpointError) as caught, held(tmp_path):
            pytest.fail("two jobs write to one folder")
        assert caught.value.what.startswith("another training writes to this run folder: train on ")
        assert f"process {holder.pid}, since 20" in caught.value.what and socket.gethostname() in caught.value.what
        assert caught.value.where == str(tmp_path) and "another output_dir" in caught.value.fix


def test_a_job_that_ended_or_was_killed_is_succeeded_at_once(tmp_path, capsys):
    for _ in range(2):
        with held(tmp_path), held(tmp_path / "another"):
            pass
    with somebody_holds(tmp_path) as holder:
        holder.kill()
        holder.join()
        with held(tmp_path):
            assert capsys.readouterr().out == ""


@pytest.mark.parametrize("returns", [False, True], ids=["still there", "gone meanwhile"])
def test_a_holder_on_another_machine_may_be_dead_and_is_waited_for(tmp_path, monkeypatch, capsys, returns):
    monkeypatch.setattr(locks, "NFS_LEASE_S", HANG_S if returns else 0.5)
    with somebody_holds(tmp_path) as holder:
        (tmp_path / ".lock").write_text("train on elsewhere, process 7, since 2026-01-01\x1b[2J")
        if returns:
            threading.Timer(0.5, holder.kill).start()
            with held(tmp_path):
                pass
        else:
            with (
                pytest.raises(CheckpointError, match=r"another training writes .*: train on elsewhere"),
                held(tmp_path),
            ):
                pytest.fail("two jobs write to one folder")
    printed = capsys.readouterr().out
    assert "waiting up to" in printed and "\\x1b[2J" in printed, "told, and nothing that a terminal would obey"


def test_a_file_system_without_locks_is_told_of(tmp_path, monkeypatch, capsys):
    def refused(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", refused)
    with held(tmp_path), held(tmp_path):  # the canary of the tests above: nobody is kept out
        assert "no locks, so a second training would not be refused" in capsys.readouterr().out


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
            found = checkpoint_to_continue(run, "latest", ranks)
            outcomes.put((rank, None if found is None else float(found.trainable["a"][0])))
            torch.distributed.barrier()
    except CheckpointError as error:
        outcomes.put((rank, error.what))
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
    assert two_ranks(tmp_path) == [(0, 20.0), (1, 20.0)]
    assert [step for step, _ in list_checkpoints(run)] == [10, 20], "renamed once, by one of them"
    for _, path in list_checkpoints(run):
        damage(path)
    seen = two_ranks(tmp_path)
    assert [rank for rank, _ in seen] == [0, 1]
    assert all("no checkpoint of this run is whole" in what for _, what in seen), "and all of them stop"


def test_a_new_run_begins_on_all_processes(tmp_path):
    assert two_ranks(tmp_path) == [(0, None), (1, None)]


def test_the_main_process_reads_its_checkpoint_once(tmp_path, monkeypatch):
    from finetune.core.checksums import ChecksummedFolder as Sealed

    write(tmp_path, 10)
    read: list[str] = []
    real = Sealed.read_bytes
    monkeypatch.setattr(Sealed, "read_bytes", lambda self, name: (read.append(name), real(self, name))[1])
    found = checkpoint_to_continue(tmp_path, "latest", ProcessGroup())
    assert found is not None and len(read) == len(set(read)) == 5
