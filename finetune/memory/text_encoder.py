"""T5 within the memory that training has: in eight bits, or with its blocks on the host.

It is larger than most CogVideoX transformers and runs once per caption, so its weights may as well visit the device.
"""

from __future__ import annotations

from functools import partial
from itertools import chain

import torch
from torch import nn

from finetune.memory.places import device_buffer
from finetune.memory.quantize import QuantisedPlacement, TextEncoder
from finetune.memory.streaming import Streamed

RING = 2
"""Blocks of T5 on the device: one computes while the next is copied."""

_LINEAR = r"encoder\.block\.\d+\.layer\.\d+\.(SelfAttention\.[qkvo]|DenseReluDense\.w(i|i_0|i_1|o))"


def text_placement(text_encoder: TextEncoder) -> QuantisedPlacement | None:
    """How ``load_text`` places T5's weights; None for as they are."""
    return QuantisedPlacement("int8", _LINEAR) if text_encoder == "int8" else None


def stream_text(encoder: nn.Module, device: torch.device) -> Streamed:
    """Have the blocks of a T5 encoder stream to ``device``, and move everything else there. Embeddings stay the same.

    Args:
        encoder: a ``T5EncoderModel`` on the CPU, frozen.
        device: where it will compute, and what tokens have to be on.

    Returns:
        What streams, to be kept as long as the encoder; its memory goes with the two of them.
    """
    blocks = list(encoder.get_submodule("encoder.block").children())
    streamed = Streamed(blocks, range(len(blocks)), RING, device)
    streamed.install()
    for index, block in enumerate(blocks):
        block.register_forward_pre_hook(partial(_enter, streamed, index))
        block.register_forward_hook(partial(_leave, streamed, index), always_call=True)
    inside = {id(tensor) for block in blocks for tensor in chain(block.parameters(), block.buffers())}
    for tensor in chain(encoder.parameters(), encoder.buffers()):
        if id(tensor) not in inside and tensor.device != device:
            held = device_buffer(tensor.nbytes, device, "weights").view(tensor.dtype).view(tensor.shape)
            tensor.data = held.copy_(tensor)
    return streamed


def _enter(streamed: Streamed, index: int, *_: object) -> None:
    streamed.acquire(index, backward=False)


def _leave(streamed: Streamed, index: int, *_: object) -> None:
    streamed.release(index, backward=False)
