"""The figures of a whole run, at a price: a short model is rehearsed, and extended to the whole one.

A block is up to some thousand operations each time it runs. Forty-two of them take up to two minutes, five and six of
them seconds, and give the same figures (see ``extend``). Blocks that a memory section treats apart are all rehearsed.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from finetune.config import RunConfig
from finetune.facts import Facts, json_folder, read_facts
from finetune.planning.ahead import beside
from finetune.planning.curve import TRANSIENT, Phase, Point
from finetune.planning.extend import SHORT, Extended, extend
from finetune.planning.names import PHASES, PhaseName
from finetune.planning.rehearse import Rehearsal
from finetune.planning.store import rehearsed

_OF_THE_RUN: tuple[PhaseName, ...] = ("train", "sample", "decode")
"""Phases with the transformer in them."""


def facts_of(config: RunConfig) -> Facts:
    """The facts of a run's model, from its JSON.

    Raises:
        ModelError: if it cannot be found or used.
    """
    return read_facts(str(json_folder(config.model.pretrained, config.model.revision)))


def predict(
    config: RunConfig,
    *,
    phases: Collection[PhaseName] = tuple(PHASES),
    card_bytes: int | None = None,
    exact: bool = False,
) -> Rehearsal:
    """What a run will hold.

    Args:
        config: see ``rehearse``.
        phases: see ``rehearse``.
        card_bytes: see ``rehearse``.
        exact: rehearse every block in any case; only then are there curves to draw.

    Raises:
        ModelError, ConfigError: as ``rehearse``.
    """
    layers = facts_of(config).num_layers
    run = _of_the_run(phases)
    others = [name for name in phases if name not in _OF_THE_RUN]

    def encoders() -> tuple[Phase, ...]:
        return rehearsed(config, phases=others, card_bytes=card_bytes).phases if others else ()

    if not run:
        return rehearsed(config, phases=others, card_bytes=card_bytes)
    # Two cores are worth two processes; what the other one made is read back.
    encoding = {"layers": None, "phases": others, "card_bytes": card_bytes}
    if exact or not _extendable(config, layers):
        step = tuple(name for name in run if name == "train")
        videos = tuple(name for name in run if name != "train")
        with beside(config, encoding, {"layers": None, "phases": videos, "card_bytes": None}):
            found = [rehearsed(config, phases=step)] if step else []
        if videos:
            found.append(rehearsed(config, phases=videos))
        return replace(found[0], phases=(*encoders(), *(phase for part in found for phase in part.phases)))
    # Decoding has no blocks in it: what it holds beside them grows as in sampling.
    few = tuple(name for name in run if name != "decode" or "sample" not in run)
    with beside(config, {"layers": SHORT[0], "phases": few if others else (), "card_bytes": None}, encoding):
        longer = rehearsed(config, layers=SHORT[1], phases=run)
    short = rehearsed(config, layers=SHORT[0], phases=few)
    short = replace(short, phases=(*short.phases, *_decoding(short, longer)))
    before = encoders()
    after = tuple(
        _whole(longer_phase, extend(short_phase, longer_phase, layers))
        for short_phase, longer_phase in zip(short.phases, longer.phases, strict=True)
    )
    return replace(longer, phases=(*before, *after))


def extended(config: RunConfig, layers: int) -> Extended:
    """The training phase with ``layers`` blocks, from two short rehearsals.

    Where some of the blocks keep attention, what they keep is counted by their number.
    """
    memory = config.memory
    if memory.keep_attention is not None and memory.keep_attention < layers:
        none = config.model_copy(
            update={"memory": memory.model_copy(update={"checkpointing": "full", "keep_attention": None})}
        )
        every = config.model_copy(update={"memory": memory.model_copy(update={"keep_attention": None})})
        fewest, most = extended(none, layers), extended(every, layers)
        share = memory.keep_attention / layers
        kept = round((most.nbytes - fewest.nbytes) * share)
        saved = "saved activations"
        return replace(fewest, parts={**fewest.parts, saved: fewest.parts.get(saved, 0) + kept})
    only: tuple[PhaseName, ...] = ("train",)
    short, longer = (rehearsed(config, layers=few, phases=only).phase("train") for few in SHORT)
    return extend(short, longer, layers)


def _of_the_run(phases: Collection[PhaseName]) -> tuple[PhaseName, ...]:
    return tuple(name for name in _OF_THE_RUN if name in phases)


def _extendable(config: RunConfig, layers: int) -> bool:
    memory = config.memory
    uniform = memory.keep_attention is None and memory.streamed_blocks in (0, "all")
    return uniform and layers > SHORT[1]


def _decoding(short: Rehearsal, longer: Rehearsal) -> tuple[Phase, ...]:
    """The decoding of the shorter model, where it was not rehearsed: without what the longer one has more."""
    names = {PHASES["sample"], PHASES["decode"]}
    there = {phase.name: phase for phase in longer.phases if phase.name in names}
    here = {phase.name: phase for phase in short.phases if phase.name in names}
    if len(there) < 2 or len(here) != 1:
        return ()
    decode, (sample,), more = there[PHASES["decode"]], here.values(), there[PHASES["sample"]]
    grown = {
        part: more.peak.parts[part] - nbytes
        for part, nbytes in sample.peak.parts.items()
        if part in more.peak.parts and part not in (TRANSIENT, "attention workspace", "batch")
    }

    def without(point: Point) -> Point:
        return Point(point.at, {part: nbytes - grown.get(part, 0) for part, nbytes in point.parts.items()})

    def hosted(point: Point, less: Point, full: Point) -> Point:
        return Point(point.at, {"host": point.nbytes - (full.nbytes - less.nbytes)})

    return (
        replace(
            decode,
            peak=without(decode.peak),
            pinned=hosted(decode.pinned, sample.pinned, more.pinned),
            pageable=hosted(decode.pageable, sample.pageable, more.pageable),
            stations={station: without(point) for station, point in decode.stations.items()},
        ),
    )


def _whole(phase: Phase, found: Extended) -> Phase:
    return replace(
        phase,
        peak=Point(0.0, found.parts),
        where=found.where,
        pinned=Point(0.0, {"pinned": found.pinned}),
        pageable=Point(0.0, {"pageable": found.pageable}),
        curve=(),
        spans=(),
        stations={},
    )
