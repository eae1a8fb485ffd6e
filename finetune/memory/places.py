"""The large buffers of memory techniques, and a register of what each is for.

A technique asks here for host and device memory and copies between the two explicitly. The register lets the planner,
which runs the same code on fake CPU tensors, tell host from device and say what every byte is for.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary


@dataclass(frozen=True)
class Label:
    """What a storage is for, and where it is."""

    what: str
    """Such as ``streaming ring``."""
    host: bool
    pinned: bool = False
    """Page-locked: the device copies from it while it computes."""


_labels: WeakIdKeyDictionary = WeakIdKeyDictionary()
_working: ContextVar[Label | None] = ContextVar("working_for", default=None)


def tag(tensor: Tensor, what: str, *, host: bool = False, pinned: bool = False) -> Tensor:
    """Register the storage of ``tensor``; it is returned."""
    _labels[tensor.untyped_storage()] = Label(what, host, pinned)
    return tensor


def label_of(storage: torch.UntypedStorage) -> Label | None:
    """What a storage was registered as; None for one that no technique made."""
    label: Label | None = _labels.get(storage)  # type: ignore[no-untyped-call]
    return label


@contextmanager
def host_work(what: str) -> Iterator[None]:
    """Around work that is done on the host: what it allocates and has no label of its own is host memory for ``what``.

    It changes nothing but what ``working_for`` says.
    """
    before = _working.set(Label(what, host=True))
    try:
        yield
    finally:
        _working.reset(before)


def working_for() -> Label | None:
    """What memory allocated right now is for, where that is known."""
    return _working.get()


def host_buffer(nbytes: int, *, pinned: bool, what: str) -> Tensor:
    """A flat uint8 buffer on the host.

    Args:
        nbytes: its size.
        pinned: page-locked, where there is a GPU. A host that refuses gives pageable memory, with a warning: the result
            is the same, and copies wait for each other.
        what: what it is for.
    """
    # Asked for even where no GPU is: the planner counts what a run would pin.
    if pinned and torch.cuda.is_available():
        try:
            return tag(torch.empty(nbytes, dtype=torch.uint8, pin_memory=True), what, host=True, pinned=True)
        except RuntimeError as error:
            warnings.warn(
                f"{nbytes / 2**30:.2f} GiB of host memory cannot be pinned for {what} ({error}); using pageable memory,"
                " which the GPU cannot copy while it computes. `ulimit -l` and the container's limits decide.",
                stacklevel=2,
            )
            pinned = False
    return tag(torch.empty(nbytes, dtype=torch.uint8), what, host=True, pinned=pinned)


def device_buffer(nbytes: int, device: torch.device, what: str) -> Tensor:
    """A flat uint8 buffer on ``device``."""
    return tag(torch.empty(nbytes, dtype=torch.uint8, device=device), what)
