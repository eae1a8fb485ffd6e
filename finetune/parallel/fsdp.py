"""FSDP2: every parameter, its gradient and its optimizer state cut into one share per process.

torch's own ``fully_shard``, on GPUs over NCCL and on CPUs over gloo alike, so that what two CPU processes prove is the
code that runs on GPUs. A block's weights are gathered for its forward pass and again for its backward pass, and its
gradients are averaged and cut up as soon as they are there.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn

from finetune.checkpoint.load import LoadedCheckpoint
from finetune.checkpoint.shares import Shares, forms_of, region_of
from finetune.core.distributed import ProcessGroup
from finetune.methods.adapter import require_same
from finetune.methods.full import FullMethod
from finetune.methods.lokr import LokrMethod
from finetune.methods.lora import LoraMethod
from finetune.optim.optimizers import OptimizerConfig
from finetune.optim.state import (
    OptimizerState,
    load_optimizer_state,
    optimizer_state,
    owner_of,
    precise_weights,
    require_same_state,
)


@dataclass(frozen=True)
class FullShard:
    """How FSDP2 shards."""

    offload: bool = False
    """Shares, gradients and optimizer states live on the host, and the update happens there."""
    reshard_after_forward: bool = True
    """Free a block's gathered weights after its forward pass, and gather them again for its backward pass."""


class FullyShardedDataParallel:
    """The ``ParallelStrategy`` of FSDP2.

    The optimizer works on plain tensors, this process's shares, and knows nothing of the others: right for optimizers
    that treat each element by itself, which ``start`` insists on.

    Args:
        launch: what the launcher asks for.
        ranks: the processes; ``ProcessGroup.current(sharding=True)``.
        module: the transformer, on the CPU, so that no device ever holds all of it; it is sharded in place.
        method: names what trains.
    """

    collective_forward = True
    sharded = True
    optimizer: torch.optim.Optimizer

    def __init__(
        self, launch: FullShard, ranks: ProcessGroup, module: nn.Module, method: LoraMethod | LokrMethod | FullMethod
    ) -> None:
        self.name = "FSDP2, a share of the model in each process" + (", kept on the host" if launch.offload else "")
        self.model = module
        self._ranks = ranks
        self._host: Any = _host_mesh(ranks)
        _shard(launch, ranks, module)
        self._whole: dict[str, Any] = dict(method.trainable(module))
        self.parameters = {name: nn.Parameter(parameter.detach().to_local()) for name, parameter in self._whole.items()}

    def start(self, optimizer: OptimizerConfig, saved: LoadedCheckpoint | None) -> None:
        if saved is not None:
            require_same(self._whole, forms_of(saved.trainable))
            for name, share in self.own_share(saved.trainable).items():
                self.parameters[name].data.copy_(share)
        self.optimizer = optimizer.build(self.parameters.items())
        if saved is not None:
            tensors, meta = saved.optimizer
            require_same_state(self.optimizer, saved.optimizer, self._whole, forms=forms_of(tensors))
            load_optimizer_state(self.optimizer, (self._read(tensors, owner_of), meta), self.parameters)

    def micro_batch(self, *, last: bool) -> AbstractContextManager[object]:
        """Every micro-batch's gradients are cut up at once, so that none is ever held whole."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def clip(self, limit: float, *, scale: float = 1.0) -> float:
        gradients = list(self._gradients().values())
        if scale != 1.0 and gradients:
            torch._foreach_div_(gradients, scale)
        # Summed where the shares are: kept on the host, each norm would be a copy that is waited for.
        where = gradients[0].device if gradients else self._ranks.device
        own = torch.zeros((), dtype=torch.float64, device=where)
        for gradient in gradients:
            if gradient.numel():
                own += torch.linalg.vector_norm(gradient, dtype=torch.float32).double().square()
        total = own.to(self._ranks.device)
        distributed.all_reduce(total)
        norm_of_all = math.sqrt(total.item())  # of NaN and infinity: themselves
        if norm_of_all > limit and gradients:
            torch._foreach_mul_(gradients, limit / (norm_of_all + 1e-6))
        return norm_of_all

    def step(self) -> None:
        for name, gradient in self._gradients().items():
            self.parameters[name].grad = gradient
        self.optimizer.step()
        self.drop_gradients()

    def drop_gradients(self) -> None:
        for name, parameter in self.parameters.items():
            parameter.grad = None
            self._whole[name].grad = None

    def _gradients(self) -> dict[str, Tensor]:
        """This process's shares of the gradients, by name; they are the model's own."""
        return {name: whole.grad.to_local() for name, whole in self._whole.items() if whole.grad is not None}

    def replicas(self) -> Mapping[str, Tensor]:
        """Of a sharded model nothing is held twice but buffers."""
        return {f"buffer {name}": buffer for name, buffer in self.model.named_buffers()}

    # ---------------------------------------------------------------------------------------------------- checkpoints

    def precise(self) -> Mapping[str, Tensor]:
        return precise_weights(self.optimizer, self.parameters)

    def weights(self) -> Mapping[str, Tensor]:
        return self.shares(self.parameters)

    def optimizer_state(self) -> OptimizerState:
        tensors, meta = optimizer_state(self.optimizer, self.parameters)
        return {key: self._as_share(owner_of(key), tensor) for key, tensor in tensors.items()}, meta

    def shares(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {name: self._as_share(name, tensor) for name, tensor in tensors.items()}

    def own_share(self, saved: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return self._read(saved, lambda key: key)

    def _as_share(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor shaped like this process's share, as a part of one that is shaped like the whole parameter."""
        from torch.distributed.tensor import DTensor

        whole, tensor = self._whole[name], tensor.detach()
        if tensor.shape != self.parameters[name].shape:  # a number of steps
            return tensor
        # On the mesh of its own device: on another's, torch would copy it there.
        mesh = self._host if tensor.device.type == "cpu" else whole.device_mesh
        return DTensor.from_local(
            tensor, mesh, whole.placements, run_check=False, shape=whole.shape, stride=whole.stride()
        )

    def _read(self, tensors: Mapping[str, Tensor], owner: Callable[[str], str]) -> dict[str, Tensor]:
        """This process's shares of what a checkpoint holds, whoever wrote it; ``owner`` names a tensor's parameter."""
        read: dict[str, Tensor] = {}
        for key, form in forms_of(tensors).items():
            region = tuple(slice(0, size) for size in form.shape)
            if (whole := self._whole.get(owner(key))) is not None and form.shape == whole.shape:
                region = region_of(whole)
            read[key] = tensors.read(key, region) if isinstance(tensors, Shares) else tensors[key][region]
        return read


def _host_mesh(ranks: ProcessGroup) -> Any:
    """The processes as a mesh for tensors on the host, which communicate through the patient group."""
    from torch.distributed.device_mesh import DeviceMesh

    return DeviceMesh.from_group(ranks.group, "cpu")


def _shard(launch: FullShard, ranks: ProcessGroup, module: nn.Module) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    # Every forward pass returns a view, which nobody writes to.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    offload = CPUOffloadPolicy(pin_memory=ranks.device.type != "cpu") if launch.offload else OffloadPolicy()
    settings: dict[str, Any] = {
        "mesh": mesh,
        "offload_policy": offload,
        # Weights and compute stay in the model's dtype; gradients are summed over processes in float32.
        "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32),
        "reshard_after_forward": launch.reshard_after_forward,
    }
    for block in module.get_submodule("transformer_blocks").children():
        fully_shard(block, **settings)
    # The rest, always resharded: torch keeps the root's gathered weights after a forward pass without gradients, and
    # the next training step would compute with them, whatever became of the shares in between (averaged weights).
    fully_shard(module, **(settings | {"reshard_after_forward": True}))
