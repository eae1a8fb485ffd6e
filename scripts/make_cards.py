#!/usr/bin/env python3
"""Write the README's first table: what a card trains, in how many hours, and what that takes on the disk."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from finetune.caching.encode import clip_bytes
from finetune.caching.precompute import ENTRY_OVERHEAD, prompt_bytes
from finetune.cli.init import recipe_for
from finetune.cogvideox.spec import spec_of
from finetune.config.schema import load_config
from finetune.core.files import atomic_write_text
from finetune.diagnosis.outlook import DOWNLOAD_GB
from finetune.planner.cost_model import DEFAULTS
from finetune.planner.step_time import step_cost

README = ROOT / "README.md"

BEGIN = "<!-- cards: written by scripts/make_cards.py; do not edit -->"
END = "<!-- end of cards -->"

CARDS = (
    ("T4", 16, "2b", "lora"),
    ("L4", 24, "5b", "lora"),
    ("4090", 24, "5b", "lora"),
    ("5090", 32, "1.5-5b", "lora"),
    ("5090", 32, "5b", "full"),
    ("A100", 80, "5b", "full"),
    ("H100", 80, "1.5-5b", "full"),
)
"""Of each row: a row of ``templates/cards.yaml``, its GB, a text-to-video model and a method."""

CLIPS, STEPS = 30, 1500


def table() -> str:
    """The table, Markdown."""
    head = "| card | trains | hours | disk, GB | begin with |\n|---|---|---|---|---|\n"
    return head + "\n".join(f"| {' | '.join(row)} |" for row in _rows())


def _rows() -> Iterator[tuple[str, ...]]:
    for name, card_gib, model, method in CARDS:
        config = load_config(ROOT / "configs" / recipe_for(model, method, card_gib).name)
        spec, bucket = spec_of(config.model, shipped=True), config.data.buckets[0]
        hours = STEPS * step_cost(config, spec, config.memory, DEFAULTS[name]).step_s / 3600
        clip = clip_bytes(spec, bucket, config.cache.latents_dtype, draws=0)
        cached = CLIPS * (clip + prompt_bytes(spec, "bf16") + 2 * ENTRY_OVERHEAD)
        yield (
            f"{name}, {card_gib} GB",
            f"{model.upper()} {'LoRA' if method == 'lora' else method}",
            f"{hours:.1f}",
            f"{sum(DOWNLOAD_GB[model]) + cached / 1e9:.1f}",
            f"`finetune init --model {model} --method {method} --card {card_gib}GB --data clips`",
        )


def renewed(page: str) -> str:
    """The README with a fresh table. Raises ValueError if it has no place for it."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError("the page has no markers for the table")
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


def main() -> int:
    """Write or compare; 1 if the README is stale."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the README would change")
    check = parser.parse_args().check
    page = README.read_text(encoding="utf-8")
    fresh = renewed(page)
    if fresh != page and not check:
        atomic_write_text(README, fresh)
    print(f"{README.name}: {'up to date' if fresh == page else 'stale' if check else 'written'}")
    return 1 if check and fresh != page else 0


if __name__ == "__main__":
    sys.exit(main())
