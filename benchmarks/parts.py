"""What a step is made of, measured part by part: attention, matrix products, and where the time of a whole step goes.

Each generator gives names with what measures them. What a device, or a version of torch, does not have is a row that
says so: the others are worth measuring.
"""

from __future__ import annotations

import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from finetune.core.distributed import cudnn_name
from finetune.memory.attention import AttentionRequest, attention_kernel, kernels_to_time

Row = dict[str, Any]
Measurement = tuple[str, Callable[[], Row]]

ATTENTION = ((1, 48, 17_776, 64), (1, 48, 45_104, 64))
"""[B, H, S, head dim] of 5B at 49x480x720, and of 1.5-5B at 81x768x1360."""

PRODUCTS = tuple(
    (tokens, fan_in, fan_out)
    for tokens in (17_776, 45_104)
    for fan_in, fan_out in ((3072, 3072), (3072, 12_288), (12_288, 3072), (3072, 384), (128, 3072))
)
"""Tokens, inputs and outputs: attention's layers, the feed-forward's two, and a LoRA's of rank 128."""

TOY_ATTENTION, TOY_PRODUCTS = ((1, 2, 272, 16),), ((64, 32, 48), (64, 32, 16))
ROUNDS = 5


def seconds(work: Callable[[], object], device: torch.device, rounds: int = ROUNDS) -> float:
    """Median of some rounds, after one that does not count."""

    def timed() -> float:
        begun = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begun

    timed()
    return statistics.median(timed() for _ in range(rounds))


def _tried(work: Callable[[], Row]) -> Row:
    try:
        return work()
    except (RuntimeError, NotImplementedError, ImportError, TypeError, AttributeError) as error:
        return {"absent": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}


# ------------------------------------------------------------------------------------------------------------ attention


def attention_kernels(device: torch.device, shapes: Sequence[tuple[int, int, int, int]]) -> Iterator[Measurement]:
    """Every kernel that is here, forward and backward, at every shape."""
    dtype = torch.bfloat16
    for shape in shapes:
        batch, heads, length, head_dim = shape
        request = AttentionRequest(device, dtype, batch, heads, head_dim, (length,))
        for kernel in kernels_to_time(request):
            work = partial(_attention, kernel, shape, device, dtype)
            yield f"attention {shape} {kernel}", partial(_tried, work)


def _attention(kernel: Any, shape: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype) -> Row:
    q, k, v, of_output = (torch.randn(shape, device=device, dtype=dtype) for _ in range(4))
    batch, heads, length, width = shape
    products = 2.0 * batch * heads * length**2 * width
    with attention_kernel(kernel):
        with torch.no_grad():
            forward_s = seconds(lambda: functional.scaled_dot_product_attention(q, k, v), device)
        leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
        output = functional.scaled_dot_product_attention(*leaves)
        differentiate = partial(torch.autograd.grad, output, leaves, of_output, retain_graph=True)
        backward_s = seconds(differentiate, device)
    version = torch.backends.cudnn.version()
    return {
        "forward_ms": round(forward_s * 1e3, 3),
        "backward_ms": round(backward_s * 1e3, 3),
        "forward_tflops": round(2 * products / forward_s / 1e12, 2),
        "backward_tflops": round(5 * products / backward_s / 1e12, 2),
        "cudnn": None if version is None else cudnn_name(version),
    }


# ------------------------------------------------------------------------------------------------------ matrix products


def products(device: torch.device, shapes: Sequence[tuple[int, int, int]]) -> Iterator[Measurement]:
    """Every real shape in the precisions that there are tensor cores for, and in float32."""
    for shape in shapes:
        for name, make in PRECISIONS.items():
            yield f"product {shape} {name}", partial(_tried, partial(_product, make, shape, device))


def _product(make: Callable[[Tensor, Tensor], Callable[[], object]], shape: Sequence[int], device: torch.device) -> Row:
    tokens, fan_in, fan_out = shape
    rows = torch.randn(tokens, fan_in, device=device, dtype=torch.bfloat16)
    weight = torch.randn(fan_out, fan_in, device=device, dtype=torch.bfloat16)
    duration_s = seconds(make(rows, weight), device)
    return {
        "ms": round(duration_s * 1e3, 4),
        "tflops": round(2.0 * tokens * fan_in * fan_out / duration_s / 1e12, 2),
    }


def _in_bf16(rows: Tensor, weight: Tensor) -> Callable[[], object]:
    return lambda: functional.linear(rows, weight)


def _in_float32(rows: Tensor, weight: Tensor) -> Callable[[], object]:
    wide, square = rows.float(), weight.float()
    return lambda: functional.linear(wide, square)


def _in_fp8(rows: Tensor, weight: Tensor) -> Callable[[], object]:
    """E4M3 with a scale per row of either, as a base held in fp8 would be multiplied."""
    (a, scale_a), (b, scale_b) = (_scaled(tensor, torch.float8_e4m3fn, 448.0) for tensor in (rows, weight))
    options = {"scale_a": scale_a, "scale_b": scale_b.T, "out_dtype": torch.bfloat16}
    return lambda: torch._scaled_mm(a, b.T, **options)


def _in_int8(rows: Tensor, weight: Tensor) -> Callable[[], object]:
    (a, _), (b, _) = (_scaled(tensor, torch.int8, 127.0) for tensor in (rows, weight))
    return lambda: torch._int_mm(a, b.T)


def _scaled(tensor: Tensor, dtype: torch.dtype, most: float) -> tuple[Tensor, Tensor]:
    scale = tensor.float().abs().amax(dim=1, keepdim=True) / most
    return (tensor.float() / scale).to(dtype), scale


PRECISIONS = {"bf16": _in_bf16, "fp8": _in_fp8, "int8": _in_int8, "float32": _in_float32}


# --------------------------------------------------------------------------------------------- where a step's time goes

KINDS = {
    "attention": r"fmha|flash|attention|sdpa|softmax",
    "products": r"gemm|cutlass|nvjet|cublas|xmma|\bmm\b|addmm|bmm|linear|matmul",
    "copies": r"memcpy|memset",
}
"""Kernels by a part of their names, the first that fits; all others are traffic."""


def breakdown(step: Callable[[], object], device: torch.device) -> Row:
    """One step under torch's profiler: seconds of its kernels by kind, how many there are, and how long it idles."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    begun = time.perf_counter()
    with profile(activities=activities) as profiler:
        step()
        if on_gpu:
            torch.cuda.synchronize(device)
    wall_s = time.perf_counter() - begun
    kinds: Counter[str] = Counter()
    kernels: Counter[str] = Counter()
    longest: Counter[str] = Counter()
    for event in profiler.key_averages():
        # A GPU's own events alone: an operation of the processor has the time of its kernels as well.
        # Nor ranges that a library names: theirs is the time of the kernels inside.
        if on_gpu != (event.device_type == torch.autograd.DeviceType.CUDA) or event.is_user_annotation:
            continue
        spent = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6
        kind = next((kind for kind, part in KINDS.items() if re.search(part, event.key, re.IGNORECASE)), "traffic")
        kinds[kind] += spent
        kernels[kind] += event.count
        longest[event.key[:80]] += spent
    busy_s = sum(kinds.values())
    return {
        "profiled_s": round(wall_s, 4),
        "busy_s": round(busy_s, 4),
        "by_kind_s": {kind: round(spent, 4) for kind, spent in kinds.most_common()},
        "kernels": dict(kernels),
        "longest_s": {name: round(spent, 4) for name, spent in longest.most_common(12)},
    }
