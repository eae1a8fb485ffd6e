"""What the processes of a ``launcher`` run: the command line, whole or with one process failing on the way."""

from __future__ import annotations

import errno
import fcntl
import os
import runpy
import signal
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from waiting import HANG_S

RANK = int(os.environ.get("RANK", "0"))


def command(*words: str) -> int:
    """The command line."""
    from finetune.cli.main import main

    return main(words)


def command_in(folder: str, *words: str) -> int:
    """The command line, typed in ``folder``."""
    os.chdir(folder)
    return command(*words)


def script(path: str, *words: str) -> None:
    """A program of Python, with its ``words``."""
    sys.argv = [path, *words]
    runpy.run_path(path, run_name="__main__")


def faulty(how: str, where: str, rank: int, *words: str) -> int:
    """The command line, with something done to process ``rank`` when it comes to ``where`` (at its second visit)."""
    if rank != RANK:
        return command(*words)
    module, _, name = CALLS[where].partition(":")
    target = f"{module}.{name}"
    inner, visits = _found(module, name), 0

    def visited(*arguments: Any, **options: Any) -> Any:
        nonlocal visits
        visits += 1
        if visits == (1 if where in ("save", "shares", "encode") else 2):
            if how == "not a number":
                return inner(*arguments, **options) * float("nan")
            FAULTS[how]()
        return inner(*arguments, **options)

    with mock.patch(target, visited):
        return command(*words)


CALLS = {
    "step": "finetune.trainers.run:TrainedModel.losses",
    "save": "finetune.checkpoint.save:atomic_save_tensors",
    "shares": "finetune.checkpoint.shares:atomic_save_tensors",
    "encode": "finetune.caching.precompute:encode_clips",
}


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _raise() -> None:
    raise ValueError("a bug in one process")


def _fill_disk() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


FAULTS: dict[str, Callable[[], None]] = {"die": _die, "raise": _raise, "disk full": _fill_disk}


def _found(module: str, name: str) -> Callable[..., Any]:
    import pkgutil

    function: Callable[..., Any] = pkgutil.resolve_name(f"{module}:{name}")
    return function


def diverging(what: str, *words: str) -> int:
    """The command line, with process 1 holding something other than the others from the second step on."""
    from finetune.datasets.schedule import StepPlan
    from finetune.parallel.strategy import DataParallel as Replicated

    clip, step = Replicated.clip, StepPlan.step

    def off_by_a_bit(self: Replicated, limit: float, *, scale: float = 1.0) -> float:
        norm = clip(self, limit, scale=scale)
        chosen = list(self.parameters.values())[5]
        held = chosen.grad if what == "gradient" else chosen.data
        assert held is not None
        held.view(-1)[:1] += 1e-9 + 1e-6 * held.view(-1)[:1].abs()
        return norm

    def other_order(self: StepPlan, number: int) -> Any:
        return step(self, number + 1)

    patch = mock.patch.object(StepPlan, "step", other_order)
    if what != "samples":
        patch = mock.patch.object(Replicated, "clip", off_by_a_bit)
    if RANK != 1:
        return command(*words)
    with patch:
        return command(*words)


def pin(config: dict[str, Any], commits: list[str], output: str, together: bool) -> int:
    """Settle the model's revision while the hub gives every process another answer: its branch is being moved."""
    from finetune.config.rules import pin_model
    from finetune.config.schema import RunConfig
    from finetune.core.distributed import ProcessGroup

    ranks = ProcessGroup.current()
    asked = []

    def download(repo: str, **_: Any) -> str:
        asked.append(repo)
        return f"/hub/{repo}/snapshots/{commits[ranks.rank]}"

    with mock.patch("huggingface_hub.snapshot_download", download):
        config_ = RunConfig.from_dict(config)
        pinned = pin_model(config_, ranks.run_on_main) if together else pin_model(config_)
    Path(output, str(ranks.rank)).write_text(f"{pinned.model.revision} {len(asked)}")
    ranks.close()
    return 0


def on_terminal(name: str, *words: str) -> int:
    """The command line as a terminal starts it, whose end is the device ``name``."""
    os.setsid()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, by all that is started there
    device = os.open(name, os.O_RDWR)
    fcntl.ioctl(device, termios.TIOCSCTTY, 0)
    for stream in range(3):
        os.dup2(device, stream)
    # The forked ones believe that they write to a file.
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115 - until the process ends
    return command(*words)


def paused(note: str, where: str, *words: str) -> int:
    """The command line, which waits for a signal when it comes to ``where`` and has written its pid to ``note``."""

    def visited(*_: Any, **__: Any) -> None:
        Path(f"{note}.new").write_text(str(os.getpid()))
        os.replace(f"{note}.new", note)
        time.sleep(HANG_S)

    with mock.patch(where, visited):
        return command(*words)


def killed_while_recording(run_yaml: str) -> int:
    """Precompute a stream, and be killed in the middle of the third line of its record."""
    from finetune.caching import streaming

    append, lines_written = streaming.append, 0

    def dying(folder: Path, file: Any, reader: str, lines: Any) -> None:
        nonlocal lines_written
        append(folder, file, reader, lines)
        lines_written += 1
        if lines_written == 2:
            with (folder / f"{file.identity}.{reader}.jsonl").open("ab") as record:
                record.write(b"half a li")
            _die()

    with mock.patch.object(streaming, "append", dying):
        return command("precompute", "--config", run_yaml)


def load_t5(model: str) -> int:
    """Whether T5 has its weights in every process, whatever accelerate is told of loading models."""
    import torch

    from finetune.cogvideox.load import ModelConfig, load_text
    from finetune.core.distributed import ProcessGroup

    ranks = ProcessGroup.current()
    _, encoder = load_text(ModelConfig(pretrained=model))
    sums = ranks.run_on_all(lambda: float(sum(p.double().abs().sum() for p in encoder.parameters())))
    ranks.close()
    assert not torch.distributed.is_initialized()
    return 0 if sums[0] == sums[1] > 0 else 3


def uneven_shares(folder: str, phase: str) -> int:
    """Write tensors that do not divide by the number of processes, some with nothing for the last; or read them."""
    import torch
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Shard, distribute_tensor

    from finetune.checkpoint.shares import Shares, region_of, write_shares
    from finetune.core.checksums import ChecksummedFolder, folder_checksums
    from finetune.core.distributed import ProcessGroup

    ranks = ProcessGroup.current(sharding=True)
    mesh = DeviceMesh.from_group(ranks.group, "cpu")
    wholes = {f"rows{rows}": torch.arange(rows * 3, dtype=torch.float32).reshape(rows, 3) for rows in (1, 2, 5, 12)}
    if phase == "write":
        shares = {name: distribute_tensor(whole, mesh, [Shard(0)]) for name, whole in wholes.items()}
        write_shares(Path(folder, "part"), shares | {"steps": torch.tensor(7.0)}, rank=ranks.rank, world=ranks.world)
        ranks.run_on_all(lambda: None)
        ranks.run_on_main(lambda: Path(folder, "COMPLETE").write_text(folder_checksums(Path(folder))))
    else:
        written = Shares(ChecksummedFolder.open(Path(folder)), "part")
        for name, whole in wholes.items():
            target = distribute_tensor(whole, mesh, [Shard(0)])
            assert torch.equal(written.read(name, region_of(target)), target.to_local()), name
        assert written["steps"] == 7
    ranks.close()
    return 0


def shares_of_dcp(model: str, folder: str) -> int:
    """Save a transformer as CogKit does under FSDP: torch.distributed.checkpoint, each process its rows."""
    import torch
    import torch.distributed as dist
    from safetensors.torch import load_file
    from torch.distributed.checkpoint import state_dict_saver
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    tensors = load_file(f"{model}/transformer/diffusion_pytorch_model.safetensors")
    shares = {name: distribute_tensor(tensor, mesh, [Shard(0)]) for name, tensor in tensors.items()}
    optimizer = {"step": 3, "exp_avg": torch.ones(2)}
    state_dict_saver.save({"app": {"model": shares, "optim": optimizer}}, checkpoint_id=folder)
    dist.destroy_process_group()
    return 0
