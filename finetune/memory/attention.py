"""Keeping what attention computed, so that a block that is run again need not compute it again.

Attention is half of a forward pass, and its output and logsumexp are a few per cent of a block's activations: nothing
else saves as much time per byte.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

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


class AttentionTape:
    """Outputs of one block's attention: recorded in its first run, given back in the repeated one.

    Args:
        kept: whether this block keeps them; otherwise nothing is recorded, and attention is computed again.
    """

    def __init__(self, *, kept: bool) -> None:
        self.kept = kept
        self.replayed = False
        """Whether attention was given back, and all of it, in the last repeated run."""
        self._seen: list[tuple[Any, Any]] = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Around attention in the first run. Logsumexp is computed although no gradient is recorded."""
        if not self.kept:
            yield
            return
        self._seen = []
        with _Recorder(self._seen):
            yield

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Around attention in the repeated run: its output is the recorded one, and differentiable as usual."""
        if not self._seen:
            yield
            return
        with _Player(self._seen) as player:
            yield
        self.replayed = not player.left

    def forget(self) -> None:
        """Let go of what was recorded."""
        self._seen = []


class _Recorder(TorchDispatchMode):
    def __init__(self, seen: list[tuple[Any, Any]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seen = seen

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if not is_attention(func):
            return func(*args, **kwargs)
        output = func(*_with_logsumexp(func, args, kwargs), **kwargs)
        self._seen.append((func, output))
        return output


def _with_logsumexp(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Some backends leave it out where no gradient is recorded; the backward pass needs it."""
    for position, argument in enumerate(func._schema.arguments):
        if argument.name == "compute_log_sumexp":
            if position < len(args):
                return (*args[:position], True, *args[position + 1 :])
            kwargs[argument.name] = True
    return args


class _Player(TorchDispatchMode):
    def __init__(self, seen: list[tuple[Any, Any]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.left = list(seen)
        """What was not asked for yet."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if self.left and is_attention(func) and self.left[0][0] is func:
            return self.left.pop(0)[1]
        return func(*args, **(kwargs or {}))
