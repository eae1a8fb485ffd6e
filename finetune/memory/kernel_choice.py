"""Whether Triton's kernels compute an operation, or plain torch does."""

from __future__ import annotations

import functools
import warnings
from types import ModuleType

import torch
from torch import Tensor

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
    """The module ``kernels``; None, and a warning once, where Triton is missing."""
    try:
        import finetune.memory.kernels as kernels
    except ImportError as error:
        warnings.warn(
            f"Triton cannot be imported ({error}): the norms of lean blocks, their rotary embedding and their gates run"
            " in plain torch, which computes the same in several times the memory traffic",
            stacklevel=1,
        )
        return None
    return kernels
