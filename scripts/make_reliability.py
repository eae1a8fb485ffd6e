#!/usr/bin/env python3
"""Write the figures in ``docs/reliability.md`` from ``benchmarks/results/soak.json``; ``--check`` only compares."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from finetune.core.files import atomic_write_text

BEGIN = "<!-- figures: written by scripts/make_reliability.py from benchmarks/results/soak.json; do not edit -->"
END = "<!-- end of figures -->"
CORRUPTION = ("tests/test_cache_integrity.py", "tests/test_checkpoint_integrity.py")
"""Whose generated cases are damaged files."""

Tests = Mapping[str, Mapping[str, Any]]


def figures(soak: Mapping[str, Any]) -> str:
    """The part between the markers."""
    tests: Tests = soak["tests"]
    versions = ", ".join(f"{name} {version}" for name, version in soak["versions"].items())
    lines = [
        BEGIN,
        "",
        f"From a run of {soak['seconds'] / 60:.0f} minutes on {soak['date']}: {soak['machine']}, Python"
        f" {soak['python']}, {versions}. "
        + (f"**Failed: {', '.join(soak['failed'])}.**" if soak["failed"] else "Nothing failed."),
        "",
        *_table(("what", "figure"), _summary(soak, tests)),
        "",
        "Kills, by test; after each round every byte was compared with an undisturbed run's:",
        "",
        *_table(
            (
                "test",
                "kills",
                "rounds",
                "other rank ended after (median, most)",
                "decode workers left",
                "gone within",
                "s",
            ),
            _kills(tests),
        ),
        "",
        "Where the processes were when the signal came:",
        "",
        *_table(("phase", "kills"), _sum(tests, "by_phase")),
        "",
        "Of these, planned for a call to the operating system that changes the disk:",
        "",
        *_table(("moment", "kills"), _sum(tests, "by_call")),
        "",
        *_table(
            ("fuzz target", "cases", "kinds of answer", "slowest case", "crashes or hangs"),
            (
                (one["target"], one["cases"], one["outcomes"], f"{one['slowest_s']:.2f} s", len(one["crashes"]))
                for one in soak["fuzz"]
            ),
        ),
        "",
        *_table(("slow tests in", "passed", "skipped", "generated cases", "s"), _files(tests)),
        "",
        END,
    ]
    return "\n".join(lines)


def _summary(soak: Mapping[str, Any], tests: Tests) -> Iterator[tuple[object, ...]]:
    kills = [one["kills"] for one in tests.values() if "kills" in one]
    yield "kills survived", sum(one["kills"] for one in kills)
    yield "longest wait for the other process of a launch", _seconds(max((_others(one) for one in kills), default=0))
    damaged = [one for name, one in tests.items() if name.split("::")[0] in CORRUPTION]
    yield "damaged files that were all detected and repaired", sum(one.get("cases", 0) for one in damaged)
    yield "fuzz cases", sum(one["cases"] for one in soak["fuzz"])
    yield "crashes and hangs found by fuzzing", sum(len(one["crashes"]) for one in soak["fuzz"])
    yield "slow tests passed", sum(one["outcome"] == "passed" for one in tests.values())


def _others(kills: Mapping[str, Any]) -> float:
    return float(kills.get("others_s", {}).get("most", 0.0))


def _seconds(value: float) -> str:
    return f"{value:.2f} s"


def _kills(tests: Tests) -> Iterator[tuple[object, ...]]:
    for name, one in tests.items():
        if "kills" in one:
            kills = one["kills"]
            others = kills.get("others_s")
            yield (
                f"`{_short(name)}`",
                kills["kills"],
                kills["rounds"],
                f"{_seconds(others['median'])}, {_seconds(others['most'])}" if others else "-",
                kills["orphans"],
                _seconds(kills["orphans_s"]),
                round(kills["seconds"]),
            )


def _sum(tests: Tests, key: str) -> list[tuple[object, ...]]:
    total: Counter[str] = Counter()
    for one in tests.values():
        total.update(one.get("kills", {}).get(key, {}))
    return list(total.most_common())


def _files(tests: Tests) -> Iterator[tuple[object, ...]]:
    for file in sorted({name.split("::")[0] for name in tests}):
        ours = [one for name, one in tests.items() if name.split("::")[0] == file]
        outcomes = Counter(one["outcome"] for one in ours)
        cases = sum(one.get("cases", 0) for one in ours)
        yield f"`{file}`", outcomes["passed"], outcomes["skipped"], cases or "-", round(sum(o["seconds"] for o in ours))


def _short(name: str) -> str:
    return name.split("::")[1]


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    cells = [f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *cells]


def page(text: str, soak: Mapping[str, Any]) -> str:
    """``docs/reliability.md`` with its figures replaced.

    Raises:
        ValueError: if the markers are missing.
    """
    pattern = re.escape(BEGIN) + r".*?" + re.escape(END)
    if len(re.findall(pattern, text, re.DOTALL)) != 1:
        raise ValueError("docs/reliability.md needs its two markers, once")
    return re.sub(pattern, lambda _: figures(soak), text, flags=re.DOTALL)


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if the page is stale")
    check = parser.parse_args().check
    path = ROOT / "docs" / "reliability.md"
    before = path.read_text(encoding="utf-8")
    after = page(before, json.loads((ROOT / "benchmarks" / "results" / "soak.json").read_text(encoding="utf-8")))
    if check:
        if before != after:
            print("stale: docs/reliability.md: run `make docs`")
        return int(before != after)
    atomic_write_text(path, after)
    print(f"wrote {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
