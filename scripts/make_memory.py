#!/usr/bin/env python3
"""Write the tables in ``docs/memory.md`` and the README from ``benchmarks/results/memory_plans.json``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from finetune.core.files import atomic_write_text

BEGIN = "<!-- tables: written by scripts/make_memory.py from benchmarks/results/memory_plans.json; do not edit -->"
END = "<!-- end of tables -->"
PLANS = ROOT / "benchmarks" / "results" / "memory_plans.json"

Plans = Mapping[str, Mapping[str, Any]]


def tables(found: Mapping[str, Any]) -> str:
    """What stands in ``docs/memory.md``."""
    plans: Plans = found["plans"]
    overhead = found["overhead_gib"]
    lines = [
        f"GiB that tensors hold while training, at the native bucket and batch size 1. A card needs {overhead} more for"
        " the CUDA context and fragmentation. Predicted, where the last column does not say what was measured.",
        "",
        *_table(("configuration", "what it does", "goal", "predicted", "host GiB", "measured"), _cards(plans)),
        "",
        "The other phases of the same configurations, predicted. Where sampling does not fit, training goes on without"
        " videos.",
        "",
        *_table(("configuration", *_phases(plans)), _by_phase(plans, overhead)),
        "",
        "Seconds per step, from arithmetic and published or assumed rates; nothing was timed.",
        "",
        *_table(("configuration", *_devices(plans)), _seconds(plans)),
    ]
    return "\n".join(lines)


def overview(found: Mapping[str, Any]) -> str:
    """What stands in the README: a row per configuration."""
    rows = (
        (
            f"{plan['card_gib']} GB",
            f"[{plan['model'].upper()} {'LoRA' if plan['method'] == 'lora' else plan['method']}](configs/{name}):"
            f" {plan['words']}",
            f"{plan['training_gib']:.1f}",
            f"{plan['host_gib']:.0f}",
        )
        for name, plan in found["plans"].items()
    )
    return "\n".join(_table(("card", "what", "peak GiB", "host GiB"), rows))


PAGES = {ROOT / "docs" / "memory.md": tables, ROOT / "README.md": overview}
"""What is written into which file."""


def _cards(plans: Plans) -> Iterator[Sequence[str]]:
    for name, plan in plans.items():
        host = plan["host_gib"]
        yield (
            f"[{name.removesuffix('.yaml')}](../configs/{name})",
            plan["words"],
            f"{plan['goal_gib']:.1f}",
            f"{plan['training_gib']:.2f}",
            f"{host:.1f}",
            plan.get("measured") or "not yet",
        )


def _phases(plans: Plans) -> list[str]:
    return list(dict.fromkeys(phase for plan in plans.values() for phase in plan["phases_gib"]))


def _by_phase(plans: Plans, overhead: float) -> Iterator[Sequence[str]]:
    for name, plan in plans.items():
        room = plan["card_gib"] - overhead
        shown = (
            f"**{gib:.2f}, too large**" if gib > room else f"{gib:.2f}"
            for gib in (plan["phases_gib"].get(phase, 0.0) for phase in _phases(plans))
        )
        yield (name.removesuffix(".yaml"), *shown)


def _devices(plans: Plans) -> list[str]:
    return list(dict.fromkeys(device for plan in plans.values() for device in plan["s_per_step"]))


def _seconds(plans: Plans) -> Iterator[Sequence[str]]:
    for name, plan in plans.items():
        yield (name.removesuffix(".yaml"), *(f"{plan['s_per_step'][device]:.2f}" for device in _devices(plans)))


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def renewed(page: str, content: str) -> str:
    """The page with fresh tables.

    Args:
        page: as it is.
        content: what stands between the markers.

    Raises:
        ValueError: if it has no place for them.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError("the page has no markers for the tables")
    return f"{before}{BEGIN}\n\n{content}\n\n{END}{after}"


def main() -> int:
    """Write or compare; 1 if a page is stale."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a page would change")
    check = parser.parse_args().check
    found, stale = json.loads(PLANS.read_text(encoding="utf-8")), False
    for path, content in PAGES.items():
        page = path.read_text(encoding="utf-8")
        fresh = renewed(page, content(found))
        if fresh != page and not check:
            atomic_write_text(path, fresh)
        print(f"{path.name}: {'up to date' if fresh == page else 'stale' if check else 'written'}")
        stale |= fresh != page
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
