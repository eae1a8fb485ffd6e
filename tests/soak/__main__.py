"""``make soak``: every slow test and the fuzzer side by side, then the figures into ``benchmarks/results/soak.json``.

Shorter runs: ``SOAK_KILLS`` (100), ``SOAK_FUZZ_SECONDS`` (600), ``SOAK_WORKERS`` (2), ``SOAK_SEED`` (1). A part that
fails makes the whole fail, after all have run; what failed is kept in ``build/soak``.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "soak.json"
PAGE = ROOT / "docs" / "reliability.md"
LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "bitsandbytes", "av")


def main() -> int:
    """Run everything, write the figures, and say what failed."""
    folder = ROOT / "build" / "soak"
    folder.mkdir(parents=True, exist_ok=True)
    fuzz_s, workers = os.environ.get("SOAK_FUZZ_SECONDS", "600"), os.environ.get("SOAK_WORKERS", "2")
    report, fuzzed = folder / "slow.xml", folder / "fuzz.json"
    for stale in (report, fuzzed):
        stale.unlink(missing_ok=True)
    parts = {
        "fuzz": ["tests.fuzz.run", "--seconds", fuzz_s, "--output", str(fuzzed), "--crashes", str(folder / "crashes")],
        "slow tests": [
            *("pytest", "-p", "soak.cases", "-m", "slow", "-n", workers, "--dist", "load", "--maxschedchunk", "1"),
            *(f"--junitxml={report}", "-o", "junit_family=xunit1", "-rs", *sys.argv[1:]),
        ],
    }
    begun = time.monotonic()
    env = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))}
    running = {
        name: subprocess.Popen([sys.executable, "-m", *words], cwd=ROOT, env=env) for name, words in parts.items()
    }
    failed = [name for name, process in running.items() if process.wait()]
    tests = read_report(report)
    failed += [name for name, one in tests.items() if one["outcome"] == "failed"]
    if not any(one["outcome"] == "passed" for one in tests.values()):
        failed.append("no slow test ran")
    figures = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} CPU cores, {platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
        "seconds": round(time.monotonic() - begun),
        "failed": failed,
        "fuzz": json.loads(fuzzed.read_text(encoding="utf-8")) if fuzzed.exists() else [],
        "tests": tests,
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(with_figures(PAGE.read_text(encoding="utf-8"), figures), encoding="utf-8")
    print(f"{figures['seconds']} s; figures in {RESULTS.relative_to(ROOT)} and {PAGE.relative_to(ROOT)}")
    for name in failed:
        print(f"FAILED: {name}", file=sys.stderr)
    return 1 if failed else 0


def read_report(path: Path) -> dict[str, dict[str, Any]]:
    """Outcome, seconds and recorded properties of every test in a JUnit file, by test id."""
    if not path.exists():
        return {}
    outcomes = {"failure": "failed", "error": "failed", "skipped": "skipped"}
    tests = {}
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        outcome = next((word for tag, word in outcomes.items() if case.find(tag) is not None), "passed")
        properties = {one.attrib["name"]: json.loads(one.attrib["value"]) for one in case.iter("property")}
        name = f"{case.attrib.get('file', '')}::{case.attrib['name']}"
        tests[name] = {"outcome": outcome, "seconds": round(float(case.attrib["time"]), 1), **properties}
    return dict(sorted(tests.items()))


def with_figures(page: str, figures: Mapping[str, Any]) -> str:
    """``docs/reliability.md`` with another run's figures between its two markers.

    Raises:
        ValueError: if the markers are missing.
    """
    parts = re.split(r"(<!-- figures: .*? -->|<!-- end of figures -->)", page)
    if len(parts) != 5:
        raise ValueError("docs/reliability.md needs its two markers, once")
    tests, versions = figures["tests"], ", ".join(f"{name} {number}" for name, number in figures["versions"].items())
    kills = {name.split("::")[1]: one["kills"] for name, one in tests.items() if "kills" in one}
    moments: Counter[str] = Counter()
    for one in kills.values():
        moments.update(one["by_phase"])
        moments.update(one["by_call"])
    summary = {
        "kills survived": sum(one["kills"] for one in kills.values()),
        "longest wait for the other process of a launch": f"{max(map(_others_s, kills.values()), default=0):.2f} s",
        "damaged files that were all detected and repaired": sum(
            one.get("cases", 0) for name, one in tests.items() if "_integrity.py" in name
        ),
        "fuzz cases": sum(one["cases"] for one in figures["fuzz"]),
        "crashes and hangs found by fuzzing": sum(len(one["crashes"]) for one in figures["fuzz"]),
        "slow tests passed": sum(one["outcome"] == "passed" for one in tests.values()),
    }
    rows = [
        (f"`{name}`", one["kills"], one["rounds"], f"{_others_s(one):.2f} s", one["orphans"], round(one["seconds"]))
        for name, one in kills.items()
    ]
    parts[2] = "\n".join(
        [
            "",
            "",
            f"From a run of {figures['seconds'] / 60:.0f} minutes on {figures['date']}: {figures['machine']}, Python"
            f" {figures['python']}, {versions}. "
            + (f"**Failed: {', '.join(figures['failed'])}.**" if figures["failed"] else "Nothing failed."),
            "",
            *_table(("what", "figure"), summary.items()),
            "",
            "Kills, by test; after each round every byte was compared with an undisturbed run's:",
            "",
            *_table(("test", "kills", "rounds", "other rank ended within", "decode workers left", "s"), rows),
            "",
            "Where the processes were when the signal came, and at which call that changes the disk:",
            "",
            *_table(("phase or call", "kills"), moments.most_common()),
            "",
            "",
        ]
    )
    return "".join(parts)


def _others_s(kills: Mapping[str, Any]) -> float:
    return float(kills.get("others_s", {}).get("most", 0.0))


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    return [f"| {' | '.join(map(str, row))} |" for row in (head, ("---",) * len(head), *rows)]


if __name__ == "__main__":
    sys.exit(main())
