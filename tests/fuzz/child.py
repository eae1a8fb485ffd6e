"""The process that runs cases: ``python -m tests.fuzz.child TARGET SECONDS SEED CURRENT REPORT``, from ``run``."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from .targets import OUTCOMES, TARGETS, Target, remove_folder

_POOL = 2000
"""Cases kept at most; a random one makes room."""
_MOST_CRASHES = 10


def limit_memory(mib: int | None) -> None:
    """Let this process allocate ``mib`` more than it has; None for no limit."""
    if mib is not None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + mib * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def run_cases(name: str, target: Target, seconds: float, seed: int, current: Path) -> dict[str, Any]:
    """Run mutated cases for ``seconds``; each is in the file ``current`` while it runs."""
    source = random.Random(seed)
    begun = time.monotonic()
    pool = target.seeds()
    outcomes: set[str] = set()
    crashes: list[dict[str, str]] = []
    cases, slowest_s = 0, 0.0
    waiting = list(pool)  # the seeds themselves come first
    while time.monotonic() - begun < seconds and len(crashes) < _MOST_CRASHES:
        case = waiting.pop() if waiting else target.mutate(source, pool, target.tokens)
        current.write_bytes(case)
        OUTCOMES.clear()
        started = time.process_time()  # other jobs on the machine are not this case's doing
        try:
            result = target.run(case)
            signature = "; ".join([*map(_words, OUTCOMES), type(result).__name__])
            if signature not in outcomes:
                outcomes.add(signature)
                pool.append(case)
        except Exception as error:  # whatever it is, it is what is looked for
            signature = f"{type(error).__name__} {''.join(traceback.format_tb(error.__traceback__)[-1:])}"
            if signature not in outcomes:
                outcomes.add(signature)
                kept = current.with_name(f"{name}-{type(error).__name__}-{seed}-{cases}")
                kept.write_bytes(case)
                crashes.append({"kind": type(error).__name__, "said": f"{error}"[:500], "file": str(kept)})
        took = time.process_time() - started
        cases, slowest_s = cases + 1, max(slowest_s, took)
        if took > target.seconds:
            kept = current.with_name(f"{name}-slow-{seed}-{cases}")
            kept.write_bytes(case)
            crashes.append({"kind": "slow", "said": f"{took:.1f} s", "file": str(kept)})
        if len(pool) > _POOL:
            pool.pop(source.randrange(len(pool)))
    return {"cases": cases, "slowest_s": round(slowest_s, 3), "outcomes": len(outcomes), "crashes": crashes}


def _words(told: str) -> str:
    """A message without what varies: numbers and quotations."""
    return re.sub(r"'[^']*'|\"[^\"]*\"|[0-9]+|/\S+", "#", told.split("\n")[0])[:60]


def main() -> int:
    """Run one target; the report is written when its time is over."""
    name, seconds, seed, current, report = sys.argv[1:]
    target = TARGETS[name]
    target.run(target.seeds()[0])  # whatever is imported lazily is no part of a case
    limit_memory(target.memory_mib)
    try:
        found = run_cases(name, target, float(seconds), int(seed), Path(current))
    finally:
        remove_folder()
    Path(report).write_text(json.dumps(found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # a library's own threads must not keep a finished process
