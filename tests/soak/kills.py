"""Kill one process after another until it was often enough; every round has to end like an undisturbed run.

``python -m soak.kills --scenario train-lora --kills 100 --seed 1 --out train.json`` draws the moments from a seed;
``--clips FOLDER`` kills a training on real clips at the ten moments of ``MOMENTS``. Exit code 0 if all came out.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from soak import processes
from soak.jobs import APPEARING, CommandJob, Failed, ForkedJob, Job, JobSpec, Killed
from soak.probe import CALLS, Plan, Profile, replace_everywhere
from soak.world import SCENARIOS, Scenario, Snapshot, World, differences, real_clips_scenario

KILLS_PER_ROUND = 12

MOMENTS: dict[str, Plan] = {
    "when the dataset has been planned": Plan("planning", side="after"),
    "when the VAE has been loaded": Plan("loading an encoder", side="after"),
    "while the second clip is decoded": Plan("decoding", 2, side="before"),
    "when the second clip has been encoded": Plan("encoding", 2, side="after"),
    "in the middle of an entry's bytes": Plan("write", 2, side="during", within="writing an entry"),
    "when the model has been loaded": Plan("loading the model", side="after"),
    "after a backward pass": Plan("backward", 2, side="after"),
    "between clipping and the update": Plan("updating weights", 2, side="before"),
    "in the middle of a checkpoint's bytes": Plan("write", 2, side="during", within="writing a checkpoint"),
    "while an old checkpoint is removed": Plan("unlink", 2, side="before", within="pruning"),
}
"""In the order in which a run that is killed at each of them comes by."""


@dataclass
class Tally:
    """What was done so far."""

    rounds: int = 0
    leftovers: int = 0
    killed: list[Killed] = field(default_factory=list)
    log: list[dict[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def add(self, scenario: Scenario, spec: JobSpec, killed: Killed) -> None:
        """Count one kill."""
        plan = spec.plan
        call = f"{plan.side} {plan.at}" if plan is not None and plan.side else ""
        rank = {"rank": spec.rank} if scenario.processes > 1 else {}
        self.killed.append(killed)
        self.log.append(
            {
                "scenario": scenario.name,
                **rank,
                "plan": str(plan),
                "call": call,
                "phase": killed.phase,
                "at": killed.note,
            }
        )

    def figures(self) -> dict[str, Any]:
        """As JSON."""
        others_s = sorted(one.others_s for one in self.killed if one.others_s is not None)
        by_call = Counter(one["call"] for one in self.log if one["call"])
        return {
            "kills": len(self.log),
            "rounds": self.rounds,
            "by_phase": dict(Counter(one["phase"] for one in self.log).most_common()),
            "by_call": dict(by_call.most_common()),
            "by_scenario": dict(sorted(Counter(one["scenario"] for one in self.log).items())),
            "orphans": sum(one.orphans for one in self.killed),
            "orphans_s": round(max((one.orphans_s for one in self.killed), default=0.0), 2),
            **({"others_s": {"median": others_s[len(others_s) // 2], "most": others_s[-1]}} if others_s else {}),
            "leftovers_collected": self.leftovers,
            "failures": self.failures,
            "log": self.log,
        }


@dataclass
class Reference:
    """What a run that nobody disturbed did, by rank, and what it left."""

    files: Snapshot
    profiles: list[Profile]
    seconds: float


class Rounds:
    """Rounds of one scenario.

    Args:
        world: built for the scenario's variant.
        scenario: what runs.
        tally: where results go.
        broken: a name of ``BREAKAGES`` to install in every process; None for none.
    """

    def __init__(self, world: World, scenario: Scenario, tally: Tally, broken: str | None = None) -> None:
        self._world, self._scenario, self._tally, self._broken = world, scenario, tally, broken
        self._prepare()
        begun = time.perf_counter()
        profiles = self._start(self._spec()).finish()
        took_s = time.perf_counter() - begun
        self._collect_garbage()
        self._reference = Reference(world.snapshot(), profiles, took_s)

    def _spec(self, plan: Plan | None = None, rank: int = 0) -> JobSpec:
        one = self._scenario
        return JobSpec(self._words(one.verb), self._world.work, one.processes, one.env, plan, rank)

    def _words(self, verb: str) -> list[str]:
        return [verb, "--config", str(self._world.work / "run.yaml")]

    def _start(self, spec: JobSpec) -> Job:
        if self._scenario.real:
            return CommandJob(spec)
        return ForkedJob(spec, BREAKAGES[self._broken] if self._broken else None)

    def _prepare(self) -> None:
        self._world.configure(self._scenario)
        if self._scenario.verb != "train" or self._scenario.cold:
            return
        warm, cache = self._world.folder / "warm" / self._scenario.name, self._world.work / "cache"
        if warm.exists():
            shutil.copytree(warm, cache)
        else:
            ForkedJob(JobSpec(self._words("precompute"), self._world.work)).finish()
            shutil.copytree(cache, warm)

    def _collect_garbage(self) -> None:
        """What users do about what killed writers left in a cache."""
        work = self._world.work
        self._tally.leftovers += self._world.age_leftovers()
        ForkedJob(JobSpec(["cache", "gc", "--delete", "--dir", str(work / "cache")], work)).finish()

    def drawn(self, rng: random.Random, limit: int) -> None:
        """Begin anew, kill at most ``limit`` times, let the last start end, compare.

        Raises:
            Failed: if any of that is not as it must be.
        """
        self._prepare()
        for _ in range(limit):
            rank = rng.randrange(self._scenario.processes)
            if not self._kill(self._draw(rng, rank), rank):
                break
        else:
            self._start(self._spec()).finish()
        self._compare()

    def planned(self, plans: Sequence[Plan]) -> None:
        """A round with given plans, in this order; each must come to pass. Raises as ``drawn``."""
        self._prepare()
        for plan in plans:
            if not self._kill(plan, 0):
                raise Failed(f"it ended before it could be killed {plan}")
        self._start(self._spec()).finish()
        self._compare()

    def _kill(self, plan: Plan, rank: int) -> bool:
        """Start and kill; False if it ended first, and so is complete."""
        step, entries = self._world.newest_step(), self._world.entries()
        spec = self._spec(plan, rank)
        killed = self._start(spec).kill(self._lacking)
        if killed is None:
            return False
        self._tally.add(self._scenario, spec, killed)
        if (lost := entries - self._world.entries()) or self._world.newest_step() < step:
            raise Failed(
                f"it lost what stood before: entries {sorted(lost)}, step {step} -> {self._world.newest_step()}"
            )
        return True

    def _compare(self) -> None:
        self._collect_garbage()
        if faults := differences(self._reference.files, self._world.snapshot()):
            raise Failed("the end differs from an undisturbed run's:\n  " + "\n  ".join(faults[:8]))
        self._tally.rounds += 1

    def _lacking(self) -> list[str]:
        """What is not as an undisturbed run leaves it; one that is killed afterwards has nothing to lose.

        What the report shows of clips is written by one process when the others are through, and again by the next
        start.
        """
        found = differences(self._reference.files, self._world.snapshot())
        return [line for line in found if not line.startswith("run/report/")]

    def _draw(self, rng: random.Random, rank: int) -> Plan:
        profile = self._reference.profiles[rank]
        targets = [*sorted(profile.entered), *sorted(profile.calls)]
        if self._scenario.real:
            targets = ["time", *APPEARING[self._scenario.verb]]
        elif self._scenario.processes == 1:
            # Of several, one that is killed before they have met leaves the others to their launcher.
            targets.append("time")
        target = rng.choice(targets)
        if target == "time":
            return Plan("time", seconds=rng.random() * self._reference.seconds)
        if self._scenario.real:
            return Plan(target, seconds=rng.random() * 0.02)
        often = profile.entered[target] + profile.calls[target]
        # Small numbers more often than large ones: a restarted run has less left to do.
        nth = 1 + int(often * rng.random() ** 2)
        if target in CALLS:
            sides = ("before", "during", "after") if target == "write" else ("before", "after")
            return Plan(target, nth, side=rng.choice(sides))
        return Plan(target, nth, seconds=rng.random() * profile.seconds[target] / often)


# ------------------------------------------------ ways to break what survives a kill, which the soak then has to notice


def _plain_writes() -> None:
    """Files are written under their final names."""

    def instead(_: Callable[..., Any]) -> Callable[..., Any]:
        def write(path: Path, parts: Iterable[memoryview]) -> str:
            from finetune.core.checksums import checksum_bytes

            path.parent.mkdir(parents=True, exist_ok=True)
            content = b"".join(parts)
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            os.write(descriptor, content)
            os.fsync(descriptor)
            os.close(descriptor)
            return checksum_bytes(content)

        return write

    replace_everywhere("finetune.core.files:atomic_write", instead)


def _old_one_first() -> None:
    """Old checkpoints are removed before the new one is written."""

    def instead(save: Callable[..., Any]) -> Callable[..., Any]:
        def saving(run_dir: Path, *args: Any, **kwargs: Any) -> Any:
            shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)
            return save(run_dir, *args, **kwargs)

        return saving

    replace_everywhere("finetune.checkpoint.save:save_checkpoint", instead)


def _immortal_workers() -> None:
    """Decode workers outlive the process that started them."""
    real = subprocess.Popen

    def popen(command: Any, *args: Any, **kwargs: Any) -> Any:
        if "worker.serve(decode_pool.handle)" in str(command):
            real(["sleep", "15"])
        return real(command, *args, **kwargs)

    subprocess.Popen = popen  # type: ignore[misc, assignment]


def _endless_patience() -> None:
    """A process that loses another waits instead of ending."""
    from finetune.cli import main as cli

    main = cli.main

    def waiting(*args: Any, **kwargs: Any) -> int:
        code = main(*args, **kwargs)
        if code:
            time.sleep(300)
        return code

    cli.main = waiting


def _nothing(*_: Any, **__: Any) -> None:
    """In place of a function."""


BREAKAGES: dict[str, Callable[[], None]] = {
    "plain-writes": _plain_writes,
    # A resumed run begins with an empty optimizer.
    "forgotten-optimizer": functools.partial(
        replace_everywhere, "finetune.optim.state:load_optimizer_state", lambda _: _nothing
    ),
    "old-one-first": _old_one_first,
    "immortal-workers": _immortal_workers,
    "endless-patience": _endless_patience,
}


# ----------------------------------------------------------------------------------------------------------- the module


def run(names: Sequence[str], kills: int, seed: int, *, seconds: float, broken: str | None, per_round: int) -> Tally:
    """Kill the named scenarios in turn, ``kills`` times in all or for ``seconds``. It ends with the first failure."""
    begun, tally, number = time.monotonic(), Tally(), 0
    rounds: dict[str, Rounds] = {}
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        world = World(Path(folder).resolve())
        world.prepare({SCENARIOS[name].variant for name in names})
        while len(tally.log) < kills and time.monotonic() - begun < seconds and not tally.failures:
            name = names[number % len(names)]
            try:
                if name not in rounds:
                    rounds[name] = Rounds(world, SCENARIOS[name], tally, broken)
                rng = random.Random(f"{seed} {name} {number}")
                rounds[name].drawn(rng, min(per_round, kills - len(tally.log)))
            except Failed as failure:
                last = "; ".join(f"{one['plan']} in {one['phase']} {one['at']}" for one in tally.log[-3:])
                tally.failures.append(f"{name}, seed {seed}, round {number}: {failure}\nlast kills: {last}")
            number += 1
    if len(tally.log) < kills and not tally.failures:
        tally.failures.append(f"only {len(tally.log)} of {kills} kills in {seconds:g} s")
    return tally


def run_moments(clips: Path) -> Tally:
    """Kill a training on real clips at every moment of ``MOMENTS`` in turn."""
    tally = Tally()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        world = World(Path(folder).resolve())
        world.prepare({"5b"})
        try:
            Rounds(world, real_clips_scenario(clips), tally).planned(list(MOMENTS.values()))
        except Failed as error:
            tally.failures.append(str(error))
    for (name, plan), one in zip(MOMENTS.items(), tally.log, strict=False):
        one["moment"] = name
        if one["phase"] != (plan.within or plan.at):
            tally.failures.append(f"{name}: killed in {one['phase']}")
    return tally


def main(words: Sequence[str] | None = None) -> int:
    """Write the figures to ``--out``, print all but the log; ``words`` are those of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenario", choices=sorted(SCENARIOS), nargs="+", default=[])
    parser.add_argument("--clips", type=Path)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--per-round", type=int, default=KILLS_PER_ROUND)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=900.0)
    parser.add_argument("--broken", choices=sorted(BREAKAGES))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(words)
    processes.preload()
    begun = time.monotonic()
    if args.clips:
        tally = run_moments(args.clips)
    else:
        options = {"seconds": args.seconds, "broken": args.broken, "per_round": args.per_round}
        tally = run(args.scenario, args.kills, args.seed, **options)
    figures = {"seed": args.seed, "seconds": round(time.monotonic() - begun, 1), **tally.figures()}
    args.out.write_text(json.dumps(figures, indent=1))
    print(json.dumps({key: value for key, value in figures.items() if key != "log"}, indent=1))
    return 1 if tally.failures else 0


if __name__ == "__main__":
    sys.exit(main())
