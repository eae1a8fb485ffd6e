"""Kill one process after another until it was often enough; every round has to end like an undisturbed run.

``python -m soak.campaign --scenario train-lora --kills 100 --seed 1 --out train.json``: exit code 0 if every one did.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from soak import nursery
from soak.job import Failed, Job, Killed
from soak.probe import CALLS, Plan, Profile
from soak.sabotage import SABOTAGE
from soak.shell import SIGHTS, Command
from soak.world import SCENARIOS, Scenario, Snapshot, World, differences

KILLS_PER_ROUND = 12


@dataclass
class Tally:
    """What a campaign has done so far."""

    rounds: int = 0
    phases: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)
    scenarios: Counter[str] = field(default_factory=Counter)
    orphans: int = 0
    orphans_s: float = 0.0
    others_s: list[float] = field(default_factory=list)
    leftovers: int = 0
    kills: list[dict[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def add(self, scenario: Scenario, plan: Plan, victim: int, killed: Killed) -> None:
        """Count one kill."""
        self.phases[killed.phase] += 1
        if plan.side:
            self.calls[f"{plan.side} {plan.at}"] += 1
        self.scenarios[scenario.name] += 1
        self.orphans += killed.orphans
        self.orphans_s = max(self.orphans_s, killed.orphans_s)
        if killed.others_s is not None:
            self.others_s.append(killed.others_s)
        rank = {"rank": victim} if scenario.processes > 1 else {}
        self.kills.append(
            {"scenario": scenario.name, **rank, "plan": str(plan), "phase": killed.phase, "at": killed.note}
        )


@dataclass
class Reference:
    """What a run that nobody disturbed did, by rank, and what it left."""

    files: Snapshot
    profiles: list[Profile]
    seconds: float


class Campaign:
    """Rounds of one scenario.

    Args:
        world: built for the scenario's variant.
        scenario: what runs.
        tally: where results go.
        sabotage: a name of ``SABOTAGE`` to install in every process; None for none.
    """

    def __init__(self, world: World, scenario: Scenario, tally: Tally, sabotage: str | None = None) -> None:
        self._world, self._scenario, self._tally, self._sabotage = world, scenario, tally, sabotage
        self._prepare()
        begun = time.perf_counter()
        profiles = self._start().finish()
        took_s = time.perf_counter() - begun
        self._collect_garbage()
        self._reference = Reference(world.snapshot(), profiles, took_s)

    def _start(self, plan: Plan | None = None, victim: int = 0) -> Job | Command:
        one = self._scenario
        command, work = self._command(one.verb), self._world.work
        if one.real:
            return Command(command, work, processes=one.processes, env=one.env, plan=plan, victim=victim)
        return Job(
            command,
            work,
            processes=one.processes,
            env=one.env,
            sabotage=self._sabotage,
            plan=plan,
            victim=victim,
        )

    def _command(self, verb: str) -> list[str]:
        return [verb, "--config", str(self._world.work / "run.yaml")]

    def _prepare(self) -> None:
        self._world.configure(self._scenario)
        if self._scenario.verb != "train" or self._scenario.cold:
            return
        warm = self._world.folder / "warm" / self._scenario.name
        if warm.exists():
            shutil.copytree(warm, self._world.work / "cache")
        else:
            Job(self._command("precompute"), self._world.work).finish()
            shutil.copytree(self._world.work / "cache", warm)

    def _collect_garbage(self) -> None:
        """What users do about what killed writers left in a cache."""
        self._tally.leftovers += self._world.age_leftovers()
        Job(["cache", "gc", "--delete", "--dir", str(self._world.work / "cache")], self._world.work).finish()

    def round(self, rng: random.Random, limit: int) -> None:
        """Begin anew, kill at most ``limit`` times, let the last start end, compare.

        Raises:
            Failed: if any of that is not as it must be.
        """
        self._prepare()
        for _ in range(limit):
            victim = rng.randrange(self._scenario.processes)
            if not self._kill(self._choose(rng, victim), victim):
                break
        else:
            self._start().finish()
        self._compare()

    def deliberate(self, plans: Sequence[Plan]) -> None:
        """A round with given plans, in this order; each must come to pass. Raises as ``round``."""
        self._prepare()
        for plan in plans:
            if not self._kill(plan, 0):
                raise Failed(f"it ended before it could be killed {plan}")
        self._start().finish()
        self._compare()

    def _kill(self, plan: Plan, victim: int) -> bool:
        """Start and kill; False if it ended first, and so is complete."""
        before = self._world.newest_step(), self._world.entries()
        killed = self._start(plan, victim).kill(complete=self._complete)
        if killed is None:
            return False
        self._tally.add(self._scenario, plan, victim, killed)
        step, lost = self._world.newest_step(), before[1] - self._world.entries()
        if lost or step < before[0]:
            raise Failed(f"it lost what stood before: entries {sorted(lost)}, step {before[0]} -> {step}")
        return True

    def _compare(self) -> None:
        self._collect_garbage()
        if found := differences(self._reference.files, self._world.snapshot()):
            raise Failed("the end differs from an undisturbed run's:\n  " + "\n  ".join(found[:8]))
        self._tally.rounds += 1

    def _complete(self) -> bool:
        """Whether everything is there that an undisturbed run leaves; one killed afterwards has nothing to lose."""
        return not differences(self._reference.files, self._world.snapshot())

    def _choose(self, rng: random.Random, victim: int) -> Plan:
        if self._scenario.real:
            target = rng.choice(["time", *SIGHTS[self._scenario.verb]])
            if target == "time":
                return Plan("time", seconds=rng.random() * self._reference.seconds)
            return Plan(target, seconds=rng.random() * 0.02)
        profile = self._reference.profiles[victim]
        targets = [*sorted(profile.entered), *sorted(profile.calls)]
        if self._scenario.processes == 1:
            # Of several, one that is killed before they have met leaves the others to their launcher.
            targets.append("time")
        target = rng.choice(targets)
        if target == "time":
            return Plan("time", seconds=rng.random() * self._reference.seconds)
        often = profile.entered[target] + profile.calls[target]
        # Small numbers more often than large ones: a restarted run has less left to do.
        nth = 1 + int(often * rng.random() ** 2)
        if target in CALLS:
            sides = ("before", "during", "after") if target == "write" else ("before", "after")
            return Plan(target, nth, side=rng.choice(sides))
        return Plan(target, nth, seconds=rng.random() * profile.seconds[target] / often)


def run(
    names: Sequence[str],
    kills: int,
    seed: int,
    *,
    seconds: float,
    sabotage: str | None = None,
    per_round: int = KILLS_PER_ROUND,
) -> dict[str, Any]:
    """Kill the named scenarios in turn, ``kills`` times in all or for ``seconds``; what happened, as JSON.

    It ends with the first failure.
    """
    nursery.preload()
    begun = time.monotonic()
    tally = Tally()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        world = World(Path(folder).resolve())
        world.prepare({SCENARIOS[name].variant for name in names})
        campaigns: dict[str, Campaign] = {}
        number = 0
        while len(tally.kills) < kills and time.monotonic() - begun < seconds and not tally.failures:
            name = names[number % len(names)]
            try:
                if name not in campaigns:
                    campaigns[name] = Campaign(world, SCENARIOS[name], tally, sabotage)
                campaigns[name].round(
                    random.Random(f"{seed} {name} {number}"), min(per_round, kills - len(tally.kills))
                )
            except Failed as failure:
                last = "; ".join(f"{one['plan']} in {one['phase']} {one['at']}" for one in tally.kills[-3:])
                tally.failures.append(f"{name}, seed {seed}, round {number}: {failure}\nlast kills: {last}")
            number += 1
    if len(tally.kills) < kills and not tally.failures:
        tally.failures.append(f"only {len(tally.kills)} of {kills} kills in {seconds:g} s")
    others_s = sorted(tally.others_s)
    return {
        "seed": seed,
        "kills": len(tally.kills),
        "rounds": tally.rounds,
        "by_phase": dict(tally.phases.most_common()),
        "by_call": dict(tally.calls.most_common()),
        "by_scenario": dict(sorted(tally.scenarios.items())),
        "orphans": tally.orphans,
        "orphans_s": round(tally.orphans_s, 2),
        **({"others_s": {"median": others_s[len(others_s) // 2], "most": others_s[-1]}} if others_s else {}),
        "leftovers_collected": tally.leftovers,
        "seconds": round(time.monotonic() - begun, 1),
        "failures": tally.failures,
        "log": tally.kills,
    }


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--scenario", choices=sorted(SCENARIOS), nargs="+", required=True)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--per-round", type=int, default=KILLS_PER_ROUND)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=900.0)
    parser.add_argument("--sabotage", choices=sorted(SABOTAGE))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    result = run(
        args.scenario, args.kills, args.seed, seconds=args.seconds, sabotage=args.sabotage, per_round=args.per_round
    )
    if args.out:
        args.out.write_text(json.dumps(result, indent=1))
    print(json.dumps({key: value for key, value in result.items() if key != "log"}, indent=1))
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
