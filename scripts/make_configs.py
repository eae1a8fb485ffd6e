#!/usr/bin/env python3
"""Write the example configurations in ``configs/``; with ``--check``, say whether they are up to date."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from finetune.cli.init import EXAMPLES, RECIPES, example
from finetune.core.files import atomic_write_text

PLANS = ROOT / "benchmarks" / "results" / "memory_plans.json"
"""What was measured of every recipe stands there, beside what the planner predicts."""


def generate() -> dict[str, str]:
    """File name in ``configs/`` -> its text."""
    plans = json.loads(PLANS.read_text(encoding="utf-8"))["plans"] if PLANS.is_file() else {}
    recipes = {recipe.name: recipe for recipe in (*EXAMPLES, *RECIPES)}
    return {
        name: example(recipe, plans.get(name, {}).get("measured", "")).text(f"configs/{name}")
        for name, recipe in recipes.items()
    }


def main() -> int:
    """Write or compare every example; 1 if one is stale."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a file would change")
    check = parser.parse_args().check
    stale = []
    for name, text in generate().items():
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
