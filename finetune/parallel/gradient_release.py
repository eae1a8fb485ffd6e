"""Gradient release: one process that never holds more than a block's gradients or two, for full fine-tuning.

==================== ============================================= ============================================
gradient_release     ``exact``                                     ``per_parameter``
==================== ============================================= ============================================
in the backward pass a block's gradients move to the host          a block is updated at once
clipping             by the norm of all, as without release        each parameter's gradient by its own norm
a bad gradient       is found before any weight changes            is found before the weight it belongs to
out of memory        the step is done again with less              ends the run, if a weight has changed
host memory          one gradient per weight                       nothing
==================== ============================================= ============================================

With ``optimizer_states: host`` master copies and moments are on the host, the update happens there, and new weights are
copied to the device block by block: under ``exact`` while the next block is updated, under ``per_parameter`` in a
worker, while the device computes the next block's backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from finetune.checkpoint.load import LoadedCheckpoint
from finetune.core.errors import ConfigError, TrainingError
from finetune.memory.config import MemoryConfig
from finetune.memory.gradient_offload import (
    OPTIMIZER,
    DoubleBuffer,
    HostGradients,
    HostWeights,
    label_optimizer_tensors,
    norm_of,
    units_of,
)
from finetune.memory.host_buffers import StreamEvent, copy_stream, host_work
from finetune.memory.runner import block_runner
from finetune.methods.adapter import load_strictly
from finetune.optim.optimizers import OptimizerConfig
from finetune.optim.state import (
    OptimizerState,
    load_optimizer_state,
    optimizer_state,
    optimizer_tensors,
    precise_weights,
)
from finetune.parallel.strategy import DataParallel


class GradientRelease(DataParallel):
    """The ``ParallelStrategy`` of one process that releases gradients.

    A step has one backward pass; a second one, which would have to be added to gradients that are gone, is refused. The
    order of updates is fixed: blocks from the first, then the rest (``exact``), or as the backward pass meets them.

    The global norm is the square root of a float64 sum of squared norms, each in float32: of all elements, right to
    about 1e-6. ``clip_grad_norm_`` takes norms in the gradients' dtype and so, in bf16, is right to 2^-7; clipped
    updates differ from those without release by that factor, and by nothing else.

    Args:
        accelerator: the launch, of one process.
        module: the transformer, in its memory state.
        parameters: what trains, by name.
        memory: the memory state; ``gradient_release`` is not ``none``.
        device: where the model computes.
        max_norm: of a single gradient, under ``per_parameter``.
    """

    threaded: bool | None = None
    """Whether updates on the host have a thread of their own; None for where there is a GPU to compute meanwhile."""

    def __init__(
        self,
        accelerator: Any,
        module: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        *,
        memory: MemoryConfig,
        device: torch.device,
        max_norm: float,
    ) -> None:
        super().__init__(accelerator, module, parameters)
        self.name = "one process, gradients released block by block"
        self._module = module
        self._device = device
        self._max_norm = max_norm
        self._units = units_of(self.parameters)
        self._names = {id(parameter): name for name, parameter in self.parameters.items()}
        self._squares: list[Tensor] = []
        self._taken: set[str] = set()
        self._limit, self._factor, self._scale = math.inf, 1.0, 1.0
        self._norm: Tensor | float = 0.0
        """Of the whole gradient, under ``exact``; on the device until the update."""
        self._updated = self._not_finite = False
        self._gradients: HostGradients | None = None
        self._weights: HostWeights | None = None
        self._staging: DoubleBuffer | None = None
        self._down, self._up = copy_stream(device), copy_stream(device)
        self._exact = memory.gradient_release == "exact"
        if self._exact:
            self._gradients = HostGradients(self._units, self._down)
        if memory.optimizer_states == "host":
            self.name += ", updated on the host"
            self._weights = HostWeights(self._units, self._up, block_runner(module))
            if not self._exact:
                threaded = device.type == "cuda" if self.threaded is None else self.threaded
                self._staging = DoubleBuffer(self._units, self._down, threaded=threaded)
        for parameter in self.parameters.values():
            # Of those outside the blocks; the blocks' own come through ``BlockRunner.sink``.
            parameter.register_post_accumulate_grad_hook(self._take_accumulated)  # type: ignore[no-untyped-call]

    @property
    def _trained(self) -> Mapping[str, nn.Parameter]:
        """What the optimizer updates, by name."""
        return self.parameters if self._weights is None else self._weights.trained

    def start(self, optimizer: OptimizerConfig, saved: LoadedCheckpoint | None) -> None:
        if saved is not None:
            load_strictly(self.parameters, saved.trainable)
            if self._weights is not None:
                self._weights.begin_update()
                load_strictly(self._weights.trained, saved.trainable)
                self._weights.end_update()
        self.optimizer = optimizer.build(self._trained.items())
        if saved is not None:
            load_optimizer_state(self.optimizer, saved.optimizer, self._trained)
        self._tag()

    # ------------------------------------------------------------------------------------------------------- the step

    def micro_batch(self, *, last: bool) -> AbstractContextManager[object]:
        blocks = block_runner(self._module)
        if blocks is not None:
            blocks.sink = self._take
        if self._weights is not None:
            self._weights.follow(blocks)
        return super().micro_batch(last=last)

    def backward(self, loss: Tensor) -> None:
        """Under ``per_parameter`` this is the update as well, unless the loss is not finite.

        Raises:
            TrainingError: if this step has had a backward pass.
        """
        if self._updated:
            raise TrainingError(
                "weights of this step have been updated already, and its passes cannot be done a second time",
                where="memory.gradient_release: per_parameter",
                fix="set memory.gradient_release: exact, which updates after all passes; the last checkpoint is intact",
            )
        if not self._exact and not math.isfinite(float(loss.detach())):
            self._not_finite = True
        super().backward(loss)

    def _take_accumulated(self, parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        if gradient is not None:
            self._take([(parameter, gradient)])

    @torch.no_grad()
    def _take(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Gradients of parameters of one unit, complete."""
        # Autograd would lay them out like their parameters, which fused optimizers rely on.
        named = {self._names[id(parameter)]: gradient.contiguous() for parameter, gradient in pairs}
        if not named:
            return
        if repeated := self._taken & named.keys():
            raise TrainingError(
                f"a step has a second gradient of {min(repeated)}, and the first has been released",
                where="memory.gradient_release",
                fix="make one backward pass per step (train.accumulation: 1, memory.clips_at_once: null)",
            )
        self._taken |= named.keys()
        norms = torch.stack([norm_of(gradient) for gradient in named.values()])
        self._squares.append(norms.double().square().sum())
        if self._gradients is not None:
            self._gradients.put(named)
        elif self._staging is not None:
            read = self._up.compute()
            self._staging.send(named, norms, lambda arrived, theirs: self._update_at_once(arrived, theirs, read))
        else:
            self._update_at_once(named, norms.tolist(), None)

    def _update_at_once(self, named: Mapping[str, Tensor], norms: Sequence[float], read: StreamEvent) -> None:
        """Clip each gradient by its norm and update, unless something has been found that is not finite."""
        self._not_finite = self._not_finite or not all(map(math.isfinite, norms))
        if self._not_finite:
            return
        for gradient, norm in zip(named.values(), norms, strict=True):
            if (factor := self._max_norm / (norm + 1e-6)) < 1:
                gradient.mul_(factor)
        self._updated = True
        self._update(named)
        if self._weights is not None:
            self._weights.copy_to_model(named, after=read)

    @torch.no_grad()
    def _update(self, named: Mapping[str, Tensor]) -> None:
        """One update of these parameters alone."""
        with nullcontext() if self._weights is None else host_work(OPTIMIZER):
            for name, gradient in named.items():
                self._trained[name].grad = gradient
            self.optimizer.step()
            for name in named:
                self._trained[name].grad = None

    def clip(self, limit: float, *, scale: float = 1.0) -> Tensor | float:
        """Under ``exact`` gradients are scaled and clipped when they are used. Under ``per_parameter`` they are gone:
        only the norm is told, as it was before clipping, and it is NaN where something was not finite.

        Raises:
            ConfigError: under ``per_parameter``, for a scaled loss.
        """
        if self._staging is not None:
            self._staging.finish()
        if self._gradients is not None:
            self._gradients.end_step()
        norm = torch.stack(self._squares).sum().sqrt() / scale if self._squares else 0.0
        if self._exact:
            self._scale, self._limit, self._norm = scale, limit, norm
            return norm
        if scale != 1.0:
            raise ConfigError(
                "gradients that are used at once cannot be divided by the scale of an fp16 loss afterwards",
                where="memory.gradient_release: per_parameter",
                fix="set model.dtype: bf16, or memory.gradient_release: exact",
            )
        return math.nan if self._not_finite else norm

    def step(self) -> None:
        """Under ``per_parameter`` all has happened, and this only ends the step."""
        if self._gradients is not None and self._taken:
            self._factor = min(1.0, self._limit / (float(self._norm) + 1e-6))
            if self._weights is None:
                self._gradients.apply_updates(self._device, self._update_clipped)
            else:
                read = self._up.compute()
                self._weights.begin_update()
                for unit in self._units:
                    gradients = {name: self._gradients.read(name) for name in unit if name in self._taken}
                    self._update_clipped(gradients)
                    self._weights.copy_to_model(gradients, after=read)
        if self._weights is not None:
            self._weights.end_update()
        self._tag()
        self._updated = False
        self.drop_gradients()

    def _update_clipped(self, named: Mapping[str, Tensor]) -> None:
        taken = {name: gradient for name, gradient in named.items() if name in self._taken}
        for gradient in taken.values():
            if self._scale != 1.0:
                gradient.div_(self._scale)
            if self._factor != 1.0:
                gradient.mul_(self._factor)
        self._update(taken)

    def drop_gradients(self) -> None:
        """Updates that were made are not undone by it: ``backward`` refuses what would follow."""
        if self._staging is not None:
            self._staging.finish()
        if self._gradients is not None:
            self._gradients.end_step()
        for parameter in (*self.parameters.values(), *self._trained.values()):
            parameter.grad = None
        self._taken.clear()
        self._squares.clear()
        self._not_finite = False

    def _tag(self) -> None:
        if self._weights is not None:
            label_optimizer_tensors(optimizer_tensors(self.optimizer))

    # --------------------------------------------------------------------------------------------------- what is saved

    def replicas(self) -> Mapping[str, Tensor]:
        """Gradients only under ``exact``, before they are scaled and clipped."""
        named: dict[str, Tensor] = {f"weight of {name}": p.detach() for name, p in self.parameters.items()}
        if self._gradients is None:
            return named
        return named | {f"gradient of {name}": self._gradients.read(name) for name in sorted(self._taken)}

    def precise(self) -> Mapping[str, Tensor]:
        return precise_weights(self.optimizer, self._trained)

    def optimizer_state(self) -> OptimizerState:
        return optimizer_state(self.optimizer, {name: self._trained[name] for name in self.parameters})


def single_process_strategy(
    accelerator: Any,
    module: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    *,
    memory: MemoryConfig,
    device: torch.device,
    max_norm: float | None,
) -> DataParallel:
    """The strategy of a model that is whole in each process, as ``memory`` asks for.

    Args:
        accelerator: the launch.
        module: the transformer, in its memory state.
        parameters: what trains, by name.
        memory: the memory state, without faults.
        device: where the model computes.
        max_norm: of gradients; None for no limit.
    """
    if memory.gradient_release == "none":
        return DataParallel(accelerator, module, parameters)
    limit = math.inf if max_norm is None else max_norm
    return GradientRelease(accelerator, module, parameters, memory=memory, device=device, max_norm=limit)
