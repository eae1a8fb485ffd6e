"""Measuring what a machine can do, in some twenty seconds: the constants of ``cost``."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from finetune.planning.rates import Rates


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
    each = seconds / 8
    dtype = torch.bfloat16
    rows = torch.randn(tokens, width, device=device, dtype=dtype)
    weight = torch.randn(4 * width, width, device=device, dtype=dtype)
    gemm = _rate(lambda: functional.linear(rows, weight), device, each, 8.0 * tokens * width**2)

    forward, backward = _attention(device, each, tokens, width)
    scratch = torch.empty_like(rows)
    memory = _rate(lambda: torch.neg(rows, out=scratch), device, each, 2.0 * rows.nbytes)
    on_host = torch.empty(rows.shape, dtype=dtype)
    pinned = torch.empty(rows.shape, dtype=dtype, pin_memory=True) if device.type == "cuda" else on_host.clone()
    return Rates(
        device=device_name(device),
        source="measured",
        gemm=gemm,
        attention_forward=forward,
        attention_backward=backward,
        memory=memory,
        host_to_device=_copy_rate(scratch, pinned, device, each),
        device_to_host=_copy_rate(pinned, scratch, device, each),
        pageable=_copy_rate(scratch, on_host, device, each),
        host_memory=_copy_rate(on_host, pinned, torch.device("cpu"), each) * 2,
    )


def _attention(device: torch.device, seconds: float, tokens: int, width: int) -> tuple[float, float]:
    """Rates of the forward and the backward pass, at head dimension 64."""
    shape, operations = (1, width // 64, tokens, 64), 4.0 * tokens**2 * width
    query, key, value = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(3))
    attend = partial(functional.scaled_dot_product_attention, query, key, value)
    forward = _rate(attend, device, seconds, operations)
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    output = attend()
    differentiate = partial(torch.autograd.grad, output, leaves, torch.randn_like(output), retain_graph=True)
    return forward, _rate(differentiate, device, seconds, 2.5 * operations)


def _copy_rate(target: Tensor, source: Tensor, device: torch.device, seconds: float) -> float:
    return _rate(lambda: target.copy_(source, non_blocking=True), device, seconds, float(source.nbytes))


def _rate(work: Callable[[], object], device: torch.device, seconds: float, amount: float) -> float:
    """How much of ``amount`` per second, at best: anything slower was disturbed."""
    work()  # libraries choose their kernels the first time
    _finish(device)
    best, end = float("inf"), time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < end:
        begun = time.perf_counter()
        for _ in range(4):
            work()
        _finish(device)
        best = min(best, (time.perf_counter() - begun) / 4)
    return amount / max(best, 1e-9)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
