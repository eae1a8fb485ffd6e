"""What a training asks of whatever spreads a model over processes; and a whole model in each, under DDP."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from finetune.checkpoint.load import LoadedCheckpoint
from finetune.core.distributed import ProcessGroup
from finetune.core.errors import TrainingError
from finetune.core.tensor_files import checksum_tensor
from finetune.methods.adapter import load_strictly
from finetune.optim.optimizers import OptimizerConfig
from finetune.optim.state import OptimizerState, load_optimizer_state, optimizer_state, precise_weights


class ParallelStrategy(Protocol):
    """One way of running a model on one or several processes.

    Made around the module, before there is an optimizer; ``start`` puts the weights in place and makes one. A step is:
    ``micro_batch`` around the forward and ``backward`` of each of this process's micro-batches; after the last,
    ``clip`` and then ``step``. Between the two the gradients are the whole step's: this is where a bad step is found
    and left undone (``drop_gradients``).
    """

    name: str
    """For people, such as ``DDP``."""
    collective_forward: bool
    """Whether every forward pass communicates, also outside training: then all processes must make equally many."""
    sharded: bool
    """Whether ``weights`` and ``optimizer_state`` give parts of the whole, to be saved by all processes together."""

    @property
    def model(self) -> nn.Module:
        """What forward passes go through."""

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """What trains, by name, as the optimizer sees it: this process's share of each parameter, or all of it."""

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """After ``start``."""

    def start(self, optimizer: OptimizerConfig, saved: LoadedCheckpoint | None) -> None:
        """Make the optimizer, over the weights of a checkpoint if one is continued.

        Raises:
            ConfigError: if this strategy cannot train with this optimizer.
            CheckpointError: if the checkpoint belongs to another model, method or optimizer.
        """

    def micro_batch(self, *, last: bool) -> AbstractContextManager[object]:
        """Around one micro-batch; in the ``last`` one of a step, at the latest, processes exchange gradients."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a scalar. Over a step, the gradient is the mean over processes of what each adds."""

    def clip(self, limit: float, *, scale: float = 1.0) -> Tensor | float:
        """Divide the step's gradients by ``scale``, then clip them to a global L2 norm of ``limit``.

        Returns:
            The norm over all parameters of all processes, after ``scale`` and before clipping; the same number on
            every process. It may still be on the device, so that nobody waits for it here.
        """

    def step(self) -> None:
        """Update the weights and forget the gradients."""

    def drop_gradients(self) -> None:
        """Forget the gradients of a step that is not to be taken."""

    def replicas(self) -> Mapping[str, Tensor]:
        """Tensors that every process must hold alike at this point: after ``clip``, weights and gradients by name."""

    def precise(self) -> Mapping[str, Tensor]:
        """The tensor that the optimizer updates behind each of ``parameters``: its master copy, or itself."""

    def weights(self) -> Mapping[str, Tensor]:
        """What trains, by name, to be saved."""

    def optimizer_state(self) -> OptimizerState:
        """What the optimizer has accumulated, to be saved."""

    def shares(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """``tensors``, formed like ``parameters``, to be saved beside them."""

    def own_share(self, saved: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Tensors of a checkpoint, formed like ``parameters``: the reverse of ``shares``."""


class DataParallel:
    """The ``ParallelStrategy`` of one process and of DDP.

    Args:
        accelerator: the launch; it wraps the model for DDP where there are several processes.
        module: the transformer, on its device.
        parameters: what trains, by name.
    """

    collective_forward = False
    sharded = False
    optimizer: torch.optim.Optimizer

    def __init__(self, accelerator: Any, module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        self.name = "one process" if accelerator.num_processes == 1 else "DDP, a whole model in each process"
        self.model: nn.Module = accelerator.prepare(module)
        self.parameters = dict(parameters)

    def start(self, optimizer: OptimizerConfig, saved: LoadedCheckpoint | None) -> None:
        if saved is not None:
            load_strictly(self.parameters, saved.trainable)
        # Built after the weights are final: master copies are taken from them. It is not handed to accelerate, which
        # would move a state that is paged, or kept on the CPU on purpose.
        self.optimizer = optimizer.build(self.parameters.items())
        if saved is not None:
            load_optimizer_state(self.optimizer, saved.optimizer, self.parameters)

    def micro_batch(self, *, last: bool) -> AbstractContextManager[object]:
        no_sync = getattr(self.model, "no_sync", None)
        context: AbstractContextManager[object] = nullcontext() if last or no_sync is None else no_sync()
        return context

    def backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def clip(self, limit: float, *, scale: float = 1.0) -> Tensor | float:
        if scale != 1.0:
            torch._foreach_div_([p.grad for p in self.parameters.values() if p.grad is not None], scale)
        norm: Tensor = torch.nn.utils.clip_grad_norm_(self.parameters.values(), limit)
        return norm

    def step(self) -> None:
        self.optimizer.step()
        self.drop_gradients()

    def drop_gradients(self) -> None:
        self.optimizer.zero_grad()

    def replicas(self) -> Mapping[str, Tensor]:
        named: dict[str, Tensor] = {f"weight of {name}": p.detach() for name, p in self.parameters.items()}
        return named | {f"gradient of {name}": p.grad for name, p in self.parameters.items() if p.grad is not None}

    def precise(self) -> Mapping[str, Tensor]:
        return precise_weights(self.optimizer, self.parameters)

    def weights(self) -> Mapping[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.parameters.items()}

    def optimizer_state(self) -> OptimizerState:
        return optimizer_state(self.optimizer, self.parameters)

    def shares(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return tensors

    def own_share(self, saved: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return saved


def require_agreement(step: int, named: Mapping[str, Tensor], facts: Mapping[str, object], ranks: ProcessGroup) -> None:
    """Compare tensors bit for bit, and facts as they print, over all processes; all must call this at once.

    Args:
        step: which optimizer step, from 0.
        named: tensors by what a person would call them; brought to the CPU one at a time.
        facts: such as the gradient norm.
        ranks: the processes.

    Raises:
        TrainingError: on every process, naming the first difference and the processes that have another value than
            the first one.
    """
    values = {name: str(fact) for name, fact in facts.items()} | {
        name: checksum_tensor(tensor) for name, tensor in named.items()
    }
    everyone = ranks.run_on_all(lambda: values)
    for name in {name: None for theirs in everyone for name in theirs}:
        odd = [rank for rank, theirs in enumerate(everyone) if theirs.get(name) != everyone[0].get(name)]
        if odd:
            raise TrainingError(
                f"step {step}: the {name} differs between processes: {', '.join(f'process {rank}' for rank in odd)}"
                " and process 0 do not hold the same; the weights were not updated",
                where="train.check_ranks",
                fix="the run before the last checkpoint may be wrong as well: continue from an earlier one, on other"
                " hardware; if it comes again at the same step, this is a bug",
            )
