"""The fastest memory plan that fits: candidates in the order of their predicted time, checked until one fits."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.cards import GIB, to_gib, usable
from finetune.config import RunConfig, memory_traits
from finetune.errors import ConfigError
from finetune.facts import Facts
from finetune.geometry import parse_bucket
from finetune.memory import MemoryConfig, Traits
from finetune.planning.cost import step_cost
from finetune.planning.extend import SHORT
from finetune.planning.names import PhaseName
from finetune.planning.predict import extended, facts_of, predict
from finetune.planning.rates import Rates
from finetune.trainers.method import LoraMethod

QUANTISED = ("fp8", "int8", "nf4")
"""Bases that change the model, from the least to the most."""
_TRAIN: tuple[PhaseName, ...] = ("train",)
_TEXT: tuple[PhaseName, ...] = ("text",)
_MOST_CHECKED = 16
"""Candidates whose peak is computed, at most."""
_SLACK = 0.1
"""How far above a card's memory a candidate's estimate may lie for it to be looked at more closely."""


@dataclass(frozen=True)
class Plan:
    """A memory state with what it is predicted to cost."""

    memory: MemoryConfig
    step_s: float
    peak_bytes: int
    """Of device memory, by tensors."""
    host_bytes: int
    """Pinned and pageable host memory."""

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
    finder = _Search(config, rates, card_bytes, ram_bytes)
    found = finder.run(finder.candidates(QUANTISED if quantize else ()))
    if found.best is None and not quantize:
        again = finder.run(finder.candidates(QUANTISED, native=False))
        smallest = min(found.smallest, again.smallest, key=lambda plan: plan.peak_bytes)
        others = tuple(sorted({*found.others, *again.others}, key=lambda plan: plan.step_s))
        return Found(again.best, others, smallest, quantised_unasked=again.best is not None)
    return found


class _Search:
    def __init__(self, config: RunConfig, rates: Rates, card_bytes: int, ram_bytes: int | None) -> None:
        self._config, self._rates = config, rates
        self._card, self._ram = card_bytes, ram_bytes
        self._facts: Facts = facts_of(config)
        self._traits: Traits = memory_traits(config, self._facts)
        self._plans: dict[MemoryConfig, Plan] = {}

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
            config = self._config.model_copy(update={"memory": state})
            if self._facts.num_layers <= SHORT[1]:
                phase = predict(config, phases=_TRAIN).phase("train")
                peak, host = phase.peak.nbytes, phase.pinned.nbytes + phase.pageable.nbytes
            else:
                found = extended(config, self._facts.num_layers)
                peak, host = found.nbytes, found.pinned + found.pageable
            self._plans[state] = Plan(state, self._step_s(state), peak, host)
        return self._plans[state]

    def run(self, states: Sequence[MemoryConfig]) -> Found:
        """Look at states in their order until three fit; those that are far from fitting are passed over."""
        room = usable(self._card) * (1 + _SLACK)
        within = [state for state in states if self._estimate(state) <= room][:_MOST_CHECKED]
        fitting: list[Plan] = []
        failed: list[Plan] = []
        for state in within:
            if len(fitting) >= 3:
                break
            plan = self.plan(state)
            if plan.fits(self._card, self._ram):
                fitting.append(plan)
            else:
                failed.append(plan)
                fitting += self._keeping_some(plan)
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
        estimate = float(self.plan(plain).peak_bytes)
        for option, value in _chosen(state).items():
            needs = {name: getattr(state, name) for name in _NEEDS.get(option, ()) if self._traits.full}
            without = plain.model_copy(update=needs)
            estimate += self.plan(without.model_copy(update={option: value})).peak_bytes - self.plan(without).peak_bytes
        return estimate

    def _keeping_some(self, plan: Plan) -> list[Plan]:
        """A plan that keeps attention in as many blocks as fit, where all of them do not."""
        state = plan.memory
        if state.checkpointing != "selective" or state.keep_attention is not None:
            return []
        layers = self._facts.num_layers
        least = self.plan(state.model_copy(update={"checkpointing": "full"}))
        each = max((plan.peak_bytes - least.peak_bytes) / layers, 1)
        blocks = int((usable(self._card) - least.peak_bytes) // each)
        if not 0 < blocks < layers or not least.fits(self._card, self._ram):
            return []
        some = state.model_copy(update={"keep_attention": blocks})
        peak = least.peak_bytes + round(each * blocks)
        return [Plan(some, self._step_s(some), peak, least.host_bytes)]


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


def resolve(
    config: RunConfig, rates: Rates, *, card_bytes: int, ram_bytes: int | None = None, quantize: bool = False
) -> tuple[RunConfig, Found]:
    """The run with the fastest memory section that fits, and what was found on the way.

    Args:
        config: see ``search``.
        rates: see ``search``.
        card_bytes: see ``search``.
        ram_bytes: see ``search``.
        quantize: see ``search``.

    Raises:
        ConfigError: if nothing fits; it says by how much, and what would.
    """
    found = search(config, rates, card_bytes=card_bytes, ram_bytes=ram_bytes, quantize=quantize)
    if found.best is None:
        raise ConfigError(
            f"no memory plan fits {to_gib(card_bytes)}: {shortage(found, card_bytes, ram_bytes)}",
            where=config.where("memory"),
            fix="; ".join(remedies(config, rates, found, card_bytes, ram_bytes)) or "use a larger card",
        )
    resolved = config.model_copy(update={"memory": found.best.memory})
    if found.best.memory.text_encoder == "device":
        text = predict(resolved, phases=_TEXT).phases
        if text and text[0].peak.nbytes > usable(card_bytes):
            streamed = found.best.memory.model_copy(update={"text_encoder": "streamed"})
            resolved = config.model_copy(update={"memory": streamed})
    return resolved, found


def shortage(found: Found, card_bytes: int, ram_bytes: int | None) -> str:
    """By how much the smallest plan is too large."""
    plan = found.smallest
    over = plan.peak_bytes - usable(card_bytes)
    said = [f"the smallest needs {to_gib(over)} more"] if over > 0 else []
    if ram_bytes is not None and plan.host_bytes > ram_bytes:
        said.append(
            f"its host memory is {to_gib(plan.host_bytes - ram_bytes)} short of {plan.host_bytes / GIB:.0f} GiB"
        )
    return " and ".join(said) or "those that fit the card need more host memory"


def remedies(config: RunConfig, rates: Rates, found: Found, card_bytes: int, ram_bytes: int | None) -> Iterator[str]:
    """Changes to the run, other than to its memory section, after which a plan fits."""
    for words, changed in _changes(config):
        finder = _Search(changed, rates, card_bytes, ram_bytes)
        state = found.smallest.memory
        if state.faults(memory_traits(changed, facts_of(changed))):
            state = MemoryConfig(block="lean", activations="host", modulation="host", streamed_blocks="all")
        plan = finder.plan(state)
        if plan.fits(card_bytes, ram_bytes):
            yield f"{words} fits, with {to_gib(plan.peak_bytes)}"


def _changes(config: RunConfig) -> Iterator[tuple[str, RunConfig]]:
    train, data = config.train, config.data
    if train.batch_size > 1:
        smaller = train.model_copy(update={"batch_size": 1, "accumulation": train.accumulation * train.batch_size})
        yield "train.batch_size: 1", config.model_copy(update={"train": smaller})
    facts = facts_of(config)
    longest = max(data.buckets, key=facts.tokens)
    for frames in (25, 17, 9):
        bucket = parse_bucket(f"{frames}x{longest.height}x{longest.width}")
        if frames < longest.frames and not facts.check_bucket(bucket):
            buckets = data.model_copy(update={"buckets": (bucket,)})
            yield f"data.buckets: [{bucket}]", config.model_copy(update={"data": buckets})
            break
    if isinstance(config.method, LoraMethod):
        if config.method.rank > 32:
            method = config.method.model_copy(update={"rank": 32})
            yield "method.rank: 32", config.model_copy(update={"method": method})
    else:
        yield "method.kind: lora", config.model_copy(update={"method": LoraMethod()})
