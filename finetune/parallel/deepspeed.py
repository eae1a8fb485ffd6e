"""DeepSpeed ZeRO: optimizer states and gradients (stage 2), and parameters as well (stage 3), in shares.

DeepSpeed itself, configured from the run's configuration and from nothing else. Its own checkpoints are pickles; here
weights and optimizer states are gathered to the main process and saved in this package's ordinary form, so that a run
can go on with any number of processes and with any other strategy, and be exported.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from finetune.checkpoint.load import LoadedCheckpoint
from finetune.core.distributed import ProcessGroup
from finetune.core.errors import ConfigError
from finetune.datasets.schedule import TrainConfig
from finetune.methods.adapter import load_strictly
from finetune.optim.optimizers import AdamW, OptimizerConfig
from finetune.optim.state import OptimizerState, require_same_state


@dataclass(frozen=True)
class Zero:
    """Which ZeRO: stage 2 shards gradients and optimizer states, stage 3 the parameters as well."""

    stage: Literal[2, 3]
    offload_optimizer: bool = False
    offload_parameters: bool = False


_STATES = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps per element."""


class DeepSpeedZero:
    """The ``ParallelStrategy`` of DeepSpeed ZeRO.

    A step is DeepSpeed's own, but for one thing: it finds the norm and updates in one call, and this strategy
    asks for the norm first, so that a bad step is not taken.

    Args:
        launch: what the launcher asks for.
        ranks: the processes; ``ProcessGroup.current(sharding=True)``.
        module: the transformer, on the CPU.
        parameters: what trains, by name.
        train: batch size, accumulation.

    Raises:
        ConfigError: if DeepSpeed cannot be imported.
    """

    sharded = False
    optimizer: torch.optim.Optimizer
    model: Any
    _zero: Any

    def __init__(
        self,
        launch: Zero,
        ranks: ProcessGroup,
        module: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        train: TrainConfig,
    ) -> None:
        import_deepspeed()
        self.name = f"DeepSpeed ZeRO-{launch.stage}" + (", offloaded to the host" if launch.offload_optimizer else "")
        self.collective_forward = launch.stage == 3
        self.parameters = dict(parameters)
        self._launch, self._ranks, self._module, self._train = launch, ranks, module, train
        self._narrow = any(parameter.dtype == torch.bfloat16 for parameter in self.parameters.values())

    def start(self, optimizer: OptimizerConfig, saved: LoadedCheckpoint | None) -> None:
        assert isinstance(optimizer, AdamW)  # as the launch was found
        if saved is not None:
            load_strictly(self.parameters, saved.trainable)
        self.optimizer = optimizer.build_in_place(self.parameters.items())
        if saved is not None:
            masters = {f"master.{name}": torch.float32 for name in self.parameters} if self._narrow else {}
            require_same_state(self.optimizer, saved.optimizer, self.parameters, masters=masters)
        config = deepspeed_config(self._launch, self._train, narrow=self._narrow)
        os.environ.setdefault("LOCAL_RANK", "0")  # it reads this at every step, also in a process that nobody launched
        self.model, self._zero, _, _ = import_deepspeed().initialize(
            model=self._module,
            model_parameters=list(self.parameters.values()),
            optimizer=self.optimizer,
            config=config,
            dist_init_required=False,
        )
        if saved is not None:
            self._restore(saved)

    def micro_batch(self, *, last: bool) -> AbstractContextManager[object]:
        self.model.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        self.model.backward(loss, scale_wrt_gas=False)  # the loss is weighted by its share in the step already

    def clip(self, limit: float, *, scale: float = 1.0) -> float:
        assert scale == 1.0  # fp16, the one dtype with a scale, is refused under ZeRO
        if self._launch.stage == 2:
            norm = float(self._zero.scaled_global_norm())
        else:
            groups = [float(group) for group in self._zero._get_norm_groups()]
            norm = math.nan if min(groups) < 0 else math.hypot(*groups)
        self._zero.clip_grad = limit if math.isfinite(limit) else 0.0
        return norm if norm >= 0 else math.nan  # DeepSpeed writes -1 for what is not finite

    def step(self) -> None:
        self.model.step()

    def drop_gradients(self) -> None:
        """DeepSpeed keeps a step's gradients to itself, so this is for a run that ends."""
        self.model.zero_grad()

    def replicas(self) -> Mapping[str, Tensor]:
        """Under stage 2, the weights."""
        if self.collective_forward:
            return {}
        return {f"weight of {name}": parameter.detach() for name, parameter in self.parameters.items()}

    # ---------------------------------------------------------------------------------------------------- checkpoints

    def weights(self) -> Mapping[str, Tensor]:
        """Whole, on the main process; nothing on the others."""
        from deepspeed.utils import safe_get_full_fp32_param

        return self._gathered(lambda p: {"": safe_get_full_fp32_param(p).to(p.dtype)})

    def optimizer_state(self) -> OptimizerState:
        """Whole, on the main process; nothing on the others."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        self._find_states()
        tensors = self._gathered(lambda p: {k: safe_get_full_optimizer_state(p, k) for k in _STATES}, "state.", ".")
        if self._narrow:
            tensors |= self._gathered(lambda p: {"": safe_get_full_fp32_param(p)}, "master.")
        if self._ranks.is_main:
            taken = next(state["step"] for state in self.optimizer.state.values())
            tensors |= {f"state.{name}.step": taken.detach().float().cpu().clone() for name in self.parameters}
        meta = {"class": "AdamW", "parameters": list(self.parameters), "scalars": {}, "shared": {}, "composed": {}}
        return tensors, meta

    def _gathered(self, of: Any, before: str = "", between: str = "") -> dict[str, Tensor]:
        """Whole tensors of every parameter, one at a time, kept on the main process's host; all processes take part."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            for key, tensor in of(parameter).items():
                if self._ranks.is_main:
                    tensors[f"{before}{name}{between}{key}"] = tensor.detach().to("cpu", copy=True)
        return tensors

    def precise(self) -> Mapping[str, Tensor]:
        """DeepSpeed's own copies cannot be reached, and no average is kept of them."""
        return self.parameters

    def shares(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return tensors

    def own_share(self, saved: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return saved

    def _restore(self, saved: LoadedCheckpoint) -> None:
        """Put a checkpoint's masters and optimizer states into DeepSpeed's shares."""
        tensors, _ = saved.optimizer
        taken = [tensors[f"state.{name}.step"] for name in self.parameters if f"state.{name}.step" in tensors]
        if not taken:
            return
        for share in self._flat_shares():
            self.optimizer.state[share] = {
                "step": taken[0].to(share.device, copy=True),
                **{key: torch.zeros_like(share) for key in _STATES},
            }
        self._find_states()
        for name, parameter in self.parameters.items():
            if f"master.{name}" in tensors:
                self._put(parameter, tensors[f"master.{name}"], None)
            for key in _STATES:
                self._put(parameter, tensors[f"state.{name}.{key}"], key)

    def _find_states(self) -> None:
        """Let DeepSpeed look for the states of every group: it does so once, when only the first one has any."""
        if self._launch.stage == 2:
            self._zero._hp_optimizer_states_linked = False
            self._zero._lazy_init_hp_params_optimizer_state()

    def _flat_shares(self) -> list[Tensor]:
        zero = self._zero
        if self._launch.stage == 2:
            return list(zero.single_partition_of_fp32_groups)
        return list(zero.fp32_partitioned_groups_flat)

    def _put(self, parameter: Any, value: Tensor, key: str | None) -> None:
        from deepspeed.utils import (
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        value = value.float().to(self._ranks.device)
        if self._launch.stage == 2:
            if key is None:
                safe_set_full_fp32_param(parameter, value)
            else:
                safe_set_full_optimizer_state(parameter, value, key)
            return
        # By hand: DeepSpeed cuts a whole tensor wrongly where its elements do not divide evenly.
        size = parameter.ds_tensor.ds_numel
        padded = value.new_zeros(size * self._ranks.world)
        padded[: value.numel()] = value.flatten()
        share = padded.narrow(0, size * self._ranks.rank, size)
        if key is None:
            safe_set_local_fp32_param(parameter, share)
        else:
            safe_set_local_optimizer_state(parameter, share, key)


def deepspeed_config(launch: Zero, train: TrainConfig, *, narrow: bool) -> dict[str, Any]:
    """What DeepSpeed is told.

    Args:
        launch: stage and offload.
        train: of the run.
        narrow: whether what trains is bf16, so that DeepSpeed has to keep float32 masters; a LoRA's float32 weights on
            a bf16 base are trained as they are.
    """
    zero: dict[str, Any] = {"stage": launch.stage}
    if launch.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if launch.offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": train.batch_size,
        "gradient_accumulation_steps": train.accumulation,
        "gradient_clipping": train.max_grad_norm or 0.0,
        "zero_optimization": zero,
        "bf16": {"enabled": narrow},
        "communication_data_type": "fp32",
        # torch's AdamW, the same as without DeepSpeed, also where its states are on the host.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 30,
    }


def import_deepspeed() -> Any:
    """The library.

    Raises:
        ConfigError: if it is not installed, or cannot be imported.
    """
    try:
        import deepspeed
    except ImportError as error:
        raise ConfigError(
            f"the launcher asks for DeepSpeed, which cannot be imported: {error}",
            where="ACCELERATE_USE_DEEPSPEED in the environment",
            fix="pip install 'cogvideox-finetune[deepspeed]', or launch with accelerate_configs/fsdp2.yaml",
        ) from error
    import logging

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed
