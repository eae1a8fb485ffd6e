"""Gradient checkpointing: keep only what enters each block, and run the block again when its gradients are due.

diffusers acts on a flag that other code can unset, and then the only symptom is an out-of-memory error, or none at all
on a large card. ``assert_recompute`` watches a training step and fails when blocks are not run again as asked.

This is torch's own checkpointing, of diffusers' own blocks: what FSDP2 and DeepSpeed can shard, and what a state with
no other technique uses. ``blocks.Blocks`` has its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import Tensor, is_grad_enabled, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from finetune.core.errors import TrainingError
from finetune.memory.config import Checkpointing
from finetune.memory.runner import is_attention


def apply(transformer: nn.Module, kind: Checkpointing, keep_attention: int | None = None) -> None:
    """Set up ``transformer`` (a diffusers CogVideoX transformer) in place; may be called again with another kind.

    Args:
        transformer: what trains.
        kind: of checkpointing.
        keep_attention: ``selective``: how many blocks keep attention's output and logsumexp, counted from the last;
            None for all.
    """
    model: Any = transformer
    if kind == "full":
        # diffusers' default is torch's non-reentrant variant: gradients reach adapters in the first block although the
        # frozen model's input needs none, and dropout draws the same mask again.
        model.enable_gradient_checkpointing()
    elif kind == "selective":
        blocks = _blocks(transformer)
        keeping = frozenset(id(blocks[index][1]) for index in _keeping(len(blocks), keep_attention))
        model.enable_gradient_checkpointing(gradient_checkpointing_func=partial(_run, keeping))
    else:
        model.disable_gradient_checkpointing()


def _run(keeping: frozenset[int], block: nn.Module, *inputs: Any) -> Any:
    """``gradient_checkpointing_func`` of diffusers: call ``block``, and again in the backward pass.

    Args:
        keeping: identities of the blocks that keep attention.
        block: which one.
        inputs: of its call.
    """
    options: dict[str, Any] = {"context_fn": _contexts} if id(block) in keeping else {}
    # ``__call__``, as diffusers has it: torch looks at the name of what is run again.
    return checkpoint(block.__call__, *inputs, use_reentrant=False, **options)


def _contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    first, again = create_selective_checkpoint_contexts(_policy)  # type: ignore[no-untyped-call]
    return first, again


def _policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if is_attention(op) else CheckpointPolicy.PREFER_RECOMPUTE


def _keeping(blocks: int, keep_attention: int | None) -> range:
    """Indices of the blocks that keep attention: the last, whose turn in the backward pass comes first."""
    return range(blocks)[-(keep_attention or blocks) :]


def _blocks(transformer: nn.Module) -> list[tuple[int, nn.Module]]:
    return list(enumerate(transformer.get_submodule("transformer_blocks").children()))


@contextmanager
def assert_recompute(transformer: nn.Module, kind: Checkpointing, keep_attention: int | None = None) -> Iterator[None]:
    """Check that the blocks are run again in the enclosed backward passes exactly as ``kind`` says.

    Wrap it around one optimizer step, forward and backward. Only blocks through which a gradient flows count: those in
    front of the first trainable layer have nothing to run again. Forward passes without gradients do not count either.

    Raises:
        TrainingError: if a block was not run again (``full``, ``selective``) or was (``none``), if attention was
            computed again in a block that keeps it or kept in one that does not, or if no block was seen.
    """
    blocks = _blocks(transformer)
    runs = _Runs(len(blocks))
    hooks = [
        transformer.register_forward_pre_hook(lambda *_: runs.enter_model()),
        transformer.register_forward_hook(lambda *_: runs.leave_model(), always_call=True),
    ]
    for index, block in blocks:
        hooks.append(block.register_forward_pre_hook(lambda *_, index=index: runs.enter_block(index)))
        hooks.append(block.register_forward_hook(lambda _m, _i, output, index=index: runs.leave_block(index, output)))
    try:
        with _Watch(runs) if kind == "selective" else nullcontext():
            yield
    finally:
        for hook in hooks:
            hook.remove()
    where = f"memory.checkpointing: {kind}"
    if not any(runs.first):
        raise TrainingError(
            "gradient checkpointing could not be checked: no block of the transformer ran with gradients",
            where=where,
            fix="wrap the guard around the transformer that trains, and around its forward and backward pass",
        )
    expected = [0] * len(blocks) if kind == "none" else runs.first
    wrong = [index for index, _ in blocks if runs.again[index] != expected[index]]
    if wrong:
        index = wrong[0]
        raise TrainingError(
            f"gradient checkpointing does not do what was asked: block {index} ran forward {runs.first[index]} times "
            f"and was run again {runs.again[index]} times in the backward pass, expected {expected[index]} "
            f"({len(wrong)} of {len(blocks)} blocks differ)",
            where=where,
            fix="leave the transformer's gradient_checkpointing flag alone between MemoryConfig.apply and training",
        )
    if kind == "selective":
        _require_kept(runs, _keeping(len(blocks), keep_attention), where)


def _require_kept(runs: _Runs, keeping: range, where: str) -> None:
    number = len(runs.first)
    if any(runs.first[index] and not runs.attention_first[index] for index in range(number)):
        raise TrainingError(
            "attention cannot be kept: it does not run as one operation that gives its output and logsumexp",
            where=where,
            fix="use a GPU and a dtype (bfloat16 or float16) for which torch has a fused attention, or set"
            " memory.checkpointing: full",
        )
    expected = [0 if index in keeping else runs.attention_first[index] for index in range(number)]
    wrong = [index for index in range(number) if runs.attention_again[index] != expected[index]]
    if wrong:
        index = wrong[0]
        raise TrainingError(
            f"selective checkpointing does not do what was asked: attention of block {index} was computed"
            f" {runs.attention_first[index]} times, and {runs.attention_again[index]} times again in the backward pass,"
            f" expected {expected[index]} ({len(wrong)} of {number} blocks differ)",
            where=where,
            fix="leave the transformer's _gradient_checkpointing_func alone between MemoryConfig.apply and training",
        )


class _Runs:
    """How often each block, and its attention, ran: at first with gradients, and again in the backward pass."""

    def __init__(self, blocks: int) -> None:
        self.first = [0] * blocks
        self.again = [0] * blocks
        self.attention_first = [0] * blocks
        self.attention_again = [0] * blocks
        self._depth = 0
        self._block = 0
        self._attention = 0

    def enter_model(self) -> None:
        self._depth += 1

    def leave_model(self) -> None:
        self._depth -= 1

    def enter_block(self, index: int) -> None:
        self._block = index
        self._attention = 0
        # Counted on entry: torch ends a repeated run early, as soon as the last tensor that it needs is there.
        if not self._depth and is_grad_enabled():
            self.again[index] += 1

    def leave_block(self, index: int, output: tuple[Tensor, ...]) -> None:
        if self._depth and any(tensor.requires_grad for tensor in output):
            self.first[index] += 1
            self.attention_first[index] += self._attention

    def attend(self) -> None:
        if self._depth:
            self._attention += 1
        else:
            self.attention_again[self._block] += 1


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts attention that is really computed: what checkpointing gives back from memory does not come this far."""

    def __init__(self, runs: _Runs) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._runs = runs

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if is_attention(func):
            self._runs.attend()
        return func(*args, **(kwargs or {}))
