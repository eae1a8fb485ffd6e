#!/usr/bin/env python3
"""Write the example configurations in ``configs/``; with ``--check``, say whether they are up to date."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from finetune.cli.init import EXAMPLE_CARDS_GIB, RECIPES, example, recipe_example
from finetune.core.files import atomic_write_text

PLANS = ROOT / "benchmarks" / "results" / "memory_plans.json"
"""What was measured of every recipe stands there, beside what the planner predicts."""


def recipe_examples() -> list[tuple[str, str]]:
    """Name and text of every recipe's file."""
    plans = json.loads(PLANS.read_text(encoding="utf-8"))["plans"] if PLANS.is_file() else {}
    return [recipe_example(recipe, plans.get(recipe.name, {}).get("measured", "")) for recipe in RECIPES]


def main() -> int:
    """Write or compare every example; 1 if one is stale."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a file would change")
    check = parser.parse_args().check
    stale = []
    examples = [example(known, method) for known, method in EXAMPLE_CARDS_GIB]
    for name, text in examples + recipe_examples():
        path = ROOT / "configs" / name
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(name)
        if not check:
            atomic_write_text(path, text)
    print(f"{'stale' if check else 'written'}: {', '.join(stale) or 'none'}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
