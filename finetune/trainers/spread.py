"""How a run is spread over processes: what the launcher asks for, made, or refused by name."""

from __future__ import annotations

from typing import Any

import torch

from finetune.config import RunConfig, memory_errors, memory_traits
from finetune.errors import ConfigError, raise_all
from finetune.facts import Facts
from finetune.ranks import Ranks, on_cpu, plain_launch
from finetune.trainers.checkpoint.resharding import reader_class
from finetune.trainers.engine import (
    Engine,
    FullShard,
    Launch,
    Replicate,
    Sharded,
    Zero,
    ZeroSharded,
    import_deepspeed,
    whole_engine,
)


def make_engine(launch: Launch, ranks: Ranks, accelerator: Any, module: torch.nn.Module, config: RunConfig) -> Engine:
    """The engine that the launcher asks for, around ``module``.

    Args:
        launch: what it asks for.
        ranks: the processes.
        accelerator: ``make_accelerator``'s.
        module: the transformer with what trains in it; on the CPU where it is to be sharded.
        config: of the run.
    """
    if isinstance(launch, FullShard):
        return Sharded(launch, ranks, module, config.method)
    if isinstance(launch, Zero):
        return ZeroSharded(launch, ranks, module, config.method.trainable(module), config.train)
    return whole_engine(
        accelerator,
        module,
        config.method.trainable(module),
        memory=config.memory,
        device=ranks.device,
        max_norm=config.train.max_grad_norm,
    )


def make_accelerator(config: RunConfig) -> Any:
    """Accelerate's view of the launch: processes, device, trackers; it neither shards, casts nor compiles.

    Raises:
        ConfigError: naming a setting of the launcher that is not supported.
    """
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs

    with plain_launch():
        accelerator = Accelerator(
            cpu=on_cpu(),
            # Weights and compute are in the model's dtype already; autocast would re-cast each layer.
            mixed_precision="no",
            kwargs_handlers=[
                # Buffers are position tables and equal everywhere; gradients need not be held twice.
                DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
            ],
            **config.tracking.accelerator_options(config.output_dir),
        )
    _require_plain(accelerator, config)
    return accelerator


def _require_plain(accelerator: Any, config: RunConfig) -> None:
    """Refuse what a launcher's own settings would change behind the configuration's back."""
    from accelerate.utils import DistributedType

    if accelerator.gradient_accumulation_steps not in (1, config.train.accumulation):
        raise ConfigError(
            f"accelerate was told to accumulate {accelerator.gradient_accumulation_steps} micro-batches,"
            f" the configuration says {config.train.accumulation}",
            where="ACCELERATE_GRADIENT_ACCUMULATION_STEPS in the environment",
            fix="unset it; train.accumulation is the one place for this",
        )
    plain = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
    if accelerator.distributed_type not in plain:
        raise ConfigError(
            f"training under {accelerator.distributed_type.value} is not supported",
            where="accelerate's configuration",
            fix="launch with one of accelerate_configs/",
        )
    dynamo = accelerator.state.dynamo_plugin.backend.value
    if dynamo != "NO":
        raise ConfigError(
            f"accelerate was told to compile the model with {dynamo}, which this package does not support",
            where="accelerate's configuration",
            fix="set dynamo_backend: 'no'",
        )


def require_launch(launch: Launch, config: RunConfig, facts: Facts, ranks: Ranks) -> None:
    """Refuse settings of the run that do not go with how it is spread over processes.

    Raises:
        ConfigError: naming the setting.
    """
    traits = memory_traits(config, facts, processes=ranks.world, sharded=not isinstance(launch, Replicate))
    refused = memory_errors(config, traits)
    raise_all(ConfigError, refused, what="{n} settings of memory do not go with this launch")
    if isinstance(launch, FullShard):
        reader_class()
        if config.optimizer.weights == "stochastic":
            raise ConfigError(
                "stochastic rounding draws by parameter, and would draw the same for every share of one",
                where="optimizer.weights: stochastic, under FSDP2",
                fix="set optimizer.weights: kahan or master",
            )
    if isinstance(launch, Zero):
        _require_zero(config)
    if isinstance(launch, Replicate) or ranks.world == 1:
        return
    clips = config.memory.clips_at_once
    if clips is not None and clips < config.train.batch_size:
        # Micro-batches of different sizes, hence passes, meet in one step, and every pass is a collective.
        raise ConfigError(
            "a sharded model's processes must make equally many forward passes, and clips_at_once splits micro-batches"
            " of different sizes into different numbers of them",
            where=f"memory.clips_at_once: {clips}, train.batch_size: {config.train.batch_size}",
            fix=f"set train.batch_size: {clips} and a larger train.accumulation, or leave memory.clips_at_once out",
        )


def _require_zero(config: RunConfig) -> None:
    import_deepspeed()
    if config.train.ema_decay is not None:
        raise ConfigError(
            "no moving average is kept under DeepSpeed ZeRO: it hides the weights that would be averaged",
            where=f"train.ema_decay: {config.train.ema_decay}",
            fix="set train.ema_decay: null, or launch with accelerate_configs/fsdp2.yaml",
        )
    if config.optimizer.weights != "master":
        raise ConfigError(
            "DeepSpeed ZeRO keeps fp32 master copies, and nothing in their place",
            where=f"optimizer.weights: {config.optimizer.weights}",
            fix="set optimizer.weights: master, or launch with accelerate_configs/single_gpu.yaml or ddp.yaml",
        )
    if config.model.torch_dtype() == torch.float16:
        raise ConfigError(
            "fp16 is not supported under DeepSpeed ZeRO, which would adapt the scale of the loss by itself",
            where="model.dtype: fp16",
            fix="set model.dtype: bf16, or launch with accelerate_configs/ddp.yaml",
        )
