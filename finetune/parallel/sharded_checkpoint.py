"""Tensors that several processes write and read together, each its own share, through torch's distributed checkpoint.

It plans who writes and who reads what, so that a run can go on with another number of processes. Its own file format
keeps a pickle beside the tensors; here the shares stand in safetensors files, with their offsets in the header as
torch's ``HuggingFaceStorageReader`` expects them. ``shards`` reads them in one process.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItemType
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from finetune.checkpoint.folders import EMA, OPTIMIZER, CheckpointConfig
from finetune.checkpoint.load import HEADER, OFFSETS, part_of
from finetune.checkpoint.save import publish_checkpoint
from finetune.core.distributed import ProcessGroup
from finetune.core.errors import ConfigError, FinetuneError
from finetune.core.files import TRAINABLE
from finetune.core.tensor_files import atomic_save_tensors, file_bytes
from finetune.core.types import RunState


def write_shares(folder: Path, tensors: Mapping[str, Tensor], *, rank: int, world: int, group: Any) -> dict[str, str]:
    """Write this process's shares of ``tensors``; every process of ``group`` calls this at once.

    Args:
        folder: of this part; it exists, and every process sees it.
        tensors: DTensors, or plain tensors that every process holds alike, of which the first writes each.
        rank: this process.
        world: how many there are.
        group: through which they agree on a plan; None for the default group.

    Returns:
        Checksums by file name of what this process wrote.

    Raises:
        OSError: if any process cannot write; on every process.
    """
    writer = _Writer(folder / f"share-{rank + 1:05d}-of-{world:05d}.safetensors")
    try:
        # What every process holds alike goes to the first one, so that equal runs write equal files.
        planner = DefaultSavePlanner(dedup_save_to_lowest_rank=True)
        save(dict(tensors), storage_writer=writer, planner=planner, process_group=group)
    except CheckpointException as error:  # no Exception, but a BaseException that wraps every process's own
        raise _cause(error) from None
    return writer.written


def read_shares(folder: Path, targets: Mapping[str, Tensor], *, group: Any) -> None:
    """Fill ``targets``, this process's shares of what ``write_shares`` wrote with any number of processes.

    Args:
        folder: as it was written.
        targets: DTensors, or plain tensors for what is not shared out.
        group: as for ``write_shares``.

    Raises:
        OSError: if any process cannot read; on every process.
    """
    try:
        load(
            dict(targets),
            storage_reader=reader_class()(str(folder)),
            planner=DefaultLoadPlanner(allow_partial_load=False),
            process_group=group,
        )
    except CheckpointException as error:
        raise _cause(error) from None


def reader_class() -> Any:
    """Torch's reader of shares in safetensors files; before a run is begun whose checkpoints nothing could read.

    Raises:
        ConfigError: if this version of torch has none.
    """
    try:
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    except ImportError as error:
        raise ConfigError(
            f"torch {torch.__version__} cannot read checkpoints in shares: {error}",
            where="a launch that shards the model",
            fix="pip install 'torch>=2.11', or launch with accelerate_configs/ddp.yaml",
        ) from error
    return HuggingFaceStorageReader


def _cause(error: CheckpointException) -> BaseException:
    first = min(error.failures)
    return error.failures[first][0]


class _Writer(StorageWriter):
    """Writes what the plan gives this process tensor by tensor; torch's own writer holds all of it in memory twice."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.written: dict[str, str] = {}

    def reset(self, checkpoint_id: Any = None) -> None:
        """Part of torch's protocol; a writer is used once."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Part of torch's protocol; the folder is there."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """The plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """The plans as they are."""
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this process's file, if it has anything to write."""
        tensors: dict[str, Tensor] = {}
        offsets: dict[str, dict[str, list[int]]] = {}
        for item in plan.items:
            if item.type is WriteItemType.BYTE_IO or item.tensor_data is None:
                raise TypeError(f"{item.index.fqn} is no tensor")
            share: Tensor = planner.resolve_data(item)  # type: ignore[assignment]  # bytes only for BYTE_IO
            if share.numel() or not math.prod(item.tensor_data.size):
                tensors[item.index.fqn] = share
                offsets[item.index.fqn] = {OFFSETS: list(item.tensor_data.chunk.offsets)}
        if tensors:
            header = {HEADER: json.dumps(offsets, sort_keys=True), "format": "pt"}
            self.written[self._path.name] = atomic_save_tensors(self._path, tensors, header)
        done: Future[list[WriteResult]] = Future()
        done.set_result([WriteResult(index=item.index, size_in_bytes=0, storage_data=None) for item in plan.items])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Nothing: each file says what is in it."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Part of torch's protocol; there are no ids here."""
        return True


# --------------------------------------------------------------------------------------------------- a whole checkpoint


def save_shares(
    run_dir: Path,
    state: RunState,
    *,
    trainable: Mapping[str, Tensor],
    optimizer: tuple[Mapping[str, Tensor], Mapping[str, Any]],
    ema: Mapping[str, Tensor] | None,
    config: Mapping[str, Any],
    policy: CheckpointConfig,
    ranks: ProcessGroup,
) -> Path:
    """``save_checkpoint`` for tensors that are shared out: every process writes its shares, all of it or nothing.

    All processes call this at once, with DTensors where ``save_checkpoint`` takes tensors.

    Raises:
        CheckpointError: if there is no room, or any process cannot write; on every process.
    """
    parts = {TRAINABLE: trainable, OPTIMIZER: optimizer[0]} | ({} if ema is None else {EMA: ema})
    needed = sum(ranks.run_on_all(lambda: sum(map(_bytes, parts.values()))))

    def write_mine(folder: Path) -> dict[str, str]:
        written: dict[str, str] = {}
        for name, tensors in parts.items():
            part = part_of(name)
            sums = write_shares(folder / part, tensors, rank=ranks.rank, world=ranks.world, group=ranks.group)
            written |= {f"{part}/{file}": checksum for file, checksum in sums.items()}
        return written

    def write(folder: Path) -> dict[str, str]:
        for name in parts:
            (folder / part_of(name)).mkdir()
        ranks.run_on_main(lambda: folder)
        written = {
            file: checksum for mine in ranks.run_on_all(lambda: write_mine(folder)) for file, checksum in mine.items()
        }
        absent = [file for file in written if not (folder / file).is_file()]
        if absent:
            raise OSError(f"{absent[0]} was written by another process and is not to be seen from this one")
        return written

    if ranks.is_main:
        return ranks.run_on_main(
            lambda: publish_checkpoint(
                run_dir,
                state,
                write,
                needed=needed,
                optimizer_meta=optimizer[1],
                config=config,
                policy=policy,
                processes=ranks.world,
            )
        )
    # The main process goes through the same three exchanges inside of the last one.
    folder = ranks.run_on_main(_of_the_main_process)
    failed: Exception | None = None
    try:
        ranks.run_on_all(lambda: write_mine(folder))
    except Exception as error:
        failed = error
    try:
        path: Path = ranks.run_on_main(_of_the_main_process)
    except FinetuneError as error:
        raise error from failed
    return path


def _of_the_main_process() -> Path:
    raise AssertionError("runs on the main process alone")


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    """What this process's shares take in a file, headers generously included."""
    shares = {name: getattr(tensor, "_local_tensor", tensor) for name, tensor in tensors.items()}
    return file_bytes(shares) + 64 * len(shares)
