"""Jobs and collections on one cache at once: whatever the order of events, no job loses an entry that it counts on."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from waiting import HANG_S
from worlds import fabricate_cache, run_config, run_values

from finetune.caching.precompute import ensure_cache
from finetune.cli.main import OK, PREEMPTED, main
from finetune.cogvideox.spec import read_spec
from finetune.core import locks
from finetune.core.checksums import digest_of
from finetune.core.errors import CacheError
from finetune.core.locks import hold, live
from finetune.datasets import cache_admin
from finetune.datasets.cache import Cache
from finetune.datasets.cache_admin import CacheJob, GcReport
from finetune.datasets.cache_entries import Manifest, prompt_address

ROOT = Path(__file__).parents[1]
AT_ONCE = {"grace_s": 0.0, "settle_s": 0.0}


@pytest.fixture(autouse=True)
def unflushed(monkeypatch) -> None:
    """Nobody pulls the plug here."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def address(number: int) -> dict[str, object]:
    return prompt_address(text=str(number), text_encoder="t", max_length=1, dtype="fp32")


def write(cache: Cache, number: int) -> str:
    cache.write_prompt(address(number), torch.full((1, 2), float(number)), tokens=1)
    return digest_of(address(number))


def manifest_of(numbers: list[int]) -> Manifest:
    keys = {str(number): digest_of(address(number)) for number in numbers}
    return Manifest((), next(iter(keys.values())), {"numbers": numbers}, {}, prompts=keys)


# ------------------------------------------------------------------------------------------- every order of events


STEPS = ("_others", "_manifests", "look", "take_away", "look_again", "bring_back", "delete")


class Stage:
    """A collection of which every step is a moment at which other things can happen."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.moments = 0
        self.settled_at: list[int] = []
        self.events: dict[int, list[Callable[[], object]]] = {}
        for name in STEPS:
            patch.setattr(cache_admin._Collection, name, self._around(getattr(cache_admin._Collection, name)))
        patch.setattr(cache_admin, "os", SimpleNamespace(replace=self._around(os.replace)))
        patch.setattr(
            cache_admin, "time", SimpleNamespace(sleep=self._settle, time=time.time, monotonic=time.monotonic)
        )
        patch.setattr(cache_admin, "PATIENCE_S", 0.0)  # nobody waits for a collection: the worst case

    def reset(self) -> None:
        self.moments, self.settled_at, self.events = 0, [], {}

    def at(self, moment: int, event: Callable[[], object]) -> None:
        self.events.setdefault(moment, []).append(event)

    def tick(self) -> None:
        due = self.events.pop(self.moments, [])
        self.moments += 1
        for event in due:
            event()

    def finish(self) -> None:
        """Let happen what was to happen after the collection."""
        for moment in sorted(self.events):
            for event in self.events[moment]:
                event()

    def _settle(self, seconds: float) -> None:
        self.tick()
        self.settled_at.append(self.moments)
        self.tick()

    def _around(self, step: Callable) -> Callable:
        def stepped(*args: object) -> object:
            self.tick()
            result = step(*args)
            self.tick()
            return result

        return stepped


class Precompute:
    """A job that finds two entries there, which nothing else refers to, and writes a third."""

    unused_days = None

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self.stack = ExitStack()
        self.counted_on: set[str] = set()
        self.manifest = manifest_of([0, 1, 2])

    @staticmethod
    def prepare(cache: Cache) -> None:
        for number in (0, 1, 5):
            write(cache, number)

    def come(self) -> None:
        lease = self.stack.enter_context(
            hold(cache_admin.folder(self.cache.root), {"verb": "train", "phase": "planning"})
        )
        self.job = CacheJob("train", lease)

    def listing(self) -> set[str]:
        return self.cache.keys("prompts")

    def plan(self, there: set[str] | None = None) -> None:
        cache_admin.await_collection(self.cache.root)
        self.counted_on = (self.listing() if there is None else there) & self.manifest.keys("prompts")

    def begin(self) -> None:
        self.job.uses(self.manifest)
        for number in (0, 1, 2):
            if digest_of(address(number)) not in self.counted_on:
                write(self.cache, number)
        self.counted_on = self.manifest.keys("prompts")

    def end(self) -> None:
        self.cache.save_manifest(self.manifest, Path("/"))
        self.stack.close()

    def lost(self) -> set[str]:
        return self.counted_on - self.cache.keys("prompts")


class Training(Precompute):
    """A job that finds a manifest there that nobody has used for long, and trusts it."""

    unused_days = 30.0

    @staticmethod
    def prepare(cache: Cache) -> None:
        for number in (0, 1, 2, 5):
            write(cache, number)
        path = cache.save_manifest(manifest_of([0, 1, 2]), Path("/"))
        os.utime(path, (time.time() - 40 * 86_400,) * 2)

    def plan(self, there: set[str] | None = None) -> None:
        cache_admin.await_collection(self.cache.root)
        paths = self.cache.manifest_paths()
        if paths:
            os.utime(paths[0])
        self.counted_on = self.manifest.keys("prompts") if paths else self.listing() & self.manifest.keys("prompts")

    def end(self) -> None:
        if not self.cache.manifest_paths():  # it was gone already when the job looked for it
            self.cache.save_manifest(self.manifest, Path("/"))
        self.stack.close()


@pytest.fixture
def stage(monkeypatch) -> Stage:
    return Stage(monkeypatch)


def play(stage: Stage, root: Path, kind: type[Precompute], moments: tuple[int, ...]) -> tuple[Precompute, GcReport]:
    """One collection with one job, whose four steps happen at the given moments."""
    stage.reset()
    cache = Cache(root)
    kind.prepare(cache)
    job = kind(cache)
    for moment, event in zip(moments, (job.come, job.plan, job.begin, job.end), strict=True):
        stage.at(moment, event)
    report = cache.gc(delete=True, unused_days=kind.unused_days, grace_s=0.0, settle_s=1.0)
    stage.finish()
    return job, report


def orders(stage: Stage, tmp_path: Path, kind: type[Precompute], stride: int) -> Iterator[tuple[int, ...]]:
    """Every order of a job's four steps among the moments of a collection, or every ``stride``-th."""
    play(stage, tmp_path / "first", kind, (999,) * 4)
    assert stage.moments >= 20
    return itertools.islice(itertools.combinations_with_replacement(range(stage.moments + 1), 4), 0, None, stride)


def losses(stage: Stage, tmp_path: Path, kind: type[Precompute], stride: int) -> tuple[int, int, list[tuple[int, ...]]]:
    """(orders played, in how many something was deleted, the one in which the job lost an entry, if there is one)."""
    played, deleted, lost = 0, 0, []
    for number, moments in enumerate(orders(stage, tmp_path, kind, stride)):
        job, report = play(stage, tmp_path / str(number), kind, moments)
        played += 1
        deleted += report.entries > 0
        if job.lost() or not Cache(tmp_path / str(number)).verify().ok:
            lost.append(moments)
        job.stack.close()
        if lost:
            break
        assert not cache_admin.taken(tmp_path / str(number))
    return played, deleted, lost


@pytest.mark.parametrize("kind", [Precompute, Training])
def test_no_order_of_events_loses_an_entry_that_a_job_counts_on(stage, tmp_path, kind):
    played, deleted, lost = losses(stage, tmp_path, kind, stride=251)
    assert not lost
    assert played >= 100 and 0 < deleted < played


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Precompute, Training])
def test_no_order_at_all_loses_an_entry_that_a_job_counts_on(stage, tmp_path, kind):
    played, deleted, lost = losses(stage, tmp_path, kind, stride=11)
    print(f"{played} orders, something deleted in {deleted}, lost in {len(lost)}")
    assert not lost
    assert played > 3000 and 0 < deleted < played


@pytest.mark.parametrize("kind", [Precompute, Training])
def test_without_the_second_look_a_job_would_lose_entries(stage, tmp_path, monkeypatch, kind):
    """The canary of the two above."""
    monkeypatch.setattr(cache_admin._Collection, "look_again", lambda self, name: (stage.tick(), ([], ""))[1])
    _, _, lost = losses(stage, tmp_path, kind, stride=251)
    assert lost


def test_without_a_lease_a_job_would_lose_entries(stage, tmp_path, monkeypatch):
    monkeypatch.setattr(Precompute, "come", lambda self: setattr(self, "job", CacheJob("train")))
    _, _, lost = losses(stage, tmp_path, Precompute, stride=251)
    assert lost


def stale_loss(stage: Stage, root: Path, listed: int, come: int) -> bool:
    """Whether a job loses an entry that lists the cache from a memory of moment ``listed``, as clients of network
    drives do, and comes at moment ``come``."""
    stage.reset()
    cache, memory = Cache(root), set[str]()
    Precompute.prepare(cache)
    job = Precompute(cache)
    stage.at(listed, lambda: memory.update(job.listing()))
    stage.at(come, job.come)
    stage.at(come, lambda: job.plan(memory))
    stage.at(come, job.begin)
    cache.gc(delete=True, grace_s=0.0, settle_s=1.0)
    stage.finish()
    lost = bool(job.lost())
    job.stack.close()
    return lost


def test_a_listing_from_memory_that_is_no_older_than_the_settling_time_loses_nothing(stage, tmp_path):
    play(stage, tmp_path / "first", Precompute, (999,) * 4)
    (settled,) = stage.settled_at
    pairs = list(itertools.combinations(range(stage.moments), 2))
    old = [pair for pair in pairs if pair[0] < settled <= pair[1]]
    fresh = [pair for pair in pairs if pair not in old][::3]
    assert len(fresh) > 50
    assert [pair for pair in fresh if stale_loss(stage, tmp_path / f"{pair}", *pair)] == []
    assert any(stale_loss(stage, tmp_path / f"{pair}", *pair) for pair in old)  # canary: an older one does


@pytest.mark.parametrize("begins", [3, 9, 14, 20])
def test_two_collections_at_once_and_a_job(tmp_path, stage, begins):
    """The second collection runs from beginning to end in the middle of the first."""
    for moments in ((2, 4, 6, 999), (8, 8, 8, 999), (13, 13, 15, 999), (18, 18, 19, 999)):
        stage.reset()
        cache = Cache(tmp_path / f"{begins}-{moments[0]}")
        Precompute.prepare(cache)
        job = Precompute(cache)
        stage.at(begins, lambda cache=cache: cache.gc(delete=True, grace_s=0.0, settle_s=1.0))
        for moment, event in zip(moments, (job.come, job.plan, job.begin, job.end), strict=True):
            stage.at(moment, event)
        cache.gc(delete=True, grace_s=0.0, settle_s=1.0)
        assert not job.lost()
        job.stack.close()


# ---------------------------------------------------------------------------------------------- manners of a collection


def two_orphans(tmp_path: Path) -> Cache:
    cache = Cache(tmp_path / "cache")
    for number in (0, 1):
        write(cache, number)
    return cache


def test_nothing_is_deleted_while_a_job_is_planning(tmp_path, capsys):
    cache = two_orphans(tmp_path)
    with cache.job("precompute") as job:
        report = cache.gc(delete=True, **AT_ONCE)
        assert report.held_back and not report.deleted and len(cache.keys("prompts")) == 2
        assert "it is not known yet what precompute on " in str(report) and f"process {os.getpid()}" in str(report)
        assert main(["cache", "gc", "--dir", str(cache.root), "--delete", "--alone"]) == PREEMPTED
        assert main(["cache", "gc", "--dir", str(cache.root)]) == OK  # without --delete it only says what it finds
        job.uses(manifest_of([0]))
        assert cache.gc(delete=True, **AT_ONCE).entries == 1
    assert cache.keys("prompts") == {digest_of(address(0))}
    assert cache.gc(delete=True, **AT_ONCE).entries == 1 and not cache.keys("prompts")


def test_a_job_that_cannot_be_understood_counts_as_planning(tmp_path):
    cache = two_orphans(tmp_path)
    cache_admin.folder(cache.root).mkdir()
    (cache_admin.folder(cache.root) / "node7-1-ab.json").write_text("{")
    assert cache.gc(delete=True, **AT_ONCE).held_back and len(cache.keys("prompts")) == 2
    (cache_admin.folder(cache.root) / "node7-1-ab.json").write_text('{"about": {"phase": "running", "manifests": 3}}')
    assert cache.gc(delete=True, **AT_ONCE).held_back and len(cache.keys("prompts")) == 2


def test_the_lease_of_a_dead_job_is_cleared_away_and_holds_nothing_back(tmp_path):
    cache = two_orphans(tmp_path)
    with cache.job("train"):
        (path,) = cache_admin.folder(cache.root).glob("*.json")
        dead = {**json.loads(path.read_text()), "started": "1"}  # another process had this number
    path.write_text(json.dumps(dead))
    assert cache.gc(delete=True, **AT_ONCE).entries == 2
    assert list(cache_admin.folder(cache.root).iterdir()) == []


def test_a_manifest_that_a_running_job_names_is_kept_however_long_unused(tmp_path):
    cache = two_orphans(tmp_path)
    manifest = manifest_of([0])
    path = cache.save_manifest(manifest, tmp_path)
    os.utime(path, (1, 1))
    with cache.job("train") as job:
        job.uses(manifest)
        report = cache.gc(delete=True, unused_days=1, **AT_ONCE)
        assert (report.entries, report.manifests) == (1, 0) and path.exists()
    assert cache.gc(delete=True, unused_days=1, **AT_ONCE).manifests == 1 and not path.exists()


def test_entries_of_a_manifest_that_was_replaced_stay_while_a_training_reads_them(tmp_path):
    """The dataset is edited and precomputed again under the same request, beside a training of its old state."""
    cache = two_orphans(tmp_path)
    old = manifest_of([0, 1])
    cache.save_manifest(old, tmp_path)
    new = replace(old, prompts={"0": digest_of(address(0))}, empty_prompt_key=digest_of(address(0)))
    assert new.name == old.name
    with cache.job("train") as job:
        job.uses(old)
        cache.save_manifest(new, tmp_path)
        assert cache.gc(delete=True, **AT_ONCE).entries == 0
    assert cache.gc(delete=True, **AT_ONCE).entries == 1


def test_a_job_waits_for_a_collection_and_says_so(tmp_path, capsys):
    cache = two_orphans(tmp_path)
    came = threading.Event()

    def job() -> None:
        with cache.job("train"):
            came.set()

    with hold(cache_admin.folder(cache.root), {"verb": "gc", "phase": "running", "manifests": [], "entries": {}}):
        thread = threading.Thread(target=job)
        thread.start()
        assert not came.wait(0.5)
    assert came.wait(5)
    thread.join()
    assert "waiting for gc on" in capsys.readouterr().out


def test_a_job_does_not_wait_for_ever(tmp_path, monkeypatch, capsys):
    cache = two_orphans(tmp_path)
    monkeypatch.setattr(cache_admin, "PATIENCE_S", 0.3)
    with hold(cache_admin.folder(cache.root), {"verb": "gc", "phase": "running", "manifests": [], "entries": {}}):
        with cache.job("train"):
            assert "going on beside it" in capsys.readouterr().out
        report = cache.gc(delete=True, **AT_ONCE)
        assert "is at it already" in report.held_back and len(cache.keys("prompts")) == 2


def test_what_a_killed_collection_had_taken_away_comes_back(tmp_path):
    cache = two_orphans(tmp_path)
    before = cache.keys("prompts")

    def killed(seconds: float) -> None:
        raise SystemExit

    def take() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cache_admin, "time", SimpleNamespace(sleep=killed, time=time.time))
            patch.setattr(cache_admin._Collection, "bring_back", lambda *_: None)  # a dead process tidies nothing up
            with pytest.raises(SystemExit):
                cache.gc(delete=True, grace_s=0, settle_s=1)
        assert not cache.keys("prompts") and len(cache_admin.taken(cache.root)) == 2

    take()
    with cache.job("train"):
        assert cache.keys("prompts") == before
    take()
    assert cache.read_prompt(min(before)).shape == (1, 2)  # also a job that is running already finds it
    assert cache.keys("prompts") == before
    take()
    assert cache.gc(delete=True, **AT_ONCE).entries == 2  # and garbage it stays
    assert not cache.keys("prompts")


def test_a_collection_that_is_interrupted_puts_everything_back(tmp_path, monkeypatch):
    cache = two_orphans(tmp_path)

    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cache_admin, "time", SimpleNamespace(sleep=interrupted, time=time.time))
    with pytest.raises(KeyboardInterrupt):
        cache.gc(delete=True, grace_s=0, settle_s=1)
    assert (
        len(cache.keys("prompts")) == 2
        and not cache_admin.taken(cache.root)
        and not live(cache_admin.folder(cache.root))
    )


def test_a_damaged_manifest_stops_collections_until_it_is_made_anew(tmp_path):
    cache = two_orphans(tmp_path)
    manifest = manifest_of([0])
    path = cache.save_manifest(manifest, tmp_path)
    path.write_bytes(path.read_bytes().replace(b"numbers", b"nombers"))
    with pytest.raises(CacheError, match="damaged"):
        cache.gc(delete=True, **AT_ONCE)
    aside = cache.move_manifest_aside(path)
    with pytest.raises(CacheError, match=r"moved aside[\s\S]*precompute"):
        cache.gc(delete=True, **AT_ONCE)
    assert len(cache.keys("prompts")) == 2
    cache.save_manifest(manifest, tmp_path)
    assert not aside.exists() and cache.gc(delete=True, **AT_ONCE).entries == 1


def test_the_space_that_others_have_yet_to_fill_is_counted(tmp_path):
    cache = two_orphans(tmp_path)

    def there() -> dict:
        return {"latents": set(), "images": set(), "prompts": cache.keys("prompts")}

    assert cache_admin.reserved_bytes(cache.root, there()) == 0
    with cache.job("precompute") as job:
        assert cache_admin.reserved_bytes(cache.root, there()) == 0  # planning: it has not asked for space yet
        job.uses(manifest_of([0, 1, 2, 3]), writes=2, bytes=1000)
        assert cache_admin.reserved_bytes(cache.root, there()) == 1000
        write(cache, 2)
        assert cache_admin.reserved_bytes(cache.root, there()) == 500
        write(cache, 3)
        assert cache_admin.reserved_bytes(cache.root, there()) == 0


# ------------------------------------------------------------------------------------------------------ runs


def test_training_holds_its_lease_until_its_cleanup(tiny_model, tmp_path):
    config = run_config(tiny_model(), tmp_path / "none", tmp_path / "run", cache={"mode": "require"})
    fabricate_cache(config)
    folder = cache_admin.folder(config.cache.dir)
    with ExitStack() as cleanup:
        manifest = ensure_cache(config, read_spec(config.model.pretrained), cleanup=cleanup)
        (one,) = live(folder)
        assert one.about["verb"] == "train" and one.about["phase"] == "running"
        assert one.about["manifests"] == [manifest.name] and len(cache_admin.entries_of(one)) == 5
        (config.cache.dir / "manifests" / f"{manifest.name}.json").unlink()
        assert Cache(config.cache.dir).gc(delete=True, **AT_ONCE).entries == 0
    assert live(folder) == []
    assert Cache(config.cache.dir).gc(delete=True, **AT_ONCE).entries == 5


def test_a_cache_that_is_read_only_can_be_trained_from(tiny_model, tmp_path, monkeypatch, capsys):
    config = run_config(tiny_model(), tmp_path / "none", tmp_path / "run", cache={"mode": "require"})
    fabricate_cache(config)

    def refused(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(locks.Lease, "_write", refused)
    manifest = ensure_cache(config, read_spec(config.model.pretrained))
    assert Cache(config.cache.dir).read(manifest.items[0]).prompt_embeds.ndim == 2
    said = capsys.readouterr().out
    assert "cannot be written to (Read-only file system)" in said and "nothing to encode" in said


# -------------------------------------------------------------------------------------------------- real processes


def _work(root: Path, seed: int, rounds: int) -> None:
    """Rounds of a job that needs some of twelve entries, leaves its manifest, and takes it back."""
    cache, choice = Cache(root), random.Random(seed)
    for _ in range(rounds):
        numbers = sorted(choice.sample(range(12), 5))
        with cache.job("precompute") as job:
            there = cache.keys("prompts")
            manifest = manifest_of(numbers)
            job.uses(manifest)
            for number in numbers:
                if digest_of(address(number)) not in there:
                    write(cache, number)
            path = cache.save_manifest(manifest, root)
            for number in numbers:
                assert float(Cache(root).read_prompt(digest_of(address(number)))[0, 0]) == number
        path.unlink(missing_ok=True)


def _collect(root: Path, done: object) -> None:
    deleted = 0
    while not done.is_set():  # type: ignore[attr-defined]
        deleted += Cache(root).gc(delete=True, **AT_ONCE).entries
        time.sleep(0.02)
    assert deleted > 0


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
    assert Cache(tmp_path).verify().ok


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
    cache, collections = Cache(tmp_path / "cache"), 0
    stranger = 100
    while any(process.poll() is None for process in started.values()):
        write(cache, stranger)  # something to delete
        stranger += 1
        collections += cache.gc(delete=True, unused_days=1e-9, **AT_ONCE).deleted
        time.sleep(0.05)
    said = {name: process.communicate()[0].decode() for name, process in started.items()}
    assert [process.returncode for process in started.values()] == [0, 0, 0], said
    assert collections >= 3 and not cache.has("prompts", digest_of(address(100)))
    print(f"{collections} collections beside three jobs")
    assert cache.verify().ok
