"""Which kernel computes attention: half of a step, and between the fastest and the slowest of a card lies a factor two.

torch has several behind ``scaled_dot_product_attention``, and chooses by rules that are older than some of them. So on
a GPU they are timed when a run begins, forward and backward, at the run's own shape and with what a block does: the
output and logsumexp are kept, and given back to the backward pass.

No choice changes what is computed but for the last digits.
"""

from __future__ import annotations

import importlib.metadata
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, activate_flash_attention_impl, restore_flash_attention_impl, sdpa_kernel

from finetune.cogvideox.config import Attention
from finetune.core.distributed import LEAST_CUDNN, cudnn_name
from finetune.core.errors import ConfigError, first_line
from finetune.memory.checkpointing import SavedAttention

_BACKENDS: Mapping[Attention, SDPBackend] = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "flash3": SDPBackend.FLASH_ATTENTION,
    "flash4": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}

_PACKAGES: Mapping[Attention, tuple[str, str]] = {
    "flash3": ("FA3", "flash_attn_interface"),
    "flash4": ("FA4", "flash_attn.cute"),
}
"""Kernels that torch takes from another package: what it calls them, and the module."""

_ON_CPU: Sequence[Attention] = ("flash", "math")


@dataclass(frozen=True)
class AttentionRequest:
    """What attention is to be computed, and how."""

    device: torch.device
    dtype: torch.dtype
    batch: int
    heads: int
    head_dim: int
    lengths: tuple[int, ...]
    """Tokens of the joint sequences that the run has, text included."""
    deterministic: bool = False

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of queries, [B, H, S, head dim], for the longest sequence."""
        return self.batch, self.heads, max(self.lengths), self.head_dim


@dataclass(frozen=True)
class AttentionChoice:
    """A kernel, and how it was chosen, in lines for a log."""

    kernel: Attention
    lines: tuple[str, ...] = ()


@contextmanager
def attention_kernel(kernel: Attention) -> Iterator[None]:
    """Compute attention with this kernel inside, in every thread; ``auto`` leaves the choice to torch.

    Where it cannot compute what it is given, torch raises: nothing else is used in its place.
    """
    if kernel == "auto":
        yield
        return
    with ExitStack() as stack:
        if kernel in _PACKAGES:
            activate_flash_attention_impl(_PACKAGES[kernel][0])
            stack.callback(restore_flash_attention_impl)
        stack.enter_context(sdpa_kernel(_BACKENDS[kernel]))
        yield


def obstacles(request: AttentionRequest) -> dict[Attention, str]:
    """Why a kernel cannot be used, by kernel; those that are not named may be tried. Nothing is computed."""
    if request.device.type != "cuda":
        return {name: f"it is not for {request.device.type}" for name in _BACKENDS if name not in _ON_CPU}
    found: dict[Attention, str] = {}
    for name, (_, module) in _PACKAGES.items():
        if not _is_installed(module):
            found[name] = f"{module} is not installed, or cannot be imported"
    version = torch.backends.cudnn.version() or 0  # type: ignore[no-untyped-call]
    if version < LEAST_CUDNN and any(length % 128 for length in request.lengths):
        # Out of bounds, and so wrong numbers rather than an error: pytorch#169849.
        found["cudnn"] = f"cuDNN {cudnn_name(version)} reads out of bounds at lengths that 128 does not divide"
    if request.deterministic:
        found["cudnn"] = "its backward pass is not deterministic"
    return found


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except Exception:  # of the package that it is in: it is missing, or was built for another torch
        return False


def kernels_to_time(request: AttentionRequest) -> list[Attention]:
    """What may be the fastest. Not ``math``, which forms the square of the sequence: 28 GiB at 17 776 tokens."""
    refused = obstacles(request)
    return [name for name in _BACKENDS if name not in refused and name != "math"]


def require_kernel(kernel: Attention, request: AttentionRequest, *, where: str) -> None:
    """Refuse a kernel that a run asks for and this machine cannot use.

    Args:
        kernel: as configured; ``auto`` is always possible.
        request: of the run.
        where: the option, for the message.

    Raises:
        ConfigError: naming why, and what there is.
    """
    if kernel != "auto" and (reason := _why_not(kernel, request)):
        refused = {kernel, *obstacles(request)}
        others = ", ".join(["auto", *(name for name in _BACKENDS if name not in refused)])
        raise ConfigError(f"{kernel} cannot compute attention here: {reason}", where=where, fix=f"use {others}")


def usable_kernel(kernel: Attention, request: AttentionRequest) -> Attention:
    """``kernel`` where it can compute what is asked for; otherwise ``auto``."""
    return "auto" if kernel != "auto" and _why_not(kernel, request) else kernel


def _why_not(kernel: Attention, request: AttentionRequest) -> str:
    """Why a kernel cannot be used, of which a few tokens are tried; empty if it can."""
    if kernel in (refused := obstacles(request)):
        return refused[kernel]
    tiny = replace(request, batch=1, heads=1, lengths=(min(min(request.lengths), 272),))
    try:
        with attention_kernel(kernel):
            attention_rate(tiny, seconds=0)
    except Exception as error:  # not for this card, dtype or head dimension; a package raises what it likes
        return first_line(error)
    return ""


def choose_kernel(request: AttentionRequest, *, recorded: Attention = "auto", seconds: float = 1.0) -> AttentionChoice:
    """The fastest kernel for a run on a GPU; on other devices ``auto``, which is torch's own choice there. Nothing is
    timed for a run that has a kernel already.

    Args:
        request: of the run.
        recorded: the kernel that the run was trained with so far, which is used again where it can be: another one
            would change the last digits. ``auto`` where there is none.
        seconds: for all measurements together.
    """
    notes: list[str] = []
    if recorded != "auto":
        if not (reason := _why_not(recorded, request)):
            return AttentionChoice(recorded, (f"attention: {recorded}, as this run was trained so far",))
        notes.append(
            f"warning: this run was trained so far with {recorded}, which cannot compute attention here: {reason}"
        )
    if request.device.type != "cuda":
        return AttentionChoice("auto", tuple(notes))
    library = f"cuDNN {cudnn_name(torch.backends.cudnn.version() or 0)}"  # type: ignore[no-untyped-call]
    if other := shadowing_cudnn():
        notes.append(f"warning: {other}")
    candidates = kernels_to_time(request)
    rates: dict[Attention, float] = {}
    failures: list[str] = []
    for name in candidates:
        try:
            with attention_kernel(name):
                rates[name] = attention_rate(request, seconds=seconds / len(candidates))
        except Exception as error:  # not for this card, dtype or head dimension; a package raises what it likes
            failures.append(f"{name}: {first_line(error)}")
    if not rates:
        why = "; ".join(failures)
        line = f"warning: attention is left to torch, no kernel could be timed ({why})"
        return AttentionChoice("auto", (line, *notes))
    fastest = sorted(rates, key=lambda name: -rates[name])
    timed = ", ".join(f"{name} {rates[name] / 1e12:.0f}" for name in fastest)
    dtype = str(request.dtype).removeprefix("torch.")
    line = f"attention: {fastest[0]}; TFLOP/s forward and backward at {request.shape} in {dtype}: {timed}; {library}"
    return AttentionChoice(fastest[0], (line, *notes))


# ------------------------------------------------------------------------------------------------------------ measuring


def attention_rate(request: AttentionRequest, *, seconds: float) -> float:
    """Floating-point operations per second of attention as it is set now, forward and backward.

    With two matrix products forward and five backward. Time is the host's between two moments at which the device has
    nothing left to do, which is right for kernels of milliseconds.

    Args:
        request: whose shape is computed.
        seconds: for the measurement; at least one round is made after one that does not count.

    Raises:
        RuntimeError: if the kernel cannot compute it.
    """
    q, k, v, of_output = (torch.randn(request.shape, device=request.device, dtype=request.dtype) for _ in range(4))

    def work() -> None:
        forward_backward((q, k, v), of_output)

    _timed(work, request.device)  # libraries choose their kernels the first time
    best, end = math.inf, time.perf_counter() + seconds
    while best == math.inf or time.perf_counter() < end:
        best = min(best, _timed(work, request.device))
    batch, heads, length, width = request.shape
    return (2 + 5) * 2.0 * batch * heads * length**2 * width / max(best, 1e-9)


def forward_backward(inputs: Sequence[Tensor], of_output: Tensor) -> tuple[Tensor, ...]:
    """Attention as a block that keeps it computes it: without a graph, then differentiated from what was kept.

    Args:
        inputs: queries, keys and values, [B, H, S, head dim].
        of_output: the output's gradient, formed like it.

    Returns:
        The gradients of the inputs.
    """
    # Not kept where the kernel is no single operation: then this runs it twice, as a block would.
    saved = SavedAttention(enabled=True)
    with torch.no_grad(), saved.recording():
        functional.scaled_dot_product_attention(inputs[0], inputs[1], inputs[2])
    q, k, v = (tensor.detach().requires_grad_() for tensor in inputs)
    with torch.enable_grad(), saved.replaying():
        output = functional.scaled_dot_product_attention(q, k, v)
    return torch.autograd.grad(output, (q, k, v), of_output)


def _timed(work: Callable[[], object], device: torch.device) -> float:
    begun = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun


# ---------------------------------------------------------------------------------------------------- which cuDNN it is


def shadowing_cudnn() -> str:
    """What to say where another cuDNN is loaded than the one that came with torch; empty where that is the one.

    A system's CUDA on ``LD_LIBRARY_PATH`` takes its place without a word, and attention may then be the slow one.
    """
    with suppress(OSError, importlib.metadata.PackageNotFoundError):  # no /proc but on Linux; torch built from source
        cuda = (torch.version.cuda or "").partition(".")[0]
        package = importlib.metadata.distribution(f"nvidia-cudnn-cu{cuda}")
        folder = Path(str(package.locate_file("nvidia/cudnn"))).resolve()
        return describe_shadowing(Path("/proc/self/maps").read_text(), folder)
    return ""


def describe_shadowing(maps: str, wheel: Path) -> str:
    """As ``shadowing_cudnn``, of a process's list of mapped files and the folder of torch's own cuDNN."""
    loaded = {Path(path) for path in re.findall(r"(/\S*libcudnn\S*\.so\S*)", maps)}
    others = sorted(str(path) for path in loaded if not path.is_relative_to(wheel))
    if not others:
        return ""
    return f"{others[0]} is loaded in place of the cuDNN that came with torch ({wheel}): look at LD_LIBRARY_PATH"
