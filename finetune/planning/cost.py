"""How long a step takes, from arithmetic: floating-point operations, bytes through memory, bytes over the bus.

Rates are the machine's (``calibrate``). Everything is per process and for the longest bucket. Copies that a technique
makes beside the computation cost what they last longer than it.
"""

from __future__ import annotations

from dataclasses import dataclass

from finetune.config import RunConfig
from finetune.facts import Facts
from finetune.memory import MemoryConfig
from finetune.planning.rates import Rates
from finetune.trainers.method import LoraMethod

_BACKWARD_ATTENTION = 2.5
"""Matrix products of attention's backward pass for one of its forward pass: five for two."""
_FORWARD_TRAFFIC = {"lora": 154, "full": 114}
_BACKWARD_TRAFFIC = {"lora": 193, "full": 149}
"""Reads and writes of a block's elementwise operations in each pass, counted on the stock block without autocast, in
tensors of the video tokens' size (104 MiB for 5B at 49x480x720). What runs again costs a forward pass once more."""
_LEAN_TRAFFIC = 1.1
"""Of the stock block's; assumed, not counted."""
_DEQUANTISED = {"native": 0.0, "fp8": 3.0, "fp8_64": 3.0, "int8": 3.0, "nf4": 3.0}
"""Bytes read and written per weight of a quantised base, each time a block runs."""
_UPDATE_TRAFFIC = 24
"""Bytes of memory traffic of an 8- or 32-bit Adam update per weight, on whichever side it runs."""


@dataclass(frozen=True)
class Cost:
    """Where the time of an optimizer step goes, in seconds."""

    forward_s: float
    backward_s: float
    recompute_s: float
    waiting_s: float
    """Copies that last longer than what they run beside."""
    update_s: float

    @property
    def step_s(self) -> float:
        """All together."""
        return self.forward_s + self.backward_s + self.recompute_s + self.waiting_s + self.update_s


def step_cost(config: RunConfig, facts: Facts, memory: MemoryConfig, rates: Rates) -> Cost:
    """Predict an optimizer step.

    Args:
        config: of the run; its memory section is not looked at.
        facts: of the model.
        memory: the memory state.
        rates: of the machine.
    """
    work = _Work.of(config, facts)
    batch = config.train.batch_size
    clips = min(memory.clips_at_once or batch, batch)
    passes = config.train.accumulation * -(-batch // clips)
    kind = config.method.kind
    traffic = work.tokens_bytes * facts.num_layers * (_LEAN_TRAFFIC if memory.block == "lean" else 1.0)
    # Weights are decoded, and copied, once for all clips that go through together.
    held = work.block_weights * facts.num_layers * _DEQUANTISED[memory.base] / rates.memory
    linear, attention = work.linear / rates.gemm, clips * work.attention / rates.attention_forward
    adapters, moved = work.adapters / rates.gemm, traffic / rates.memory
    forward = clips * (linear + adapters + moved * _FORWARD_TRAFFIC[kind]) + attention + held
    again = 0.0
    if memory.checkpointing != "none":
        kept = 0 if memory.checkpointing == "full" else (memory.keep_attention or facts.num_layers)
        again = forward - attention * min(kept / facts.num_layers, 1.0)
    backward = (
        clips * (linear * (2 if kind == "full" else 1) + 2 * adapters + moved * _BACKWARD_TRAFFIC[kind])
        + clips * work.attention * _BACKWARD_ATTENTION / rates.attention_backward
        + held
    )
    waiting = _waiting(work, facts, memory, rates, clips, forward, backward + again)
    return Cost(
        forward_s=passes * forward,
        backward_s=passes * backward,
        recompute_s=passes * again,
        waiting_s=passes * waiting,
        update_s=_update(work, memory, rates),
    )


@dataclass(frozen=True)
class _Work:
    """One clip through the whole model, forward."""

    linear: float
    """Floating-point operations of the blocks' linear layers."""
    attention: float
    adapters: float
    tokens_bytes: float
    """Of one tensor of tokens."""
    block_weights: float
    """Weights of a block's attention and feed-forward layers."""
    modulation_weights: float
    trained: float
    """Weights that train."""

    @classmethod
    def of(cls, config: RunConfig, facts: Facts) -> _Work:
        tokens = max(facts.tokens(bucket) for bucket in config.data.buckets)
        width = facts.num_attention_heads * facts.attention_head_dim
        layers = facts.num_layers
        block, modulation = 12.0 * width**2, 12.0 * width * 512
        adapters = trained = 0.0
        if isinstance(config.method, LoraMethod):
            # As of the default targets, four square layers; others change seconds by hundredths.
            trained = layers * 4 * 2 * width * config.method.rank
            adapters = 2.0 * tokens * trained
        else:
            trained = layers * (block + modulation)
        return cls(
            linear=2.0 * tokens * block * layers,
            attention=4.0 * tokens**2 * width * layers,
            adapters=adapters,
            tokens_bytes=2.0 * tokens * width,
            block_weights=block,
            modulation_weights=modulation,
            trained=trained,
        )


BYTES = {"native": 2.0, "fp8": 1.0, "fp8_64": 1.06, "int8": 1.0, "nf4": 0.53}
"""Of a weight, with its share of the scales."""


def _waiting(
    work: _Work, facts: Facts, memory: MemoryConfig, rates: Rates, clips: int, forward_s: float, backward_s: float
) -> float:
    """What copies beside one forward and backward pass of some clips add, in seconds."""
    layers = facts.num_layers
    streamed = layers if memory.streamed_blocks == "all" else min(memory.streamed_blocks, layers)
    weights = streamed * work.block_weights * BYTES[memory.base]
    if memory.modulation == "device":
        weights += streamed * work.modulation_weights * 2.0
    boundaries = clips * layers * work.tokens_bytes if memory.activations == "host" else 0.0
    gradients = 0.0
    if memory.gradient_release == "exact" or memory.optimizer_states == "host":
        gradients = 2.0 * work.trained
    inward_forward = weights / rates.host_to_device
    outward_forward = boundaries / rates.device_to_host
    inward_backward = (weights + boundaries) / rates.host_to_device
    outward_backward = gradients / rates.device_to_host
    if memory.streams and memory.ring == 1:
        return 2 * inward_forward
    # Copies that hide behind the computation still take their share of the memory's bandwidth.
    shared = (2 * weights + 2 * boundaries + gradients) / rates.memory
    return (
        shared
        + max(inward_forward, outward_forward, forward_s)
        - forward_s
        + (max(inward_backward, outward_backward, backward_s) - backward_s)
    )


def _update(work: _Work, memory: MemoryConfig, rates: Rates) -> float:
    """The optimizer's own time, in seconds."""
    weights_back = 2.0 * work.trained / rates.host_to_device
    if memory.optimizer_states == "host":
        return max(work.trained * _UPDATE_TRAFFIC / rates.host_memory, weights_back)
    update = work.trained * _UPDATE_TRAFFIC / rates.memory
    return max(update, weights_back) if memory.gradient_release == "exact" else update
