"""Tensors that stay where they are when their module is moved.

Whatever prepares a model calls ``model.to(device)`` on the whole of it, and so would bring to the device what a
technique keeps on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from finetune.errors import TrainingError


def anchor(module: nn.Module, tensors: Iterable[Tensor]) -> None:
    """Let ``module.to(...)`` and the like pass over these parameters and buffers; the rest moves as usual.

    A change of dtype raises TrainingError: left undone without a word, it would be a model of two dtypes.
    """
    anchored = {id(tensor) for tensor in tensors}
    original: Callable[..., nn.Module] = type(module)._apply

    def apply(fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        def passing_over(tensor: Tensor) -> Tensor:
            if id(tensor) not in anchored:
                return fn(tensor)
            # Buffers of a block are codes and scales, which no cast is meant for.
            if isinstance(tensor, nn.Parameter) and fn(torch.empty(0, dtype=tensor.dtype)).dtype != tensor.dtype:
                raise TrainingError(
                    "the dtype of weights that are kept on the host cannot be changed",
                    where="memory",
                    fix="convert the model before MemoryConfig.apply",
                )
            return tensor.data if isinstance(tensor, nn.Parameter) else tensor

        return original(module, passing_over, recurse)

    untyped: Any = module
    untyped._apply = apply


def release(module: nn.Module) -> None:
    """Undo ``anchor``."""
    module.__dict__.pop("_apply", None)
