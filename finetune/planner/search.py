"""The fastest memory section that fits a machine: legal ones in the order of their predicted time, until one fits."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np

from finetune.cogvideox.spec import spec_of
from finetune.config.rules import memory_traits
from finetune.config.schema import RunConfig
from finetune.core.errors import ConfigError
from finetune.core.gpu import to_gib, usable
from finetune.datasets.geometry import parse_bucket
from finetune.memory.config import MEMORY_LADDER, MemoryConfig, Traits
from finetune.methods.lora import LoraMethod
from finetune.planner.cost_model import Rates
from finetune.planner.estimate import longest_bucket, predict
from finetune.planner.memory_tracker import PHASES, RUN_PHASES, Phase, PhaseName
from finetune.planner.step_time import BYTES_PER_WEIGHT, StepCosts

QUANTISED = ("fp8", "int8", "nf4")
"""Bases that change the model, from the least to the most."""

_BLOCK_COUNTS = 14
"""In how many steps a number of blocks is varied."""

_WANTED = 3
"""Plans that fit, of as many kinds, to choose from."""

_MOST_CHECKED = 16
"""Candidates whose peak is predicted, at most, beside what guesses need."""

_MARGIN = 0.05
"""Of a card's memory, left free by a plan that is cut to fit: a prediction may be off by as much."""

_SLACK = 0.1
"""How far above a card's memory a candidate's guess may lie for it to be looked at more closely."""

_log = logging.getLogger(__name__)

Bytes: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]
"""Of the device in each phase of the run, and of the host as the last: float64 [phases + 1]."""


@dataclass(frozen=True)
class Machine:
    """What a run is planned for."""

    rates: Rates
    card_bytes: int
    """Of the GPU."""
    ram_bytes: int | None = None
    """Host memory that the run may take; None for any amount."""
    processes: int = 1
    """How many train a whole model each (DDP)."""

    @property
    def room(self) -> int:
        """Bytes of the card for tensors."""
        return usable(self.card_bytes, self.processes)

    def excess(self, nbytes: Bytes, *, margin: float = 0.0) -> float:
        """By how many times the card or the host is too small for these bytes; up to 1 they fit.

        Args:
            nbytes: what a run takes.
            margin: share of the card's memory that is to be left free.
        """
        on_card = nbytes[:-1].max() / max(self.room - margin * self.card_bytes, 1)
        return float(on_card if self.ram_bytes is None else max(on_card, nbytes[-1] / max(self.ram_bytes, 1)))


@dataclass(frozen=True)
class MemoryPlan:
    """A memory section with what it is predicted to cost."""

    memory: MemoryConfig
    step_s: float
    peaks: tuple[tuple[PhaseName, int], ...]
    """Bytes of device memory, by tensors, in the phases with the transformer in memory."""
    host_bytes: int
    """Pinned and pageable host memory."""

    @property
    def peak_bytes(self) -> int:
        """Of the highest phase."""
        return max(nbytes for _, nbytes in self.peaks)

    @property
    def highest(self) -> PhaseName:
        """The phase with the peak."""
        return max(self.peaks, key=lambda peak: peak[1])[0]

    @property
    def nbytes(self) -> Bytes:
        """All of its figures."""
        return np.array([*(nbytes for _, nbytes in self.peaks), self.host_bytes], dtype=np.float64)

    def fits(self, machine: Machine) -> bool:
        """Whether a machine holds it."""
        return machine.excess(self.nbytes) <= 1


@dataclass(frozen=True)
class SearchResult:
    """What a search has come to."""

    best: MemoryPlan | None
    """The fastest that fits; None where nothing does."""
    others: tuple[MemoryPlan, ...]
    """Plans that were looked at beside it: slower ones that fit, and faster ones that do not, by time."""
    smallest: MemoryPlan
    """The one for which the machine is too small by the least, on the device and on the host."""
    quantised_unasked: bool = False
    """Whether ``best`` has a quantised base only because nothing else fits."""
    notes: tuple[str, ...] = ()
    """What of the run does not fit whatever the memory section says."""


def fit_memory(config: RunConfig, machine: Machine, *, quantize: bool = False) -> tuple[RunConfig, SearchResult]:
    """The run with the fastest memory section that fits, and what the search has come to.

    Args:
        config: see ``search``.
        machine: see ``search``.
        quantize: see ``search``.

    Raises:
        ConfigError: if nothing fits; it says by how much, and what would.
    """
    result = search(config, machine, quantize=quantize)
    if result.best is None:
        raise ConfigError(
            f"no memory plan fits {to_gib(machine.card_bytes)}: {_shortage(result.smallest, machine)}",
            where=config.where("memory"),
            fix="; ".join(_remedies(config, machine, result.smallest)) or "use a larger card",
        )
    return _with_encoders(config, result, result.best.memory, machine)


def search(config: RunConfig, machine: Machine, *, quantize: bool = False) -> SearchResult:
    """Search the memory sections that are legal for a run.

    Args:
        config: of the run; its memory section says how T5 is held and how many clips go through at once, the rest of it
            is what is searched.
        machine: where it is to fit.
        quantize: whether a quantised base, which changes the model a little, may be chosen to be faster. Where nothing
            else fits it is chosen in any case, and said.

    Raises:
        ModelError, ConfigError: as ``predict``.
    """
    running = _Search(config, machine)
    result = running.run(running.candidates(["native", *(QUANTISED if quantize else ())]))
    smaller = [] if quantize else running.candidates(QUANTISED)  # none in full fine-tuning
    if result.best is None and smaller:
        again = running.run(smaller)
        smallest = min(result.smallest, again.smallest, key=lambda plan: machine.excess(plan.nbytes))
        others = tuple(sorted({*result.others, *again.others}, key=lambda plan: plan.step_s))
        result = SearchResult(again.best, others, smallest, quantised_unasked=again.best is not None)
    if result.best is None and result.smallest.fits(machine):  # with less left free than is wise
        others = tuple(plan for plan in result.others if plan != result.smallest)
        result = replace(result, best=result.smallest, others=others)
    return result


# ------------------------------------------------------------------------------------------------------- the candidates


@dataclass(frozen=True)
class Candidate:
    """A legal memory section, with the seconds that a step takes in it."""

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


def candidates(config: RunConfig, traits: Traits, rates: Rates, bases: Sequence[str]) -> list[Candidate]:
    """Legal memory sections, the fastest first; of equally fast ones, those with fewer techniques.

    Args:
        config: of the run; what of its memory section is not searched is kept: T5, clips at once, the ring.
        traits: of the run.
        rates: of the machine.
        bases: how the base may be held.
    """
    spec = spec_of(config.model, shipped=True)
    layers, costs = spec.num_layers, StepCosts(config, spec, rates)
    counts = sorted({*range(0, layers, max(layers // _BLOCK_COUNTS, 1)), layers})
    every: list[Candidate] = []
    for family in _families(config, traits, bases):
        keeping = (0,) if family.checkpointing == "none" else counts
        streaming = counts if _can_stream(family, traits) else (0,)
        for kept, streamed in itertools.product(keeping, streaming):
            changes: dict[str, object] = {}
            if kept:
                changes = {"checkpointing": "selective", "keep_attention": None if kept == layers else kept}
            if streamed:
                changes["streamed_blocks"] = "all" if streamed == layers else streamed
            memory = family.model_copy(update=changes)
            seconds = costs.of(memory).step_s
            every.append(Candidate(memory, family, kept / layers, streamed / layers, seconds))
    return sorted(every, key=lambda one: (round(one.step_s, 3), len(one.memory.changed())))


def _families(config: RunConfig, traits: Traits, bases: Sequence[str]) -> Iterator[MemoryConfig]:
    """Every legal choice of the ladder's techniques but streaming; earlier steps are taken before later ones."""
    start = _plain(config.memory).model_copy(update={"checkpointing": "none"})
    steps = [step.change for step in reversed(MEMORY_LADDER) if "streamed_blocks" not in step.change]
    for *taken, base in itertools.product(*[(False, True)] * len(steps), bases):
        changes: dict[str, object] = {"base": base}
        for step in itertools.compress(steps, taken):
            changes |= step
        family = start.model_copy(update=changes)
        if not family.faults(traits):
            yield family


def _can_stream(family: MemoryConfig, traits: Traits) -> bool:
    return not family.model_copy(update={"streamed_blocks": "all"}).faults(traits)


# ----------------------------------------------------------------------------------------------------------- the search

_NEEDS = {"optimizer_states": ("gradient_release",), "streamed_blocks": ("gradient_release", "optimizer_states")}
"""In full fine-tuning, what has to be chosen before an option may be."""


class _Search:
    """What is legal, what each section is predicted to take, which are worth a look; see ``search``."""

    def __init__(self, config: RunConfig, machine: Machine) -> None:
        self._config, self._machine = config, machine
        self._spec = spec_of(config.model, shipped=True)
        self._traits = memory_traits(config, self._spec, processes=machine.processes)
        self._costs = StepCosts(config, self._spec, machine.rates)
        self._plans: dict[MemoryConfig, MemoryPlan] = {}
        self._families: dict[MemoryConfig, tuple[Bytes, Bytes, Bytes]] = {}
        self._corrections: dict[MemoryConfig, Bytes] = {}
        """By how much the guesses of a family that was looked at are off."""

    def candidates(self, bases: Sequence[str]) -> list[Candidate]:
        """Memory sections that are legal for this run over ``bases``, fastest first by their predicted time."""
        return candidates(self._config, self._traits, self._machine.rates, bases)

    def plan(self, memory: MemoryConfig) -> MemoryPlan:
        """A memory section with its predicted peak."""
        if memory not in self._plans:
            _log.info("looking at memory plan %d: %s", len(self._plans) + 1, memory)
            config = self._config.model_copy(update={"memory": memory})
            estimate = predict(config, phases=RUN_PHASES, processes=self._machine.processes)
            names = {PHASES[name]: name for name in RUN_PHASES}
            peaks = tuple((names[phase.name], phase.peak.nbytes) for phase in estimate.phases)
            seconds = self._costs.of(memory).step_s
            self._plans[memory] = MemoryPlan(memory, seconds, peaks, estimate.host_bytes)
        return self._plans[memory]

    def run(self, every: Sequence[Candidate]) -> SearchResult:
        """Look at candidates, the fastest first, until three families have one that fits.

        What is looked at is what may fit by a guess. A look corrects the guesses of its family, so that the next one
        from there is right; then the fastest is looked for anew.

        Args:
            every: candidates, the fastest first; at least one.
        """
        fitting: list[tuple[Candidate, MemoryPlan]] = []
        seen: set[MemoryConfig] = set()
        while len(fitting) < _WANTED and len(seen) < _MOST_CHECKED:
            following = next((one for one in every if one.memory not in seen and self._is_worth(one, fitting)), None)
            if following is None:
                break
            seen.add(following.memory)
            plan = self.plan(following.memory)
            self._corrections[following.family] = plan.nbytes - self._guess(following)
            if self._excess(following, plan.nbytes) <= 1:
                fitting.append((following, plan))
        if not fitting:
            # Guesses add up what techniques save one by one; together they may save more.
            least = min(every, key=lambda one: self._machine.excess(self._corrected(one)))
            seen.add(least.memory)
            if self._excess(least, self.plan(least.memory).nbytes) <= 1:
                fitting.append((least, self.plan(least.memory)))
        best = min((plan for _, plan in fitting), key=lambda plan: plan.step_s, default=None)
        looked_at = {self._plans[memory] for memory in seen} | {self._plans[_plain(every[0].memory)]}
        others = sorted(looked_at - {best}, key=lambda plan: (plan.step_s, plan.peak_bytes))
        return SearchResult(best, tuple(others), min(looked_at, key=lambda plan: self._machine.excess(plan.nbytes)))

    def _is_worth(self, one: Candidate, fitting: Sequence[tuple[Candidate, MemoryPlan]]) -> bool:
        """Whether to look at a candidate: it may fit, and is faster than what fits, or of another kind."""
        if any(one.family == other.family and one.step_s >= plan.step_s for other, plan in fitting):
            return False
        slack = 0.0 if one.family in self._corrections else _SLACK
        return self._excess(one, self._corrected(one)) <= 1 + slack

    def _excess(self, one: Candidate, nbytes: Bytes) -> float:
        return self._machine.excess(nbytes, margin=_MARGIN if one.cut else 0.0)

    def _corrected(self, one: Candidate) -> Bytes:
        return self._guess(one) + self._corrections.get(one.family, 0.0)

    def _guess(self, one: Candidate) -> Bytes:
        """As if techniques did not know each other: what each takes away, or adds, by itself, summed up."""
        if one.family not in self._families:
            self._families[one.family] = self._guesses(one.family)
        family, keeping, streaming = self._families[one.family]
        return family + one.kept * keeping + one.streamed * streaming

    def _guesses(self, family: MemoryConfig) -> tuple[Bytes, Bytes, Bytes]:
        """A family's own figures, and what changes where every block keeps attention, and where every block streams."""
        plain = _plain(family)
        guess = self.plan(plain).nbytes
        nothing = np.zeros_like(guess)
        for option, value in family:
            if value != getattr(plain, option):
                guess = guess + self._difference(family, plain, option, value)
        if family.checkpointing == "none":
            return guess, nothing, nothing
        keeping = self._difference(family, plain, "checkpointing", "selective")
        if not _can_stream(family, self._traits):
            return guess, keeping, nothing
        streaming = self._difference(family, plain, "streamed_blocks", "all")
        if family.modulation == "host":  # where it is by then, a block has no adaLN weights left to stream
            away = 1 - family.ring / self._spec.num_layers
            streaming = streaming - away * self._difference(family, plain, "modulation", "host")
        return guess, keeping, streaming * (BYTES_PER_WEIGHT[family.base] / BYTES_PER_WEIGHT["native"])

    def _difference(self, family: MemoryConfig, plain: MemoryConfig, option: str, value: object) -> Bytes:
        needs = {name: getattr(family, name) for name in _NEEDS.get(option, ()) if self._traits.full}
        without = plain.model_copy(update=needs)
        before, after = (self.plan(memory).nbytes for memory in (without, without.model_copy(update={option: value})))
        return after - before


def _plain(memory: MemoryConfig) -> MemoryConfig:
    """Without any technique that is searched."""
    return MemoryConfig(text_encoder=memory.text_encoder, clips_at_once=memory.clips_at_once, ring=memory.ring)


# -------------------------------------------------------------------------------------- what a search is put to use for


def _with_encoders(
    config: RunConfig, result: SearchResult, memory: MemoryConfig, machine: Machine
) -> tuple[RunConfig, SearchResult]:
    """Stream T5 where it does not fit whole; say where an encoder does not fit in any case.

    That refuses no run: its cache may have been made elsewhere.
    """
    room, ram = machine.room, machine.ram_bytes

    def encoder(name: PhaseName, memory: MemoryConfig) -> Phase | None:
        run = config.model_copy(update={"memory": memory})
        return next(iter(predict(run, phases=[name], card_bytes=room).phases), None)

    text = encoder("text", memory)
    if memory.text_encoder == "device" and text is not None and text.peak.nbytes > room:
        memory = memory.model_copy(update={"text_encoder": "streamed"})
    notes: list[str] = []
    fixes: dict[PhaseName, str] = {"text": "lower cache.text_batch_size", "encode": "use smaller buckets"}
    for name, fix in fixes.items():
        if (phase := encoder(name, memory)) is None:
            continue
        if (over := phase.peak.nbytes - room) > 0:
            notes.append(f"the {phase.name} needs {to_gib(over)} more: precompute on a larger card, or {fix}")
        if ram is not None and (over := phase.pinned - ram) > 0:
            notes.append(f"the {phase.name} needs {to_gib(over)} more of host memory: precompute on another machine")
    return config.model_copy(update={"memory": memory}), replace(result, notes=tuple(notes))


def _shortage(smallest: MemoryPlan, machine: Machine) -> str:
    """By how much the smallest plan is too large."""
    over, ram = smallest.peak_bytes - machine.room, machine.ram_bytes
    words = [f"the smallest needs {to_gib(over)} more, in {PHASES[smallest.highest]}"] if over > 0 else []
    if ram is not None and smallest.host_bytes > ram:
        host, more = to_gib(smallest.host_bytes), to_gib(smallest.host_bytes - ram)
        which = "and" if words else "the smallest needs"
        words.append(f"{which} {host} of host memory, {more} more than the run may have")
    return " ".join(words)


def _remedies(config: RunConfig, machine: Machine, smallest: MemoryPlan) -> Iterator[str]:
    """Changes to the run or the host, other than to the memory section, after which a plan fits."""
    if machine.ram_bytes is not None:
        unbounded = search(config, replace(machine, ram_bytes=None)).best
        if unbounded is not None:
            yield f"{to_gib(unbounded.host_bytes)} of host memory would do (--ram, or memory.ram)"
    for words, changed in _changes(config, videos=smallest.highest != "train"):
        memory = smallest.memory
        traits = memory_traits(changed, spec_of(changed.model, shipped=True), processes=machine.processes)
        if memory.faults(traits):  # what full fine-tuning needs is not for a LoRA
            memory = MemoryConfig().fallbacks(traits)[-1]
        plan = _Search(changed, machine).plan(memory)
        if plan.fits(machine):
            yield f"{words} fits, with {to_gib(plan.peak_bytes)}"


def _changes(config: RunConfig, *, videos: bool) -> Iterator[tuple[str, RunConfig]]:
    """Changes that may help, each with the words for it."""
    train, method = config.train, config.method

    def changed(section: str, **values: object) -> RunConfig:
        return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})

    if videos:
        yield "validation.samples: []", changed("validation", samples=())
    if train.batch_size > 1:
        smaller = changed("train", batch_size=1, accumulation=train.accumulation * train.batch_size)
        yield "train.batch_size: 1", smaller
    spec = spec_of(config.model, shipped=True)
    longest = longest_bucket(config, spec)
    for frames in (25, 17, 9):
        bucket = parse_bucket(f"{frames}x{longest.height}x{longest.width}")
        if frames < longest.frames and not spec.check_bucket(bucket):
            yield f"data.buckets: [{bucket}]", changed("data", buckets=(bucket,))
            break
    if method.kind == "full":
        yield "method.kind: lora", config.model_copy(update={"method": LoraMethod()})
    elif isinstance(method, LoraMethod) and method.rank > 32:
        yield "method.rank: 32", changed("method", rank=32)
