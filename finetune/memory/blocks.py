"""Running the transformer's blocks: one autograd function per block, in which memory techniques meet.

In the forward pass a block leaves no graph behind: what entered it is kept (``Boundaries``), and in the backward pass
it is run again. How a block is computed (``BlockMath``), where its weights are (``Residency``) and who gets its
gradients (``Blocks.sink``) are parts to be exchanged, each without knowing the others. diffusers' model calls its
blocks as before; validation and sampling pass through here too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from finetune.errors import TrainingError
from finetune.memory.attention import AttentionTape
from finetune.memory.parts import BlockInputs, BlockMath, Boundaries, GradientSink, Residency, Resident, Wanted

_ATTRIBUTE = "_memory_blocks"


class Blocks:
    """Runs every block of a transformer in a memory state, from ``install`` to ``remove``.

    Args:
        transformer: a diffusers CogVideoX transformer, what trains already in it.
        math: how a block is computed.
        weights: where its weights are.
        boundaries: where what enters it waits.
        keep_attention: indices of the blocks that keep what attention computed.
    """

    def __init__(
        self,
        transformer: nn.Module,
        *,
        math: BlockMath,
        weights: Residency,
        boundaries: Boundaries,
        keep_attention: frozenset[int] = frozenset(),
    ) -> None:
        self.transformer = transformer
        self.blocks = list(transformer.get_submodule("transformer_blocks").children())
        self.math = math
        self.weights = weights
        self.boundaries = boundaries
        self.keep_attention = keep_attention
        self.sink: GradientSink | None = None
        """Takes parameter gradients instead of autograd, where set."""
        self.first_runs = [0] * len(self.blocks)
        """Forward passes with gradients so far, per block."""
        self.repeats = [0] * len(self.blocks)
        """Backward passes so far, per block."""
        self.unkept: set[int] = set()
        """Blocks that were to keep attention and computed it again."""

    def install(self) -> None:
        """Take the blocks over."""
        for index, block in enumerate(self.blocks):
            block.forward = partial(self._call, index)
        # A module attribute would be looked up as a submodule or parameter by everything that walks the model.
        self.transformer.__dict__[_ATTRIBUTE] = self

    def remove(self) -> None:
        """Give the blocks back, as they were."""
        for block in self.blocks:
            block.__dict__.pop("forward", None)
        self.boundaries.remove()
        self.transformer.__dict__.pop(_ATTRIBUTE, None)

    def _call(
        self,
        index: int,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What takes the place of a block's ``forward``, with its signature."""
        if attention_kwargs:
            raise ValueError(f"attention_kwargs {sorted(attention_kwargs)} are not known to the blocks in this state")
        parameters = [p for p in self.blocks[index].parameters() if p.requires_grad]
        inputs = (hidden_states, encoder_hidden_states, temb)
        if torch.is_grad_enabled() and (parameters or any(tensor.requires_grad for tensor in inputs)):
            outputs: tuple[Tensor, Tensor] = _Run.apply(  # type: ignore[no-untyped-call]
                self, index, *inputs, image_rotary_emb, *parameters
            )
            return outputs
        with torch.no_grad(), self._resident(index, backward=False):
            seed = self._seed(index)
            return self.math.forward(
                self.blocks[index], BlockInputs(*inputs, image_rotary_emb, seed), AttentionTape(kept=False)
            )

    @contextmanager
    def _resident(self, index: int, *, backward: bool) -> Iterator[None]:
        self.weights.acquire(index, backward=backward)
        try:
            yield
        finally:
            self.weights.release(index, backward=backward)

    def _random(self, index: int) -> bool:
        modules = self.blocks[index].modules()
        return any(isinstance(module, nn.Dropout) and module.p > 0 and module.training for module in modules)

    def _seed(self, index: int) -> int | None:
        if not (self.math.seeded and self._random(index)):
            return None
        return int(torch.randint(2**62, ()))

    @contextmanager
    def check(self) -> Iterator[None]:
        """Check that every block through which a gradient flows is run again once, in the enclosed passes, and that
        attention is not computed again where it is kept.

        Raises:
            TrainingError: if one was not, or none was run at all; if attention was computed again.
        """
        before = list(self.first_runs), list(self.repeats)
        self.unkept.clear()
        yield
        first = [now - then for now, then in zip(self.first_runs, before[0], strict=True)]
        again = [now - then for now, then in zip(self.repeats, before[1], strict=True)]
        wrong = [index for index in range(len(first)) if first[index] != again[index]]
        if not any(first):
            raise TrainingError(
                "gradient checkpointing could not be checked: no block of the transformer ran with gradients",
                where="memory",
                fix="wrap the guard around the transformer that trains, and around its forward and backward pass",
            )
        if wrong:
            raise TrainingError(
                f"gradient checkpointing does not do what was asked: block {wrong[0]} ran forward {first[wrong[0]]}"
                f" times and was run again {again[wrong[0]]} times ({len(wrong)} of {len(first)} blocks differ)",
                where="memory",
            )
        if self.unkept:
            raise TrainingError(
                f"attention cannot be kept: {len(self.unkept)} of {len(self.keep_attention)} blocks computed it again."
                " It does not run as one operation that gives its output and logsumexp",
                where="memory.checkpointing: selective",
                fix="use a GPU and a dtype (bfloat16 or float16) for which torch has a fused attention, or set"
                " memory.checkpointing: full",
            )


@contextmanager
def rewriting_weights(transformer: nn.Module) -> Iterator[None]:
    """Around writes to weights by other than an engine, between passes: no copy reads those that stream meanwhile, and
    what was copied before is copied anew.
    """
    blocks = memory_of(transformer)
    weights: Residency = Resident() if blocks is None else blocks.weights
    weights.invalidate()
    try:
        yield
    finally:
        weights.invalidate()


def memory_of(transformer: nn.Module) -> Blocks | None:
    """What runs a transformer's blocks; None where they run by themselves."""
    found: Blocks | None = transformer.__dict__.get(_ATTRIBUTE)
    return found


class _Run(torch.autograd.Function):
    """One block, run without a graph, and again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        owner: Blocks,
        index: int,
        hidden: Tensor,
        encoder: Tensor,
        temb: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        *parameters: nn.Parameter,
    ) -> tuple[Tensor, Tensor]:
        ctx.owner, ctx.index, ctx.temb, ctx.rotary, ctx.parameters = owner, index, temb, rotary, parameters
        ctx.tape = AttentionTape(kept=index in owner.keep_attention)
        ctx.seed = owner._seed(index)
        ctx.random = _RandomState(hidden.device) if ctx.seed is None and owner._random(index) else None
        ctx.kept = owner.boundaries.put(index, hidden, encoder)  # first: what leaves does so while the block computes
        with owner._resident(index, backward=False):
            outputs = owner.math.forward(
                owner.blocks[index], BlockInputs(hidden, encoder, temb, rotary, ctx.seed), ctx.tape
            )
        owner.first_runs[index] += 1
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        owner, index, parameters = ctx.owner, ctx.index, ctx.parameters
        needs = ctx.needs_input_grad
        hidden, encoder = owner.boundaries.get(index, ctx.kept)
        ctx.kept = None
        inputs = BlockInputs(hidden, encoder, ctx.temb, ctx.rotary, ctx.seed)
        del hidden, encoder
        with owner._resident(index, backward=True), ctx.random.restored() if ctx.random else nullcontext():
            found = owner.math.backward(
                owner.blocks[index],
                inputs,
                (grads[0], grads[1]),
                parameters,
                wanted=Wanted(hidden=needs[2], encoder=needs[3], temb=needs[4]),
                attention=ctx.tape,
            )
            if ctx.tape.kept and not ctx.tape.replayed:
                owner.unkept.add(index)
            ctx.tape.forget()
            owner.repeats[index] += 1
            given: Sequence[Tensor | None] = found.parameters
            if owner.sink is not None:
                owner.sink(index, [(p, g) for p, g in zip(parameters, given, strict=True) if g is not None])
                given = [None] * len(parameters)
        return (None, None, found.hidden, found.encoder, found.temb, None, *given)


class _RandomState:
    """The global generators' state, so that dropout draws the same masks again."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    @contextmanager
    def restored(self) -> Iterator[None]:
        with torch.random.fork_rng(devices=[self._device] if self._cuda is not None else []):
            torch.set_rng_state(self._cpu)
            if self._cuda is not None:
                torch.cuda.set_rng_state(self._cuda, self._device)
            yield
