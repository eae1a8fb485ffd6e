"""The memory sections that a search chooses from: every legal one, with the seconds that a step takes in it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.config import RunConfig
from finetune.facts import Facts
from finetune.memory import MemoryConfig, Traits
from finetune.planning.cost import step_cost
from finetune.planning.rates import Rates

_STEPS = 14
"""In how many steps a number of blocks is varied."""


@dataclass(frozen=True)
class Candidate:
    """One of them."""

    memory: MemoryConfig
    family: MemoryConfig
    """The same with no block that keeps attention or streams: what candidates have in common whose figures differ by
    numbers of blocks alone."""
    kept: float
    """Share of the blocks that keep attention."""
    streamed: float
    """Share of the blocks that stream."""
    step_s: float

    @property
    def cut(self) -> bool:
        """Whether it is made to measure: some blocks are treated otherwise than the rest."""
        return 0 < self.kept < 1 or 0 < self.streamed < 1


def candidates(config: RunConfig, facts: Facts, traits: Traits, rates: Rates, bases: Sequence[str]) -> list[Candidate]:
    """Legal memory sections, the fastest first; of equally fast ones, those with fewer techniques.

    Args:
        config: of the run; what of its memory section is not searched is kept: T5, clips at once, the ring.
        facts: of its model.
        traits: of the run.
        rates: of the machine.
        bases: how the base may be held.
    """
    layers = facts.num_layers
    counts = sorted({*range(0, layers, max(layers // _STEPS, 1)), layers})
    found: list[Candidate] = []
    for family in _families(config, traits, bases):
        keeping = (0,) if family.checkpointing == "none" else counts
        streaming = counts if can_stream(family, traits) else (0,)
        for kept, streamed in itertools.product(keeping, streaming):
            memory = family.model_copy(update=_numbers(kept, streamed, layers))
            seconds = step_cost(config, facts, memory, rates).step_s
            found.append(Candidate(memory, family, kept / layers, streamed / layers, seconds))
    return sorted(found, key=lambda one: (round(one.step_s, 3), _techniques(one.memory)))


def can_stream(family: MemoryConfig, traits: Traits) -> bool:
    """Whether blocks of a family may stream."""
    return not family.model_copy(update={"streamed_blocks": "all"}).faults(traits)


def _numbers(kept: int, streamed: int, layers: int) -> dict[str, Any]:
    told: dict[str, Any] = {}
    if kept:
        told |= {"checkpointing": "selective", "keep_attention": None if kept == layers else kept}
    if streamed:
        told |= {"streamed_blocks": "all" if streamed == layers else streamed}
    return told


def _families(config: RunConfig, traits: Traits, bases: Sequence[str]) -> Iterator[MemoryConfig]:
    release: list[dict[str, str]] = [{}]
    if traits.full:
        release += [{"gradient_release": "exact"}, {"gradient_release": "exact", "optimizer_states": "host"}]
    asked = {name: getattr(config.memory, name) for name in ("text_encoder", "clips_at_once", "ring")}
    places, blocks = ("device", "host"), ("stock", "lean")
    for checkpointing, block, activations, modulation, base, released in itertools.product(
        ("none", "full"), blocks, places, places, bases, release
    ):
        chosen = {"checkpointing": checkpointing, "block": block, "activations": activations, "modulation": modulation}
        family = MemoryConfig.model_validate({**asked, **chosen, "base": base, **released})
        if not family.faults(traits):
            yield family


def _techniques(memory: MemoryConfig) -> int:
    fields = MemoryConfig.model_fields
    return sum(getattr(memory, name) != field.default for name, field in fields.items())
