"""Counting the memory that tensors take, storage by storage."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class StorageCounter(TorchDispatchMode):
    """Bytes of the storages that were made inside and are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._alive: dict[int, int] = {}

    def count(self, tensor: Tensor) -> None:
        """Count it, unless that was done."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._alive and tensor.device.type != "meta":
            self._watch(storage, storage.nbytes())

    def ignore(self, tensor: Tensor) -> None:
        """Do not count what was made before."""
        self._watch(tensor.untyped_storage(), 0)

    def _watch(self, storage: torch.UntypedStorage, size: int) -> None:
        self._alive[storage._cdata] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, storage._cdata)

    def _drop(self, key: int) -> None:
        self.now -= self._alive.pop(key)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        for tensor in tree_iter(output):
            if isinstance(tensor, Tensor):
                self.count(tensor)
        return output
