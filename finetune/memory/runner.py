"""Running the transformer's blocks: one autograd function per block, in which memory techniques meet.

In the forward pass a block leaves no graph behind: what entered it is stored (``ActivationStore``), and in the backward
pass it is run again. How a block is computed (``BlockForwardBackward``), where its weights are (``WeightPlacement``)
and who gets its gradients (``BlockRunner.sink``) are parts to be exchanged, each without knowing the others. diffusers'
model calls its blocks as before; validation and sampling pass through here too.

``apply`` puts a transformer into the state that a ``MemoryConfig`` describes, ``undo`` takes it out again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from finetune.memory import checkpointing
from finetune.memory.checkpointing import BlockRuns, SavedAttention, blocks_of
from finetune.memory.config import MemoryConfig

GradientSink = Callable[[Sequence[tuple[nn.Parameter, Tensor]]], None]
"""Takes the gradients of one block's parameters in the backward pass."""


@dataclass(frozen=True)
class BlockInputs:
    """What a block is called with; in the backward pass, those that require a gradient are the ones that get one."""

    hidden: Tensor
    """Video tokens [B, S, D]."""
    encoder: Tensor
    """Text tokens [B, T, D]."""
    temb: Tensor
    """Time embedding [B, E]."""
    rotary: tuple[Tensor, Tensor] | None
    """Cosines and sines, float32 [S, head dim]; None for a model with other positions."""
    seed: int | None = None
    """Of this call's dropout masks, where the block is computed from a seed; None where no dropout is active."""


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
        attention: SavedAttention,
    ) -> list[Tensor | None]:
        """Run the block again and give its gradients.

        Args:
            block: the block.
            inputs: as in the forward pass, leaves of the graph.
            grads: of the outputs; may be overwritten, nobody reads them afterwards.
            parameters: those that train.
            attention: what the forward pass kept.

        Returns:
            Gradients of hidden, encoder and temb, then of the parameters; None where none is required.
        """


class WeightPlacement:
    """Where the blocks' weights are: here, on the device. Every pass through a block is framed by the first two."""

    def acquire(self, index: int, *, backward: bool) -> None:
        """After this, work that is queued on the current stream finds the block's weights on the device."""

    def release(self, index: int, *, backward: bool) -> None:
        """The work of this pass through the block is queued."""

    def invalidate(self) -> None:
        """Weights are written to, between passes. To be called before, so that no copy reads them, and after."""


class ActivationStore:
    """Where what enters a block waits for the backward pass: here, on the device."""

    def put(self, index: int, hidden: Tensor, encoder: Tensor) -> Any:
        """Store both; returns what ``get`` asks for."""
        return hidden, encoder

    def get(self, index: int, stored: Any) -> tuple[Tensor, Tensor]:
        """Both, on the device; called once for each ``put``, in reverse order."""
        hidden, encoder = stored
        return hidden, encoder

    def close(self) -> None:
        """No more will be asked for, and passes may have been broken off: wait for copies that are under way."""


class StockBlock:
    """diffusers' own block, differentiated by autograd."""

    seeded = False

    def forward(self, block: nn.Module, inputs: BlockInputs, attention: SavedAttention) -> tuple[Tensor, Tensor]:
        with attention.recording():
            return _stock_forward(block, inputs)

    def backward(
        self,
        block: nn.Module,
        inputs: BlockInputs,
        grads: tuple[Tensor, Tensor],
        parameters: Sequence[nn.Parameter],
        attention: SavedAttention,
    ) -> list[Tensor | None]:
        with torch.enable_grad(), attention.replaying():
            outputs = _stock_forward(block, inputs)
        # Edges and not the outputs, whose values nobody needs.
        roots = [torch.autograd.graph.get_gradient_edge(out) if out.requires_grad else None for out in outputs]
        del outputs
        return gradients_of(roots, grads, [inputs.hidden, inputs.encoder, inputs.temb, *parameters])


def _stock_forward(block: nn.Module, inputs: BlockInputs) -> tuple[Tensor, Tensor]:
    # The class's forward: the instance's is the runner's.
    outputs: tuple[Tensor, Tensor] = type(block).forward(
        block,
        hidden_states=inputs.hidden,
        encoder_hidden_states=inputs.encoder,
        temb=inputs.temb,
        image_rotary_emb=inputs.rotary,
    )
    return outputs


def gradients_of(
    roots: Sequence[Tensor | torch.autograd.graph.GradientEdge | None],
    grads: Sequence[Tensor],
    inputs: Sequence[Tensor],
) -> list[Tensor | None]:
    """``torch.autograd.grad`` from those ``roots`` and of those ``inputs`` that a gradient reaches; else None."""
    pairs = [
        (root, grad)
        for root, grad in zip(roots, grads, strict=True)
        if root is not None and (not isinstance(root, Tensor) or root.requires_grad)
    ]
    leaves = [tensor for tensor in inputs if tensor.requires_grad]
    if not pairs or not leaves:
        return [None] * len(inputs)
    reached, seeds = zip(*pairs, strict=True)
    gradients = iter(torch.autograd.grad(reached, leaves, seeds, allow_unused=True))
    return [next(gradients) if tensor.requires_grad else None for tensor in inputs]


_RUNNER = "_block_runner"


class BlockRunner:
    """Runs every block of a transformer in a memory state, from ``install`` to ``remove``.

    Args:
        transformer: a diffusers CogVideoX transformer, what trains already in it.
        compute: how a block is computed; by default as diffusers does.
        weights: where its weights are; by default on the device.
        activations: where what enters it waits; by default on the device.
        keep_attention: indices of the blocks that keep what attention computed.
    """

    def __init__(
        self,
        transformer: nn.Module,
        *,
        compute: BlockForwardBackward | None = None,
        weights: WeightPlacement | None = None,
        activations: ActivationStore | None = None,
        keep_attention: Sequence[int] = (),
    ) -> None:
        self.transformer = transformer
        self.blocks = blocks_of(transformer)
        self.compute: BlockForwardBackward = compute or StockBlock()
        self.weights = weights or WeightPlacement()
        self.activations = activations or ActivationStore()
        self.keep_attention = keep_attention
        self.sink: GradientSink | None = None
        """Takes parameter gradients instead of autograd, where set."""
        self.runs: BlockRuns | None = None
        """Where repeated runs are counted, while somebody counts."""

    def install(self) -> None:
        """Take the blocks over."""
        for index, block in enumerate(self.blocks):
            block.forward = partial(self._call, index)
        # A module attribute would be looked up as a submodule or parameter by everything that walks the model.
        self.transformer.__dict__[_RUNNER] = self

    def remove(self) -> None:
        """Give the blocks back, as they were."""
        for block in self.blocks:
            block.__dict__.pop("forward", None)
        self.activations.close()
        self.transformer.__dict__.pop(_RUNNER, None)

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
        tensors = (hidden_states, encoder_hidden_states, temb)
        if torch.is_grad_enabled() and (parameters or any(tensor.requires_grad for tensor in tensors)):
            outputs: tuple[Tensor, Tensor] = _RunBlock.apply(  # type: ignore[no-untyped-call]
                self, index, *tensors, image_rotary_emb, *parameters
            )
            return outputs
        with torch.no_grad(), self.weights_of(index, backward=False):
            inputs = BlockInputs(*tensors, image_rotary_emb, self.dropout_seed(index))
            return self.compute.forward(self.blocks[index], inputs, SavedAttention(enabled=False))

    @contextmanager
    def weights_of(self, index: int, *, backward: bool) -> Iterator[None]:
        """Around a pass through a block: its weights are on the device."""
        self.weights.acquire(index, backward=backward)
        try:
            yield
        finally:
            self.weights.release(index, backward=backward)

    def has_dropout(self, index: int) -> bool:
        """Whether a pass through a block draws random numbers."""
        modules = self.blocks[index].modules()
        return any(isinstance(module, nn.Dropout) and module.p > 0 and module.training for module in modules)

    def dropout_seed(self, index: int) -> int | None:
        """Draw the seed of a pass through a block, where it needs one."""
        return int(torch.randint(2**62, ())) if self.compute.seeded and self.has_dropout(index) else None


class _RunBlock(torch.autograd.Function):
    """One block, run without a graph, and again in the backward pass.

    Its many parameters are autograd's: it differentiates only tensors that are passed one by one.
    """

    @staticmethod
    def forward(
        ctx: Any,
        runner: BlockRunner,
        index: int,
        hidden: Tensor,
        encoder: Tensor,
        temb: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        *parameters: nn.Parameter,
    ) -> tuple[Tensor, Tensor]:
        ctx.runner, ctx.index, ctx.temb, ctx.rotary, ctx.parameters = runner, index, temb, rotary, parameters
        ctx.attention = SavedAttention(enabled=index in runner.keep_attention)
        ctx.seed = runner.dropout_seed(index)
        ctx.random = _RandomState(hidden.device) if ctx.seed is None and runner.has_dropout(index) else None
        # First: what leaves the device does so while the block computes.
        ctx.stored = runner.activations.put(index, hidden, encoder)
        with runner.weights_of(index, backward=False):
            inputs = BlockInputs(hidden, encoder, temb, rotary, ctx.seed)
            return runner.compute.forward(runner.blocks[index], inputs, ctx.attention)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        runner, index, parameters = ctx.runner, ctx.index, ctx.parameters
        if runner.runs is not None:
            runner.runs.repeat_block(index)
        tensors = (*runner.activations.get(index, ctx.stored), ctx.temb)
        ctx.stored = None
        needed = ctx.needs_input_grad[2:5]
        hidden, encoder, temb = (t.detach().requires_grad_(n) for t, n in zip(tensors, needed, strict=True))
        inputs = BlockInputs(hidden, encoder, temb, ctx.rotary, ctx.seed)
        del tensors, hidden, encoder
        with runner.weights_of(index, backward=True), ctx.random.restored() if ctx.random else nullcontext():
            of_hidden, of_encoder, of_temb, *of_parameters = runner.compute.backward(
                runner.blocks[index], inputs, (grads[0], grads[1]), parameters, ctx.attention
            )
            ctx.attention.clear()
            if runner.sink is not None:
                runner.sink([(p, g) for p, g in zip(parameters, of_parameters, strict=True) if g is not None])
                of_parameters = [None] * len(parameters)
        return (None, None, of_hidden, of_encoder, of_temb, None, *of_parameters)


class _RandomState:
    """The global generators' state, so that dropout draws the same masks again."""

    def __init__(self, device: torch.device) -> None:
        self._devices = [device] if device.type == "cuda" else []
        self._cpu = torch.get_rng_state()
        self._cuda = [torch.cuda.get_rng_state(each) for each in self._devices]

    @contextmanager
    def restored(self) -> Iterator[None]:
        with torch.random.fork_rng(devices=self._devices):
            torch.set_rng_state(self._cpu)
            for device, state in zip(self._devices, self._cuda, strict=True):
                torch.cuda.set_rng_state(state, device)
            yield


def block_runner(transformer: nn.Module) -> BlockRunner | None:
    """What runs a transformer's blocks; None where they run by themselves."""
    runner: BlockRunner | None = transformer.__dict__.get(_RUNNER)
    return runner


@contextmanager
def rewriting_weights(transformer: nn.Module) -> Iterator[None]:
    """Around writes to weights by other than an optimizer, between passes: no copy reads those that stream meanwhile,
    and what was copied before is copied anew.
    """
    runner = block_runner(transformer)
    weights = WeightPlacement() if runner is None else runner.weights
    weights.invalidate()
    try:
        yield
    finally:
        weights.invalidate()


@contextmanager
def assert_recompute(transformer: nn.Module, config: MemoryConfig) -> Iterator[None]:
    """A guard around one training step: the blocks are run again exactly as ``config`` says; see ``watch_recompute``.

    Raises:
        TrainingError: if they were not, or no block was seen at all.
    """
    runner = block_runner(transformer)
    with checkpointing.watch_recompute(transformer, config.checkpointing, config.keep_attention) as runs:
        if runner is not None:
            runner.runs = runs
        try:
            yield
        finally:
            if runner is not None:
                runner.runs = None


# ------------------------------------------------------------------------------------------- into a state and out again

_UNDO = "_memory_undo"


def apply(transformer: nn.Module, config: MemoryConfig, device: torch.device | None = None) -> None:
    """``MemoryConfig.apply``; ``config.faults`` is empty."""
    undo(transformer)
    blocks = blocks_of(transformer)
    computes_on = device or next(transformer.parameters()).device
    with ExitStack() as stack:
        on_host: list[Tensor] = []
        if config.modulation == "host":
            from finetune.memory.adaln_offload import AdaLnOffload

            adaln = AdaLnOffload(transformer, computes_on)
            adaln.install()
            stack.callback(adaln.remove)
            on_host = adaln.weights()
        weights, activations, compute = WeightPlacement(), ActivationStore(), None
        if config.streams:
            from finetune.memory.block_streaming import BlockStreaming

            streamed = _streamed(config.streamed_blocks, len(blocks))
            trains = config.gradient_release != "none"
            weights = BlockStreaming(blocks, streamed, config.ring, computes_on, trainable=trains, leave=on_host)
            weights.install()
            stack.callback(weights.remove)
        if device is not None:
            transformer.to(device)  # what a technique keeps on the host is pinned there
        if config.activations == "host":
            from finetune.memory.activation_offload import ActivationOffload

            activations = ActivationOffload(len(blocks), computes_on)
        if config.block == "lean":
            from finetune.memory.lean_block import LeanBlock

            compute = LeanBlock()
        if config.needs_block_runner:
            keep = checkpointing.keeps_attention(len(blocks), config.checkpointing, config.keep_attention)
            runner = BlockRunner(
                transformer, compute=compute, weights=weights, activations=activations, keep_attention=keep
            )
            runner.install()
            stack.callback(runner.remove)
        else:
            checkpointing.apply(transformer, config.checkpointing, config.keep_attention)
            stack.callback(checkpointing.apply, transformer, "none")
        if config.compile == "block":
            _compile(blocks)
            stack.callback(_compile, blocks, undo=True)
        transformer.__dict__[_UNDO] = stack.pop_all()


def undo(transformer: nn.Module) -> None:
    """Take ``transformer`` out of the state it is in: its blocks run by themselves, where their weights are."""
    stack: ExitStack | None = transformer.__dict__.pop(_UNDO, None)
    if stack is not None:
        stack.close()


COMPILER = "inductor"

_MOST_GRAPHS = 256
"""Buckets, and shapes that are sampled, of which each is a graph; torch gives up after eight."""


def _compile(blocks: Iterable[nn.Module], *, undo: bool = False) -> None:
    """Have each block's forward pass compiled when it is first called with a shape, or not any more."""
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MOST_GRAPHS)
    for block in blocks:
        if undo:
            block._compiled_call_impl = None
        else:
            block.compile(backend=COMPILER, dynamic=False)


def _streamed(streamed_blocks: int | str, number: int) -> list[int]:
    """Indices of the blocks that stream, at even intervals, so that the others give the copies time."""
    count = number if isinstance(streamed_blocks, str) else min(streamed_blocks, number)
    return sorted({(position * number) // count for position in range(count)}) if count else []
