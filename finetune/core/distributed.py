"""What the processes of one launch say to each other outside training: plain objects, however long a process takes.

Encoding a large dataset takes hours and the processes do not finish together, while a collective of training gives up
after ten minutes. Everything here therefore goes through a gloo group with a patient timeout; a process that dies still
ends the others at once, because its connections close.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed

from finetune.core.errors import ConfigError, FinetuneError, LaunchError, is_out_of_memory

GLOO_TIMEOUT = timedelta(days=7)
"""Of what goes through ``ProcessGroup``: encoding a large dataset takes hours."""

TIMEOUT = timedelta(minutes=10)
"""Of a collective of training: gradients, weights, losses. Whoever is not there by then is not coming."""

_Result = TypeVar("_Result")


def on_cpu() -> bool:
    """Whether to compute on the CPU: asked for (ACCELERATE_USE_CPU), or because there is no CUDA.

    Asked here because PartialState does not look at the variable by itself, and because accelerate would choose Apple's
    GPU, which has no float64.
    """
    from accelerate.utils import parse_flag_from_env

    return bool(parse_flag_from_env("ACCELERATE_USE_CPU")) or not torch.cuda.is_available()


LEAST_CUDNN = 91501
"""As ``torch.backends.cudnn.version()`` counts: 9.15.1. Before it, bf16 conv3d, of which the VAE is made, is wrong on
some GPUs (pytorch#163539), for which torch goes without cuDNN there and takes 17 times the memory (pytorch#166643);
and cuDNN's attention reads out of bounds where a length is not divisible by 128 (pytorch#169849), as 17 776 is not."""


def require_cudnn(device: torch.device) -> None:
    """Refuse to compute on an NVIDIA GPU with a cuDNN that is wrong for CogVideoX; see ``LEAST_CUDNN``.

    Raises:
        LaunchError: naming the version that is here, and how to come by another.
    """
    if device.type != "cuda" or torch.version.cuda is None:  # torch for AMD's GPUs has another library in its place
        return
    version = torch.backends.cudnn.version() or 0  # type: ignore[no-untyped-call]
    if version >= LEAST_CUDNN:
        return
    name = f"cuDNN {cudnn_name(version)}" if version else "no cuDNN"
    cuda = torch.version.cuda.partition(".")[0]
    raise LaunchError(
        f"this torch has {name}, and CogVideoX needs 9.15.1: before it, the VAE's bf16 convolutions give wrong results"
        " or take 17 times the memory, and attention reads out of bounds",
        where=f"torch {torch.__version__} on {device}",
        fix=f"pip install --upgrade 'nvidia-cudnn-cu{cuda}>=9.15.1', or torch's wheel from PyPI, which brings its own;"
        " or set CUDA_VISIBLE_DEVICES= to compute on the CPU",
    )


def cudnn_name(version: int) -> str:
    """``9.15.1`` for 91501, as ``torch.backends.cudnn.version()`` counts; 8.9.2 is 8902."""
    thousands = 10_000 if version >= 10_000 else 1000
    return f"{version // thousands}.{version % thousands // 100}.{version % 100}"


def indexed(device: torch.device) -> torch.device:
    """The device by its number. Without one it would be whatever is current where it is used: in another thread that is
    the first, whatever was set here.
    """
    return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device


def compute_device(name: str | None = None) -> torch.device:
    """Where a command that no launcher started computes: the device of this name, or the GPU where there is one.

    Raises:
        LaunchError: see ``require_cudnn``.
    """
    device = torch.device(name or ("cpu" if on_cpu() else "cuda"))
    require_cudnn(device)
    return indexed(device)


def usable_device(name: str | None = None) -> torch.device:
    """``compute_device`` of a name that a person gave, tried out.

    Raises:
        ConfigError: if there is no such device, or it cannot be used.
        LaunchError: see ``require_cudnn``.
    """
    try:
        device = compute_device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        if is_out_of_memory(error):  # another program holds all of it
            raise
        raise ConfigError(
            f"the device cannot be used: {str(error).splitlines()[0]}", where=f"--device {name or 'cuda'}"
        ) from None
    return device


_PLUGINS = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")


@contextmanager
def plain_launch() -> Iterator[None]:
    """Inside, accelerate sees nothing but processes: it would shard the model itself, and refuses to on a CPU."""
    hidden = {name: os.environ.pop(name) for name in _PLUGINS if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


@dataclass(frozen=True)
class ProcessGroup:
    """One process among those of its launch."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Where this process computes."""
    group: Any = None
    """The patient gloo group; None where no process group was opened."""
    opened: bool = False
    """Whether ``current`` opened the process group, so that ``close`` has to close it."""
    context: int = 1
    """How many neighbouring processes compute each clip together (``parallel.context``); it divides ``world``."""

    @property
    def data_rank(self) -> int:
        """Which share of the clips this process has; neighbours in ``context`` have the same."""
        return self.rank // self.context

    @property
    def data_world(self) -> int:
        """How many shares of the clips there are."""
        return self.world // self.context

    @property
    def leads_context(self) -> bool:
        """Whether this process is the first of those that have the same clips, and so the one that counts."""
        return self.rank % self.context == 0

    @classmethod
    def current(cls, *, sharding: bool = False) -> ProcessGroup:
        """The processes that ``accelerate launch``, ``torchrun`` or ``srun`` started; one, where none did.

        All of them must call this at the same point.

        Args:
            sharding: a model will be sharded, which takes a process group also of a single process.

        Raises:
            LaunchError: see ``require_cudnn``.
        """
        from accelerate import PartialState

        # With `true`, accelerate's default, transformers loads T5 on the first process of a machine alone and leaves
        # the others with empty weights, for a plugin of accelerate's that is not used here to fill.
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
        opened = not distributed.is_initialized()
        with plain_launch():
            state = PartialState(cpu=on_cpu(), timeout=TIMEOUT)
        require_cudnn(state.device)
        if sharding and not distributed.is_initialized():
            backend = "gloo" if state.device.type == "cpu" else "nccl"
            store = distributed.HashStore()  # type: ignore[attr-defined]  # public, but not re-exported
            distributed.init_process_group(backend, store=store, rank=0, world_size=1, timeout=TIMEOUT)
        group = None
        if distributed.is_initialized():
            group = distributed.new_group(backend="gloo", timeout=GLOO_TIMEOUT)
        opened = opened and distributed.is_initialized()
        return cls(state.process_index, state.num_processes, indexed(state.device), group, opened)

    def close(self) -> None:
        """Close the process group, if ``current`` opened it; a later launch in this process opens its own."""
        if self.opened and distributed.is_initialized():
            from accelerate.state import AcceleratorState

            distributed.destroy_process_group()
            AcceleratorState._reset_state(reset_partial_state=True)  # it would go on to name the group that is gone

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that speaks and decides."""
        return self.rank == 0

    def run_on_main(self, work: Callable[[], _Result]) -> _Result:
        """Run ``work`` on the main process alone and give every process its result.

        Raises:
            Exception: what ``work`` raised, on the main process; a ``FinetuneError`` that says so on the others.
            LaunchError: if a process is gone.
        """
        result, error = _attempt(work) if self.is_main else (None, None)
        if self.world > 1:
            outcome = [(result, _portable(error, self.rank))]
            with peers():
                distributed.broadcast_object_list(outcome, src=0, group=self.group)
            result, failure = outcome[0]
            error = error or failure
        if error is not None:
            raise error
        return result  # type: ignore[return-value]  # there is a result where there was no error

    def run_on_all(self, work: Callable[[], _Result]) -> list[_Result]:
        """Run ``work`` on every process and give every process all results, in order of rank.

        One that fails is waited for like the others, so that none hangs in a collective.

        Raises:
            Exception: what ``work`` raised here; where it failed only elsewhere, a ``FinetuneError`` that says so.
            LaunchError: if a process is gone.
        """
        result, error = _attempt(work)
        if self.world == 1:
            if error is not None:
                raise error
            return [result]  # type: ignore[list-item]  # as above
        if error is not None:  # said now: the others may take hours to come here
            print(f"process {self.rank} stopped and waits for the others: {error}", file=sys.stderr, flush=True)
        outcomes: list[Any] = [None] * self.world
        with peers():
            distributed.all_gather_object(outcomes, (result, _portable(error, self.rank)), group=self.group)
        for failed in [error, *(failure for _, failure in outcomes)]:
            if failed is not None:
                raise failed
        return [outcome for outcome, _ in outcomes]

    def gather(self, entries: list[_Result]) -> list[_Result]:
        """Every process's objects in one list, in order of rank."""
        return [entry for part in self.run_on_all(lambda: entries) for entry in part]


@contextmanager
def peers() -> Iterator[None]:
    """Around a collective: say in a sentence that another process is gone, where torch has a traceback.

    Raises:
        LaunchError: where the collective failed because a connection closed or nobody answered in time.
    """
    try:
        yield
    except BaseException as error:
        if distributed.is_initialized():
            _failures.append(error)
        # torch's DistError and gloo's own; NCCL's buffers may not fit either.
        if not isinstance(error, RuntimeError) or is_out_of_memory(error) or not _is_loss(error):
            raise
        raise LaunchError(
            f"another process of the launch failed or was killed: {str(error).strip().splitlines()[0]}",
            fix="its own last lines say why; the last checkpoint is intact, and the same command continues",
        ) from error


_failures: list[BaseException] = []
"""What ended a collective, kept until the process ends, and with it the frames that hold a model under DDP: freed while
gloo is in an all-reduce, the process group joins a thread that waits for Python's lock, and neither goes on."""

_LOSS = ("connection", "timed out", "timeout", "socket", "peer", "nccl", "broken pipe", "recvvalue")


def _is_loss(error: RuntimeError) -> bool:
    if isinstance(error, distributed.DistError):
        return True
    text = str(error).lower()
    return ("gloo" in text or "collective" in text or "[rank" in text) and any(word in text for word in _LOSS)


def _attempt(work: Callable[[], _Result]) -> tuple[_Result | None, Exception | None]:
    try:
        return work(), None
    except Exception as error:  # handed to every process, and raised there
        return None, error


def _portable(error: Exception | None, rank: int) -> FinetuneError | None:
    """The error as other processes get it: their own kind as it is, anything else in words, since it may not pickle."""
    if error is None or isinstance(error, FinetuneError):
        return error
    return LaunchError(f"process {rank} stopped: {type(error).__name__}: {error}", fix="its own message says more")
