"""Random numbers that depend on seed and purpose alone; and what else decides whether a run repeats bit for bit.

Every random number of a run is drawn from ``generator(seed, *path)``, which depends on its arguments alone. Nothing
accumulates, so a resumed run needs no generator state, validation cannot disturb training, and the split of an
optimizer step over processes and micro-batches does not change what a sample sees. ``docs/numerics.md`` says what is
bit-exact where.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from finetune.core.errors import ConfigError, TrainingError, first_line

if TYPE_CHECKING:
    import torch
    from torch import nn

PathPart = int | str


def seed_for(seed: int, *path: PathPart) -> int:
    """A 56-bit integer that depends only on its arguments (blake2b of their text)."""
    digest = hashlib.blake2b(repr((seed, *path)).encode("utf-8"), digest_size=7).digest()
    return int.from_bytes(digest, "big")


def generator(seed: int, *path: PathPart) -> torch.Generator:
    """A CPU generator for one purpose, such as ``generator(seed, "noise", step, index)``.

    It lives on the CPU also in GPU runs: a seed then means the same run on every device.
    """
    import torch  # here and below, so that a configuration is read without it

    return torch.Generator("cpu").manual_seed(seed_for(seed, *path))


def permutation(size: int, seed: int, *path: PathPart) -> list[int]:
    """The numbers below ``size`` in an order drawn for one purpose."""
    import torch

    order: list[int] = torch.randperm(size, generator=generator(seed, *path)).tolist()
    return order


def seed_global(seed: int, device: torch.device) -> None:
    """Seed the generators that operations on the CPU and on ``device`` draw from where they are given none.

    ``torch.manual_seed`` seeds those of every device there could be. Where there is no GPU it keeps each call, with its
    traceback, for the day when one is used: a fifth of a millisecond and some kilobytes at every step.
    """
    import torch

    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


# ------------------------------------------------------------------------------------------------ deterministic kernels

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"

DETERMINISTIC_WORKSPACE = ":4096:8"
"""What ``train.deterministic`` sets it to: the fastest of the values under which cuBLAS repeats itself."""

_WORKSPACES = (DETERMINISTIC_WORKSPACE, ":16:8")


@contextmanager
def deterministic_kernels(enabled: bool) -> Iterator[None]:
    """Compute with deterministic kernels inside, as ``train.deterministic`` asks; without it, change nothing.

    It has to be entered before the process first uses a GPU: cuBLAS's workspace is read once, and stays set.
    Attention stays as fast as it can be: in this mode torch passes cuDNN's attention over, and the flash and
    memory-efficient kernels take their deterministic backward pass.

    Raises:
        ConfigError: if the environment forbids it.
        TrainingError: in place of torch's error for an operation that has no deterministic kernel.
    """
    import torch

    if not enabled:
        yield
        return
    if os.environ.get(WORKSPACE, _WORKSPACES[0]) not in _WORKSPACES:
        raise ConfigError(
            f"{WORKSPACE} is {os.environ[WORKSPACE]!r} in the environment, under which cuBLAS does not repeat itself",
            where="train.deterministic: true",
            fix=f"unset it, or set it to {_WORKSPACES[0]}",
        )
    if torch.cuda.is_initialized() and WORKSPACE not in os.environ:  # type: ignore[no-untyped-call]
        raise ConfigError(
            "this process has used a GPU already, and how cuBLAS works is decided at its first product",
            where="train.deterministic: true",
            fix=f"set {WORKSPACE}={_WORKSPACES[0]} before Python starts, or train in a process of its own",
        )
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
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


def repeatability(deterministic: bool, device: torch.device) -> str:
    """Whether another run of the same settings on ``device`` gives the same bits, in words for the run sheet."""
    import torch

    if device.type == "cpu":
        threads = torch.get_num_threads()
        return f"bit for bit on this machine with {threads} thread{'s' if threads > 1 else ''} per process"
    if deterministic:
        return "bit for bit on this model of GPU with these libraries (deterministic kernels)"
    return (
        "same random numbers, not the same bits: some kernels add up in an order that varies"
        " (train.deterministic: true for the others)"
    )


@contextmanager
def training_state_untouched(*modules: nn.Module) -> Iterator[None]:
    """Measure or sample inside; on leaving, also through an exception, training goes on as if nothing had happened.

    Inside, ``modules`` are in eval mode (LoRA dropout off) and no gradient is recorded. Afterwards the train/eval flag
    of every submodule is what it was, and so is the state of the global random generators of the CPU and of every CUDA
    device. Parameters, buffers and gradients are not copied: what runs inside must not write to them.
    """
    import torch

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
