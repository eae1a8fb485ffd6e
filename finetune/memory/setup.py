"""Putting a transformer into a memory state, and taking it out again."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack

import torch
from torch import nn

from finetune.memory import checkpointing
from finetune.memory.config import MemoryConfig
from finetune.memory.host_buffers import label_of
from finetune.memory.runner import (
    ActivationsOnDevice,
    ActivationStore,
    BlockForwardBackward,
    Blocks,
    OnDevice,
    StockBlock,
    WeightPlacement,
    memory_of,
)

_ATTRIBUTE = "_memory_set_up"


def apply(transformer: nn.Module, config: MemoryConfig, device: torch.device | None = None) -> None:
    """Set up ``transformer`` in place, out of whatever state it was in.

    Args:
        transformer: what trains is in it already.
        config: the state; ``config.faults`` is empty.
        device: where everything goes that does not stay on the host; None leaves the model where it is, which a state
            that keeps weights on the host does not allow.
    """
    undo(transformer)
    with ExitStack() as stack:
        if config.plain:
            checkpointing.apply(transformer, config.checkpointing, config.keep_attention)
            stack.callback(checkpointing.apply, transformer, "none", None)
        blocks = _modules(transformer)
        if config.modulation == "host":
            from finetune.memory.adaln_offload import AdaLnOffload as HostModulation

            modulation = HostModulation(transformer, device or _device_of(transformer))
            modulation.install()
            stack.callback(modulation.remove)
        weights: WeightPlacement = OnDevice()
        if config.streams:
            from finetune.memory.block_streaming import BlockStreaming as Streamed

            streamed = Streamed(
                blocks,
                _spread(config, len(blocks)),
                config.ring,
                device or _device_of(transformer),
                trainable=config.gradient_release != "none",
            )
            streamed.install()
            stack.callback(streamed.remove)
            weights = streamed
        if device is not None:
            _move(transformer, device)
        if not config.plain:
            runner = Blocks(
                transformer,
                math=_math(config),
                weights=weights,
                boundaries=_boundaries(config, len(blocks)),
                keep_attention=frozenset(_keeping(config, len(blocks))),
            )
            runner.install()
            stack.callback(runner.remove)
        transformer.__dict__[_ATTRIBUTE] = stack.pop_all()


def undo(transformer: nn.Module) -> None:
    """Take ``transformer`` out of the state it is in: its blocks run by themselves, where their weights are."""
    stack: ExitStack | None = transformer.__dict__.pop(_ATTRIBUTE, None)
    if stack is not None:
        stack.close()


def assert_recompute(transformer: nn.Module, config: MemoryConfig) -> AbstractContextManager[None]:
    """A guard around one training step: the blocks are run again exactly as often as ``config`` says.

    Raises:
        TrainingError: if they were not, or no block was seen at all.
    """
    runner = memory_of(transformer)
    if runner is not None:
        return runner.check()
    return checkpointing.assert_recompute(transformer, config.checkpointing, config.keep_attention)


def _modules(transformer: nn.Module) -> list[nn.Module]:
    return list(transformer.get_submodule("transformer_blocks").children())


def _math(config: MemoryConfig) -> BlockForwardBackward:
    if config.block == "lean":
        from finetune.memory.lean_block import LeanBlock as LeanMath

        return LeanMath()
    return StockBlock()


def _boundaries(config: MemoryConfig, number: int) -> ActivationStore:
    if config.activations == "host":
        from finetune.memory.activation_offload import ActivationOffload as OffloadedBoundaries

        return OffloadedBoundaries(number)
    return ActivationsOnDevice()


def _keeping(config: MemoryConfig, number: int) -> range:
    """Indices of the blocks that keep attention: the last ones, whose turn in the backward pass comes first."""
    if config.checkpointing != "selective":
        return range(0)
    return range(number)[-(config.keep_attention or number) :]


def _spread(config: MemoryConfig, number: int) -> list[int]:
    """Indices of the blocks that stream, at even intervals, so that the others give the copies time."""
    count = number if config.streamed_blocks == "all" else min(config.streamed_blocks, number)
    return sorted({(position * number) // count for position in range(count)}) if count else []


def _device_of(transformer: nn.Module) -> torch.device:
    return next(transformer.parameters()).device


def _move(transformer: nn.Module, device: torch.device) -> None:
    """Everything to ``device`` but what a technique keeps on the host."""
    tensors = [*transformer.parameters(), *transformer.buffers()]
    for tensor in tensors:
        label = label_of(tensor.untyped_storage())
        if tensor.device != device and not (label is not None and label.host):
            tensor.data = tensor.data.to(device)
