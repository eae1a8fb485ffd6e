"""Keeping what attention computed, so that a block that is run again need not compute it again.

Attention is half of a forward pass, and its output and logsumexp are a few per cent of a block's activations: nothing
else saves as much time per byte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from finetune.core.errors import TrainingError

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


class SavedAttention:
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


# -------- The parts that ``blocks.Blocks`` is put together from: how a block is computed, where its weights and
# inputs are.

GradientSink = Callable[[int, Sequence[tuple[nn.Parameter, Tensor]]], None]
"""Takes the gradients of one block's parameters, by the block's index, in the backward pass."""


@dataclass(frozen=True)
class BlockInputs:
    """What a block is called with."""

    hidden: Tensor
    """Video tokens [B, S, D]."""
    encoder: Tensor
    """Text tokens [B, T, D]."""
    temb: Tensor
    """Time embedding [B, E]."""
    rotary: tuple[Tensor, Tensor] | None
    """Cosines and sines, float32 [S, head dim]; None for a model with other positions."""
    seed: int | None = None
    """Of this call's dropout masks, for a ``BlockMath`` that is ``seeded``; None where no dropout is active."""


@dataclass
class BlockGradients:
    """Gradients of a block's inputs and parameters; None where none was asked for."""

    hidden: Tensor | None
    encoder: Tensor | None
    temb: Tensor | None
    parameters: list[Tensor | None]


@dataclass(frozen=True)
class WantedGradients:
    """Which inputs of a block need a gradient."""

    hidden: bool
    encoder: bool
    temb: bool


class BlockForwardBackward(Protocol):
    """How one block is computed, forward and backward. Both are called without gradient recording."""

    seeded: bool
    """Whether dropout masks are drawn from ``BlockInputs.seed`` instead of the global generator."""

    def forward(self, block: nn.Module, inputs: BlockInputs, attention: SavedAttention) -> tuple[Tensor, Tensor]:
        """The block's outputs: video [B, S, D] and text [B, T, D]."""

    def backward(
        self,
        block: nn.Module,
        inputs: BlockInputs,
        grads: tuple[Tensor, Tensor],
        parameters: Sequence[nn.Parameter],
        *,
        wanted: WantedGradients,
        attention: SavedAttention,
    ) -> BlockGradients:
        """Run the block again and give its gradients.

        Args:
            block: the block.
            inputs: as in the forward pass.
            grads: of the outputs; may be overwritten, nobody reads them afterwards.
            parameters: those that train, in the order in which their gradients are wanted.
            wanted: which inputs need a gradient.
            attention: what the forward pass kept.
        """


class WeightPlacement(Protocol):
    """Where the blocks' weights are. Every pass through a block is framed by these two."""

    def acquire(self, index: int, *, backward: bool) -> None:
        """After this, work that is queued on the current stream finds the block's weights on the device."""

    def release(self, index: int, *, backward: bool) -> None:
        """The work of this pass through the block is queued."""

    def invalidate(self) -> None:
        """Weights are written to, between passes. To be called before, so that no copy reads them, and after."""


class ActivationStore(Protocol):
    """Where what enters a block waits for the backward pass."""

    def put(self, index: int, hidden: Tensor, encoder: Tensor) -> object:
        """Keep both; returns what ``get`` asks for."""

    def get(self, index: int, kept: Any) -> tuple[Tensor, Tensor]:
        """Both, on the device; called once for each ``put``, in reverse order."""

    def remove(self) -> None:
        """No more will be asked for, and passes may have been broken off: wait for copies that are under way."""


class OnDevice:
    """The ``Residency`` of weights that stay on the device."""

    def acquire(self, index: int, *, backward: bool) -> None:
        """See ``Residency``: nothing to do."""

    def release(self, index: int, *, backward: bool) -> None:
        """See ``Residency``: nothing to do."""

    def invalidate(self) -> None:
        """See ``Residency``: nothing to do."""


class ActivationsOnDevice:
    """The ``Boundaries`` that stay on the device."""

    def put(self, index: int, hidden: Tensor, encoder: Tensor) -> tuple[Tensor, Tensor]:
        """See ``Boundaries``."""
        return hidden, encoder

    def get(self, index: int, kept: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """See ``Boundaries``."""
        return kept

    def remove(self) -> None:
        """See ``Boundaries``: nothing to do."""


# -------- diffusers' own block as a part of ``blocks.Blocks``.


class StockBlock:
    """The ``BlockMath`` of diffusers' own block, differentiated by autograd."""

    seeded = False

    def forward(self, block: nn.Module, inputs: BlockInputs, attention: SavedAttention) -> tuple[Tensor, Tensor]:
        """See ``BlockMath``."""
        with attention.recording():
            return _stock(block, inputs.hidden, inputs.encoder, inputs.temb, inputs.rotary)

    def backward(
        self,
        block: nn.Module,
        inputs: BlockInputs,
        grads: tuple[Tensor, Tensor],
        parameters: Sequence[nn.Parameter],
        *,
        wanted: WantedGradients,
        attention: SavedAttention,
    ) -> BlockGradients:
        """See ``BlockMath``."""
        hidden = inputs.hidden.detach().requires_grad_(wanted.hidden)
        encoder = inputs.encoder.detach().requires_grad_(wanted.encoder)
        temb = inputs.temb.detach().requires_grad_(wanted.temb)
        with torch.enable_grad(), attention.replaying():
            outputs = _stock(block, hidden, encoder, temb, inputs.rotary)
        leaves = [tensor for tensor in (hidden, encoder, temb) if tensor.requires_grad]
        # The edges and not the outputs, whose values nobody needs.
        roots = [torch.autograd.graph.get_gradient_edge(out) for out in outputs if out.requires_grad]
        seeds = [grad for out, grad in zip(outputs, grads, strict=True) if out.requires_grad]
        del outputs
        found = torch.autograd.grad(roots, [*leaves, *parameters], seeds, allow_unused=True)
        of_inputs = iter(found[: len(leaves)])
        return BlockGradients(
            hidden=next(of_inputs) if wanted.hidden else None,
            encoder=next(of_inputs) if wanted.encoder else None,
            temb=next(of_inputs) if wanted.temb else None,
            parameters=list(found[len(leaves) :]),
        )


def _stock(
    block: nn.Module, hidden: Tensor, encoder: Tensor, temb: Tensor, rotary: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    # The class's forward: the instance's is ours.
    outputs: tuple[Tensor, Tensor] = type(block).forward(
        block, hidden_states=hidden, encoder_hidden_states=encoder, temb=temb, image_rotary_emb=rotary
    )
    return outputs


# -------- Running the transformer's blocks: one autograd function per block, in which memory techniques meet.
#
# In the forward pass a block leaves no graph behind: what entered it is kept (``Boundaries``), and in the backward pass
# it is run again. How a block is computed (``BlockMath``), where its weights are (``Residency``) and who gets its
# gradients (``Blocks.sink``) are parts to be exchanged, each without knowing the others. diffusers' model calls its
# blocks as before; validation and sampling pass through here too.

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
        math: BlockForwardBackward,
        weights: WeightPlacement,
        boundaries: ActivationStore,
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
                self.blocks[index], BlockInputs(*inputs, image_rotary_emb, seed), SavedAttention(kept=False)
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
    """Around writes to weights by other than a strategy, between passes: no copy reads those that stream meanwhile, and
    what was copied before is copied anew.
    """
    blocks = memory_of(transformer)
    weights: WeightPlacement = OnDevice() if blocks is None else blocks.weights
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
        ctx.tape = SavedAttention(kept=index in owner.keep_attention)
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
                wanted=WantedGradients(hidden=needs[2], encoder=needs[3], temb=needs[4]),
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
