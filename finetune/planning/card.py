"""The GPU that is here, and what of a GPU's memory is not for the tensors of a training."""

from __future__ import annotations

import os
import re

import torch

from finetune.cards import GIB, NCCL_BYTES, OVERHEAD_GIB, to_gib
from finetune.planning.calibrate import device_name
from finetune.planning.rates import OTHER

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
    if not torch.cuda.is_available() or (held := held_by_others(device)) < GIB // 10:
        return ""
    return f"other programs hold {to_gib(held)} of this GPU's {to_gib(torch.cuda.mem_get_info(device)[1])} (nvidia-smi)"


def device_here() -> str:
    """Name of the GPU that is here; where there is none, of the one whose rates stand in."""
    return device_name(torch.device("cuda")) if torch.cuda.is_available() else OTHER


def beside_tensors(device: str, *, processes: int = 1, workspace: str | None = None) -> dict[str, int]:
    """What a training holds of a GPU beside its tensors, in bytes, by name; ``cards.usable`` leaves room for it.

    Args:
        device: name of the GPU.
        processes: how many train together.
        workspace: see ``workspace_bytes``.
    """
    workspaces = _THREADS * workspace_bytes(device, workspace)
    beside = {
        "CUDA context, fragmentation": max(0, round(OVERHEAD_GIB * GIB) - workspaces),
        WORKSPACES: workspaces,
    }
    return beside | ({"NCCL buffers": NCCL_BYTES} if processes > 1 else {})


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
