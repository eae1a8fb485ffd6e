"""Splitting micro-batches: fewer clips in the model at a time, for the same step.

The gradient of a step is a sum over its clips, so the parts of a micro-batch may go through the model one after the
other. What is equal: which clips, timesteps, noise and weights; each clip's loss and the gradient up to the order of
summation, that is to rounding. What is not: LoRA's dropout draws a mask of its own for every part.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from pydantic import Field, field_validator, model_validator

from finetune.core.gpu import parse_bytes
from finetune.core.types import Batch, Strict

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Checkpointing = Literal["full", "selective", "none"]
"""``full``: every block is run again in the backward pass, a third more compute for the least memory. ``selective``:
the same, but what attention computed, half of the work, is kept in some blocks. ``none``: all activations are kept."""

Base = Literal["native", "fp8", "fp8_64", "int8", "nf4"]
"""How a frozen base's weights are held: ``native``, in the model's dtype, or in a format of ``quantized_linear``."""

TextEncoder = Literal["device", "streamed", "int8"]
"""Where T5 is while it encodes: whole on the device in the model's dtype, there block by block, or there in int8."""


def parts(batch: Batch, clips: int | None) -> Iterator[Batch]:
    """Cut a micro-batch into parts of at most ``clips`` clips, in order; views, not copies.

    Args:
        batch: [B, ...].
        clips: None for the whole at once.
    """
    size = len(batch.slots)
    step = size if clips is None else clips
    for first in range(0, size, step):
        yield _rows(batch, slice(first, min(first + step, size)))


def _rows(batch: Batch, rows: slice) -> Batch:
    image: Tensor | None = batch.image_latents
    return replace(
        batch,
        latents=batch.latents[rows],
        noise=batch.noise[rows],
        timesteps=batch.timesteps[rows],
        prompt_embeds=batch.prompt_embeds[rows],
        image_latents=None if image is None else image[rows],
        slots=batch.slots[rows],
        clips=batch.clips[rows],
    )


# -------- ``MemoryConfig``: which techniques a run uses, which of them go together, and what to try next.


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
    adapts_modulation: bool = False
    """Whether adaLN layers train, or carry an adapter."""
    dora: bool = False
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
        asked = [name for name in _ASKED if getattr(self, name) != type(self).model_fields[name].default]
        if self.kind == "manual" and asked:
            raise ValueError(f"{', '.join(asked)} only means something with kind: auto")
        chosen = [
            name
            for name, field in type(self).model_fields.items()
            if name not in ("kind", *_ASKED, *_LEFT) and getattr(self, name) != field.default
        ]
        if self.kind == "auto" and chosen:
            raise ValueError(f"kind: auto chooses {', '.join(chosen)} itself; leave them out, or set kind: manual")
        return self

    @property
    def plain(self) -> bool:
        """Whether diffusers' own model runs its own blocks; otherwise ``blocks.Blocks`` does."""
        return (
            self.block == "stock"
            and self.activations == "device"
            and self.streamed_blocks == 0
            and self.gradient_release == "none"
        )

    @property
    def streams(self) -> bool:
        """Whether weights of blocks are on the host between passes."""
        return self.streamed_blocks != 0

    def apply(self, transformer: nn.Module, device: torch.device | None = None) -> None:
        """Put ``transformer`` into this state; see ``setup.apply``. To be called after what trains is in it."""
        from finetune.memory.setup import apply  # which knows this class

        apply(transformer, self, device)

    def parts(self, batch: Batch) -> Iterator[Batch]:
        """What of a micro-batch goes through the model at a time; see ``splitting.parts``."""
        return parts(batch, self.clips_at_once)

    def faults(self, traits: Traits) -> list[Fault]:
        """Why this state cannot be used in a run; empty where it can."""
        return list(_faults(self, traits))

    def notches(self, traits: Traits) -> tuple[MemoryConfig, ...]:
        """States that need less and less memory, this one first, in the order in which they cost more time.

        Each is a section as it could stand in a configuration: ``difference`` says what to write. What is computed
        stays the same, so ``base`` is never changed.
        """
        states = [self]
        for change in _MEASURES:
            following = states[-1].model_copy(update=change)
            if following != states[-1] and not following.faults(traits):
                states.append(following)
        clips = min(traits.batch_size, self.clips_at_once or traits.batch_size)
        while clips > 1:
            clips = (clips + 1) // 2
            following = states[-1].model_copy(update={"clips_at_once": clips})
            if not following.faults(traits):
                states.append(following)
        return tuple(states)

    def difference(self, other: MemoryConfig) -> str:
        """What must be written to come from this state to ``other``, such as ``memory.checkpointing: full``."""
        ours, theirs = self.model_dump(mode="json"), other.model_dump(mode="json")
        return ", ".join(f"memory.{name}: {_yaml(theirs[name])}" for name in theirs if theirs[name] != ours[name])


_ASKED = ("budget", "ram", "quantize")
"""What ``auto`` is asked for."""

_LEFT = ("text_encoder", "clips_at_once")
"""What may be set beside ``auto``."""

_MEASURES: tuple[dict[str, object], ...] = (
    {"checkpointing": "full", "keep_attention": None},
    {"block": "lean"},
    {"modulation": "host"},
    {"activations": "host"},
    {"streamed_blocks": "all"},
)
"""What the next notch changes, in the order in which it costs more time."""


def _yaml(value: object) -> str:
    return "null" if value is None else str(value)


def _faults(state: MemoryConfig, traits: Traits) -> Iterator[Fault]:
    yield from _checkpointing_faults(state)
    yield from _frozen_faults(state, traits)
    yield from _release_faults(state, traits)
    yield from _process_faults(state, traits)


def _checkpointing_faults(state: MemoryConfig) -> Iterator[Fault]:
    if state.keep_attention is not None and state.checkpointing != "selective":
        yield Fault(
            "keep_attention",
            f"only selective checkpointing keeps attention, and memory.checkpointing is {state.checkpointing}",
            "set memory.checkpointing: selective, or leave keep_attention out",
        )
    if state.checkpointing == "none":
        for option in ("block", "activations", "streamed_blocks", "gradient_release"):
            if getattr(state, option) != MemoryConfig.model_fields[option].default:
                yield Fault(
                    option,
                    f"memory.{option}: {getattr(state, option)} runs every block again in the backward pass, and"
                    " memory.checkpointing: none asks for the opposite",
                    "set memory.checkpointing: full or selective",
                )


def _frozen_faults(state: MemoryConfig, traits: Traits) -> Iterator[Fault]:
    if state.base != "native" and traits.full:
        yield Fault("base", f"a base in {state.base} cannot train, and full fine-tuning trains it", "set base: native")
    if state.base != "native" and traits.dora:
        yield Fault(
            "base",
            f"DoRA needs the norms of the base's weights, which a base in {state.base} has only approximately",
            "set memory.base: native, or method.use_dora: false",
        )
    if state.modulation == "host" and (traits.full or traits.adapts_modulation):
        yield Fault(
            "modulation",
            "the adaLN layers train, so their result cannot be computed ahead",
            "set memory.modulation: device, or choose method.targets without adaLN layers",
        )


def _release_faults(state: MemoryConfig, traits: Traits) -> Iterator[Fault]:
    if state.gradient_release != "none":
        if not traits.full:
            yield Fault(
                "gradient_release",
                "a LoRA's gradients are small, and are not released",
                "set memory.gradient_release: none",
            )
        splits = state.clips_at_once is not None and state.clips_at_once < traits.batch_size
        if traits.accumulation > 1 or splits:
            yield Fault(
                "gradient_release",
                "gradients that are released after every backward pass cannot be accumulated over several"
                f" (train.accumulation: {traits.accumulation}, train.batch_size: {traits.batch_size},"
                f" memory.clips_at_once: {_yaml(state.clips_at_once)})",
                "set train.accumulation: 1 and leave memory.clips_at_once out, or set memory.gradient_release: none",
            )
    if state.optimizer_states == "host" and state.gradient_release == "none":
        yield Fault(
            "optimizer_states",
            "states on the host are updated block by block, from gradients that are released"
            if traits.full
            else "a LoRA's optimizer states are small, and stay on the device",
            "set memory.gradient_release: exact" if traits.full else "set memory.optimizer_states: device",
        )
    if state.streams and traits.full and state.optimizer_states == "device":
        yield Fault(
            "streamed_blocks",
            "blocks that train can only stream if they are updated on the host",
            "set memory.optimizer_states: host and memory.gradient_release: exact",
        )


def _process_faults(state: MemoryConfig, traits: Traits) -> Iterator[Fault]:
    if state.kind == "auto" and (traits.processes > 1 or traits.sharded):
        yield Fault(
            "kind",
            "the planner chooses for a run of one process",
            "set memory.kind: manual, with the section that `finetune plan --budget 24GiB --processes N` finds",
        )
    default = MemoryConfig.model_fields
    if traits.sharded:
        alone: tuple[str, ...] = (
            "block",
            "activations",
            "streamed_blocks",
            "base",
            "modulation",
            "gradient_release",
            "optimizer_states",
        )
        said = "FSDP2 and ZeRO place weights, gradients and states by themselves"
        fix = "leave it out, or launch with accelerate_configs/single_gpu.yaml or ddp.yaml"
    elif traits.processes > 1:
        alone = ("streamed_blocks", "modulation", "gradient_release", "optimizer_states")
        said = "DDP wants every parameter on one device and every gradient at once"
        fix = "leave it out, launch one process, or shard the model with accelerate_configs/fsdp2.yaml"
    else:
        return
    for option in alone:
        if getattr(state, option) != default[option].default:
            yield Fault(option, f"memory.{option}: {getattr(state, option)} works in a single process: {said}", fix)
