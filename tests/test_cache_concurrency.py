"""Jobs and collections on one cache at once: a collection takes nothing away from a job on this machine."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from waiting import HANG_S, until
from worlds import fabricate_cache, run_config, run_values

from finetune.caching.precompute import ensure_cache
from finetune.cli.app import OK, PREEMPTED, USER_ERROR
from finetune.cli.main import main
from finetune.cogvideox.spec import read_spec
from finetune.core import locks
from finetune.core.checksums import digest_of
from finetune.core.errors import CacheError
from finetune.datasets import cache_admin
from finetune.datasets.cache import Cache, Encoding
from finetune.datasets.manifests import Manifest
from finetune.trainers.loop import train

ROOT = Path(__file__).parents[1]


@pytest.fixture
def without_locks(monkeypatch) -> None:
    """As on a file system that has none."""

    def refused(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", refused)


def address(number: int) -> dict[str, object]:
    return Encoding("v", "t", "fp32", 1, "fp16", None, "rule").prompt_address(str(number))


def write(cache: Cache, number: int) -> str:
    cache.write_prompt(address(number), torch.full((1, 2), float(number)), tokens=1)
    return digest_of(address(number))


def manifest_of(numbers: list[int]) -> Manifest:
    keys = {str(number): digest_of(address(number)) for number in numbers}
    return Manifest((), next(iter(keys.values())), {"numbers": numbers}, {}, prompts=keys)


def two_orphans(tmp_path: Path) -> Cache:
    cache = Cache(tmp_path / "cache")
    for number in (0, 1):
        write(cache, number)
    return cache


def test_nothing_is_deleted_while_a_job_uses_the_cache(tmp_path):
    cache = two_orphans(tmp_path)
    words = ["cache", "gc", "--dir", str(cache.root)]
    with cache.in_use("precompute"), cache.in_use("train"):  # any number of jobs
        report = cache_admin.gc(cache, delete=True, grace_s=0)
        assert not report.deleted and report.entries == 2 and len(cache.keys("prompts")) == 2
        assert f"nothing was deleted: the cache is in use (train on {socket.gethostname()}, process " in str(report)
        assert cache_admin.gc(cache, delete=True, grace_s=0, alone=True).held_back, (
            "the lock is believed, not the caller"
        )
        assert main([*words, "--delete"]) == PREEMPTED
        assert main(words) == OK  # without --delete it only says what it finds
    assert cache_admin.gc(cache, delete=True, grace_s=0).entries == 2 and not cache.keys("prompts")


def test_without_the_lock_a_job_would_lose_entries(tmp_path, without_locks):
    """The canary of the tests here."""
    cache = two_orphans(tmp_path)
    with cache.in_use("precompute"):
        assert cache_admin.gc(cache, delete=True, grace_s=0, alone=True).deleted and not cache.keys("prompts")


def test_without_locks_a_collection_asks_whether_it_is_alone(tmp_path, without_locks, capsys):
    cache = two_orphans(tmp_path)
    with cache.in_use("train"):
        assert "cannot be locked (No locks available)" in capsys.readouterr().out
    with cache.in_use("train", quiet=True):
        assert capsys.readouterr().out == ""
    words = ["cache", "gc", "--dir", str(cache.root), "--delete"]
    assert main(words) == USER_ERROR and "--alone" in capsys.readouterr().err
    assert main([*words, "--alone"]) == OK and len(cache.keys("prompts")) == 2, "what is young stays all the same"
    assert "2 more entries are unused and younger than 1 h" in capsys.readouterr().out
    assert cache_admin.gc(cache, delete=True, grace_s=0, alone=True).entries == 2


def test_a_job_waits_for_a_collection_and_says_so(tmp_path, capsys):
    cache = two_orphans(tmp_path)
    come = threading.Event()

    def job() -> None:
        with cache.in_use("train"):
            come.set()

    with locks.hold(cache.lock, "cache gc"):
        thread = threading.Thread(target=job)
        thread.start()
        until(lambda: "waiting for cache gc on" in capsys.readouterr().out, "it says so")
        assert not come.is_set()
    thread.join(HANG_S)
    assert come.is_set()


def test_what_earlier_versions_left_is_collected_when_their_jobs_are_over(tmp_path):
    cache = two_orphans(tmp_path)
    cache.save_manifest(manifest_of([0]), tmp_path)
    old = cache.root / "jobs" / "node3-812-1a2b3c4d.json", cache.root / "trash" / "gc-1" / "manifests" / "a.json"
    for path in old:
        path.parent.mkdir(parents=True)
        path.write_text("{")
    needed = cache.path("prompts", digest_of(address(0)))
    taken_away = cache.root / "trash" / "gc-1" / needed.relative_to(cache.root)
    taken_away.parent.mkdir(parents=True)
    needed.rename(taken_away)
    report = cache_admin.gc(cache, delete=True, grace_s=0)
    assert old[0].name in report.held_back and not report.deleted, "a job of an earlier version may be running"
    assert old[0].exists() and taken_away.exists()
    for path in old:
        os.utime(path, (1, 1))
    report = cache_admin.gc(cache, delete=True, grace_s=0)
    assert report.leftovers == 2 and report.entries == 1 and not report.held_back
    assert needed.exists(), "an entry that a killed collection had taken away is there again"
    assert {path.name for path in cache.root.iterdir()} == {"lock", "manifests", "prompts"}


def test_a_full_disk_does_not_keep_anybody_from_making_room(tmp_path, monkeypatch):
    cache = two_orphans(tmp_path)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(locks.os, "pwrite", full)
    monkeypatch.setattr(cache_admin.Path, "touch", full)
    assert cache_admin.gc(cache, delete=True, grace_s=0).entries == 2 and not cache.keys("prompts")


def test_a_damaged_manifest_stops_collections_until_it_is_made_anew(tmp_path):
    cache = two_orphans(tmp_path)
    manifest = manifest_of([0])
    path = cache.save_manifest(manifest, tmp_path)
    path.write_bytes(path.read_bytes().replace(b"numbers", b"nombers"))
    with pytest.raises(CacheError, match="damaged"):
        cache_admin.gc(cache, delete=True, grace_s=0)
    aside = cache.move_manifest_aside(path)
    with pytest.raises(CacheError, match=r"moved aside[\s\S]*precompute"):
        cache_admin.gc(cache, delete=True, grace_s=0)
    assert len(cache.keys("prompts")) == 2
    cache.save_manifest(manifest, tmp_path)
    assert not aside.exists() and cache_admin.gc(cache, delete=True, grace_s=0).entries == 1


# ------------------------------------------------------------------------------------------------------ runs


def test_training_uses_the_cache_until_its_end(tiny_model, tmp_path):
    config = run_config(
        tiny_model(), tmp_path / "none", tmp_path / "run", cache={"mode": "require"}, train={"steps": 1}
    )
    fabricate_cache(config)
    cache, held_back = Cache(config.cache.dir), []

    def collect(record: object) -> None:
        for manifest in (cache.root / "manifests").glob("*.json"):
            manifest.unlink()
        held_back.append(cache_admin.gc(cache, delete=True, grace_s=0).held_back)

    train(config, on_step=collect)
    assert len(held_back) == 1 and held_back[0]
    assert cache_admin.gc(cache, delete=True, grace_s=0).entries == 5


def test_a_cache_that_is_read_only_can_be_trained_from(tiny_model, tmp_path, monkeypatch, capsys):
    config = run_config(tiny_model(), tmp_path / "none", tmp_path / "run", cache={"mode": "require"})
    fabricate_cache(config)

    def refused(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(locks, "_open", refused)
    cache = Cache(config.cache.dir)
    with cache.in_use("train"):
        manifest = ensure_cache(config, read_spec(config.model.pretrained), cache=cache)
    assert cache.read(manifest.items[0]).prompt_embeds.ndim == 2
    said = capsys.readouterr().out
    assert "cannot be locked (Read-only file system)" in said and "nothing to encode" in said


# -------------------------------------------------------------------------------------------------- real processes


def _work(root: Path, seed: int, rounds: int) -> None:
    """Rounds of a job that needs some of twelve entries, leaves its manifest, and takes it back."""
    cache, choice = Cache(root), random.Random(seed)
    for _ in range(rounds):
        numbers = sorted(choice.sample(range(12), 5))
        with cache.in_use("precompute", quiet=True):
            there = cache.keys("prompts")
            for number in numbers:
                if digest_of(address(number)) not in there:
                    write(cache, number)
            path = cache.save_manifest(manifest_of(numbers), root)
            for number in numbers:
                assert float(Cache(root).read_prompt(digest_of(address(number)))[0, 0]) == number
        path.unlink(missing_ok=True)
        time.sleep(0.02)


def _collect(root: Path, done: object) -> None:
    deleted = 0
    while not done.is_set() or not deleted:  # type: ignore[attr-defined]
        report = cache_admin.gc(Cache(root), delete=True, grace_s=0)
        deleted += report.entries * report.deleted
        time.sleep(0.005)


def test_processes_that_come_and_go_beside_a_collector_lose_nothing(tmp_path):
    context = multiprocessing.get_context("fork")
    done = context.Event()
    collector = context.Process(target=_collect, args=(tmp_path, done))
    workers = [context.Process(target=_work, args=(tmp_path, seed, 15)) for seed in range(3)]
    for process in (collector, *workers):
        process.start()
    for worker in workers:
        worker.join(HANG_S)
    done.set()
    collector.join(HANG_S)
    assert [worker.exitcode for worker in workers] == [0, 0, 0] and collector.exitcode == 0
    assert cache_admin.verify(Cache(tmp_path)).ok


@pytest.mark.slow
def test_two_precomputes_a_training_and_a_collector_at_once(tiny_model, demo_clips, tmp_path):
    """The commands themselves, on overlapping datasets in one cache."""
    from finetune.config.schema import RunConfig

    def config(name: str, **changes: object) -> Path:
        values = run_values(tiny_model(), demo_clips, tmp_path / "runs" / name, **changes)
        values["cache"]["dir"] = str(tmp_path / "cache")
        path = tmp_path / f"{name}.yaml"
        path.write_text(RunConfig.from_dict(values).to_yaml())
        return path

    one = config("one")
    two = config("two", data={"buckets": ["9x32x32", "9x64x64"], "caption_prefix": "seen: "})
    three = config("three", train={"steps": 30}, validation={"every": 10}, data={"holdout": 1})
    commands = {
        "one": ["precompute", "--config", str(one)],
        "two": ["precompute", "--config", str(two)],
        "three": ["train", "--config", str(three)],
    }
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    started = {
        name: subprocess.Popen(
            [sys.executable, "-m", "finetune", *words], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for name, words in commands.items()
    }
    cache, outcomes = Cache(tmp_path / "cache"), Counter[bool]()
    stranger = 100
    while any(process.poll() is None for process in started.values()):
        write(cache, stranger)  # something to delete
        stranger += 1
        outcomes[cache_admin.gc(cache, delete=True, unused_days=1e-9, grace_s=0).deleted] += 1
        time.sleep(0.05)
    said = {name: process.communicate()[0].decode() for name, process in started.items()}
    assert [process.returncode for process in started.values()] == [0, 0, 0], said
    assert outcomes[True] and outcomes[False] and not cache.has("prompts", digest_of(address(100)))
    assert cache_admin.verify(cache).ok
