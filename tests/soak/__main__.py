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
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "soak.json"
LIBRARIES = (
    "torch",
    "diffusers",
    "transformers",
    "peft",
    "accelerate",
    "safetensors",
    "bitsandbytes",
    "pydantic",
    "av",
)


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
    subprocess.run([sys.executable, str(ROOT / "scripts" / "make_reliability.py")], check=True)
    print(f"{figures['seconds']} s; figures in {RESULTS.relative_to(ROOT)} and docs/reliability.md")
    for name in failed:
        print(f"FAILED: {name}", file=sys.stderr)
    return 1 if failed else 0


def read_report(path: Path) -> dict[str, dict[str, Any]]:
    """Outcome, seconds and recorded properties of every test in a JUnit file, by test id."""
    if not path.exists():
        return {}
    tests = {}
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        outcome = next((word for tag, word in _OUTCOMES.items() if case.find(tag) is not None), "passed")
        properties = {one.attrib["name"]: _value(one.attrib["value"]) for one in case.iter("property")}
        name = f"{case.attrib.get('file', '')}::{case.attrib['name']}"
        tests[name] = {"outcome": outcome, "seconds": round(float(case.attrib["time"]), 1), **properties}
    return dict(sorted(tests.items()))


_OUTCOMES = {"failure": "failed", "error": "failed", "skipped": "skipped"}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


if __name__ == "__main__":
    sys.exit(main())
