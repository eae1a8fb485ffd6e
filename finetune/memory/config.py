"""``MemoryConfig``: which memory techniques a run uses, which of them go together, and what to try next.

Nothing here needs torch: a configuration is checked before anything heavy is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from pydantic import Field, field_validator, model_validator

from finetune.core.gpu import parse_bytes
from finetune.core.types import Batch, Strict

if TYPE_CHECKING:
    import torch
    from torch import nn

Checkpointing = Literal["full", "selective", "none"]

QuantisedFormat = Literal["fp8", "fp8_64", "int8", "nf4"]
"""``fp8``: E4M3 with a scale per output; ``fp8_64``: with a scale per 64 inputs of an output; ``int8``: with a scale
per output; ``nf4``: QLoRA's four bits with a scale per 64 numbers, the scales held in eight bits themselves."""

Base = Literal["native", QuantisedFormat]
"""How a frozen base's weights are held: ``native``, in the model's dtype, or quantised."""

TextEncoder = Literal["device", "streamed", "int8"]
"""Where T5 is while it encodes: whole on the device in the model's dtype, there block by block, or there in int8."""


class Fault(NamedTuple):
    """Why a memory state cannot be used."""

    option: str
    """Of the memory section."""
    what: str
    fix: str


@dataclass(frozen=True)
class Traits:
    """What of a run decides which memory states are possible."""

    full: bool = False
    """Whether every weight trains."""
    adapts_adaln: bool = False
    """Whether adaLN layers train, or carry an adapter."""
    dora: bool = False
    lokr: bool = False
    divided_masks: bool = False
    """Whether dropout masks are for tokens that processes divide (``parallel.context``)."""
    processes: int = 1
    sharded: bool = False
    """Whether FSDP2 or ZeRO spreads the model."""
    accumulation: int = 1
    batch_size: int = 1


class MemoryConfig(Strict):
    """What is done to fit the run into memory. But for ``base``, nothing here changes what is computed, except for the
    last digits. Where a single process trains, a step that runs out of GPU memory is done again with the next of these
    measures.
    """

    kind: Literal["manual", "auto"] = "manual"
    """``auto`` has the planner choose the fastest techniques that fit ``budget``, when the run begins; the run's
    ``config.yaml`` records what it chose. ``manual`` takes the following as they stand."""
    budget: str | None = None
    """With ``auto``: memory of the card to plan for, such as ``12GB``; null for the card that trains."""
    ram: str | None = None
    """With ``auto``: host memory that the plan may take, such as ``32GB``; null for any amount."""
    quantize: bool = False
    """With ``auto``: choose a ``base`` in fewer bits also where that is faster, not only where nothing else fits."""
    checkpointing: Checkpointing = "full"
    """Gradient checkpointing: ``full`` keeps only the blocks' inputs and runs each block again in the backward pass;
    ``selective`` also keeps what attention computed, half of the work, in ``keep_attention`` of the blocks; ``none``
    keeps all activations, for small models and large cards."""
    keep_attention: int | None = Field(None, ge=1, le=1_000)
    """Blocks that keep the output of attention with ``checkpointing: selective``, counted from the last; null for all.
    Each is one token tensor: 0.1 GiB for 5B at 49x480x720."""
    block: Literal["stock", "lean"] = "stock"
    """How a block is computed: as diffusers writes it, or by our own forward and backward pass, which hold half as
    much."""
    compile: Literal["off", "block"] = "off"
    """``block`` has torch.compile fuse what stands between a stock block's products: two graphs per bucket, because the
    first block's inputs need no gradient, each compiled in its first step. The last digits are others. Lean blocks are
    fused without; no GPU has measured either yet."""
    activations: Literal["device", "host"] = "device"
    """Where the blocks' inputs wait for the backward pass; ``host`` copies them while the GPU computes."""
    streamed_blocks: Annotated[int, Field(ge=0, le=1_000)] | Literal["all"] = 0
    """Blocks whose weights stay in host memory and are copied to the GPU for every pass, or ``all``."""
    ring: int = Field(2, ge=1, le=1_000)
    """Streamed blocks that are on the GPU at a time; with 2, one is copied while another computes."""
    base: Base = "native"
    """How the frozen base of a LoRA is held: in ``model.dtype``; in 8 bits with a scale per row (``fp8``, ``int8``) or
    per 64 weights (``fp8_64``); or in 4 bits (``nf4``). This changes the model, a little, and so what is learnt."""
    modulation: Literal["device", "host"] = "device"
    """Where the adaLN weights of a LoRA's base are, a seventh of 5B, which are applied to one vector per clip; ``host``
    computes their result ahead on the CPU."""
    gradient_release: Literal["none", "exact", "per_parameter"] = "none"
    """Full fine-tuning: hold one block's gradients at a time. ``exact`` moves them to the host until the norm of all is
    known, then updates block by block; ``per_parameter`` clips each parameter by itself and updates it at once."""
    optimizer_states: Literal["device", "host"] = "device"
    """Full fine-tuning: where master weights and moments are. ``host`` updates on the CPU, block by block."""
    text_encoder: TextEncoder = "device"
    """How T5, larger than most of the models, is held while captions are encoded: whole, block by block from the host,
    or in 8 bits, which changes embeddings a little and so has cache entries of its own."""
    clips_at_once: int | None = Field(None, ge=1, le=4_096)
    """Most clips of a micro-batch that go through the model together; null for all of them. The step's gradient is the
    same sum over the same clips; its last digits, and LoRA's dropout masks, are others."""

    @field_validator("budget", "ram", mode="before")
    @classmethod
    def _amounts(cls, value: Any) -> Any:
        if isinstance(value, int | float) and not isinstance(value, bool):
            value = str(value)  # `budget: 24` is what people write
        if isinstance(value, str):
            parse_bytes(value)
        return value

    @model_validator(mode="after")
    def _one_kind(self) -> MemoryConfig:
        changed = self.changed()
        for_auto = [name for name in changed if name in _FOR_AUTO]
        if self.kind == "manual" and for_auto:
            raise ValueError(f"{', '.join(for_auto)} only means something with kind: auto")
        chosen = [name for name in changed if name not in ("kind", *_FOR_AUTO, *_BESIDE_AUTO)]
        if self.kind == "auto" and chosen:
            raise ValueError(f"kind: auto chooses {', '.join(chosen)} itself; leave them out, or set kind: manual")
        return self

    def __str__(self) -> str:
        return ", ".join(f"{name}: {value}" for name, value in self.changed().items()) or "defaults"

    def changed(self) -> dict[str, Any]:
        """The fields that are not at their defaults, in the section's order."""
        default = type(self).model_fields
        return {name: value for name, value in self if value != default[name].default}

    @property
    def needs_block_runner(self) -> bool:
        """Whether ``runner.BlockRunner`` runs the blocks; otherwise diffusers' own model does."""
        return self.streams or not self.changed().keys().isdisjoint(("block", "activations", "gradient_release"))

    @property
    def streams(self) -> bool:
        """Whether weights of blocks are on the host between passes."""
        return self.streamed_blocks != 0

    def apply(self, transformer: nn.Module, device: torch.device | None = None) -> None:
        """Put ``transformer`` into this state, out of whatever state it was in.

        Args:
            transformer: what trains is in it already.
            device: where everything goes that does not stay on the host; None leaves the model where it is, which a
                state that keeps weights on the host does not allow.
        """
        from finetune.memory.runner import apply

        apply(transformer, self, device)

    def split(self, batch: Batch) -> Iterator[Batch]:
        """What of a micro-batch [B, ...] goes through the model at a time: at most ``clips_at_once`` clips, in order.

        The gradient of a step is a sum over its clips, so it is the same up to the order of summation; LoRA's dropout
        draws a mask of its own for every part. The parts are views.
        """
        size = len(batch.slots)
        step = self.clips_at_once or size
        for first in range(0, size, step):
            rows = slice(first, first + step)
            values = ((field.name, getattr(batch, field.name)) for field in fields(batch))
            part: dict[str, Any] = {name: None if value is None else value[rows] for name, value in values}
            yield Batch(**part)

    def faults(self, traits: Traits) -> list[Fault]:
        """Why this state cannot be used in a run; empty where it can."""
        return [fault for applies, fault in _rules(self, traits) if applies]

    def fallbacks(self, traits: Traits) -> tuple[MemoryConfig, ...]:
        """States that need less and less memory, this one first, which a run can change to between two steps.

        Each is a section as it could stand in a configuration: ``difference`` says what to write. What is computed
        stays the same, so ``base`` is never changed.
        """
        states = _descend(self, (step.change for step in MEMORY_LADDER if step.in_run), traits)
        clips, halves = min(traits.batch_size, self.clips_at_once or traits.batch_size), []
        while clips > 1:
            clips = (clips + 1) // 2
            halves.append({"clips_at_once": clips})
        return (self, *states, *_descend(states[-1] if states else self, halves, traits))

    def restart_fallbacks(self, traits: Traits) -> tuple[MemoryConfig, ...]:
        """States below the last of ``fallbacks`` in which only a new start can train."""
        smaller = {"base": "fp8" if self.base == "native" else "nf4"}
        changes = [*(step.change for step in MEMORY_LADDER if not step.in_run), smaller]
        return tuple(_descend(self.fallbacks(traits)[-1], changes, traits))

    def difference(self, other: MemoryConfig) -> str:
        """What must be written to come from this state to ``other``, such as ``memory.checkpointing: full``."""
        ours, theirs = self.model_dump(mode="json"), other.model_dump(mode="json")
        return ", ".join(f"memory.{name}: {_yaml(theirs[name])}" for name in theirs if theirs[name] != ours[name])


_FOR_AUTO = ("budget", "ram", "quantize")
"""What ``auto`` is told."""

_BESIDE_AUTO = ("text_encoder", "clips_at_once")
"""What may be set beside ``auto``."""


class LadderStep(NamedTuple):
    """A change to a memory section that saves memory."""

    change: Mapping[str, object]
    in_run: bool = True
    """Whether a run can take it between two steps."""


MEMORY_LADDER = (
    LadderStep({"checkpointing": "full", "keep_attention": None}),
    LadderStep({"block": "lean", "compile": "off"}),
    LadderStep({"modulation": "host"}),
    LadderStep({"activations": "host"}),
    LadderStep({"streamed_blocks": "all"}),
    LadderStep({"gradient_release": "exact"}, in_run=False),
    LadderStep({"optimizer_states": "host"}, in_run=False),
    LadderStep({"streamed_blocks": "all"}, in_run=False),  # of weights that train, whose states must be on the host
)
"""The techniques in the order in which they cost more time; a step is passed over where it has faults."""


def _descend(state: MemoryConfig, changes: Iterable[Mapping[str, object]], traits: Traits) -> list[MemoryConfig]:
    """The states that the changes lead to, each from the one before; those without effect or with faults left out."""
    states = []
    for change in changes:
        following = state.model_copy(update=change)
        if following != state and not following.faults(traits):
            states.append(state := following)
    return states


def _yaml(value: object) -> str:
    return "null" if value is None else str(value)


def _rules(state: MemoryConfig, traits: Traits) -> Iterator[tuple[bool, Fault]]:
    """Every rule for what goes together: whether it is broken, and what to say then."""
    changed = state.changed()

    def value(option: str) -> str:
        return f"memory.{option}: {getattr(state, option)}"

    what = f"only selective checkpointing keeps attention, and memory.checkpointing is {state.checkpointing}"
    fix = "set memory.checkpointing: selective, or leave keep_attention out"
    broken = state.keep_attention is not None and state.checkpointing != "selective"
    yield broken, Fault("keep_attention", what, fix)
    for option in ("block", "activations", "streamed_blocks", "gradient_release"):
        what = (
            f"{value(option)} runs every block again in the backward pass, and memory.checkpointing: none asks for the"
            " opposite"
        )
        fix = "set memory.checkpointing: full or selective"
        yield state.checkpointing == "none" and option in changed, Fault(option, what, fix)

    what = "the lean block draws dropout masks by chunks of tokens, and would draw the same for every process's tokens"
    fix = "set method.dropout: 0 or parallel.context: 1, or memory.block: stock"
    yield state.block == "lean" and traits.divided_masks, Fault("block", what, fix)

    unknown = {"block": state.block == "lean", "compile": state.compile == "block", "base": state.base != "native"}
    for option, chosen in unknown.items():
        what = f"a LoKr trains in stock blocks, uncompiled, on a base in the model's dtype, not with {value(option)}"
        yield chosen and traits.lokr, Fault(option, what, f"leave memory.{option} out, or set method.kind: lora")

    compiles = state.compile == "block"
    what = "only stock blocks are compiled, as diffusers runs them"
    fix = "set memory.compile: off (a lean block is fused without it), or leave the other techniques out"
    yield compiles and (state.needs_block_runner or state.base != "native"), Fault("compile", what, fix)
    what = "selective checkpointing watches each operation of a block, and a compiled one shows none"
    yield compiles and state.checkpointing == "selective", Fault("compile", what, "set memory.checkpointing: full")

    quantised = state.base != "native"
    what = f"a base in {state.base} cannot train, and full fine-tuning trains it"
    yield quantised and traits.full, Fault("base", what, "set base: native")
    what = f"DoRA needs the norms of the base's weights, which a base in {state.base} has only approximately"
    yield quantised and traits.dora, Fault("base", what, "set memory.base: native, or method.use_dora: false")
    what = "the adaLN layers train, so their result cannot be computed ahead"
    fix = "set memory.modulation: device, or choose method.targets without adaLN layers"
    yield state.modulation == "host" and (traits.full or traits.adapts_adaln), Fault("modulation", what, fix)

    releases = state.gradient_release != "none"
    what, fix = "a LoRA's gradients are small, and are not released", "set memory.gradient_release: none"
    yield releases and not traits.full, Fault("gradient_release", what, fix)
    splits = state.clips_at_once is not None and state.clips_at_once < traits.batch_size
    what = (
        "gradients that are released after every backward pass cannot be accumulated over several"
        f" (train.accumulation: {traits.accumulation}, train.batch_size: {traits.batch_size},"
        f" memory.clips_at_once: {_yaml(state.clips_at_once)})"
    )
    fix = "set train.accumulation: 1 and leave memory.clips_at_once out, or set memory.gradient_release: none"
    yield releases and (traits.accumulation > 1 or splits), Fault("gradient_release", what, fix)
    what, fix = "a LoRA's optimizer states are small, and stay on the device", "set memory.optimizer_states: device"
    if traits.full:
        what = "states on the host are updated block by block, from gradients that are released"
        fix = "set memory.gradient_release: exact"
    host_states = state.optimizer_states == "host"
    yield host_states and not releases, Fault("optimizer_states", what, fix)
    what = "blocks that train can only stream if they are updated on the host"
    fix = "set memory.optimizer_states: host and memory.gradient_release: exact"
    yield state.streams and traits.full and not host_states, Fault("streamed_blocks", what, fix)

    several = traits.processes > 1 or traits.sharded
    what = "the planner chooses for a run of one process"
    fix = "set memory.kind: manual, with the section that `finetune plan --budget 24GiB --processes N` finds"
    yield state.kind == "auto" and several, Fault("kind", what, fix)
    single: tuple[str, ...] = ("streamed_blocks", "modulation", "gradient_release", "optimizer_states")
    why = "DDP wants every parameter on one device and every gradient at once"
    fix = "leave it out, launch one process, or shard the model with accelerate_configs/fsdp2.yaml"
    if traits.sharded:
        single = ("block", "compile", "activations", "base", *single)
        why = "FSDP2 and ZeRO place weights, gradients and states by themselves"
        fix = "leave it out, or launch with accelerate_configs/single_gpu.yaml or ddp.yaml"
    for option in single:
        what = f"{value(option)} works in a single process: {why}"
        yield several and option in changed, Fault(option, what, fix)
