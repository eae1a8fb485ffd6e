"""What the launcher asks for: which strategy, and which of its settings this package does not do.

``accelerate launch`` turns its configuration file into environment variables. They are read here and nowhere else; a
setting that would do nothing, or something behind the run configuration's back, is refused by its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from finetune.core.errors import ConfigError

BLOCK = "CogVideoXBlock"
"""The module that is gathered and freed as one."""


@dataclass(frozen=True)
class Replicate:
    """One process, or a whole model in each of several (DDP)."""


@dataclass(frozen=True)
class FullShard:
    """FSDP2: each process holds its share of every parameter, gradient and optimizer state."""

    offload: bool = False
    """Shares, gradients and optimizer states live on the host, and the update happens there."""
    reshard_after_forward: bool = True
    """Free a block's gathered weights after its forward pass, and gather them again for its backward pass."""


@dataclass(frozen=True)
class Zero:
    """DeepSpeed ZeRO: stage 2 shards gradients and optimizer states, stage 3 the parameters as well."""

    stage: Literal[2, 3]
    offload_optimizer: bool = False
    offload_parameters: bool = False


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
        "leave parallelism_config out; to shard the model launch with accelerate_configs/fsdp2.yaml",
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
    for variable, (allowed, fix) in _FSDP_ALLOWED.items():
        value = environ.get(variable, "1" if variable == "FSDP_VERSION" else None)
        if value is not None and value.lower() not in allowed:
            raise _refused(f"the launcher asks for {variable.lower()} {value!r}, which is not supported", variable, fix)
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
    for variable, (allowed, fix) in _ZERO_ALLOWED.items():
        value = environ.get(variable)
        if value is not None and value.lower() not in allowed:
            raise _refused(f"the launcher sets {variable.lower()} to {value!r}, which is not supported", variable, fix)
    stage = int(environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))
    zero = Zero(
        stage=3 if stage == 3 else 2,
        offload_optimizer=environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none").lower() == "cpu",
        offload_parameters=environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "none").lower() == "cpu",
    )
    if zero.offload_parameters and zero.stage == 2:
        raise _refused(
            "ZeRO-2 keeps parameters on the device; only ZeRO-3 can offload them",
            "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE",
            "set offload_param_device: none, or zero_stage: 3",
        )
    return zero


def _on(environ: Mapping[str, str], variable: str) -> bool:
    return environ.get(variable, "").lower() in ("1", "true", "yes", "on")


def _refused(what: str, variable: str, fix: str) -> ConfigError:
    return ConfigError(what, where=f"the launch ({variable} in the environment)", fix=fix)
