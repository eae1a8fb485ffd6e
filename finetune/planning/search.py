"""The fastest memory plan that fits: candidates in the order of their predicted time, checked until one fits."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.cards import usable
from finetune.config import RunConfig, memory_traits
from finetune.facts import Facts
from finetune.memory import MemoryConfig, Traits
from finetune.planning.cost import step_cost
from finetune.planning.names import PhaseName
from finetune.planning.predict import facts_of, peaks
from finetune.planning.rates import Rates

QUANTISED = ("fp8", "int8", "nf4")
"""Bases that change the model, from the least to the most."""
_MOST_CHECKED = 16
"""Candidates whose peak is computed, at most."""
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

    @property
    def training_bytes(self) -> int:
        """The peak of training."""
        return dict(self.peaks)["train"]

    def fits(self, card_bytes: int, ram_bytes: int | None) -> bool:
        """Whether a machine holds it."""
        return self.peak_bytes <= usable(card_bytes) and (ram_bytes is None or self.host_bytes <= ram_bytes)


@dataclass(frozen=True)
class Found:
    """What a search found."""

    best: Plan | None
    """The fastest that fits; None where nothing does."""
    others: tuple[Plan, ...]
    """Plans that were looked at beside it: slower ones that fit, and faster ones that do not, by time."""
    smallest: Plan
    """The one that needs the least device memory."""
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

    Raises:
        ModelError, ConfigError: as ``rehearse``.
    """
    finder = Finder(config, rates, card_bytes, ram_bytes)
    found = finder.run(finder.candidates(QUANTISED if quantize else ()))
    if found.best is None and not quantize:
        again = finder.run(finder.candidates(QUANTISED, native=False))
        smallest = min(found.smallest, again.smallest, key=lambda plan: plan.peak_bytes)
        others = tuple(sorted({*found.others, *again.others}, key=lambda plan: plan.step_s))
        return Found(again.best, others, smallest, quantised_unasked=again.best is not None)
    return found


class Finder:
    """One search: what is legal, what each state is predicted to take, which are worth a look.

    Args:
        config: see ``search``.
        rates: see ``search``.
        card_bytes: see ``search``.
        ram_bytes: see ``search``.
    """

    def __init__(self, config: RunConfig, rates: Rates, card_bytes: int, ram_bytes: int | None) -> None:
        self._config, self._rates = config, rates
        self._card, self._ram = card_bytes, ram_bytes
        self._facts: Facts = facts_of(config)
        self._traits: Traits = memory_traits(config, self._facts)
        self._plans: dict[MemoryConfig, Plan] = {}

    @property
    def _filled(self) -> float:
        """Bytes up to which a plan may be filled."""
        return usable(self._card) - self._card * _MARGIN

    def candidates(self, bases: Sequence[str], *, native: bool = True) -> list[MemoryConfig]:
        """Legal states, the fastest first; of equally fast ones, the one with fewer techniques."""
        states = dict.fromkeys(self._states([*(["native"] if native else []), *bases]))
        return sorted(states, key=lambda state: (round(self._step_s(state), 3), len(state.model_fields_set)))

    def _states(self, bases: Sequence[str]) -> Iterator[MemoryConfig]:
        release: list[dict[str, str]] = [{}]
        if self._traits.full:
            release += [{"gradient_release": "exact"}, {"gradient_release": "exact", "optimizer_states": "host"}]
            bases = [base for base in bases if base == "native"]
        kept = {name: getattr(self._config.memory, name) for name in ("text_encoder", "clips_at_once", "ring")}
        for checkpointing, block, activations, modulation, streamed, base, released in itertools.product(
            ("none", "selective", "full"),
            ("stock", "lean"),
            ("device", "host"),
            ("device", "host"),
            (0, "all"),
            bases,
            release,
        ):
            values: dict[str, Any] = {
                "checkpointing": checkpointing,
                "block": block,
                "activations": activations,
                "modulation": modulation,
                "streamed_blocks": streamed,
                "base": base,
                **released,
            }
            default = MemoryConfig.model_fields
            told = {name: value for name, value in values.items() if value != default[name].default}
            state = MemoryConfig(**kept, **told)
            if not state.faults(self._traits):
                yield state

    def _step_s(self, state: MemoryConfig) -> float:
        return step_cost(self._config, self._facts, state, self._rates).step_s

    def plan(self, state: MemoryConfig) -> Plan:
        """The state with its predicted peak."""
        if state not in self._plans:
            found = peaks(self._config.model_copy(update={"memory": state}))
            host = max(phase.pinned + phase.pageable for phase in found.values())
            by_phase = tuple((name, phase.nbytes) for name, phase in found.items())
            self._plans[state] = Plan(state, self._step_s(state), by_phase, host)
        return self._plans[state]

    def run(self, states: Sequence[MemoryConfig]) -> Found:
        """Look at states in their order until three fit and no other can be faster than the best of them.

        Those that are far from fitting are passed over.
        """
        room = usable(self._card) * (1 + _SLACK)
        within = [state for state in states if self._estimate(state) <= room][:_MOST_CHECKED]
        fitting: list[Plan] = []
        failed: list[Plan] = []
        for state in within:
            if len(fitting) >= 3 and self._step_s(state) > min(plan.step_s for plan in fitting):
                break
            plan = self.plan(state)
            if plan.fits(self._card, self._ram):
                fitting += [plan, *self._streaming_some(plan)]
            else:
                failed.append(plan)
                fitting += [*self._keeping_some(plan), *self._streaming_some(plan)]
        best = min(fitting, key=lambda plan: plan.step_s, default=None)
        if best is None:
            # Estimates add up what techniques save one by one; together they may save more.
            least = self.plan(min(states, key=self._estimate))
            (fitting if least.fits(self._card, self._ram) else failed).append(least)
            best = next(iter(fitting), None)
        seen = sorted({*fitting, *failed, *self._plans.values()}, key=lambda plan: (plan.step_s, plan.peak_bytes))
        smallest = min(seen, key=lambda plan: plan.peak_bytes)
        return Found(best, tuple(plan for plan in seen if plan is not best), smallest)

    def _estimate(self, state: MemoryConfig) -> float:
        """The peak in bytes as if techniques did not know each other: what each takes away by itself, added up."""
        plain = MemoryConfig(ring=state.ring, clips_at_once=state.clips_at_once)
        estimate = {name: float(nbytes) for name, nbytes in self.plan(plain).peaks}
        for option, value in _chosen(state).items():
            needs = {name: getattr(state, name) for name in _NEEDS.get(option, ()) if self._traits.full}
            without = plain.model_copy(update=needs)
            before = dict(self.plan(without).peaks)
            for name, nbytes in self.plan(without.model_copy(update={option: value})).peaks:
                estimate[name] += nbytes - before[name]
        return max(estimate.values())

    def _keeping_some(self, plan: Plan) -> list[Plan]:
        """A plan that keeps attention in as many blocks as fit, where all of them do not."""
        state = plan.memory
        if state.checkpointing != "selective" or state.keep_attention is not None:
            return []
        layers = self._facts.num_layers
        least = self.plan(state.model_copy(update={"checkpointing": "full"}))
        each = max((plan.training_bytes - least.training_bytes) / layers, 1)
        blocks = int((self._filled - least.training_bytes) // each)
        if not 0 < blocks < layers:
            return []
        some = self.plan(state.model_copy(update={"keep_attention": blocks}))
        return [some] if some.fits(self._card, self._ram) else []

    def _streaming_some(self, plan: Plan) -> list[Plan]:
        """A plan that streams as few blocks as the card needs, in place of all."""
        state, layers = plan.memory, self._facts.num_layers
        if state.streamed_blocks != "all" or not plan.fits(self._card, None):
            return []
        one = state.model_copy(update={"streamed_blocks": layers - 1})
        each = max(self.plan(one).peak_bytes - plan.peak_bytes, 1)
        del self._plans[one]  # which only shows what a block takes
        staying = int((self._filled - plan.peak_bytes) // each)
        if not 0 < staying < layers - state.ring:
            return []
        some = self.plan(state.model_copy(update={"streamed_blocks": layers - staying}))
        return [some] if some.fits(self._card, self._ram) else []


def _chosen(state: MemoryConfig) -> dict[str, Any]:
    """What a state has otherwise than the default, of what is searched."""
    default = MemoryConfig.model_fields
    return {option: getattr(state, option) for option in _SEARCHED if getattr(state, option) != default[option].default}


_SEARCHED = (
    "checkpointing",
    "block",
    "activations",
    "modulation",
    "streamed_blocks",
    "base",
    "gradient_release",
    "optimizer_states",
)
_NEEDS = {"optimizer_states": ("gradient_release",), "streamed_blocks": ("gradient_release", "optimizer_states")}
"""In full fine-tuning, what has to be chosen before an option may be."""
