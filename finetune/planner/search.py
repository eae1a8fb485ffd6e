"""The memory sections that a search chooses from: every legal one, with the seconds that a step takes in it."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from finetune.cogvideox.spec import ModelSpec
from finetune.config.rules import memory_traits
from finetune.config.schema import RunConfig
from finetune.core.errors import ConfigError
from finetune.core.gpu import to_gib, usable
from finetune.datasets.geometry import parse_bucket
from finetune.memory.config import MemoryConfig, Traits
from finetune.methods.lora import LoraMethod
from finetune.planner.cost_model import BYTES, Rates, step_cost
from finetune.planner.estimate import longest_bucket
from finetune.planner.helper_process import second_core
from finetune.planner.memory_tracker import Phase
from finetune.planner.phases import PHASES, PhaseName
from finetune.planner.predict import peaks, predict, spec_of

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


def candidates(
    config: RunConfig, spec: ModelSpec, traits: Traits, rates: Rates, bases: Sequence[str]
) -> list[Candidate]:
    """Legal memory sections, the fastest first; of equally fast ones, those with fewer techniques.

    Args:
        config: of the run; what of its memory section is not searched is kept: T5, clips at once, the ring.
        spec: of its model.
        traits: of the run.
        rates: of the machine.
        bases: how the base may be held.
    """
    layers = spec.num_layers
    counts = sorted({*range(0, layers, max(layers // _STEPS, 1)), layers})
    found: list[Candidate] = []
    for family in _families(config, traits, bases):
        keeping = (0,) if family.checkpointing == "none" else counts
        streaming = counts if can_stream(family, traits) else (0,)
        for kept, streamed in itertools.product(keeping, streaming):
            memory = family.model_copy(update=_numbers(kept, streamed, layers))
            seconds = step_cost(config, spec, memory, rates).step_s
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


# -------- The fastest memory plan that fits: candidates in the order of their predicted time, checked until one fits.

_log = logging.getLogger(__name__)

QUANTISED = ("fp8", "int8", "nf4")
"""Bases that change the model, from the least to the most."""

_WANTED = 3
"""Plans that fit, of as many kinds, to choose from."""

_MOST_CHECKED = 16
"""Candidates whose peak is computed, at most, beside what estimates need."""

_MARGIN = 0.05
"""Of a card's memory, left free by a plan that is cut to fit: a prediction may be off by as much."""

_SLACK = 0.1
"""How far above a card's memory a candidate's estimate may lie for it to be looked at more closely."""


@dataclass(frozen=True)
class Plan:
    """A memory state with what it is predicted to cost."""

    memory: MemoryConfig
    step_s: float
    peaks: tuple[tuple[PhaseName, int], ...]
    """Of device memory, by tensors, in the phases with the transformer in memory."""
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

    def fits(self, card_bytes: int, ram_bytes: int | None, processes: int = 1) -> bool:
        """Whether a machine holds it."""
        on_card = self.peak_bytes <= usable(card_bytes, processes)
        return on_card and (ram_bytes is None or self.host_bytes <= ram_bytes)


@dataclass(frozen=True)
class Found:
    """What a search found."""

    best: Plan | None
    """The fastest that fits; None where nothing does."""
    others: tuple[Plan, ...]
    """Plans that were looked at beside it: slower ones that fit, and faster ones that do not, by time."""
    smallest: Plan
    """The one for which the machine is too small by the least, on the device and on the host."""
    quantised_unasked: bool = False
    """Whether ``best`` has a quantised base only because nothing else fits."""
    notes: tuple[str, ...] = ()
    """What of the run does not fit whatever the memory section says."""


def search(
    config: RunConfig,
    rates: Rates,
    *,
    card_bytes: int,
    ram_bytes: int | None = None,
    quantize: bool = False,
    processes: int = 1,
) -> Found:
    """Search the memory states that are legal for a run.

    Args:
        config: of the run; its memory section says how T5 is held and how many clips go through at once, the rest of it
            is what is searched.
        rates: of the machine.
        card_bytes: of the GPU.
        ram_bytes: host memory for the plan; None for any amount.
        quantize: whether a quantised base, which changes the model a little, may be chosen to be faster. Where nothing
            else fits it is chosen in any case, and said.
        processes: how many train a whole model each (DDP).

    Raises:
        ModelError, ConfigError: as ``rehearse``.
    """
    finder = Finder(config, rates, card_bytes, ram_bytes, processes)
    found = finder.run(finder.candidates(["native", *(QUANTISED if quantize else ())]))
    smaller = [] if quantize else finder.candidates(QUANTISED)  # none in full fine-tuning
    if found.best is None and smaller:
        again = finder.run(smaller)
        smallest = min(found.smallest, again.smallest, key=finder.excess)
        others = tuple(sorted({*found.others, *again.others}, key=lambda plan: plan.step_s))
        found = Found(again.best, others, smallest, quantised_unasked=again.best is not None)
    if found.best is None and found.smallest.fits(card_bytes, ram_bytes, processes):
        others = tuple(plan for plan in found.others if plan != found.smallest)
        found = replace(found, best=found.smallest, others=others)  # with less left free than is wise
    return found


class _Estimate(NamedTuple):
    """Bytes."""

    device: Mapping[PhaseName, float]
    host: float

    def plus(self, other: _Estimate, share: float = 1.0) -> _Estimate:
        device = {name: nbytes + share * other.device[name] for name, nbytes in self.device.items()}
        return _Estimate(device, self.host + share * other.host)


class Finder:
    """One search: what is legal, what each state is predicted to take, which are worth a look.

    Args:
        config: see ``search``.
        rates: see ``search``.
        card_bytes: see ``search``.
        ram_bytes: see ``search``.
        processes: see ``search``.
    """

    def __init__(
        self, config: RunConfig, rates: Rates, card_bytes: int, ram_bytes: int | None, processes: int = 1
    ) -> None:
        self._config, self._rates = config, rates
        self._processes = processes
        self._card, self._ram = card_bytes, ram_bytes
        self._room = usable(card_bytes, processes)
        self._spec: ModelSpec = spec_of(config)
        self._traits: Traits = memory_traits(config, self._spec, processes=processes)
        self._plans: dict[MemoryConfig, Plan] = {}
        self._families: dict[MemoryConfig, tuple[_Estimate, _Estimate, _Estimate]] = {}
        self._off: dict[MemoryConfig, _Estimate] = {}
        """By how much the estimates of a family that was looked at are to be corrected."""

    def plan(self, memory: MemoryConfig) -> Plan:
        """A memory section with its predicted peak."""
        if memory not in self._plans:
            _log.info("looking at memory plan %d: %s", len(self._plans) + 1, _in_words(memory))
            found = peaks(self._config.model_copy(update={"memory": memory}), processes=self._processes)
            host = max(phase.pinned + phase.pageable for phase in found.values())
            by_phase = tuple((name, phase.nbytes) for name, phase in found.items())
            seconds = step_cost(self._config, self._spec, memory, self._rates).step_s
            self._plans[memory] = Plan(memory, seconds, by_phase, host)
        return self._plans[memory]

    def candidates(self, bases: Sequence[str]) -> list[Candidate]:
        """See ``candidates``."""
        return candidates(self._config, self._spec, self._traits, self._rates, bases)

    def run(self, every: Sequence[Candidate]) -> Found:
        """Look at candidates, the fastest first, until three families have one that fits.

        What is looked at is what may fit by estimate. A look corrects the estimates of its family, so that the next one
        from there is right; then the fastest is looked for anew.

        Args:
            every: candidates, the fastest first; at least one.
        """
        fitting: list[tuple[Candidate, Plan]] = []
        seen: set[MemoryConfig] = set()
        while len(fitting) < _WANTED and len(seen) < _MOST_CHECKED:
            following = next((one for one in every if one.memory not in seen and self._worth(one, fitting)), None)
            if following is None:
                break
            seen.add(following.memory)
            plan = self.plan(following.memory)
            self._off[following.family] = _estimate_of(plan).plus(self._estimate(following), -1.0)
            if self._fits(following, _estimate_of(plan)):
                fitting.append((following, plan))
        if not fitting:
            # Estimates add up what techniques save one by one; together they may save more.
            least = min(every, key=lambda one: self._excess(self._corrected(one)))
            seen.add(least.memory)
            if self._fits(least, _estimate_of(self.plan(least.memory))):
                fitting.append((least, self.plan(least.memory)))
        best = min((plan for _, plan in fitting), key=lambda plan: plan.step_s, default=None)
        looked_at = {self._plans[memory] for memory in seen} | {self._plans[_plain(every[0].memory)]}
        others = sorted(looked_at - {best}, key=lambda plan: (plan.step_s, plan.peak_bytes))
        smallest = min(looked_at, key=self.excess)
        return Found(best, tuple(others), smallest)

    def _worth(self, one: Candidate, fitting: Sequence[tuple[Candidate, Plan]]) -> bool:
        """Whether to look at a candidate: it may fit, and is faster than what fits, or of another kind."""
        if any(one.family == other.family and one.step_s >= plan.step_s for other, plan in fitting):
            return False
        return self._fits(one, self._corrected(one), slack=0.0 if one.family in self._off else _SLACK)

    def _corrected(self, one: Candidate) -> _Estimate:
        estimate = self._estimate(one)
        return estimate.plus(self._off[one.family]) if one.family in self._off else estimate

    def _fits(self, one: Candidate, estimate: _Estimate, slack: float = 0.0) -> bool:
        room = self._room - (self._card * _MARGIN if one.cut else 0)
        if max(estimate.device.values()) > room * (1 + slack):
            return False
        return self._ram is None or estimate.host <= self._ram * (1 + slack)

    def excess(self, plan: Plan) -> float:
        """By how many times the card or the host is too small for a plan; below 1 it fits."""
        return self._excess(_estimate_of(plan))

    def _excess(self, estimate: _Estimate) -> float:
        host = 0.0 if self._ram is None else estimate.host / max(self._ram, 1)
        return max(max(estimate.device.values()) / max(self._room, 1), host)

    def _estimate(self, one: Candidate) -> _Estimate:
        """As if techniques did not know each other: what each takes away, or adds, by itself, summed up."""
        if one.family not in self._families:
            self._families[one.family] = self._estimates_of(one.family)
        estimate, keeping, streaming = self._families[one.family]
        return estimate.plus(keeping, one.kept).plus(streaming, one.streamed)

    def _estimates_of(self, family: MemoryConfig) -> tuple[_Estimate, _Estimate, _Estimate]:
        """A family's own figures, and what changes where every block keeps attention, and where every block streams."""
        plain = _plain(family)
        estimate = _estimate_of(self.plan(plain))
        nothing = estimate.plus(estimate, -1.0)
        for option, value in _chosen(family).items():
            estimate = estimate.plus(self._difference(family, plain, option, value))
        if family.checkpointing == "none":
            return estimate, nothing, nothing
        keeping = self._difference(family, plain, "checkpointing", "selective")
        if not can_stream(family, self._traits):
            return estimate, keeping, nothing
        streaming = self._difference(family, plain, "streamed_blocks", "all")
        if family.modulation == "host":  # where it is by then, a block has no adaLN weights left to stream
            away = 1 - family.ring / self._spec.num_layers
            streaming = streaming.plus(self._difference(family, plain, "modulation", "host"), -away)
        return estimate, keeping, nothing.plus(streaming, BYTES[family.base] / BYTES["native"])

    def _difference(self, family: MemoryConfig, plain: MemoryConfig, option: str, value: object) -> _Estimate:
        needs = {name: getattr(family, name) for name in _NEEDS.get(option, ()) if self._traits.full}
        without = plain.model_copy(update=needs)
        after = _estimate_of(self.plan(without.model_copy(update={option: value})))
        return after.plus(_estimate_of(self.plan(without)), -1.0)


def _in_words(memory: MemoryConfig) -> str:
    chosen = _chosen(memory) | ({"streamed_blocks": memory.streamed_blocks} if memory.streams else {})
    return ", ".join(f"{name}: {value}" for name, value in chosen.items()) or "defaults"


def _estimate_of(plan: Plan) -> _Estimate:
    return _Estimate({name: float(nbytes) for name, nbytes in plan.peaks}, float(plan.host_bytes))


def _plain(memory: MemoryConfig) -> MemoryConfig:
    """Without any technique that is searched."""
    return MemoryConfig(ring=memory.ring, clips_at_once=memory.clips_at_once)


def _chosen(family: MemoryConfig) -> dict[str, Any]:
    """What a family has otherwise than the default, of what is searched."""
    default = MemoryConfig.model_fields
    return {name: getattr(family, name) for name in _SEARCHED if getattr(family, name) != default[name].default}


_SEARCHED = ("checkpointing", "block", "activations", "modulation", "base", "gradient_release", "optimizer_states")

_NEEDS = {"optimizer_states": ("gradient_release",), "streamed_blocks": ("gradient_release", "optimizer_states")}
"""In full fine-tuning, what has to be chosen before an option may be."""


# -------- A search's outcome, put to use: the run with the plan that was found, or what would have to change for one
# to fit.


def resolve(
    config: RunConfig,
    rates: Rates,
    *,
    card_bytes: int,
    ram_bytes: int | None = None,
    quantize: bool = False,
    processes: int = 1,
) -> tuple[RunConfig, Found]:
    """The run with the fastest memory section that fits, and what was found on the way.

    Args:
        config: see ``search``.
        rates: see ``search``.
        card_bytes: see ``search``.
        ram_bytes: see ``search``.
        quantize: see ``search``.
        processes: see ``search``.

    Raises:
        ConfigError: if nothing fits; it says by how much, and what would.
    """
    with second_core():
        found = search(
            config, rates, card_bytes=card_bytes, ram_bytes=ram_bytes, quantize=quantize, processes=processes
        )
        if found.best is not None:
            return _with_encoders(config, found, found.best.memory, usable(card_bytes, processes), ram_bytes)
        raise ConfigError(
            f"no memory plan fits {to_gib(card_bytes)}: {shortage(found, usable(card_bytes, processes), ram_bytes)}",
            where=config.where("memory"),
            fix="; ".join(remedies(config, rates, found, card_bytes, ram_bytes, processes)) or "use a larger card",
        )


def _with_encoders(
    config: RunConfig, found: Found, memory: MemoryConfig, room: int, ram_bytes: int | None
) -> tuple[RunConfig, Found]:
    """Stream T5 where it does not fit whole; say where an encoder does not fit in any case.

    That refuses no run: its cache may have been made elsewhere.
    """
    notes: list[str] = []

    def passing(phase: PhaseName, state: MemoryConfig) -> Phase | None:
        run = config.model_copy(update={"memory": state})
        return next(iter(predict(run, phases=[phase], card_bytes=room).phases), None)

    text = passing("text", memory)
    if memory.text_encoder == "device" and text is not None and text.peak.nbytes > room:
        memory = memory.model_copy(update={"text_encoder": "streamed"})
    fixes: dict[PhaseName, str] = {"text": "lower cache.text_batch_size", "encode": "use smaller buckets"}
    for name, fix in fixes.items():
        phase = passing(name, memory)
        if phase is not None and (over := phase.peak.nbytes - room) > 0:
            notes.append(f"the {phase.name} needs {to_gib(over)} more: precompute on a larger card, or {fix}")
        if phase is not None and ram_bytes is not None and (over := phase.pinned.nbytes - ram_bytes) > 0:
            notes.append(f"the {phase.name} needs {to_gib(over)} more of host memory: precompute on another machine")
    return config.model_copy(update={"memory": memory}), replace(found, notes=tuple(notes))


def shortage(found: Found, room: int, ram_bytes: int | None) -> str:
    """By how much the smallest plan is too large for ``room`` bytes of tensors."""
    plan = found.smallest
    over = plan.peak_bytes - room
    said = [f"the smallest needs {to_gib(over)} more, in {PHASES[plan.highest]}"] if over > 0 else []
    if ram_bytes is not None and plan.host_bytes > ram_bytes:
        more = to_gib(plan.host_bytes - ram_bytes)
        which = "and" if said else "the smallest needs"
        said.append(f"{which} {to_gib(plan.host_bytes)} of host memory, {more} more than the run may have")
    return " ".join(said)


def remedies(
    config: RunConfig, rates: Rates, found: Found, card_bytes: int, ram_bytes: int | None, processes: int
) -> Iterator[str]:
    """Changes to the run or the host, other than to the memory section, after which a plan fits."""
    if ram_bytes is not None:
        unbounded = search(config, rates, card_bytes=card_bytes, processes=processes).best
        if unbounded is not None:
            yield f"{to_gib(unbounded.host_bytes)} of host memory would do (--ram, or memory.ram)"
    for words, changed in _changes(config, videos=found.smallest.highest != "train"):
        finder = Finder(changed, rates, card_bytes, ram_bytes, processes)
        state = found.smallest.memory
        traits = memory_traits(changed, spec_of(changed), processes=processes)
        if state.faults(traits):  # what full fine-tuning needs is not for a LoRA
            state = MemoryConfig().fallbacks(traits)[-1]
        plan = finder.plan(state)
        if plan.fits(card_bytes, ram_bytes, processes):
            yield f"{words} fits, with {to_gib(plan.peak_bytes)}"


def _changes(config: RunConfig, *, videos: bool) -> Iterator[tuple[str, RunConfig]]:
    train, data = config.train, config.data
    if videos:
        without = config.validation.model_copy(update={"samples": ()})
        yield "validation.samples: []", config.model_copy(update={"validation": without})
    if train.batch_size > 1:
        smaller = train.model_copy(update={"batch_size": 1, "accumulation": train.accumulation * train.batch_size})
        yield "train.batch_size: 1", config.model_copy(update={"train": smaller})
    spec = spec_of(config)
    longest = longest_bucket(config, spec)
    for frames in (25, 17, 9):
        bucket = parse_bucket(f"{frames}x{longest.height}x{longest.width}")
        if frames < longest.frames and not spec.check_bucket(bucket):
            buckets = data.model_copy(update={"buckets": (bucket,)})
            yield f"data.buckets: [{bucket}]", config.model_copy(update={"data": buckets})
            break
    if isinstance(config.method, LoraMethod):
        if config.method.rank > 32:
            method = config.method.model_copy(update={"rank": 32})
            yield "method.rank: 32", config.model_copy(update={"method": method})
    else:
        yield "method.kind: lora", config.model_copy(update={"method": LoraMethod()})
