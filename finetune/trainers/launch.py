"""What the launcher asks for: which strategy, and which of its settings this package does not do.

``accelerate launch`` turns its configuration file into environment variables. They are read here and nowhere else; a
setting that would do nothing, or something behind the run configuration's back, is refused by its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from finetune.cogvideox.spec import ModelSpec
from finetune.config.rules import memory_errors, memory_traits
from finetune.config.schema import RunConfig
from finetune.core.distributed import ProcessGroup, on_cpu, plain_launch
from finetune.core.errors import ConfigError, raise_all
from finetune.optim.optimizers import AdamW
from finetune.parallel.deepspeed import DeepSpeedZero, Zero, import_deepspeed
from finetune.parallel.fsdp import FullShard, FullyShardedDataParallel
from finetune.parallel.gradient_release import single_process_strategy
from finetune.parallel.strategy import ParallelStrategy

BLOCK = "CogVideoXBlock"
"""The module that is gathered and freed as one."""


@dataclass(frozen=True)
class Replicate:
    """One process, or a whole model in each of several (DDP)."""


Launch = Replicate | FullShard | Zero


def read_launch(environ: Mapping[str, str]) -> Launch:
    """Which strategy the launcher's environment asks for.

    Raises:
        ConfigError: naming the setting that is not supported.
    """
    for variable, (name, fix) in _REFUSED_WHEN_ON.items():
        if _on(environ, variable):
            raise _refused(f"{name} is not supported", variable, fix)
    precision = environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision != "no":
        raise _refused(
            f"the launcher asks for mixed precision ({precision})",
            "ACCELERATE_MIXED_PRECISION",
            "set mixed_precision: 'no'; weights and compute are in model.dtype, and there is no autocast",
        )
    if _on(environ, "ACCELERATE_USE_FSDP"):
        return _full_shard(environ)
    if _on(environ, "ACCELERATE_USE_DEEPSPEED"):
        return _zero(environ)
    return Replicate()


_REFUSED_WHEN_ON: Mapping[str, tuple[str, str]] = {
    "ACCELERATE_USE_MEGATRON_LM": ("Megatron-LM", "launch with one of accelerate_configs/"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": (
        "a parallelism configuration (tensor, context, sequence or hybrid parallelism)",
        "leave parallelism_config out; clips are divided by parallel.context of the run's configuration, and the model"
        " with accelerate_configs/fsdp2.yaml",
    ),
    "ACCELERATE_USE_SAGEMAKER": ("SageMaker's launcher", "launch with one of accelerate_configs/"),
}

# --------------------------------------------------------------------------------------------------------------- FSDP2

_FSDP_ALLOWED: Mapping[str, tuple[tuple[str, ...], str]] = {
    "FSDP_VERSION": (("2",), "set fsdp_version: 2; the first FSDP is not supported"),
    "FSDP_SHARDING_STRATEGY": (
        ("full_shard", "1"),
        "leave fsdp_sharding_strategy out; fsdp_reshard_after_forward: false keeps gathered weights",
    ),
    "FSDP_RESHARD_AFTER_FORWARD": (("true", "false"), "set fsdp_reshard_after_forward to true or false"),
    "FSDP_OFFLOAD_PARAMS": (("true", "false"), "set fsdp_offload_params to true or false"),
    "FSDP_AUTO_WRAP_POLICY": (
        ("transformer_based_wrap",),
        "set fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP; each block of the transformer is a unit",
    ),
    "FSDP_TRANSFORMER_CLS_TO_WRAP": ((BLOCK.lower(),), f"set fsdp_transformer_layer_cls_to_wrap: {BLOCK}"),
    "FSDP_STATE_DICT_TYPE": (
        ("sharded_state_dict",),
        "set fsdp_state_dict_type: SHARDED_STATE_DICT; `finetune export` puts the shares together",
    ),
    "FSDP_ACTIVATION_CHECKPOINTING": (("false",), "set memory.checkpointing in the run's configuration instead"),
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": (("false",), "set memory.checkpointing in the run's configuration"),
    "FSDP_BACKWARD_PREFETCH": (("backward_pre", "no_prefetch"), "leave it out: FSDP2 prefetches by itself"),
    "FSDP_FORWARD_PREFETCH": (("false",), "leave it out: FSDP2 prefetches by itself"),
    "FSDP_IGNORED_MODULES": ((), "leave fsdp_ignored_modules out: every parameter is sharded"),
}
"""Values (in lower case) that mean what this package does; anything else is refused, with what to do about it.
Not listed is what has no meaning in FSDP2: FSDP_MIN_NUM_PARAMS, FSDP_USE_ORIG_PARAMS, FSDP_SYNC_MODULE_STATES, and
FSDP_CPU_RAM_EFFICIENT_LOADING, which is about how accelerate loads a model."""


def _full_shard(environ: Mapping[str, str]) -> FullShard:
    _require_allowed({"FSDP_VERSION": "1", **environ}, _FSDP_ALLOWED)
    return FullShard(
        offload=_on(environ, "FSDP_OFFLOAD_PARAMS"),
        reshard_after_forward=environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() == "true",
    )


# ----------------------------------------------------------------------------------------------------------- DeepSpeed

_ZERO_ALLOWED: Mapping[str, tuple[tuple[str, ...], str]] = {
    "ACCELERATE_DEEPSPEED_CONFIG_FILE": (
        ("none",),
        "leave deepspeed_config_file out: what DeepSpeed is told follows from the run's configuration",
    ),
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": (("2", "3"), "set zero_stage to 2 or 3; without either use ddp.yaml"),
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": (("none", "cpu"), "set offload_optimizer_device to none or cpu"),
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": (("none", "cpu"), "set offload_param_device to none or cpu"),
    "ACCELERATE_GRADIENT_CLIPPING": (("none",), "leave gradient_clipping out: train.max_grad_norm is the one place"),
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": (("false", "none"), "set zero3_init_flag: false"),
    "ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES": (("none",), "leave deepspeed_moe_layer_cls_names out"),
}


def _zero(environ: Mapping[str, str]) -> Zero:
    _require_allowed(environ, _ZERO_ALLOWED)
    parameters = "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE"
    zero = Zero(
        stage=3 if environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3" else 2,
        offload_optimizer=environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "").lower() == "cpu",
        offload_parameters=environ.get(parameters, "").lower() == "cpu",
    )
    if zero.offload_parameters and zero.stage == 2:
        what = "ZeRO-2 keeps parameters on the device; only ZeRO-3 can offload them"
        raise _refused(what, parameters, "set offload_param_device: none, or zero_stage: 3")
    return zero


def _require_allowed(environ: Mapping[str, str], allowed: Mapping[str, tuple[tuple[str, ...], str]]) -> None:
    for variable, (values, fix) in allowed.items():
        value = environ.get(variable)
        if value is not None and value.lower() not in values:
            what = f"the launcher sets {variable.lower()} to {value!r}, which is not supported"
            raise _refused(what, variable, fix)


def _on(environ: Mapping[str, str], variable: str) -> bool:
    return environ.get(variable, "").lower() in ("1", "true", "yes", "on")


def _refused(what: str, variable: str, fix: str) -> ConfigError:
    return ConfigError(what, where=f"the launch ({variable} in the environment)", fix=fix)


# ----------------------------------------------------------------------------------------------- the strategy it means


def make_accelerator(accumulation: int, **tracking: Any) -> Any:
    """Accelerate's view of the launch: processes, device, trackers; it neither shards, casts nor compiles.

    Args:
        accumulation: micro-batches of a step, ``train.accumulation``.
        tracking: what accelerate is told of trackers.

    Raises:
        ConfigError: naming a setting of the launcher that is not supported.
    """
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, DistributedType

    with plain_launch():
        accelerator = Accelerator(
            cpu=on_cpu(),
            # Weights and compute are in the model's dtype already; autocast would re-cast each layer.
            mixed_precision="no",
            kwargs_handlers=[
                # Buffers are position tables and equal everywhere; gradients need not be held twice.
                DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
            ],
            **tracking,
        )
    accumulated = accelerator.gradient_accumulation_steps
    if accumulated not in (1, accumulation):
        raise ConfigError(
            f"accelerate was told to accumulate {accumulated} micro-batches, the configuration says {accumulation}",
            where="ACCELERATE_GRADIENT_ACCUMULATION_STEPS in the environment",
            fix="unset it; train.accumulation is the one place for this",
        )
    kind, dynamo = accelerator.distributed_type, accelerator.state.dynamo_plugin.backend.value
    if kind not in (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
        what, fix = f"training under {kind.value} is not supported", "launch with one of accelerate_configs/"
        raise ConfigError(what, where="accelerate's configuration", fix=fix)
    if dynamo != "NO":
        what = f"accelerate was told to compile the model with {dynamo}, which this package does not support"
        raise ConfigError(what, where="accelerate's configuration", fix="set dynamo_backend: 'no'")
    return accelerator


def make_strategy(
    launch: Launch, ranks: ProcessGroup, accelerator: Any, module: nn.Module, config: RunConfig
) -> ParallelStrategy:
    """The strategy that the launcher asks for, around ``module``.

    Args:
        launch: what it asks for.
        ranks: the processes.
        accelerator: ``make_accelerator``'s.
        module: the transformer with what trains in it; on the CPU where it is to be sharded.
        config: of the run.
    """
    if isinstance(launch, FullShard):
        return FullyShardedDataParallel(launch, ranks, module, config.method)
    parameters, train = config.method.trainable(module), config.train
    if isinstance(launch, Zero):
        return DeepSpeedZero(launch, ranks, module, parameters, train)
    return single_process_strategy(
        accelerator, module, parameters, memory=config.memory, device=ranks.device, max_norm=train.max_grad_norm
    )


def require_launch(launch: Launch, config: RunConfig, spec: ModelSpec, ranks: ProcessGroup) -> None:
    """Refuse settings of a run that do not go with how it is launched, before anything is loaded.

    Raises:
        ConfigError: naming the setting.
    """
    sharded, zero = isinstance(launch, FullShard), isinstance(launch, Zero)
    traits = memory_traits(config, spec, processes=ranks.world, sharded=sharded or zero)
    raise_all(ConfigError, memory_errors(config, traits), what="{n} settings of memory do not go with this launch")
    if zero:
        import_deepspeed()
    optimizer, train = config.optimizer, config.train
    clips, context = config.memory.clips_at_once, config.parallel.context
    for fault, what, where, fix in (
        (
            (sharded or zero) and config.method.kind == "lokr",
            "a LoKr trains in a single process or under DDP, and not where the model is sharded",
            "method.kind: lokr",
            "set method.kind: lora, or launch with accelerate_configs/single_gpu.yaml or ddp.yaml",
        ),
        (
            sharded and not optimizer.elementwise,
            f"{optimizer.title} does not treat each element by itself, and cannot update shares of parameters",
            "optimizer.kind, under FSDP2",
            "set optimizer.kind: adamw, or launch with accelerate_configs/ddp.yaml",
        ),
        (
            sharded and optimizer.weights == "stochastic",
            "stochastic rounding draws by parameter, and would draw the same for every share of one",
            "optimizer.weights: stochastic, under FSDP2",
            "set optimizer.weights: kahan or master",
        ),
        (
            zero and not isinstance(optimizer, AdamW),
            f"{optimizer.title} is not supported under DeepSpeed ZeRO",
            "optimizer.kind",
            "set optimizer.kind: adamw, or launch with accelerate_configs/ddp.yaml",
        ),
        (
            zero and train.ema_decay is not None,
            "no moving average is kept under DeepSpeed ZeRO: it hides the weights that would be averaged",
            f"train.ema_decay: {train.ema_decay}",
            "set train.ema_decay: null, or launch with accelerate_configs/fsdp2.yaml",
        ),
        (
            zero and optimizer.weights != "master",
            "DeepSpeed ZeRO keeps fp32 master copies, and nothing in their place",
            f"optimizer.weights: {optimizer.weights}",
            "set optimizer.weights: master, or launch with accelerate_configs/single_gpu.yaml or ddp.yaml",
        ),
        (
            zero and config.model.dtype == "fp16",
            "fp16 is not supported under DeepSpeed ZeRO, which would adapt the scale of the loss by itself",
            "model.dtype: fp16",
            "set model.dtype: bf16, or launch with accelerate_configs/ddp.yaml",
        ),
        (
            bool(ranks.world % context),
            f"{ranks.world} process{'es' if ranks.world > 1 else ''} cannot be divided into groups of {context}",
            config.where("parallel.context"),
            f"launch a multiple of {context} (accelerate launch --num_processes {context}), or set parallel.context: 1",
        ),
        (
            zero and context > 1,
            "clips are not divided among processes under DeepSpeed ZeRO",
            config.where("parallel.context"),
            "launch with accelerate_configs/ddp.yaml or fsdp2.yaml, or set parallel.context: 1",
        ),
        (
            # Micro-batches of different sizes, hence passes, meet in one step, and every pass is a collective.
            (sharded or zero) and ranks.world > 1 and clips is not None and clips < train.batch_size,
            "a sharded model's processes must make equally many forward passes, and clips_at_once splits micro-batches"
            " of different sizes into different numbers of them",
            f"memory.clips_at_once: {clips}, train.batch_size: {train.batch_size}",
            f"set train.batch_size: {clips} and a larger train.accumulation, or leave memory.clips_at_once out",
        ),
    ):
        if fault:
            raise ConfigError(what, where=where, fix=fix)
