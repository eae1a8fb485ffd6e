"""Seed faults into the package one at a time, and see whether the test suite notices each: its mutant score.

    python scripts/mutants.py [--only NAME ...] [--list] [--jobs N] [--json FILE] [--trust]

The faults stand in ``mutants.toml`` beside this file. A row has a name, the area it belongs to, a sentence that says
the fault, the text to find in the package and what to put in its place, and the tests that are expected to fail: the
middle of a test file's name, with a ``-k`` expression where the whole file is slow. Text is found wherever in the
package it stands, and a test file wherever below ``tests/``, so files may move; text that stands nowhere, or twice, is
an error.

First the named tests run on the tree as it is, for a test that fails anyway proves nothing (``--trust`` leaves that
out). Then each fault is put into a copy of the tree of its own, with all changes that are not committed. A fault is
*killed* if one of its tests fails, and *survives* if none does. Exits with 1 if a fault survives that its row does not
give a reason for (``hole``), with 2 if one does not apply or its tests cannot be run.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
TABLE = Path(__file__).with_suffix(".toml")
PACKAGE = "finetune"
TEST_LIMIT_S = 180
"""A test that takes longer has failed: a fault may be one that never ends. An entry's own ``--timeout`` goes before."""
CALL_LIMIT_S = 900
"""Of all tests of one entry together."""

Outcome = Literal["killed", "survived", "error"]


@dataclass(frozen=True)
class Mutant:
    """A row of the table."""

    name: str
    area: str
    fault: str
    find: str
    put: str
    tests: tuple[str, ...]
    hole: str = ""
    """Why it may survive for now."""


class Result(NamedTuple):
    """What became of one mutant."""

    name: str
    area: str
    outcome: Outcome
    by: str
    """The test that failed first; of an error, what went wrong."""
    seconds: float


class Ran(NamedTuple):
    """One call of pytest."""

    code: int
    failed: str
    tail: str


def main() -> int:
    """Parse the command line, try the faults, and print the score."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="names of rows, or of areas")
    parser.add_argument("--list", action="store_true", help="print the rows and stop")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time (1)")
    parser.add_argument("--json", type=Path, help="keep the results here")
    parser.add_argument("--trust", action="store_true", help="do not run the tests on the tree as it is first")
    args = parser.parse_args()
    mutants = read_table()
    if args.only:
        known = {word for mutant in mutants for word in (mutant.name, mutant.area)}
        if unknown := sorted(set(args.only) - known):
            parser.error(f"no row or area is called {', '.join(unknown)}")
        mutants = [mutant for mutant in mutants if {mutant.name, mutant.area} & set(args.only)]
    if faults := table_faults(mutants, package_texts(), test_files()):
        print("\n".join(faults), file=sys.stderr)
        return 2
    if args.list:
        for mutant in mutants:
            print(f"{mutant.area:12} {mutant.name:32} {mutant.fault}")
        return 0
    begun = time.monotonic()
    if not args.trust and (broken := tests_that_fail_anyway(mutants, args.jobs)):
        print("\n".join(broken), file=sys.stderr)
        return 2
    with ThreadPoolExecutor(args.jobs) as pool:
        results = list(pool.map(attempt, mutants))
    return report(mutants, results, time.monotonic() - begun, args.json)


def read_table(path: Path = TABLE) -> list[Mutant]:
    """The rows, in order."""
    rows = tomllib.loads(path.read_text(encoding="utf-8"))["mutant"]
    return [Mutant(**{**row, "tests": tuple(row["tests"])}) for row in rows]


def package_texts(root: Path = ROOT) -> dict[Path, str]:
    """Every source file of the package, by its path below ``root``."""
    files = sorted((root / PACKAGE).rglob("*.py"))
    return {path.relative_to(root): path.read_text(encoding="utf-8") for path in files}


def test_files(root: Path = ROOT) -> dict[str, Path]:
    """The test files below ``root``, by the middle of their names."""
    files = sorted((root / "tests").rglob("test_*.py"))
    return {path.stem.removeprefix("test_"): path.relative_to(root) for path in files}


def table_faults(mutants: Sequence[Mutant], texts: Mapping[Path, str], tests: Mapping[str, Path]) -> list[str]:
    """What is wrong with rows of the table; a fast check of what running them would find out slowly."""
    faults: list[str] = []
    names = [mutant.name for mutant in mutants]
    faults += [f"{name}: another row is called so" for name in sorted(set(names)) if names.count(name) > 1]
    for mutant in mutants:
        stands = [path for path, text in texts.items() for _ in range(text.count(mutant.find))]
        if len(stands) != 1:
            where = f" ({', '.join(map(str, dict.fromkeys(stands)))})" if stands else ""
            faults.append(f"{mutant.name}: its text stands {len(stands)} times in the package, not once{where}")
        elif mutant.find == mutant.put:
            faults.append(f"{mutant.name}: it changes nothing")
        elif not _parses(texts[stands[0]].replace(mutant.find, mutant.put)):
            faults.append(f"{mutant.name}: {stands[0]} is no Python with it")
        unknown = [entry for entry in mutant.tests if shlex.split(entry)[0] not in tests]
        faults += [f"{mutant.name}: there is no test file for {entry!r}" for entry in unknown]
        if not mutant.tests:
            faults.append(f"{mutant.name}: it names no test")
    return faults


def _parses(text: str) -> bool:
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True


def attempt(mutant: Mutant) -> Result:
    """Put one fault into a copy of the tree and run its tests there, until one fails."""
    begun = time.monotonic()
    outcome: Outcome = "survived"
    by = ""
    with tempfile.TemporaryDirectory(prefix="mutant-") as name:
        copy = Path(name) / "tree"
        copy_tree(copy)
        (path,) = (path for path, text in package_texts(copy).items() if mutant.find in text)
        text = (copy / path).read_text(encoding="utf-8")
        (copy / path).write_text(text.replace(mutant.find, mutant.put), encoding="utf-8")
        for entry in mutant.tests:
            ran = run_tests(copy, entry)
            if ran.code == 1:
                outcome, by = "killed", ran.failed
                break
            if ran.code != 0:
                outcome, by = "error", ran.tail
                break
    result = Result(mutant.name, mutant.area, outcome, by, round(time.monotonic() - begun, 1))
    print(f"{result.outcome:9} {result.name:32} {result.seconds:6.1f} s  {result.by}", flush=True)
    return result


def copy_tree(copy: Path) -> None:
    """Everything that git knows or would take, as it is now."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    for name in dict.fromkeys(listed.stdout.split("\0")):
        if name and (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)


def run_tests(tree: Path, entry: str) -> Ran:
    """Run one entry of a row on a tree: pytest's exit code, the first test that failed, and its last words."""
    stem, *options = shlex.split(entry)
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-rfE", "-p", "no:cacheprovider"]
    command += [f"--timeout={TEST_LIMIT_S}", str(test_files(tree)[stem]), *options]
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            command, cwd=tree, env=environment, capture_output=True, text=True, timeout=CALL_LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return Ran(1, f"{entry}: no end after {CALL_LIMIT_S} s", "")
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.M)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    return Ran(done.returncode, failed[1] if failed else entry, " / ".join(lines[-3:]))


def tests_that_fail_anyway(mutants: Iterable[Mutant], jobs: int) -> list[str]:
    """Entries of rows whose tests do not pass, or do not exist, on the tree as it is."""
    entries = list(dict.fromkeys(entry for mutant in mutants for entry in mutant.tests))
    with tempfile.TemporaryDirectory(prefix="mutant-") as name:
        copy = Path(name) / "tree"
        copy_tree(copy)
        with ThreadPoolExecutor(jobs) as pool:
            every = list(pool.map(partial(run_tests, copy), entries))
    return [
        f"{entry}: does not pass without any fault: {ran.failed if ran.code == 1 else ran.tail}"
        for entry, ran in zip(entries, every, strict=True)
        if ran.code != 0
    ]


def report(mutants: Sequence[Mutant], results: Sequence[Result], seconds: float, path: Path | None) -> int:
    """Print the score and the survivors, keep them in a file, and return the exit code."""
    holes = {mutant.name: mutant.hole for mutant in mutants if mutant.hole}
    faults = {mutant.name: mutant.fault for mutant in mutants}
    named: dict[Outcome, list[str]] = {"killed": [], "survived": [], "error": []}
    for result in results:
        named[result.outcome].append(result.name)
    print(f"\n{len(named['killed'])} of {len(results)} mutants killed, in {seconds:.0f} s")
    for name in named["survived"]:
        print(f"survived: {name}: {faults[name]}" + (f" Known: {holes[name]}" if name in holes else ""))
    if path is not None:
        score = {outcome: len(names) for outcome, names in named.items()}
        rows = [result._asdict() for result in results]
        path.write_text(json.dumps({"score": score, "seconds": round(seconds), "mutants": rows}, indent=1) + "\n")
    if named["error"]:
        print(f"could not be tried: {', '.join(named['error'])}", file=sys.stderr)
        return 2
    return 1 if set(named["survived"]) - set(holes) else 0


if __name__ == "__main__":
    raise SystemExit(main())
