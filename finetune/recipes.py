"""Memory settings for cards of a given size: a file each in ``configs/``, and a table in ``docs/memory.md``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Recipe:
    """A model, a method and the memory techniques that fit them to a card."""

    model: str
    """One of ``facts.KNOWN_MODELS``."""
    method: Literal["lora", "full"]
    card_gib: int
    goal_gib: float
    """What the training phase is meant to allocate at most, at the native bucket and batch size 1."""
    peak_gib: float
    """What the planner predicts for it; ``benchmarks/results/memory_plans.json`` has the exact figure."""
    memory: Mapping[str, str]
    """The memory section, value by value, as YAML."""
    optimizer: Mapping[str, str]
    """What is added to the optimizer section."""
    words: str
    """What it does, for a heading."""

    @property
    def name(self) -> str:
        """Of its file in ``configs/``."""
        return f"cogvideox-{self.model}-{self.method}-{self.card_gib}gb.yaml"


_LEAN = {"checkpointing": "full", "block": "lean", "modulation": "host"}
_OFFLOADED = {**_LEAN, "activations": "host"}
_RELEASED = {"checkpointing": "full", "block": "lean", "gradient_release": "exact"}
_HOST = {**_RELEASED, "optimizer_states": "host"}
_ROUNDED = {"weights": "stochastic"}
_ON_HOST = {"kind": "adamw", "weights": "kahan"}
"""On a CPU torch's fused AdamW takes 0.8 ns per weight where bitsandbytes' 8-bit one takes 18 (two cores), and random
numbers for stochastic rounding 2.5."""

RECIPES: tuple[Recipe, ...] = (
    Recipe("5b", "lora", 24, 16.6, 15.1, _LEAN, {}, "lean blocks, adaLN weights on the host"),
    Recipe("5b", "lora", 16, 12.6, 11.5, _OFFLOADED, {}, "the same, and activations on the host"),
    Recipe("5b", "lora", 12, 8.2, 7.0, {**_OFFLOADED, "base": "fp8"}, {}, "the same, and the base in fp8"),
    Recipe("5b", "lora", 8, 4.6, 3.0, {**_OFFLOADED, "streamed_blocks": "all", "text_encoder": "streamed"}, {},
           "weights streamed from the host, activations on the host"),
    # What streams makes room for decoding sampled videos; training alone would fit without.
    Recipe("2b", "lora", 8, 6.1, 4.9, {**_LEAN, "streamed_blocks": "10", "text_encoder": "streamed"}, {},
           "lean blocks, a third of the weights streamed"),
    Recipe("2b", "lora", 6, 4.4, 1.6, {**_OFFLOADED, "streamed_blocks": "all", "text_encoder": "streamed"}, {},
           "weights streamed from the host, activations on the host"),
    Recipe("5b", "full", 32, 28.1, 26.6, _RELEASED, _ROUNDED, "gradients released block by block, 8-bit Adam"),
    Recipe("5b", "full", 24, 17.4, 16.1, _HOST, _ON_HOST, "optimizer states on the host"),
    Recipe("5b", "full", 16, 10.0, 2.3, {**_HOST, "activations": "host", "streamed_blocks": "all"}, _ON_HOST,
           "weights, activations and optimizer states on the host"),
    Recipe("1.5-5b", "lora", 24, 15.3, 13.6, _OFFLOADED, {}, "lean blocks, activations and adaLN weights on the host"),
    Recipe("1.5-5b", "lora", 16, 10.9, 9.1, {**_OFFLOADED, "base": "fp8"}, {}, "the same, and the base in fp8"),
)  # fmt: skip
"""The rows of the project's memory goals, in their order."""


def recipe_for(model: str, method: str, card_gib: float) -> Recipe | None:
    """The recipe for the largest card that is not larger than ``card_gib``; None where there is none.

    Args:
        model: one of ``facts.KNOWN_MODELS``; an image-to-video model has the blocks and tokens of its twin.
        method: ``lora`` or ``full``.
        card_gib: the card's memory.
    """
    fitting = [
        recipe
        for recipe in RECIPES
        if (recipe.model, recipe.method) == (model.removesuffix("-i2v"), method) and recipe.card_gib <= card_gib
    ]
    return max(fitting, key=lambda recipe: recipe.card_gib, default=None)
