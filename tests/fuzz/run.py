"""Fuzz for a stated time and report: ``python -m tests.fuzz.run --seconds 600 --output fuzz.json``.

Each target runs in a process of its own, with a limit on memory, watched from outside: a case that crashes the
interpreter or hangs in C code is that case's fault and is kept in a file. Exit code 1 if anything was found. There is
no coverage feedback; an input that is refused in new words, or accepted for the first time, joins the pool instead.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .targets import TARGETS, Target

_MOST_CRASHES = 10
"""Of one target, then it is given up."""
_HANG = 10
"""Times the limit on a case: by the clock, on a machine that does other things too."""
_STARTING_S = 300.0
"""Patience with a process that has not begun its first case."""


def main(argv: Sequence[str] | None = None) -> int:
    """Fuzz every target for an equal share of the time, print and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    seconds = float(os.environ.get("FINETUNE_FUZZ_SECONDS", "60"))
    parser.add_argument("--seconds", type=float, default=seconds, help="in all; FINETUNE_FUZZ_SECONDS, or 60")
    parser.add_argument("--targets", nargs="+", choices=sorted(TARGETS), default=list(TARGETS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="write the report, JSON, here")
    parser.add_argument("--crashes", type=Path, default=Path("fuzz-crashes"), help="folder for cases that fail")
    args = parser.parse_args(argv)
    share = args.seconds / len(args.targets)
    reports = [fuzz(name, share, args.seed, args.crashes) for name in args.targets]
    for report in reports:
        told = {key: value for key, value in report.items() if key != "crashes"}
        print(
            json.dumps(told), *(f"  {crash['kind']}: {crash['said']} ({crash['file']})" for crash in report["crashes"])
        )
    if args.output:
        args.output.write_text(json.dumps(reports, indent=2) + "\n", encoding="utf-8")
    return int(any(report["crashes"] for report in reports))


def fuzz(name: str, seconds: float, seed: int, crashes: Path, target: Target | None = None) -> dict[str, Any]:
    """Fuzz one target in processes of its own; returns its part of the report."""
    target = target or TARGETS[name]
    crashes.mkdir(parents=True, exist_ok=True)
    current, partial = crashes / f"{name}.current", crashes / f"{name}.json"
    total: dict[str, Any] = {"target": name, "cases": 0, "seconds": 0.0, "slowest_s": 0.0, "outcomes": 0, "crashes": []}
    begun = time.monotonic()
    for attempt in range(_MOST_CRASHES):
        left = seconds - (time.monotonic() - begun)
        if left <= 0 or len(total["crashes"]) >= _MOST_CRASHES:
            break
        for path in (current, partial):
            path.unlink(missing_ok=True)
        died = _watched(name, left, seed + attempt, current, partial, target.seconds)
        found = json.loads(partial.read_text(encoding="utf-8")) if partial.exists() else {}
        total["cases"] += found.get("cases", 0)
        total["slowest_s"] = max(total["slowest_s"], found.get("slowest_s", 0.0))
        total["outcomes"] = max(total["outcomes"], found.get("outcomes", 0))
        total["crashes"] += found.get("crashes", [])
        if died is None:
            break
        kept = crashes / f"{name}-{died.split()[0]}-{seed + attempt}"
        kept.write_bytes(current.read_bytes() if current.exists() else b"")
        total["crashes"].append({"kind": died, "said": "the process ended in this case", "file": str(kept)})
    for path in (current, partial):
        path.unlink(missing_ok=True)
    total["seconds"] = round(time.monotonic() - begun, 1)
    return total


def _watched(name: str, seconds: float, seed: int, current: Path, partial: Path, limit_s: float) -> str | None:
    """Run one child until its time is over; what killed it, or None."""
    words = [sys.executable, "-m", "tests.fuzz.child", name, str(seconds), str(seed), str(current), str(partial)]
    child = subprocess.Popen(words, cwd=Path(__file__).parents[2])
    began = time.monotonic()
    seen, since = -1, began
    while child.poll() is None:
        time.sleep(0.2)
        now = time.monotonic()
        stamp = current.stat().st_mtime_ns if current.exists() else -1
        if stamp != seen:
            seen, since = stamp, now
        if now - since > (_HANG * limit_s if seen != -1 else _STARTING_S):
            child.kill()
            child.wait()
            return f"hang of more than {_HANG * limit_s:g} s" if seen != -1 else f"start of more than {_STARTING_S:g} s"
    return None if child.returncode == 0 else f"exit {child.returncode}"


if __name__ == "__main__":
    sys.exit(main())
