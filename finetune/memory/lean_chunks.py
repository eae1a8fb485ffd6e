"""Working through a block in chunks of tokens: where they lie, their dropout masks, and sums over them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Chunk:
    """Some neighbouring tokens of one stream, for every clip."""

    index: int
    """Running number over both streams."""
    text: bool
    """Of the text stream; otherwise of the video stream."""
    within: slice
    """Where in its stream."""
    joint: slice
    """Where in the sequence that attention sees: text first."""


def chunks(text: int, video: int, most: int) -> list[Chunk]:
    """Cut both streams into equal chunks, as far as they divide.

    Args:
        text: text tokens per clip.
        video: video tokens per clip.
        most: tokens in a chunk at most.
    """
    found: list[Chunk] = []
    for is_text, count, start in ((True, text, 0), (False, video, text)):
        size = -(-count // -(-count // most))  # of as few chunks as there can be, none much smaller than the others
        for first in range(0, count, size):
            last = min(first + size, count)
            found.append(Chunk(len(found), is_text, slice(first, last), slice(start + first, start + last)))
    return found


@contextmanager
def masks(seed: int | None, segment: int, chunk: int, device: torch.device) -> Iterator[None]:
    """Draw dropout masks from an address, so that a repeated run draws the same; global generators stay as they were.

    Args:
        seed: of this pass through the block; None where no dropout is active, and then nothing is done.
        segment: which part of the block.
        chunk: which tokens.
        device: where the masks are drawn.
    """
    if seed is None:
        yield
        return
    # Steps by an odd constant without pattern keep addresses apart in the low 32 bits too, which is all that the CPU
    # generator reads.
    own = (seed + 0x9E3779B97F4A7C15 * (1 + segment + 3 * chunk)) % 2**63
    cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if cuda else []):
        torch.default_generator.manual_seed(own)
        if cuda:
            torch.cuda.default_generators[device.index].manual_seed(own)
        yield


class GradientSums:
    """Gradients of some tensors, summed over chunks: in float32 where the tensor is narrower.

    Args:
        tensors: what the gradients are of.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = list(tensors)
        self._sums: list[Tensor | None] = [None] * len(self.tensors)

    def add(self, gradients: Sequence[Tensor | None]) -> None:
        """Add one chunk's share, in the order of ``tensors``; None where a tensor had no part in it."""
        for index, gradient in enumerate(gradients):
            if gradient is None:
                continue
            total = self._sums[index]
            if total is None:
                # A copy, even where nothing widens: autograd may hand out one tensor as the gradient of two.
                wide = torch.promote_types(gradient.dtype, torch.float32)
                self._sums[index] = gradient.to(wide, copy=True)
            else:
                total.add_(gradient)

    def settle(self) -> list[Tensor | None]:
        """The sums in their tensors' dtypes; call it when what was added so far is complete, to drop the wide ones."""
        for index, (tensor, total) in enumerate(zip(self.tensors, self._sums, strict=True)):
            if total is not None:
                self._sums[index] = total.to(tensor.dtype)
        return list(self._sums)


def gradients_of(outputs: Sequence[Tensor], grads: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor | None]:
    """``torch.autograd.grad`` over those ``outputs`` and ``inputs`` that a gradient can reach; None for the others."""
    pairs = [(output, grad) for output, grad in zip(outputs, grads, strict=True) if output.requires_grad]
    leaves = [tensor for tensor in inputs if tensor.requires_grad]
    if not pairs or not leaves:
        return [None] * len(inputs)
    found = iter(
        torch.autograd.grad([output for output, _ in pairs], leaves, [grad for _, grad in pairs], allow_unused=True)
    )
    return [next(found) if tensor.requires_grad else None for tensor in inputs]


def writable(grad: Tensor) -> Tensor:
    """``grad`` itself, unless its elements share memory as an expanded tensor's do."""
    shared = any(stride == 0 and size > 1 for stride, size in zip(grad.stride(), grad.shape, strict=True))
    return grad.clone(memory_format=torch.contiguous_format) if shared else grad
