"""How long a step takes: what a machine can do, measured on it or published for its kind of card, and arithmetic.

Also what of a GPU's memory is not for the tensors of a training.
"""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, Literal

import torch
from pydantic import Field, ValidationError
from torch import Tensor
from torch.nn import functional

from finetune.cogvideox.spec import ModelSpec
from finetune.config.schema import RunConfig
from finetune.core.files import atomic_write_text, user_folder
from finetune.core.gpu import NCCL_BYTES, OVERHEAD_GIB, to_gib
from finetune.core.types import GIB, Strict
from finetune.memory.config import MemoryConfig
from finetune.methods.lora import LoraMethod


class Rates(Strict):
    """Of one device and its host. Operations or bytes per second."""

    device: str
    """Its name, as torch gives it."""
    source: Literal["measured", "published or assumed", "of another card"]
    """Where the numbers come from."""
    gemm: float = Field(gt=0)
    """Matrix products in bf16."""
    attention_forward: float = Field(gt=0)
    """Attention of head dimension 64 over some ten thousand tokens."""
    attention_backward: float = Field(gt=0)
    memory: float = Field(gt=0)
    """Reads and writes of device memory."""
    host_to_device: float = Field(gt=0)
    """From page-locked memory."""
    device_to_host: float = Field(gt=0)
    """To page-locked memory."""
    pageable: float = Field(gt=0)
    """To the device from ordinary memory."""
    host_memory: float = Field(gt=0)
    """Reads and writes of host memory."""


_PUBLISHED = {
    # Teraflops of matrix products and of attention's two passes; TB/s of the memory; GB/s of the bus and of the host.
    # GEMM: others measured 798 on large squares; less for these shapes. Attention: cuDNN, as the FlashAttention-3
    # paper has it.
    "H100": (720, 413, 433, 2.7, 50, 150),
    # An H100 with faster memory, 4.8 TB/s at most.
    "H200": (720, 413, 433, 3.8, 50, 150),
    # GEMM: 312 at most, 265 seen. Attention: FlashAttention-2 paper. The bus: PCIe 4.
    "A100": (265, 192, 170, 1.65, 25, 100),
    # GEMM: 165 at most. Attention: assumed; no figure for its backward pass at head dimension 64 was found.
    "4090": (150, 155, 120, 0.9, 25, 60),
}

DEFAULTS: Mapping[str, Rates] = {
    name: Rates(
        device=name,
        source="published or assumed",
        gemm=gemm * 1e12,
        attention_forward=forward * 1e12,
        attention_backward=backward * 1e12,
        memory=memory * 1e12,
        host_to_device=bus * 1e9,
        device_to_host=bus * 1e9,
        pageable=bus * 1e9 / 3,
        host_memory=host * 1e9,
    )
    for name, (gemm, forward, backward, memory, bus, host) in _PUBLISHED.items()
}
"""By a part of the device's name. None of these was measured by us."""

OTHER = "A100"
"""Whose rates a card is given that is none of these: orders of plans then still mean something, seconds do not."""

OF_ANOTHER: Final = "of another card"


_LINKS = {"H100": 350, "H200": 350, "A100": 230}
"""GB/s that a GPU sends to its neighbours while it receives as much: of NVLink's 450 and 300 about what others measured
of NCCL's exchanges. Cards without NVLink go through the host."""

_HOST_LINK = 12


def link_rate(device: str) -> float:
    """Bytes per second that a GPU sends to others of its machine; published or assumed, never measured by us.

    Args:
        device: its name.
    """
    kinds = [rate for part, rate in _LINKS.items() if re.search(rf"\b{part}\b", device, re.IGNORECASE)]
    return 1e9 * (kinds[0] if kinds else _HOST_LINK)


def known_devices() -> list[str]:
    """What ``rates_of`` has rates of its own for: kinds of cards, and names of devices that were calibrated here."""
    files = sorted(calibration_file("any").parent.glob("*.json"))
    return [*DEFAULTS, *(rates.device for path in files if (rates := _read_rates(path)) is not None)]


def rates_of(device: str) -> Rates:
    """Measured rates of a device where it was calibrated, else its kind's.

    Args:
        device: its name.
    """
    if (measured := _read_rates(calibration_file(device))) is not None:
        return measured
    for part, rates in DEFAULTS.items():
        if re.search(rf"\b{part}\b", device, re.IGNORECASE):
            return rates.model_copy(update={"device": device})
    return DEFAULTS[OTHER].model_copy(update={"device": device, "source": OF_ANOTHER})


def _read_rates(path: Path) -> Rates | None:
    with suppress(OSError, ValidationError):
        return Rates.model_validate_json(path.read_bytes())
    return None


def calibration_file(device: str) -> Path:
    """Where the measured rates of a device are kept."""
    return user_folder() / "calibration" / f"{re.sub('[^A-Za-z0-9]+', '-', device).strip('-').lower()}.json"


def save_rates(rates: Rates) -> Path:
    """Write measured rates to where ``rates_of`` finds them, and return the file.

    Raises:
        OSError: if it cannot be written.
    """
    path = calibration_file(rates.device)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, rates.model_dump_json(indent=1) + "\n")
    return path


# ----------------------------------------------------------------------------------------- measuring, in twenty seconds


def device_name(device: torch.device) -> str:
    """What a device is called, in calibrations and plans."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"CPU {platform.machine()}"


def calibrate(device: torch.device, *, seconds: float = 20.0, tokens: int = 17_776, width: int = 3072) -> Rates:
    """Measure the rates of ``device`` and its host.

    Args:
        device: what trains.
        seconds: for all of it; a measurement is ended by the clock, but makes at least one round.
        tokens: of the sequence that is computed on.
        width: of its tokens; a multiple of 64.

    Raises:
        torch.OutOfMemoryError: if some hundred MiB are not free.
    """
    dtype, cpu = torch.bfloat16, torch.device("cpu")
    rate = partial(_rate, seconds=seconds / 8)
    rows = torch.randn(tokens, width, device=device, dtype=dtype)
    weight = torch.randn(4 * width, width, device=device, dtype=dtype)
    gemm = rate(lambda: functional.linear(rows, weight), device, 8.0 * tokens * width**2)

    shape, attention = (1, width // 64, tokens, 64), 4.0 * tokens**2 * width
    query, key, value = (torch.randn(shape, device=device, dtype=dtype) for _ in range(3))
    attend = partial(functional.scaled_dot_product_attention, query, key, value)
    forward = rate(attend, device, attention)
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    output = attend()
    differentiate = partial(torch.autograd.grad, output, leaves, torch.randn_like(output), retain_graph=True)
    backward = rate(differentiate, device, _BACKWARD_ATTENTION * attention)

    scratch, on_host = torch.empty_like(rows), torch.empty(rows.shape, dtype=dtype)
    pinned = torch.empty(rows.shape, dtype=dtype, pin_memory=True) if device.type == "cuda" else on_host.clone()

    def copy_rate(target: Tensor, source: Tensor, device: torch.device) -> float:
        return rate(lambda: target.copy_(source, non_blocking=True), device, float(source.nbytes))

    return Rates(
        device=device_name(device),
        source="measured",
        gemm=gemm,
        attention_forward=forward,
        attention_backward=backward,
        memory=rate(lambda: torch.neg(rows, out=scratch), device, 2.0 * rows.nbytes),
        host_to_device=copy_rate(scratch, pinned, device),
        device_to_host=copy_rate(pinned, scratch, device),
        pageable=copy_rate(scratch, on_host, device),
        host_memory=2 * copy_rate(on_host, pinned, cpu),
    )


def _rate(work: Callable[[], object], device: torch.device, amount: float, *, seconds: float) -> float:
    """How much of ``amount`` per second, at best: anything slower was disturbed."""

    def finish() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    work()  # libraries choose their kernels the first time
    finish()
    best, end = float("inf"), time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < end:
        begun = time.perf_counter()
        for _ in range(4):
            work()
        finish()
        best = min(best, (time.perf_counter() - begun) / 4)
    return amount / max(best, 1e-9)


# ------------------------------------------------------ the GPU that is here, and what of its memory tensors do not get

WORKSPACES = "cuBLAS workspaces"

_THREADS = 2
"""That multiply matrices: the one that calls, and autograd's for backward passes. cuBLAS has a handle in each."""

_CONTEXT_GIB = 0.5
"""Of what is taken on a card and is not torch's, this much is our own process's CUDA context."""

_SINCE_HOPPER = re.compile(r"\b(?:GH|GB|H|B)(?:10|20|100|200|300|800)\b|\b50[5-9]0\b|Blackwell", re.IGNORECASE)


def card_here(device: torch.device | None = None) -> int | None:
    """Memory of a GPU here, in bytes, less what other programs hold of it now; None where there is none.

    Args:
        device: which; the current one if None.
    """
    if not torch.cuda.is_available():
        return None
    return torch.cuda.mem_get_info(device)[1] - held_by_others(device)


def held_by_others(device: torch.device | None = None) -> int:
    """Bytes of a GPU here that are neither free nor ours."""
    free, total = torch.cuda.mem_get_info(device)
    return max(0, total - free - torch.cuda.memory_reserved(device) - round(_CONTEXT_GIB * GIB))


def held_note(device: torch.device | None = None) -> str:
    """How much other programs hold of a GPU here, in words; empty where there is none or they hold next to nothing."""
    if not torch.cuda.is_available() or (others := held_by_others(device)) < GIB // 10:
        return ""
    total = torch.cuda.mem_get_info(device)[1]
    return f"other programs hold {to_gib(others)} of this GPU's {to_gib(total)} (nvidia-smi)"


def device_here() -> str:
    """Name of the GPU that is here; where there is none, of the one whose rates stand in."""
    return device_name(torch.device("cuda")) if torch.cuda.is_available() else OTHER


def overhead(device: str, *, processes: int = 1, workspace: str | None = None) -> dict[str, int]:
    """What a training holds of a GPU beside its tensors, in bytes, by name; ``gpu.usable`` leaves room for it.

    Args:
        device: name of the GPU.
        processes: how many train together.
        workspace: see ``workspace_bytes``.
    """
    workspaces = _THREADS * workspace_bytes(device, workspace)
    rest = max(0, round(OVERHEAD_GIB * GIB) - workspaces)
    by_name = {"CUDA context, fragmentation": rest, WORKSPACES: workspaces}
    return by_name | ({"NCCL buffers": NCCL_BYTES} if processes > 1 else {})


def workspace_bytes(device: str, setting: str | None = None) -> int:
    """What torch gives cuBLAS for one handle: 32 MiB since Hopper, 8.1 MiB before, or as its variable says.

    From torch's ``CublasHandlePool.cpp``. The memory is the allocator's, so a measured peak counts it.

    Args:
        device: name of the GPU.
        setting: in place of the environment's ``CUBLAS_WORKSPACE_CONFIG``: pairs of KiB and a count, ``:4096:2:16:8``.
    """
    setting = setting or os.environ.get("CUBLAS_WORKSPACE_CONFIG", "")
    if pairs := re.findall(r":(\d+):(\d+)", setting):
        return sum(int(kib) * 1024 * int(count) for kib, count in pairs)
    if torch.cuda.is_available() and device == device_here():
        hopper = torch.cuda.get_device_capability()[0] >= 9
    else:
        hopper = _SINCE_HOPPER.search(device) is not None
    return 32 * 2**20 if hopper else (2 * 4096 + 8 * 16) * 1024


# --------------------------------------------------------------------------------------------------- a step, in seconds
#
# Floating-point operations, bytes through memory, bytes over the bus. Everything is per process and for the longest
# bucket. Copies that a technique makes beside the computation cost what they last longer than it.

BYTES_PER_WEIGHT = {"native": 2.0, "fp8": 1.0, "fp8_64": 1.06, "int8": 1.0, "nf4": 0.53}
"""With a weight's share of the scales."""

_BACKWARD_ATTENTION = 2.5
"""Matrix products of attention's backward pass for one of its forward pass: five for two."""

_FORWARD_TRAFFIC = {"lora": 154, "full": 114}
_BACKWARD_TRAFFIC = {"lora": 193, "full": 149}
"""Reads and writes of a block's elementwise operations in each pass, counted on the stock block without autocast, in
tensors of the video tokens' size (104 MiB for 5B at 49x480x720). What runs again costs a forward pass once more."""

_LEAN_TRAFFIC = 1.1
"""Of the stock block's; assumed, not counted."""

_DEQUANTISED = 3.0
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


def step_cost(config: RunConfig, spec: ModelSpec, memory: MemoryConfig, rates: Rates) -> Cost:
    """Predict an optimizer step.

    Args:
        config: of the run; its memory section is not looked at.
        spec: of the model.
        memory: the memory state.
        rates: of the machine.
    """
    work = _Work.of(config, spec)
    batch = config.train.batch_size
    clips = min(memory.clips_at_once or batch, batch)
    passes = config.train.accumulation * -(-batch // clips)
    kind = config.method.kind
    traffic = work.token_bytes * work.layers * (_LEAN_TRAFFIC if memory.block == "lean" else 1.0)
    # Weights are decoded, and copied, once for all clips that go through together.
    decoded = 0.0 if memory.base == "native" else work.block_weights * work.layers * _DEQUANTISED / rates.memory
    linear, attention = work.linear / rates.gemm, clips * work.attention / rates.attention_forward
    exchanges = clips * work.exchanged / link_rate(rates.device)
    adapters, moved = work.adapters / rates.gemm, traffic / rates.memory
    forward = clips * (linear + adapters + moved * _FORWARD_TRAFFIC[kind]) + attention + decoded + exchanges
    recompute = 0.0
    if memory.checkpointing != "none":
        keeping = 0 if memory.checkpointing == "full" else (memory.keep_attention or work.layers)
        recompute = forward - attention * min(keeping / work.layers, 1.0)
    backward = (
        clips * (linear * (2 if kind == "full" else 1) + 2 * adapters + moved * _BACKWARD_TRAFFIC[kind])
        + clips * work.attention * _BACKWARD_ATTENTION / rates.attention_backward
        + decoded
        + exchanges
    )
    waiting = _waiting(work, memory, rates, clips, forward, backward + recompute)
    update = _update(work, memory, rates)
    return Cost(passes * forward, passes * backward, passes * recompute, passes * waiting, update)


@dataclass(frozen=True)
class _Work:
    """One clip, or this process's share of it, through the whole model, forward: floating-point operations, bytes and
    weights.
    """

    layers: int
    linear: float
    """Operations of the blocks' linear layers."""
    attention: float
    adapters: float
    token_bytes: float
    """Of one tensor of tokens."""
    block_weights: float
    """Of a block's attention and feed-forward layers."""
    modulation_weights: float
    trained: float
    """Weights that train."""
    exchanged: float
    """Bytes that this process sends to those it shares a clip with, and receives: queries, keys, values, and back."""

    @classmethod
    def of(cls, config: RunConfig, spec: ModelSpec) -> _Work:
        whole, context = max(spec.tokens(bucket) for bucket in config.data.trained_buckets), config.parallel.context
        tokens = whole / context
        width, layers = spec.num_attention_heads * spec.attention_head_dim, spec.num_layers
        block, modulation = 12.0 * width**2, 12.0 * width * 512
        adapters, trained = 0.0, layers * (block + modulation)
        if isinstance(config.method, LoraMethod):
            # As of the default targets, four square layers; others change seconds by hundredths.
            trained = layers * 4 * 2 * width * config.method.rank
            adapters = 2.0 * tokens * trained
        return cls(
            layers=layers,
            linear=2.0 * tokens * block * layers,
            attention=4.0 * tokens * whole * width * layers,
            adapters=adapters,
            token_bytes=2.0 * tokens * width,
            block_weights=block,
            modulation_weights=modulation,
            trained=trained,
            exchanged=4 * 2.0 * tokens * width * layers * (context - 1) / context,
        )


def _waiting(work: _Work, memory: MemoryConfig, rates: Rates, clips: int, forward_s: float, backward_s: float) -> float:
    """What copies beside one forward and backward pass of some clips add, in seconds."""
    streamed = work.layers if memory.streamed_blocks == "all" else min(memory.streamed_blocks, work.layers)
    weights = streamed * work.block_weights * BYTES_PER_WEIGHT[memory.base]
    if memory.modulation == "device":
        weights += streamed * work.modulation_weights * 2.0
    activations = clips * work.layers * work.token_bytes if memory.activations == "host" else 0.0
    gradients = 0.0
    if memory.gradient_release == "exact" or memory.optimizer_states == "host":
        gradients = 2.0 * work.trained
    if memory.streams and memory.ring == 1:
        return 2 * (weights / rates.host_to_device)
    forward_copies = max(weights / rates.host_to_device, activations / rates.device_to_host)
    backward_copies = max((weights + activations) / rates.host_to_device, gradients / rates.device_to_host)
    # Copies that hide behind the computation still take their share of the memory's bandwidth.
    shared = (2 * weights + 2 * activations + gradients) / rates.memory
    return shared + max(forward_copies, forward_s) - forward_s + (max(backward_copies, backward_s) - backward_s)


def _update(work: _Work, memory: MemoryConfig, rates: Rates) -> float:
    """The optimizer's own time, in seconds."""
    weights_back = 2.0 * work.trained / rates.host_to_device
    if memory.optimizer_states == "host":
        return max(work.trained * _UPDATE_TRAFFIC / rates.host_memory, weights_back)
    update = work.trained * _UPDATE_TRAFFIC / rates.memory
    return max(update, weights_back) if memory.gradient_release == "exact" else update
