"""Peak memory of the shipped configurations, as the planner predicts it, against the goal of each.

A prediction is not a measurement: every figure in the file is the planner's, but for what ``measured`` says, which
comes from the files that `benchmarks/gpu.py` wrote.

    python benchmarks/memory.py [--exact] [--only NAME ...] [--output benchmarks/results/memory_plans.json]

Exits with 1 where a goal is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from cases import cases

from finetune.cli.init import EXAMPLES, RECIPES, Recipe
from finetune.cogvideox.spec import spec_of
from finetune.config.schema import RunConfig, load_config
from finetune.core.gpu import OVERHEAD_GIB, usable
from finetune.core.types import GIB
from finetune.planner.cost_model import DEFAULTS
from finetune.planner.estimate import predict
from finetune.planner.step_time import step_cost

ROOT = Path(__file__).resolve().parent.parent
CARDS = ("H100", "H200", "A100", "4090")
"""Whose seconds are shown."""
RESULTS = ROOT / "benchmarks" / "results" / "memory_plans.json"


def predict_recipe(recipe: Recipe, *, exact: bool) -> dict[str, Any]:
    """The figures of one shipped configuration."""
    config = load_config(ROOT / "configs" / recipe.name)
    begun = time.process_time()
    estimate = predict(config, card_bytes=usable(recipe.card_gib * GIB), exact=exact)
    training = estimate.phase("train")
    spec = spec_of(config.model, shipped=True)
    return {
        "model": recipe.model,
        "method": recipe.method,
        "card_gib": recipe.card_gib,
        "words": recipe.words,
        "memory": config.memory.model_dump(mode="json"),
        "bucket": estimate.bucket,
        "goal_gib": recipe.goal_gib,
        "training_gib": _gib(training.peak.nbytes),
        "where": training.where,
        "parts_gib": {part: _gib(nbytes) for part, nbytes in training.peak.parts.items() if nbytes > GIB // 200},
        "phases_gib": {phase.name: _gib(phase.peak.nbytes) for phase in estimate.phases},
        "host_gib": _gib(estimate.host_bytes),
        "s_per_step": {name: round(step_cost(config, spec, config.memory, DEFAULTS[name]).step_s, 2) for name in CARDS},
        "exact": exact,
        "took_cpu_s": round(time.process_time() - begun, 1),
    }


def predict_step(config: RunConfig) -> float:
    """GiB of a training step."""
    return _gib(predict(config, phases=("train",)).phase("train").peak.nbytes)


def measured(name: str, folder: Path = RESULTS.parent) -> str:
    """What ``benchmarks/gpu.py`` measured of a configuration, in words; empty where it has not been run."""
    said = []
    for path in sorted(folder.glob("gpu_memory_*.json")):
        found = json.loads(path.read_text())
        for row in found["rows"]:
            if row["config"] == name and "peak_gib" in row:
                said.append(f"{row['peak_gib']:.2f} GiB, {row['s_per_step']:.2f} s/step on {found['device']}")
    return "; ".join(said)


def missed(plans: dict[str, dict[str, Any]]) -> list[str]:
    """Goals that are missed, and passes without which nothing starts that a card does not hold, in words."""
    goals = [
        f"missed: {name}: training needs {plan['training_gib']} GiB, the goal is {plan['goal_gib']}"
        for name, plan in plans.items()
        if plan["training_gib"] > plan["goal_gib"]
    ]
    return goals + [f"missed: {said}" for phase in ("T5 pass", "VAE pass") for said in _over(plans, phase)]


def too_large(plans: dict[str, dict[str, Any]]) -> list[str]:
    """Sampling and decoding that do not fit a card, in words. Training goes on without videos then."""
    return [f"note: {said}" for phase in ("validation sampling", "VAE decode") for said in _over(plans, phase)]


def _over(plans: dict[str, dict[str, Any]], phase: str) -> list[str]:
    return [
        f"{name}: {phase} needs {plan['phases_gib'][phase]} GiB, a card of {plan['card_gib']} GiB has"
        f" {plan['card_gib'] - OVERHEAD_GIB:.1f}"
        for name, plan in plans.items()
        if plan["phases_gib"].get(phase, 0.0) > plan["card_gib"] - OVERHEAD_GIB
    ]


def _gib(nbytes: int) -> float:
    return round(nbytes / GIB, 2)


def main() -> int:
    """Predict, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exact", action="store_true", help="run every block; takes a minute per configuration")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="these files of configs/; the others keep their figures"
    )
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    before = json.loads(args.output.read_text()) if args.output.is_file() else {}
    plans: dict[str, dict[str, Any]] = {}
    for recipe in RECIPES:
        if args.only and recipe.name not in args.only:
            plans |= {recipe.name: before["plans"][recipe.name]} if recipe.name in before.get("plans", {}) else {}
            continue
        plans[recipe.name] = predict_recipe(recipe, exact=args.exact) | {"measured": measured(recipe.name)}
        plan = plans[recipe.name]
        print(f"{recipe.name:44} {plan['training_gib']:6.2f} GiB, goal {plan['goal_gib']:5.1f}", flush=True)
    examples, techniques = before.get("examples", {}), before.get("techniques", {})
    if not args.only:
        names = [example.name for example in EXAMPLES]
        examples = {name: predict_step(load_config(ROOT / "configs" / name)) for name in names}
        techniques = {name: predict_step(config) for name, config in cases()}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    found = {"overhead_gib": OVERHEAD_GIB, "plans": plans, "examples": examples, "techniques": techniques}
    args.output.write_text(json.dumps(found, indent=1) + "\n")
    said = missed(plans)
    print("\n".join([*too_large(plans), *said]))
    print(f"{len(said)} goals missed, as predicted" if said else "every goal is met, as predicted")
    return 1 if said else 0


if __name__ == "__main__":
    sys.exit(main())
