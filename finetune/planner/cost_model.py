"""What a machine can do, measured on it or published for its kind of card; and what of a GPU's memory is not for the
tensors of a training. ``step_time`` makes seconds of it.
"""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Final, Literal

import torch
import yaml
from pydantic import Field, ValidationError
from torch import Tensor
from torch.nn import functional

from finetune.core.files import atomic_write_text, user_folder
from finetune.core.gpu import NCCL_BYTES, OVERHEAD_GIB, to_gib
from finetune.core.types import GIB, Strict


class Rates(Strict):
    """Of one device and its host. Operations or bytes per second."""

    device: str
    """Its name, as torch gives it."""
    source: Literal["measured", "published or assumed", "of another card"]
    """Where the numbers come from."""
    gemm: float = Field(gt=0)
    """Matrix products in bf16."""
    gemm_float32: float = Field(gt=0)
    """Matrix products in float32, without TF32 as torch has it by default."""
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
    launch: float = Field(gt=0)
    """Seconds in which Python and torch queue one kernel."""


CARDS = Path(__file__).parent.parent / "templates" / "cards.yaml"

_UNITS = {
    **dict.fromkeys(("gemm", "gemm_float32", "attention_forward", "attention_backward", "memory"), 1e12),
    **dict.fromkeys(("host_to_device", "host_memory"), 1e9),
    "launch": 1e-6,
}


def _published(name: str, figures: Mapping[str, float]) -> Rates:
    values = {key: value * _UNITS[key] for key, value in figures.items()}
    bus = values["host_to_device"]
    return Rates(device=name, source="published or assumed", device_to_host=bus, pageable=bus / 3, **values)


DEFAULTS: Mapping[str, Rates] = {
    name: _published(name, figures) for name, figures in yaml.safe_load(CARDS.read_text(encoding="utf-8")).items()
}
"""By a part of the device's name. None of these was measured by us."""

OTHER = "A100"
"""Whose rates a card is given that is none of these: orders of plans then still mean something, seconds do not."""

OF_ANOTHER: Final = "of another card"


_LINKS = {"H100": 350, "H200": 350, "A100": 230}
"""GB/s that a GPU sends to its neighbours while it receives as much: of NVLink's 450 and 300 about what others measured
of NCCL's exchanges. Cards without NVLink go through the host."""

_HOST_LINK = 12


@cache
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
        # A slice of a card (MIG) has its name, and a part of what it does.
        if re.search(rf"\b{part}\b(?!.*\bMIG\b)", device, re.IGNORECASE):
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
    rate = partial(_rate, seconds=seconds / 10)
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
    backward = rate(differentiate, device, BACKWARD_ATTENTION * attention)

    scratch, on_host = torch.empty_like(rows), torch.empty(rows.shape, dtype=dtype)
    pinned = torch.empty(rows.shape, dtype=dtype, pin_memory=True) if device.type == "cuda" else on_host.clone()

    def copy_rate(target: Tensor, source: Tensor, device: torch.device) -> float:
        return rate(lambda: target.copy_(source, non_blocking=True), device, float(source.nbytes))

    few = torch.randn(16, width, device=device, dtype=dtype)
    scale = torch.ones_like(few[0])

    def launches() -> None:
        functional.layer_norm(few, (width,)) * scale + scale

    wide = rows[:4096].float()
    square = weight[:width].float()
    return Rates(
        device=device_name(device),
        source="measured",
        gemm=gemm,
        gemm_float32=rate(lambda: functional.linear(wide, square), device, 2.0 * len(wide) * width**2),
        launch=1 / rate(launches, device, 3.0),
        attention_forward=forward,
        attention_backward=backward,
        memory=rate(lambda: torch.neg(rows, out=scratch), device, 2.0 * rows.nbytes),
        host_to_device=copy_rate(scratch, pinned, device),
        device_to_host=copy_rate(pinned, scratch, device),
        pageable=copy_rate(scratch, on_host, device),
        host_memory=2 * copy_rate(on_host, pinned, cpu),
    )


BACKWARD_ATTENTION = 2.5
"""Matrix products of attention's backward pass for one of its forward pass: five for two."""


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

_CONTEXT_GIB = 0.75
"""Of what is taken on a card and is not torch's, this much is our own process's CUDA context and libraries' kernels."""

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
    ours = torch.cuda.memory_reserved(device) + round(_CONTEXT_GIB * GIB)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        ours += NCCL_BYTES
    return max(0, total - free - ours)


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
