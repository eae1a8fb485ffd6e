"""How long a step takes, as a sum that can be looked at: counts of a block's work over the rates of a machine.

What a block does in each pass was counted once on fake tensors, by ``benchmarks/work.py``, and stands in
``templates/block_work.json`` in units that hold for other sizes too. So seconds are there at once, and
``tests/test_work.py`` fails where the code does something else than what was counted.

A pass lasts as long as the slowest of three that go on beside each other: the device's own work, the processor that
queues it, and copies over the bus. Everything is per process and for the longest bucket.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from finetune.cogvideox.spec import ModelSpec
from finetune.config.schema import RunConfig
from finetune.memory.config import MemoryConfig
from finetune.methods.lokr import LokrMethod
from finetune.methods.lora import LoraMethod
from finetune.planner.cost_model import BACKWARD_ATTENTION, Rates, link_rate

BLOCK_WORK = Path(__file__).parent.parent / "templates" / "block_work.json"

REFERENCES = ("2b", "5b", "1.5-5b")
"""Models whose blocks were counted at their own size, with a LoRA of rank 128 or in full: the first has learned
positions, the others have rotary ones and differ in their tokens."""

BYTES_PER_WEIGHT = {"native": 2.0, "fp8": 1.0, "fp8_64": 1.06, "int8": 1.0, "nf4": 0.53}
"""With a weight's share of the scales."""

_DEQUANTISED = 3.0
"""Bytes read and written per weight of a quantised base, each time a block runs."""

_UPDATE_TRAFFIC = 24
"""Bytes of memory traffic of an 8- or 32-bit Adam update per weight, on whichever side it runs."""


@dataclass(frozen=True)
class PassTime:
    """Where the time of one pass of a step goes, in seconds."""

    name: str
    products_s: float = 0.0
    """Matrix products of the model, of adapters, and of gradients."""
    attention_s: float = 0.0
    traffic_s: float = 0.0
    """Everything that reads and writes memory and computes next to nothing, copies' share of it included."""
    exchanges_s: float = 0.0
    """Between processes that divide a clip."""
    decoding_s: float = 0.0
    """Of a quantised base."""
    launches_s: float = 0.0
    """Of the processor, which queues kernels one by one."""
    copies_s: float = 0.0
    """Over the bus, beside the computation."""
    serial_s: float = 0.0
    """Of copies that nothing goes on beside, and of work on the host."""

    @property
    def device_s(self) -> float:
        """Of the device's own work."""
        return self.products_s + self.attention_s + self.traffic_s + self.exchanges_s + self.decoding_s

    @property
    def seconds(self) -> float:
        """The whole pass."""
        return max(self.device_s, self.launches_s, self.copies_s) + self.serial_s


@dataclass(frozen=True)
class StepTime:
    """An optimizer step: its passes over all micro-batches, and the update."""

    forward: PassTime
    backward: PassTime
    """With what is computed again in it."""
    update: PassTime
    base: PassTime | None = None
    """Of the base model, before the others, where all clips of the step are for prior preservation; None where none
    is.
    """

    @property
    def passes(self) -> tuple[PassTime, ...]:
        """In their order."""
        return (*([self.base] if self.base else []), self.forward, self.backward, self.update)

    @property
    def step_s(self) -> float:
        """All together."""
        return sum(each.seconds for each in self.passes)


BLOCK_LAYERS: Mapping[str, tuple[float, float]] = {
    **dict.fromkeys(("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"), (1.0, 1.0)),
    "ff.net.0.proj": (1.0, 4.0),
    "ff.net.2": (4.0, 1.0),
}
"""Linear layers of a block that every token goes through: inputs and outputs, in the model's width."""

MODULATION_LAYERS = "norm1.linear", "norm2.linear"
"""Those that one vector goes through: ``_TIME_WIDTH`` inputs and six times the model's width."""

_TIME_WIDTH = 512


@dataclass(frozen=True)
class AdapterShapes:
    """Adapters in one block, at the mean over blocks."""

    products: float
    """Multiplications a token: of a LoRA as many as weights; a LoKr is multiplied out to the size of its layer, by
    memory traffic a tenth of the time of its product with the tokens of 49x480x720, which is left out."""
    weights: float
    """Of those that every token goes through."""
    modulation_weights: float
    """Of those that one vector goes through, whose products are nothing."""
    sides: float
    """Numbers a token that they read and write: inputs and outputs of their layers."""

    @classmethod
    def of(cls, method: LoraMethod | LokrMethod, layers: int, width: float) -> AdapterShapes:
        """Counted from the names that ``method.targets`` selects in every block. What a lean block's chunks of the
        feed-forward add to adapters in it, 30 u of traffic and 180 kernels, is left out: 2 % of a step of 5B.

        Args:
            method: of the run.
            layers: blocks of the model.
            width: of the model.
        """
        sides = {name: (inputs * width, outputs * width) for name, (inputs, outputs) in BLOCK_LAYERS.items()}
        sides |= dict.fromkeys(MODULATION_LAYERS, (float(_TIME_WIDTH), 6.0 * width))
        products = weights = modulation = token_sides = 0.0
        for block in range(layers):
            for name, (inputs, outputs) in sides.items():
                layer = f"transformer_blocks.{block}.{name}"
                if not method.matches(layer):
                    continue
                if isinstance(method, LoraMethod):
                    trained = multiplied = method.rank_of(layer) * (inputs + outputs)
                else:
                    trained, multiplied = method.weights(int(inputs), int(outputs)), inputs * outputs
                if name in MODULATION_LAYERS:
                    modulation += trained
                else:
                    weights += trained
                    products += multiplied
                    token_sides += inputs + outputs
        return cls(products / layers, weights / layers, modulation / layers, token_sides / layers)


@dataclass(frozen=True)
class BlockUnits:
    """What counts of a block are given in: one clip, or this process's share of it, through one block, forward."""

    linear: float
    """Floating-point operations of its linear layers."""
    attention: float
    adapters: float
    """Of an adapter's products in it; 0 where every weight trains."""
    adapter_bytes: float
    """Of an eighth of what its adapters read and write: one tensor of tokens, where four square layers have one."""
    token_bytes: float
    """Of one tensor of tokens, in 16 bits."""
    weights: float
    """Of its attention and feed-forward layers."""
    modulation_weights: float
    trained: float
    """Weights of it that train."""
    tokens: float
    exchanged: float
    """Bytes that this process sends to those it shares a clip with, and receives: queries, keys, values, and back."""

    @classmethod
    def of(cls, config: RunConfig, spec: ModelSpec) -> BlockUnits:
        """For the longest bucket of a run."""
        whole = max(map(spec.tokens, config.data.trained_buckets))
        context = config.parallel.context
        tokens = whole / context
        width = spec.num_attention_heads * spec.attention_head_dim
        weights, modulation = 12.0 * width**2, 12.0 * width * _TIME_WIDTH
        adapters, adapter_bytes, trained = 0.0, 0.0, weights + modulation
        if isinstance(config.method, LoraMethod):
            method, ranks = config.method, tuple(config.method.ranks.items())
            shapes = _adapter_shapes(method.targets, method.rank, ranks, spec.num_layers, width)
        elif isinstance(config.method, LokrMethod):
            shapes = _lokr_shapes(config.method, spec.num_layers, width)
        if config.method.kind != "full":
            trained = shapes.weights + shapes.modulation_weights
            adapters, adapter_bytes = 2.0 * tokens * shapes.products, 2.0 * tokens * shapes.sides / 8
        return cls(
            linear=2.0 * tokens * weights,
            attention=4.0 * tokens * whole * width,
            adapters=adapters,
            adapter_bytes=adapter_bytes,
            token_bytes=2.0 * tokens * width,
            weights=weights,
            modulation_weights=modulation,
            trained=trained,
            tokens=tokens,
            exchanged=4 * 2.0 * tokens * width * (context - 1) / context,
        )


def step_cost(config: RunConfig, spec: ModelSpec, memory: MemoryConfig, rates: Rates) -> StepTime:
    """Predict an optimizer step.

    Args:
        config: of the run; its memory section is not looked at.
        spec: of the model.
        memory: the memory state.
        rates: of the machine.
    """
    return StepCosts(config, spec, rates).of(memory)


class StepCosts:
    """Predicts the steps of one run on one machine, in thousands of memory states; see ``step_cost``."""

    def __init__(self, config: RunConfig, spec: ModelSpec, rates: Rates) -> None:
        self._config, self._rates = config, rates
        self._unit, self._layers, self._rotary = BlockUnits.of(config, spec), spec.num_layers, spec.use_rotary
        # Counted in bf16, where nothing is in float32.
        self._gemm = rates.gemm_float32 if config.model.dtype == "fp32" else rates.gemm
        fp16 = config.model.dtype == "fp16"
        lora = config.method if isinstance(config.method, LoraMethod) else None
        self._wide_adapters = lora.in_float32(fp16=fp16) if lora is not None else fp16

    def of(self, memory: MemoryConfig) -> StepTime:
        """In one memory state."""
        config, rates, unit, layers = self._config, self._rates, self._unit, self._layers
        batch = config.train.batch_size
        clips = min(memory.clips_at_once or batch, batch)
        times = config.train.accumulation * -(-batch // clips)
        state = "nothing recomputed" if memory.checkpointing == "none" else "stock block"
        state = "lean" if memory.block == "lean" else state
        keeping = min(memory.keep_attention or layers, layers) if memory.checkpointing == "selective" else 0
        method = "full" if config.method.kind == "full" else "lora"  # a LoKr makes as many products as often
        counts = {
            name: _counts(self._rotary, method, state, name, unit.tokens) for name in ("forward", "backward", "update")
        }
        # Weights are decoded, and copied, once for all clips that go through together.
        decoded = 0.0 if memory.base == "native" else unit.weights * layers * _DEQUANTISED / rates.memory
        runs = {"forward": 1, "backward": 1 if memory.checkpointing == "none" else 2}
        copies, shared, serial = _copies(unit, layers, memory, rates, clips)

        def passing(name: str) -> PassTime:
            count = counts[name]
            products = count["linear"] * unit.linear / self._gemm
            if self._wide_adapters:
                products += (runs[name] + (name == "backward")) * unit.adapters / rates.gemm_float32
            else:
                # Products that wait for memory move as many bytes at any rank; at a large one they wait no more.
                waiting_s = count["thin_u"] * unit.adapter_bytes / rates.memory
                products += max(waiting_s, count["thin"] * unit.adapters / self._gemm)
            kept = keeping / layers if name == "backward" else 0.0
            attention = (count["attention"] - kept) * unit.attention / rates.attention_forward
            attention += count["attention_backward"] * BACKWARD_ATTENTION * unit.attention / rates.attention_backward
            traffic = clips * layers * count["elementwise_u"] * unit.token_bytes / rates.memory
            return PassTime(
                name,
                products_s=times * clips * layers * products,
                attention_s=times * clips * layers * attention,
                traffic_s=times * (traffic + shared[name]),
                exchanges_s=times * clips * layers * runs[name] * unit.exchanged / link_rate(rates.device),
                decoding_s=times * decoded * runs[name],
                launches_s=times * layers * count["kernels"] * rates.launch,
                copies_s=times * copies[name],
                serial_s=times * serial,
            )

        update = _update(unit, layers, memory, rates)
        update_launches = layers * counts["update"]["kernels"] * rates.launch
        if memory.optimizer_states == "host":
            last = PassTime("update", serial_s=update)
        else:
            last = PassTime("update", traffic_s=update, launches_s=update_launches)
        base = replace(passing("forward"), name="base") if config.data.preserves_prior else None
        return StepTime(passing("forward"), passing("backward"), last, base)


@cache
def _adapter_shapes(
    targets: str | tuple[str, ...], rank: int, ranks: tuple[tuple[str, int], ...], layers: int, width: float
) -> AdapterShapes:
    return AdapterShapes.of(LoraMethod(targets=targets, rank=rank, ranks=dict(ranks)), layers, width)


_lokr_shapes = cache(AdapterShapes.of)


@cache
def _block_work() -> Mapping[str, Mapping[str, Mapping[str, float]]]:
    table: dict[str, dict[str, dict[str, float]]] = json.loads(BLOCK_WORK.read_text(encoding="utf-8"))
    return table


@cache
def _counts(rotary: bool, method: str, state: str, name: str, tokens: float) -> Mapping[str, float]:
    """What a block does in a pass, in ``BlockUnits``; kernels for so many tokens, by which chunks are cut."""
    table = _block_work()
    learned, few, many = (table[f"{model} {method}, {state}"][name] for model in REFERENCES)
    first = few if rotary else learned
    slope = (many["kernels"] - few["kernels"]) / (many["tokens"] - few["tokens"])
    return {**first, "kernels": max(first["kernels"] + slope * (tokens - first["tokens"]), 1.0)}


def _copies(
    unit: BlockUnits, layers: int, memory: MemoryConfig, rates: Rates, clips: int
) -> tuple[Mapping[str, float], Mapping[str, float], float]:
    """Of one forward and backward pass of some clips: copies beside them, the bandwidth that these take from the
    device's memory, and what of them nothing goes on beside; in seconds.
    """
    streamed = layers if memory.streamed_blocks == "all" else min(memory.streamed_blocks, layers)
    weights = streamed * unit.weights * BYTES_PER_WEIGHT[memory.base]
    if memory.modulation == "device":
        weights += streamed * unit.modulation_weights * 2.0
    activations = clips * layers * unit.token_bytes if memory.activations == "host" else 0.0
    gradients = 0.0
    if memory.gradient_release == "exact" or memory.optimizer_states == "host":
        gradients = 2.0 * unit.trained * layers
    if memory.streams and memory.ring == 1:
        nothing = {"forward": 0.0, "backward": 0.0}
        return nothing, nothing, weights / rates.host_to_device
    copies = {
        "forward": max(weights / rates.host_to_device, activations / rates.device_to_host),
        "backward": max((weights + activations) / rates.host_to_device, gradients / rates.device_to_host),
    }
    shared = {
        "forward": (weights + activations) / rates.memory,
        "backward": (weights + activations + gradients) / rates.memory,
    }
    return copies, shared, 0.0


def _update(unit: BlockUnits, layers: int, memory: MemoryConfig, rates: Rates) -> float:
    """The optimizer's own time, in seconds."""
    trained = unit.trained * layers
    weights_back = 2.0 * trained / rates.host_to_device
    if memory.optimizer_states == "host":
        return max(trained * _UPDATE_TRAFFIC / rates.host_memory, weights_back)
    update = trained * _UPDATE_TRAFFIC / rates.memory
    return max(update, weights_back) if memory.gradient_release == "exact" else update
