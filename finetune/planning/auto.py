"""``memory: {kind: auto}``: the planner's choice in place of a person's."""

from __future__ import annotations

from finetune.cards import parse_bytes
from finetune.config import RunConfig
from finetune.errors import ConfigError
from finetune.planning.card import card_here, device_here, held_note
from finetune.planning.command import search_lines
from finetune.planning.rates import rates_of
from finetune.planning.resolve import resolve


def settled(config: RunConfig) -> tuple[RunConfig, tuple[str, ...]]:
    """The run with a memory section that says what is done, and lines about how it was chosen (none for ``manual``).

    Where a run goes on, the search may come to another choice than before. That changes no number that is trained,
    unless only a quantised base fits where a native one did, or the other way round: such a run is not continued.

    Args:
        config: of the run, valid for its model.

    Raises:
        ConfigError: if nothing fits, or there is no card to plan for.
    """
    asked = config.memory
    if asked.kind == "manual":
        return config, ()
    card_bytes = card_here() if asked.budget is None else parse_bytes(asked.budget)
    if card_bytes is None:
        raise ConfigError(
            "there is no GPU here to plan for",
            where=config.where("memory"),
            fix="say for how much memory, such as memory.budget: 24GiB, or set memory.kind: manual",
        )
    rates = rates_of(device_here())
    ram_bytes = None if asked.ram is None else parse_bytes(asked.ram)
    chosen, found = resolve(config, rates, card_bytes=card_bytes, ram_bytes=ram_bytes, quantize=asked.quantize)
    held = held_note() if asked.budget is None else ""
    return chosen, (*([held] if held else []), *search_lines(chosen.memory, found, rates, card_bytes, ram_bytes))
