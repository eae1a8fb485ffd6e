"""Whether a run repeats bit for bit: the settings that decide it, and a digest by which two runs compare.

``docs/numerics.md`` says what is bit-exact where.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import xxhash
from torch import Tensor, nn

from finetune.core.errors import ConfigError, TrainingError, first_line
from finetune.core.tensor_files import layout

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"

DETERMINISTIC_WORKSPACE = ":4096:8"
"""What ``train.deterministic`` sets it to: the fastest of the values under which cuBLAS repeats itself."""

_WORKSPACES = (DETERMINISTIC_WORKSPACE, ":16:8", ":0:0")


@contextmanager
def repeatable(asked: bool) -> Iterator[None]:
    """Compute with deterministic kernels inside, as ``train.deterministic`` asks; without it, change nothing.

    It has to be entered before the process first uses a GPU. Attention stays as fast as it can be: in this mode torch
    passes cuDNN's attention over, and the flash and memory-efficient kernels take their deterministic backward pass.

    Raises:
        ConfigError: if the environment forbids it.
        TrainingError: in place of torch's error for an operation that has no deterministic kernel.
    """
    if not asked:
        yield
        return
    if os.environ.get(WORKSPACE, _WORKSPACES[0]) not in _WORKSPACES:
        raise ConfigError(
            f"{WORKSPACE} is {os.environ[WORKSPACE]!r} in the environment, under which cuBLAS does not repeat itself",
            where="train.deterministic: true",
            fix=f"unset it, or set it to {_WORKSPACES[0]}",
        )
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark, workspace = torch.backends.cudnn.benchmark, os.environ.get(WORKSPACE)
    os.environ.setdefault(WORKSPACE, _WORKSPACES[0])
    # Errors, not warnings: with warnings only, attention's backward pass stays the one that does not repeat itself.
    torch.use_deterministic_algorithms(True, warn_only=False)
    torch.backends.cudnn.benchmark = False  # it picks kernels by a race
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        raise TrainingError(
            f"an operation has no deterministic kernel here: {first_line(error)}",
            where="train.deterministic: true",
            fix="leave train.deterministic out; everything else about the run stays as repeatable as it is",
        ) from error
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = benchmark
        if workspace is None:
            del os.environ[WORKSPACE]


def repeats(asked: bool, device: torch.device) -> str:
    """What the run sheet says of a run on ``device``: whether another one of the same settings gives the same bits."""
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return f"bit for bit on this machine with {threads} thread{'s' if threads > 1 else ''} per process"
    if asked:
        return "bit for bit on this model of GPU with these libraries (deterministic kernels)"
    return (
        "same random numbers, not the same bits: some kernels add up in an order that varies"
        " (train.deterministic: true for the others)"
    )


def weights_digest(tensors: Mapping[str, Tensor]) -> str:
    """One number for named tensors, whoever holds them: the xxh3-128 of their safetensors file, in hexadecimal.

    It is the checksum of ``trainable.safetensors`` in a checkpoint of one file. Shares of sharded tensors are put
    together for it, one tensor at a time, so all processes that hold some must call this.
    """
    digest = xxhash.xxh3_128()
    for part in layout(tensors, {}):
        digest.update(part)
    return digest.hexdigest()


@contextmanager
def training_state_untouched(*modules: nn.Module) -> Iterator[None]:
    """Measure or sample inside; on leaving, also through an exception, training goes on as if nothing had happened.

    Inside, ``modules`` are in eval mode (LoRA dropout off) and no gradient is recorded. Afterwards the train/eval flag
    of every submodule is what it was, and so is the state of the global random generators of the CPU and of every CUDA
    device. Parameters, buffers and gradients are not copied: what runs inside must not write to them.
    """
    flags = {module: module.training for root in modules for module in root.modules()}
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        try:
            for root in modules:
                root.eval()
            yield
        finally:
            # Flag by flag: `train()` on the root would also wake a submodule that was in eval mode on purpose.
            for module, training in flags.items():
                module.training = training
