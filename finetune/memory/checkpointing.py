"""Gradient checkpointing: keep only what enters each block, and run the block again when its gradients are due.

``apply`` sets up torch's own checkpointing of diffusers' own blocks: what FSDP2 and DeepSpeed can shard, and what a
state with no other technique uses. ``runner.BlockRunner`` has its own. Either may keep what attention computed
(``SavedAttention`` in the runner): attention is half of a forward pass, and its output and logsumexp are a few per cent
of a block's activations, so nothing else saves as much time per byte.

diffusers acts on a flag that other code can unset, and then the only symptom is an out-of-memory error, or none at all
on a large card. ``watch_recompute`` counts during a training step, and fails when blocks are not run again as asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import Tensor, is_grad_enabled, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from finetune.core.errors import TrainingError
from finetune.memory.config import Checkpointing

ATTENTION_OPS = frozenset(
    {
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_fused_attention_overrideable",
        # The kernels' own packages register these, where an attention processor calls them directly.
        "flash_attn::_flash_attn_forward",
        "flash_attn_3::_flash_attn_forward",
        "flash_attn_3::fwd",
    }
)
"""What ``scaled_dot_product_attention`` becomes, whichever backend torch chooses, and flash attention's own operations;
each gives output and logsumexp. FA3 as torch activates it is another implementation of the first. The ``math`` fallback
is many operations, and not here."""


def is_attention(op: Any) -> bool:
    """Whether an operation that a dispatch mode sees is one of ``ATTENTION_OPS``."""
    return op.name().partition(".")[0] in ATTENTION_OPS


def blocks_of(transformer: nn.Module) -> list[nn.Module]:
    """A diffusers transformer's blocks, in the order in which they run."""
    return list(transformer.get_submodule("transformer_blocks").children())


def keeps_attention(blocks: int, checkpointing: Checkpointing, keep_attention: int | None) -> range:
    """Indices of the blocks that keep attention: the last ones, whose turn in the backward pass comes first."""
    return range(blocks)[-(keep_attention or blocks) :] if checkpointing == "selective" else range(0)


def apply(transformer: nn.Module, checkpointing: Checkpointing, keep_attention: int | None = None) -> None:
    """Set up ``transformer`` in place; may be called again with other values.

    Args:
        transformer: a diffusers CogVideoX transformer.
        checkpointing: which kind.
        keep_attention: ``selective``: how many blocks keep attention's output and logsumexp, counted from the last;
            None for all.
    """
    model: Any = transformer
    if checkpointing == "full":
        # diffusers' default is torch's non-reentrant variant: gradients reach adapters in the first block although the
        # frozen model's input needs none, and dropout draws the same mask again.
        model.enable_gradient_checkpointing()
    elif checkpointing == "selective":
        blocks = blocks_of(transformer)
        keeping = {id(blocks[index]) for index in keeps_attention(len(blocks), checkpointing, keep_attention)}
        model.enable_gradient_checkpointing(gradient_checkpointing_func=partial(_run_selective, keeping))
    else:
        model.disable_gradient_checkpointing()


def _run_selective(keeping: set[int], block: nn.Module, *inputs: Any) -> Any:
    """``gradient_checkpointing_func`` of diffusers; blocks whose ``id`` is in ``keeping`` keep attention."""
    contexts = partial(create_selective_checkpoint_contexts, _policy)
    options: dict[str, Any] = {"context_fn": contexts} if id(block) in keeping else {}
    # ``__call__``, as diffusers has it: torch looks at the name of what is run again.
    return checkpoint(block.__call__, *inputs, use_reentrant=False, **options)


def _policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if is_attention(op) else CheckpointPolicy.PREFER_RECOMPUTE


class _AttentionMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Has ``run(op, args, kwargs)`` do what attention's operations do; everything else runs as it is."""

    def __init__(self, run: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._run = run

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if is_attention(func):
            return self._run(func, args, dict(kwargs or {}))
        return func(*args, **(kwargs or {}))


class SavedAttention:
    """Outputs of one block's attention: recorded in its first run, given back in the repeated one.

    Args:
        enabled: whether this block keeps them; otherwise nothing is recorded, and attention is computed again.
    """

    def __init__(self, *, enabled: bool) -> None:
        self._enabled = enabled
        self._outputs: list[tuple[Any, Any]] = []

    def recording(self) -> AbstractContextManager[object]:
        """Around attention in the first run. Logsumexp is computed although no gradient is recorded."""
        return _AttentionMode(self._record) if self._enabled else nullcontext()

    def replaying(self) -> AbstractContextManager[object]:
        """Around attention in the repeated run: its output is the recorded one, and differentiable as usual."""
        return _AttentionMode(partial(_replay, list(self._outputs))) if self._outputs else nullcontext()

    def clear(self) -> None:
        """Let go of what was recorded."""
        self._outputs = []

    def _record(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # Some backends leave logsumexp out where no gradient is recorded; the backward pass needs it.
        for position, argument in enumerate(op._schema.arguments):
            if argument.name == "compute_log_sumexp":
                if position < len(args):
                    args = (*args[:position], True, *args[position + 1 :])
                else:
                    kwargs[argument.name] = True
        output = op(*args, **kwargs)
        self._outputs.append((op, output))
        return output


def _replay(outputs: list[tuple[Any, Any]], op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return outputs.pop(0)[1] if outputs and outputs[0][0] is op else op(*args, **kwargs)


# ----------------------------------------------------------------------------------------------------------- the guard


class BlockRuns:
    """How often each block, and its attention, ran: at first with gradients, and again in the backward pass."""

    def __init__(self, blocks: int) -> None:
        self.first = [0] * blocks
        self.again = [0] * blocks
        self.attention_first = [0] * blocks
        self.attention_again = [0] * blocks
        self._depth = 0
        """Of calls of the transformer: blocks that run outside of them run again."""
        self._block = 0
        self._attention = 0

    def enter_model(self) -> None:
        """The transformer is called."""
        self._depth += 1

    def leave_model(self) -> None:
        """The call has returned, or failed."""
        self._depth -= 1

    def enter_block(self, index: int) -> None:
        """A block is called. Repeated runs are counted on entry: torch ends them as soon as it has what it needs."""
        self._block, self._attention = index, 0
        if not self._depth and is_grad_enabled():
            self.again[index] += 1

    def repeat_block(self, index: int) -> None:
        """A block runs again without being called."""
        self._block = index
        self.again[index] += 1

    def leave_block(self, index: int, output: tuple[Tensor, ...]) -> None:
        """A block has run."""
        if self._depth and any(tensor.requires_grad for tensor in output):
            self.first[index] += 1
            self.attention_first[index] += self._attention

    def attend(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Attention is really computed: what checkpointing gives back from memory does not come this far."""
        if self._depth:
            self._attention += 1
        else:
            self.attention_again[self._block] += 1
        return op(*args, **kwargs)

    def require(self, checkpointing: Checkpointing, keep_attention: int | None) -> None:
        """Raise TrainingError unless blocks and attention ran again exactly as asked."""
        where, number = f"memory.checkpointing: {checkpointing}", len(self.first)
        if not any(self.first):
            raise TrainingError(
                "gradient checkpointing could not be checked: no block of the transformer ran with gradients",
                where=where,
                fix="wrap the guard around the transformer that trains, and around its forward and backward pass",
            )
        expected = [0] * number if checkpointing == "none" else self.first
        _require_counts("block {}", self.first, self.again, expected, where)
        if checkpointing != "selective":
            return
        if any(runs and not attended for runs, attended in zip(self.first, self.attention_first, strict=True)):
            raise TrainingError(
                "attention cannot be kept: it does not run as one operation that gives its output and logsumexp",
                where=where,
                fix="use a GPU and a dtype (bfloat16 or float16) for which torch has a fused attention, or set"
                " memory.checkpointing: full",
            )
        keeping = keeps_attention(number, checkpointing, keep_attention)
        expected = [0 if index in keeping else runs for index, runs in enumerate(self.attention_first)]
        _require_counts("attention of block {}", self.attention_first, self.attention_again, expected, where)


def _require_counts(what: str, first: list[int], again: list[int], expected: list[int], where: str) -> None:
    wrong = [index for index in range(len(first)) if again[index] != expected[index]]
    if wrong:
        index = wrong[0]
        raise TrainingError(
            f"gradient checkpointing does not do what was asked: {what.format(index)} ran forward {first[index]} times"
            f" and was run again {again[index]} times in the backward pass, expected {expected[index]}"
            f" ({len(wrong)} of {len(first)} blocks differ)",
            where=where,
            fix="leave the transformer's gradient checkpointing alone between MemoryConfig.apply and training",
        )


@contextmanager
def watch_recompute(
    transformer: nn.Module, checkpointing: Checkpointing, keep_attention: int | None = None
) -> Iterator[BlockRuns]:
    """Check that blocks are run again in the enclosed backward passes exactly as asked.

    Wrap it around one optimizer step, forward and backward. Only blocks through which a gradient flows count: those in
    front of the first trainable layer have nothing to run again. Forward passes without gradients do not count either.

    Yields:
        The counts, to which whoever repeats a block without calling it must add.

    Raises:
        TrainingError: if a block was not run again (``full``, ``selective``) or was (``none``), if attention was
            computed again in a block that keeps it or kept in one that does not, or if no block was seen.
    """
    blocks = blocks_of(transformer)
    runs = BlockRuns(len(blocks))
    hooks = [
        transformer.register_forward_pre_hook(lambda *_: runs.enter_model()),
        transformer.register_forward_hook(lambda *_: runs.leave_model(), always_call=True),
    ]
    for index, block in enumerate(blocks):
        hooks.append(block.register_forward_pre_hook(lambda *_, index=index: runs.enter_block(index)))
        hooks.append(block.register_forward_hook(lambda _m, _i, output, index=index: runs.leave_block(index, output)))
    try:
        with _AttentionMode(runs.attend) if checkpointing == "selective" else nullcontext():
            yield runs
    finally:
        for hook in hooks:
            hook.remove()
    runs.require(checkpointing, keep_attention)
