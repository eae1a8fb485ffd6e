#!/usr/bin/env python3
"""Draw ``docs/memory.png``: what each recipe holds at its peak, from ``benchmarks/results/memory_plans.json``."""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib import colormaps
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent

PLANS = ROOT / "benchmarks" / "results" / "memory_plans.json"

MODELS = {"2b": "2B", "5b": "5B", "1.5-5b": "1.5-5B"}


def main() -> None:
    """A bar for each recipe, part by part, with a mark where its card ends."""
    found = json.loads(PLANS.read_text(encoding="utf-8"))
    methods = {"lora": 0, "full": 1}
    plans = sorted(
        found["plans"].values(),
        key=lambda plan: (methods[plan["method"]], [*MODELS].index(plan["model"]), -plan["card_gib"]),
    )
    parts = sorted(
        {part for plan in plans for part in plan["parts_gib"]},
        key=lambda part: -sum(plan["parts_gib"].get(part, 0) for plan in plans),
    )
    figure = Figure(figsize=(10, 4.6), dpi=100, layout="constrained")
    axes = figure.subplots()
    names = [
        f"{MODELS[plan['model']]} {'LoRA' if plan['method'] == 'lora' else 'full'}, {plan['card_gib']} GB"
        for plan in plans
    ]
    left = [0.0] * len(plans)
    for number, part in enumerate(parts):
        widths = [plan["parts_gib"].get(part, 0.0) for plan in plans]
        axes.barh(names, widths, left=left, color=colormaps["tab20"](number), label=part, height=0.72)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    cards = [plan["card_gib"] - found["overhead_gib"] for plan in plans]
    axes.plot(cards, names, "|", color="#be2828", markersize=13, markeredgewidth=2, label="the card, less overhead")
    axes.invert_yaxis()
    axes.set_xlabel("GiB of GPU memory at the peak of a training step, native size, batch 1; predicted, not measured")
    axes.grid(axis="x", alpha=0.4)
    axes.set_axisbelow(True)
    figure.legend(loc="outside right upper", frameon=False)
    figure.savefig(ROOT / "docs" / "memory.png", format="png")


if __name__ == "__main__":
    main()
