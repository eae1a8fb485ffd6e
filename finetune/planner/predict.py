"""From two short models to a long one: what a phase holds is linear in the number of blocks, station by station.

Blocks are alike. So what is held while, say, the last block but one runs backward grows by the same bytes with every
block that the model has more, and what is held at a block in between lies between the first ones and the last ones. The
highest station may be another one in the long model than in the short ones, which is why each is extended by itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from finetune.cogvideox.model_files import json_folder
from finetune.cogvideox.spec import ModelSpec, read_spec
from finetune.config.schema import RunConfig
from finetune.planner.estimate import Estimate, longest_bucket, samples_videos
from finetune.planner.helper_process import HelperJob, beside
from finetune.planner.memory_tracker import TRANSIENT, Phase, Point
from finetune.planner.phases import OF_THE_RUN, PHASES, PhaseName
from finetune.planner.store import rehearsed

SHORT = (5, 6)
"""Layers of the two short models: two blocks at either end, which techniques may treat apart, at least one between them
that keeps the ends from each other's treatment, and what one more adds."""


@dataclass(frozen=True)
class Extended:
    """The peak of a phase of a model that was not rehearsed itself."""

    parts: Mapping[str, int]
    """Of the peak, in bytes."""
    where: str
    pinned: int
    """Bytes of page-locked host memory."""
    pageable: int
    """Bytes of other host memory."""
    note: str = ""
    """See ``Phase``."""

    @property
    def nbytes(self) -> int:
        """All parts together."""
        return sum(self.parts.values())

    def more(self, parts: Mapping[str, int], *, pinned: int = 0) -> Extended:
        """With so many bytes more in some parts, and of pinned memory."""
        together = {part: self.parts.get(part, 0) + parts.get(part, 0) for part in dict.fromkeys([*self.parts, *parts])}
        return replace(self, parts=together, pinned=self.pinned + pinned)


def extend(
    short: Phase, longer: Phase, layers: int, changed: Callable[[Mapping[str, int]], Mapping[str, int]] = dict
) -> Extended:
    """The peak with ``layers`` blocks.

    Args:
        short: the phase with ``SHORT[0]`` blocks.
        longer: the same with ``SHORT[1]``.
        layers: of the whole model, at least ``SHORT[1]``.
        changed: what becomes of the parts that are held at a station, before the highest is chosen.
    """
    few, more = SHORT
    best, where = Point(0.0, {}), ""
    for station, point in longer.stations.items():
        twin, named = _counterpart(station, layers)
        start = None if twin is None else short.stations.get(twin)
        if start is not None:
            found = Point(point.at, changed(_line(start.parts, point.parts, (layers - few) / (more - few))))
            if found.nbytes > best.nbytes:
                best, where = found, named
    steps = (layers - few) / (more - few)
    return Extended(
        parts=best.parts,
        where=where,
        pinned=_along(short.pinned.nbytes, longer.pinned.nbytes, steps),
        pageable=_along(short.pageable.nbytes, longer.pageable.nbytes, steps),
        note=longer.note,
    )


def _counterpart(station: str, layers: int) -> tuple[str | None, str]:
    """What a station of the longer model is called in the shorter one (None: it has no such), and in the whole."""
    few, more = SHORT
    found = re.fullmatch(r"(.*block) (\d+) of \d+", station)
    if found is None:
        return station, station
    number = int(found[2])
    if number < few // 2:
        return f"{found[1]} {number} of {few}", f"{found[1]} {number} of {layers}"
    from_end = more - 1 - number
    if from_end < few // 2:
        return f"{found[1]} {few - 1 - from_end} of {few}", f"{found[1]} {layers - 1 - from_end} of {layers}"
    return None, station


def _line(start: Mapping[str, int], end: Mapping[str, int], steps: float) -> dict[str, int]:
    parts = {part: _along(start.get(part, 0), end.get(part, 0), steps) for part in dict.fromkeys([*end, *start])}
    # Where the two name the same bytes differently, one part falls as another rises; together they are right.
    excess = sum(nbytes for nbytes in parts.values() if nbytes < 0)
    parts[TRANSIENT] = parts.get(TRANSIENT, 0) + excess
    return {part: nbytes for part, nbytes in parts.items() if nbytes > 0}


def _along(start: int, end: int, steps: float) -> int:
    return round(start + (end - start) * steps)


# -------- The figures of a whole run, at a price: short models are rehearsed, and extended to the whole one.
#
# A block is up to some thousand operations each time it runs. Forty-two of them take up to two minutes, five and six of
# them seconds, and give the same figures (see ``extend``).


def spec_of(config: RunConfig) -> ModelSpec:
    """The spec of a run's model, from its JSON.

    Raises:
        ModelError: if it cannot be found or used.
    """
    return read_spec(str(json_folder(config.model.pretrained, config.model.revision)))


def predict(
    config: RunConfig,
    *,
    phases: Collection[PhaseName] = tuple(PHASES),
    card_bytes: int | None = None,
    processes: int = 1,
    exact: bool = False,
) -> Estimate:
    """What a run will hold.

    Args:
        config: see ``rehearse``.
        phases: see ``rehearse``.
        card_bytes: see ``rehearse``.
        processes: how many hold a whole model each (DDP); the figures are of one of them.
        exact: rehearse every block in any case; only then are there curves to draw.

    Raises:
        ModelError, ConfigError: as ``rehearse``.
    """
    spec = spec_of(config)
    run, others = _of_the_run(config, phases), tuple(name for name in phases if name not in OF_THE_RUN)
    encoding = HelperJob(config, phases=others, card_bytes=card_bytes)
    # Two cores are worth two processes; what the other one made is read back.
    after: tuple[Phase, ...] = ()
    if run and (exact or not _extendable(config, spec.num_layers)):
        with beside(encoding):
            after = rehearsed(config, phases=run).phases
        if processes > 1:
            after = tuple(_in_buckets(phase) for phase in after)
    elif run:
        found = peaks(config, run, encoding, processes=processes)
        after = tuple(_whole(name, extended) for name, extended in found.items())
    before = rehearsed(config, phases=others, card_bytes=card_bytes).phases
    bucket = longest_bucket(config, spec)
    return Estimate((*before, *after), str(bucket), spec.tokens(bucket))


def peaks(
    config: RunConfig, phases: Collection[PhaseName] = OF_THE_RUN, *meanwhile: HelperJob, processes: int = 1
) -> Mapping[PhaseName, Extended]:
    """The peaks of the phases with the transformer in memory, those of ``phases`` that the run has.

    Args:
        config: see ``rehearse``.
        phases: which.
        meanwhile: what else is made on the second core, if there is time.
        processes: see ``predict``.

    Raises:
        ModelError, ConfigError: as ``rehearse``.
    """
    layers = spec_of(config).num_layers
    run = _of_the_run(config, phases)
    if not _extendable(config, layers):
        found = rehearsed(config, phases=run)
        return {name: _exactly(found.phase(name), processes) for name in run}
    # All phases of the run, whichever are asked for: they are made together, and are found together another time.
    every, states = _of_the_run(config, OF_THE_RUN), _uniform(config, layers)
    few, more = SHORT
    changed = _with_buckets if processes > 1 else dict
    jobs = [HelperJob(state, layers=few, phases=tuple(name for name in every if name != "decode")) for state in states]
    with beside(*jobs, *meanwhile):
        longer = [rehearsed(state, layers=more, phases=every) for state in states]
    short = [rehearsed(state, layers=few, phases=every) for state in states]
    pairs = list(zip(short, longer, strict=True))
    return {
        name: _mixed(config, layers, [extend(a.phase(name), b.phase(name), layers, changed) for a, b in pairs])
        for name in run
    }


def _of_the_run(config: RunConfig, phases: Collection[PhaseName]) -> tuple[PhaseName, ...]:
    there = OF_THE_RUN if samples_videos(config) else OF_THE_RUN[:1]
    return tuple(name for name in there if name in phases)


def _extendable(config: RunConfig, layers: int) -> bool:
    """Whether short models are shorter, and have the techniques' ends in them as the whole one has."""
    return layers > SHORT[1] and (not config.memory.streams or config.memory.ring < SHORT[0])


def _uniform(config: RunConfig, layers: int) -> list[RunConfig]:
    """The run with all blocks treated alike; where they are not, each of the ways in which they are treated."""
    memory = config.memory

    def changed(**values: object) -> RunConfig:
        return config.model_copy(update={"memory": memory.model_copy(update=values)})

    if memory.keep_attention is not None:
        every = _uniform(changed(keep_attention=None), layers)
        if memory.keep_attention >= layers:
            return every
        return [*_uniform(changed(checkpointing="full", keep_attention=None), layers), *every]
    return [changed(streamed_blocks="all")] if memory.streams else [config]


def _mixed(config: RunConfig, layers: int, uniform: Sequence[Extended]) -> Extended:
    """From models of ``layers`` blocks that are all treated alike (``_uniform``) to one whose blocks are not.

    The difference that a block makes which keeps attention, or does not stream, is counted by their number.
    """
    memory, found = config.memory, uniform[0]
    if len(uniform) > 1 and memory.keep_attention is not None:
        kept = round((uniform[1].nbytes - found.nbytes) * memory.keep_attention / layers)
        found = found.more({"saved activations": kept})
    streamed = memory.streamed_blocks
    if isinstance(streamed, int) and 0 < streamed < layers:
        slots, staying = min(memory.ring, streamed), layers - streamed
        weights = found.parts["streaming ring"] // memory.ring
        full = config.method.kind == "full"
        more = {
            "trainable weights" if full else "frozen weights": staying * weights,
            "streaming ring": (slots - memory.ring) * weights,
        }
        # Weights that train and are updated on the host are there in any case.
        found = found.more(more, pinned=0 if full else -staying * weights)
    return found


def _with_buckets(parts: Mapping[str, int]) -> dict[str, int]:
    """What one of several processes holds: from the first step on, all gradients lie in DDP's buckets all the time."""
    return {**parts, "gradients": max(parts.get("gradients", 0), parts.get("trainable weights", 0))}


def _in_buckets(phase: Phase) -> Phase:
    """A phase as one of several processes has it; where it is highest may change."""
    where, point = max(
        ((where, Point(point.at, _with_buckets(point.parts))) for where, point in phase.stations.items()),
        key=lambda station: station[1].nbytes,
    )
    curve = tuple(Point(point.at, _with_buckets(point.parts)) for point in phase.curve)
    return replace(phase, peak=point, where=where, curve=curve)


def _exactly(phase: Phase, processes: int) -> Extended:
    phase = _in_buckets(phase) if processes > 1 else phase
    return Extended(phase.peak.parts, phase.where, phase.pinned.nbytes, phase.pageable.nbytes, phase.note)


def _whole(name: PhaseName, found: Extended) -> Phase:
    return Phase(
        name=PHASES[name],
        peak=Point(0.0, found.parts),
        where=found.where,
        pinned=Point(0.0, {"pinned": found.pinned}),
        pageable=Point(0.0, {"pageable": found.pageable}),
        curve=(),
        spans=(),
        stations={},
        note=found.note,
    )
