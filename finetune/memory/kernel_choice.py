"""Whether Triton's kernels compute an operation, or plain torch does."""

from __future__ import annotations

import functools
import warnings
from types import ModuleType

import torch
from torch import Tensor

from finetune.core.errors import first_line

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def kernels_for(*tensors: Tensor) -> ModuleType | None:
    """The Triton kernels, if they can compute on these, of which the last axis lies side by side; None for plain torch.

    Args:
        tensors: those of full size.
    """
    fit = all(t.is_cuda and t.stride(-1) == 1 and t.dtype in _KERNEL_DTYPES for t in tensors)
    return triton_kernels() if fit else None


@functools.cache
def triton_kernels() -> ModuleType | None:
    """The module ``kernels``; None, and a warning once, where Triton is missing or cannot start kernels."""
    try:
        import finetune.memory.kernels as kernels
    except ImportError as error:
        reason = f"Triton cannot be imported ({first_line(error)})"
    else:
        if not (lacking := _why_not_started()):
            return kernels
        reason = f"Triton cannot start kernels, for which gcc and Python's headers are needed ({lacking})"
    warnings.warn(
        f"{reason}: the norms of lean blocks, their rotary embedding and their gates run in plain torch, which computes"
        " the same in several times the memory traffic",
        stacklevel=1,
    )
    return None


def _why_not_started() -> str:
    """What Triton lacks to start kernels on the GPU that is here; nothing without one."""
    from triton.runtime import driver

    if torch.cuda.is_available():
        try:
            _ = driver.active.utils  # compiled when it is first asked for
        except Exception as error:  # no compiler, no header, no libcuda to link with: each raises another kind
            return first_line(error) or type(error).__name__
    return ""
