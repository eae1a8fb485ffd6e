"""A search's outcome, put to use: the run with the plan that was found, or what would have to change for one to fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from finetune.cards import to_gib, usable
from finetune.config import RunConfig, memory_traits
from finetune.errors import ConfigError
from finetune.geometry import parse_bucket
from finetune.memory import MemoryConfig
from finetune.planning.ahead import second_core
from finetune.planning.curve import Phase
from finetune.planning.names import PHASES, PhaseName
from finetune.planning.predict import facts_of, predict
from finetune.planning.rates import Rates
from finetune.planning.rehearse import longest_bucket
from finetune.planning.search import Finder, Found, search
from finetune.trainers.method import LoraMethod


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
        traits = memory_traits(changed, facts_of(changed), processes=processes)
        if state.faults(traits):  # what full fine-tuning needs is not for a LoRA
            state = MemoryConfig().notches(traits)[-1]
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
    facts = facts_of(config)
    longest = longest_bucket(config, facts)
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
