"""Checkpoints and exports on disks that are full or fail: nothing half written, nothing older lost, a clear error."""

from __future__ import annotations

import dataclasses
import errno
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from broken_disk import disk, forked, mount_small_disk
from worlds import fabricate_cache, run_config

from finetune.caching.precompute import require_room
from finetune.checkpoint import save
from finetune.checkpoint.folders import CheckpointConfig, list_checkpoints
from finetune.checkpoint.load import choose_checkpoint, load_checkpoint
from finetune.checkpoint.save import CheckpointContent, CheckpointManager, save_checkpoint
from finetune.core import files
from finetune.core import files as space
from finetune.core.errors import CacheError, CheckpointError, ExportError
from finetune.core.types import RunState

ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS)


def write(run_dir: Path, step: int, *, numel: int = 64, keep_last: int = 2, best: int | None = None) -> Path:
    return save_checkpoint(
        run_dir,
        CheckpointContent(
            RunState(step, "cache", best_heldout_loss=None if best is None else 0.5, best_step=best),
            trainable={"a": torch.full((numel,), float(step))},
            optimizer=({"state.a.exp_avg": torch.ones(numel)}, {"step": step}),
            ema={"a": torch.zeros(numel)},
            config={"a": 1},
        ),
        CheckpointConfig(keep_last=keep_last),
    )


def steps(run_dir: Path) -> list[int]:
    return [step for step, _ in list_checkpoints(run_dir)]


# ------------------------------------------------------------------------------------------- every call fails in turn


@pytest.mark.parametrize("again", [False, True], ids=["a new step", "the same step"])
def test_whichever_call_of_a_save_fails_the_one_before_stands(tmp_path, again, monkeypatch):
    """Every call to the operating system of one save fails once, with each kind of error in turn."""
    monkeypatch.setattr(files, "_sync", lambda _: None)  # hundreds of real ones take ten seconds

    def prepared(name: str) -> Path:
        run = tmp_path / name
        for step in (10, 20) if again else (10,):
            write(run, step)
        return run

    with disk() as whole:
        write(prepared("counted"), 20)
    once = whole.calls[-whole.calls[::-1].index("_mkdir") - 1 :]  # from the partial folder on: one save
    assert len(once) >= 25
    for number, call in enumerate(once):
        run = prepared(str(number))
        code = ERRORS[number % len(ERRORS)]
        with pytest.raises(CheckpointError) as caught, disk(fail_at=number, error=code) as seen:
            write(run, 20)
        assert seen.calls[number] == call
        assert os.strerror(code) in str(caught.value) and "step-00000020" in caught.value.where
        assert "earlier checkpoints are intact" in caught.value.fix and "MiB" in str(caught.value)
        assert not list(run.rglob("*.partial")), (number, seen.calls)
        assert steps(run) == ([10, 20] if again else [10])
        found = choose_checkpoint(run, "latest")
        assert found is not None and found.state.step == (20 if again else 10)
        write(run, 20)
        assert steps(run) == [10, 20] and load_checkpoint(run / "checkpoints" / "step-00000020").state.step == 20
    assert set(once) == {"_create", "_write", "_sync", "_rename", "_mkdir"}


def test_a_save_that_writes_in_place_would_lose_the_one_before(tmp_path, monkeypatch):
    """The canary of the test above: without the partial folder a full disk costs a checkpoint that stood."""
    write(tmp_path, 20)
    monkeypatch.setattr(save, "begin_dir", lambda path, *_: path)
    with pytest.raises(CheckpointError, match="cannot be written"), disk(fail_at=6):
        write(tmp_path, 20, numel=65)
    assert choose_checkpoint(tmp_path, "latest") is None


def test_what_is_not_an_error_of_the_disk_is_not_called_one(tmp_path, monkeypatch):
    def bug(*_: object) -> str:
        raise ZeroDivisionError

    monkeypatch.setattr(save, "atomic_save_tensors", bug)
    with pytest.raises(ZeroDivisionError):
        write(tmp_path, 10)
    assert steps(tmp_path) == [] and not list(tmp_path.rglob("*.partial"))


# --------------------------------------------------------------------------------------------------------- room first


def free(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    usage = type("usage", (), {"free": size})
    monkeypatch.setattr(space.shutil, "disk_usage", lambda _: usage)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_room_is_asked_for_before_anything_is_written(tmp_path, monkeypatch):
    size = size_of(write(tmp_path, 10, numel=100_000))
    free(monkeypatch, size)
    with pytest.raises(CheckpointError) as caught, disk() as seen:
        write(tmp_path, 20, numel=100_000)
    assert seen.calls == []
    assert caught.value.what == "the checkpoint needs 1.207 MiB and the disk has 1.145 MiB free"
    assert "step-00000020" in caught.value.where and "earlier checkpoints are intact" in caught.value.fix
    free(monkeypatch, size + 2 * save._BLOCKS)
    write(tmp_path, 20, numel=100_000)
    assert steps(tmp_path) == [10, 20]


def test_what_would_go_afterwards_is_named_and_not_removed_before(tmp_path, monkeypatch):
    for step in (10, 20):
        write(tmp_path, step, numel=100_000, best=10)
    free(monkeypatch, 200_000)
    with pytest.raises(CheckpointError) as caught:
        write(tmp_path, 30, numel=100_000, best=10)
    assert "would be removed" not in caught.value.fix, "10 is the best one, 20 one of the last two"
    with pytest.raises(CheckpointError) as caught:
        write(tmp_path, 30, numel=100_000, best=30)
    assert "step-00000010 (1.1" in caught.value.fix and "removing it by hand would be enough" in caught.value.fix
    free(monkeypatch, 10_000)
    with pytest.raises(CheckpointError) as caught:
        write(tmp_path, 30, numel=100_000, best=30)
    assert "would be removed" not in caught.value.fix, "it would not make enough room"
    assert steps(tmp_path) == [10, 20]


def few_files(monkeypatch: pytest.MonkeyPatch, room: int, *, counted: bool = True) -> None:
    """A disk with bytes enough, and ``room`` for so many files more."""
    blocks = dict.fromkeys(("f_bavail", "f_bfree", "f_blocks", "f_frsize"), 10**6)
    status = type("status", (), {**blocks, "f_files": 1_000 if counted else 0, "f_favail": room})
    monkeypatch.setattr(space.os, "statvfs", lambda _: status)


def test_room_for_files_is_asked_for_too(tmp_path, monkeypatch):
    few_files(monkeypatch, 31)
    with pytest.raises(CheckpointError) as caught, disk() as seen:
        write(tmp_path, 10)
    assert seen.calls == []
    assert caught.value.what == (
        "the checkpoint makes up to 32 files and the disk has room for 31 more (`df -i`), whatever its bytes"
    )
    few_files(monkeypatch, 0, counted=False)  # canary: a file system that does not count them has room
    write(tmp_path, 10)
    few_files(monkeypatch, 100)
    write(tmp_path, 20)
    assert steps(tmp_path) == [10, 20]


def test_as_many_files_as_entries_are_asked_for_before_encoding(tmp_path, monkeypatch):
    plan = SimpleNamespace(missing={"clips": 40, "prompts": 10}, needed_bytes=1)
    few_files(monkeypatch, 99)
    with pytest.raises(CacheError, match="makes up to 100 files and the disk has room for 99 more"):
        require_room(plan, tmp_path)
    few_files(monkeypatch, 100)
    require_room(plan, tmp_path)


# ------------------------------------------------------------------------------------------- a disk that really is full


def fill_up(folder: Path, what: str, check: bool) -> dict[str, Any] | None:
    """Save until the disk has no room for bytes, or for files, make room, and go on; returns what was seen.

    None where nothing can be mounted. Without ``check`` writing itself has to fail.
    """
    if not mount_small_disk(folder, "3m" if what == "bytes" else "9m,nr_inodes=80"):
        return None
    free_space, free_files = files.free_space, files.free_files
    if not check:
        files.free_space, files.free_files = lambda _: 1 << 60, lambda _: None
    numel = 40_000 if what == "bytes" else 64
    seen: dict[str, Any] = {"saved": []}
    (folder / "ballast").mkdir()
    (folder / "ballast" / "bytes").write_bytes(bytes(700_000))
    try:
        for step in range(1, 50):
            while what == "files" and step == 2 and os.statvfs(folder).f_favail > 3:
                (folder / "ballast" / f"{os.statvfs(folder).f_favail}").touch()
            write(folder / "run", step, numel=numel, keep_last=9)
            seen["saved"].append(step)
    except CheckpointError as error:
        seen["error"] = str(error)
    seen["left"] = [path.name for path in (folder / "run").rglob("*.partial")]
    best = choose_checkpoint(folder / "run", "latest")
    seen["latest"] = None if best is None else [best.state.step, float(best.trainable["a"].sum())]
    shutil.rmtree(folder / "ballast")
    files.free_space, files.free_files = free_space, free_files
    write(folder / "run", 60, numel=numel, keep_last=9)
    seen["after"] = steps(folder / "run")
    return seen


@pytest.mark.parametrize("check", [True, False], ids=["refused before", "failed while writing"])
@pytest.mark.parametrize("what", ["bytes", "files"])
def test_on_a_full_file_system_the_last_checkpoint_stands_and_saving_goes_on_later(tmp_path, what, check):
    seen = forked(lambda: fill_up(tmp_path, what, check))
    if seen is None:
        pytest.skip("no file system can be mounted here; the errors are injected above")
    last, numel = seen["saved"][-1], 40_000 if what == "bytes" else 64
    assert len(seen["saved"]) >= (2 if what == "bytes" else 1)
    assert seen["latest"] == [last, float(last * numel)] and seen["left"] == []
    assert seen["after"] == [*seen["saved"], 60]
    words = ("MiB and the disk has" if what == "bytes" else "room for 3 more") if check else "No space left on device"
    assert words in seen["error"] and f"step-{last + 1:08d}" in seen["error"]


def test_a_file_size_limit_is_an_error_like_a_full_disk(tmp_path):
    """What a batch system's limits do: the kernel refuses to let a file grow."""

    def limited() -> str:
        write(tmp_path, 1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        with pytest.raises(CheckpointError) as caught:
            write(tmp_path, 2, numel=40_000)
        return str(caught.value)

    said = forked(limited)
    assert "File too large" in said and "make room" in said
    assert steps(tmp_path) == [1] and not list(tmp_path.rglob("*.partial"))


# ------------------------------------------------------------------------------ a run whose checkpoint cannot be saved


class FailingRun:
    """Steps through a run whose saves fail at the steps that are named."""

    def __init__(self, fails: Callable[[int], bool], every: int | None = 100) -> None:
        self.saved: list[int] = []
        self.tried: list[int] = []
        self.said: list[str] = []
        self._fails = fails
        self.saver = CheckpointManager(self._save, every, self.said.append, RunState(0, "cache"))

    def _save(self, state: RunState) -> Path:
        self.tried.append(state.step)
        if self._fails(state.step):
            raise CheckpointError("no room", fix="make room")
        self.saved.append(state.step)
        return Path(str(state.step))

    def go(self, to: int, every: int = 100) -> None:
        state = RunState(0, "cache")
        for step in range(1, to + 1):
            state = dataclasses.replace(state, step=step)
            state, _ = self.saver.after_step(state, due=step % every == 0, must=step == to)


def test_a_passing_fault_costs_nothing():
    run = FailingRun(lambda step: 100 <= step < 130)
    run.go(300)
    assert run.tried == [100, 110, 120, 130, 200, 300] and run.saved == [130, 200, 300]
    assert len(run.said) == 3 and "training goes on" in run.said[0] and "no room" in run.said[0]


def test_a_lasting_fault_stops_at_the_second_checkpoint_that_is_due():
    run = FailingRun(lambda step: step >= 100)
    with pytest.raises(CheckpointError, match="no room"):
        run.go(1000)
    assert run.tried == [*range(100, 201, 10)] and run.saved == []


@pytest.mark.parametrize("last", [50, 100, 150])
def test_the_last_one_must_be_written(last):
    run = FailingRun(lambda step: True)
    with pytest.raises(CheckpointError):
        run.go(last)
    assert run.tried[-1] == last


def test_a_best_measurement_that_was_not_saved_is_not_the_best():
    """Otherwise the best one on the disk would be pruned for the sake of one that is not there."""
    run = FailingRun(lambda step: step == 20)
    good = RunState(10, "cache", best_heldout_loss=0.5, best_step=10)
    assert run.saver.after_step(good, due=True, must=False) == (good, Path("10"))
    better = RunState(20, "cache", best_heldout_loss=0.4, best_step=20)
    state, path = run.saver.after_step(better, due=True, must=False)
    assert path is None and state == dataclasses.replace(better, best_heldout_loss=0.5, best_step=10)


def test_a_bug_in_saving_is_not_waited_for():
    def bug(_: RunState) -> Path:
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        CheckpointManager(bug, 10, lambda _: None, RunState(0, "")).after_step(RunState(10, ""), due=True, must=False)


# ------------------------------------------------------------------------------------------------- a whole run, and out


def test_a_run_on_a_disk_that_fills_up_goes_on_when_there_is_room(tiny_model, tmp_path, monkeypatch, capsys):
    """Out of room at step 1, again at step 2: the run ends with the error; the same command then trains on as ever."""
    from finetune.trainers.loop import train

    config = run_config(
        tiny_model("5b"),
        tmp_path / "none",
        tmp_path / "run",
        cache={"mode": "require"},
        checkpoint={"every": 1},
        train={"steps": 3},
    )
    fabricate_cache(config)
    with monkeypatch.context() as patch:
        patch.setattr(save, "free_space", lambda _: 0)
        patch.setattr(files, "free_space", lambda _: 0)
        with pytest.raises(CheckpointError, match=r"the disk has 0\.000 MiB free"):
            train(config)
    assert "warning: step 1: the checkpoint needs" in capsys.readouterr().out
    assert steps(tmp_path / "run") == []
    assert load_checkpoint(train(config).checkpoint).state.step == 3


def test_an_export_that_cannot_be_written_says_so_and_leaves_the_earlier_one(tiny_model, tmp_path, monkeypatch):
    from finetune import export
    from finetune.conversion import export as export_module
    from finetune.trainers.loop import train

    config = run_config(
        tiny_model("5b"), tmp_path / "none", tmp_path / "run", cache={"mode": "require"}, train={"steps": 1}
    )
    fabricate_cache(config)
    train(config)
    report = export(tmp_path / "run")
    before = {path: path.read_bytes() for path in report.folder.rglob("*") if path.is_file()}

    def unharmed() -> bool:
        now = {path: path.read_bytes() for path in report.folder.rglob("*") if path.is_file()}
        return now == before and not list(report.folder.parent.glob("*.partial"))

    with monkeypatch.context() as patch:
        free(patch, 1000)
        with pytest.raises(ExportError, match=r"the export needs .* MiB and the disk has 0\.001 MiB free"):
            export(tmp_path / "run")
    assert unharmed()

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def full_too(*_: object, **__: object) -> None:
        raise export_module.SafetensorError("Error while serializing: I/O error: No space left on device")

    for fail in (full, full_too):
        with monkeypatch.context() as patch:
            patch.setattr(export_module, "_save_adapter", fail)
            with pytest.raises(ExportError, match=r"cannot be written: .*No space left") as caught:
                export(tmp_path / "run")
        assert "make room" in caught.value.fix and unharmed()
    with disk() as whole:
        export(tmp_path / "run")
    for number in (0, len(whole.calls) // 2, len(whole.calls) - 2, len(whole.calls) - 1):
        with pytest.raises(ExportError, match="cannot be written"), disk(fail_at=number):
            export(tmp_path / "run")
        assert not list(report.folder.parent.glob("*.partial")) and report.folder.is_dir()
