"""Checkpoints that several processes wrote in shares: DeepSpeed ZeRO, and torch.distributed.checkpoint (FSDP, CogKit).

Both are read without the program that wrote them, and without a process group: a tensor is put together from its shares
when it is asked for. ZeRO's layout is that of DeepSpeed's ``zero_to_fp32.py``; its weights are the optimizer's float32
ones. torch's own reader reads the other; its table of contents is a pickle, which is read by a list of the classes that
belong there.
"""

from __future__ import annotations

import math
import pickle
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.state_dict_loader import load

from finetune.conversion.sat import Tensors
from finetune.conversion.torch_files import read_torch_file
from finetune.core.errors import ModelError, first_line, is_out_of_memory
from finetune.core.tensor_files import Deferred
from finetune.methods.adapter import some

# --------------------------------------------------------------------------------------------------------------- ZeRO

_MODEL_STATES, _OPTIMIZER_STATES = "*_model_states.pt", "*_optim_states.pt"

_STAGE_3, _UP_TO_STAGE_2 = "fp32_flat_groups", "single_partition_of_fp32_groups"
"""Where the float32 weights stand in the optimizer's states, by stage."""


def read_zero(folder: Path) -> Tensors:
    """The float32 weights of a DeepSpeed checkpoint, by the names of the model that was trained; none is in memory.

    Args:
        folder: with the ``*_optim_states.pt`` of all processes.

    Raises:
        ModelError: if files of processes are missing, damaged or would run code, or do not hold what they should.
    """
    where = str(folder)
    optimizer_files = _by_rank(folder, _OPTIMIZER_STATES)
    model_files = _by_rank(folder, _MODEL_STATES)
    if not model_files:
        raise ModelError("there is no *_model_states.pt beside the optimizer's states", where=where, fix=_FETCH)
    try:
        optimizers = [read_torch_file(path)["optimizer_state_dict"] for path in optimizer_files]
        count = optimizers[0]["partition_count"]
        processes = max(count) if isinstance(count, list) else count
        if processes != len(optimizers):
            raise ModelError(
                f"{processes} processes wrote the checkpoint, and files of {len(optimizers)} are here",
                where=where,
                fix=_FETCH,
            )
        models = [read_torch_file(path) for path in model_files]
        stage_3 = _STAGE_3 in optimizers[0]
        flat = [states[_STAGE_3 if stage_3 else _UP_TO_STAGE_2] for states in optimizers]
        trained = (_partitioned if stage_3 else _grouped)(models[0]["param_shapes"], flat, where)
        frozen = _frozen(models if stage_3 else models[:1], where)
        buffers = {name: models[0]["module"][name] for name in models[0]["buffer_names"] if name in models[0]["module"]}
        named = {**buffers, **frozen, **trained}
        shared = {name: named[other] for name, other in models[0].get("shared_params", {}).items() if other in named}
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise ModelError(
            f"the files are not laid out as DeepSpeed ZeRO's: {type(error).__name__} {first_line(error):.200}",
            where=where,
            fix="run the zero_to_fp32.py that DeepSpeed put beside them, and convert what it writes",
        ) from None
    return {**named, **shared}


_FETCH = "fetch the whole folder; each process wrote a file of its own"


def _by_rank(folder: Path, pattern: str) -> list[Path]:
    """Files in the order of the processes: rank 10 after rank 9."""
    return sorted(folder.glob(pattern), key=lambda path: [int(number) for number in re.findall(r"\d+", path.name)])


def _grouped(shapes: Sequence[Mapping[str, Sequence[int]]], flat: list[list[Tensor]], where: str) -> Tensors:
    """Stages 1 and 2: the parameters of a group lie end to end, and the processes hold equal parts of that."""
    named: dict[str, Tensor | Deferred] = {}
    for group, group_shapes in enumerate(shapes):
        parts = [process[group] for process in flat]
        offset = 0
        for name, shape in group_shapes.items():
            named[name] = Deferred(torch.float32, tuple(shape), _span(parts, offset, tuple(shape)))
            offset += math.prod(shape)
        _require_used(offset, sum(len(part) for part in parts), 2 * len(flat), where)
    return named


def _partitioned(shapes: Sequence[Mapping[str, Sequence[int]]], flat: list[list[Tensor]], where: str) -> Tensors:
    """Stage 3: each parameter is cut into one part per process, and a process holds its parts end to end."""
    named: dict[str, Tensor | Deferred] = {}
    offset = 0
    for name, shape in ((name, tuple(shape)) for group in shapes for name, shape in group.items()):
        part = math.ceil(math.prod(shape) / len(flat))
        named[name] = Deferred(torch.float32, shape, _gathered(flat, offset, part, shape))
        offset += part
    for process in flat:
        _require_used(offset, sum(len(part) for part in process), 1, where)
    return named


def _frozen(models: Sequence[Mapping[str, Any]], where: str) -> Tensors:
    """What was not trained, whole or in one part per process."""
    shapes = models[0].get("frozen_param_shapes") or {}
    named: dict[str, Tensor | Deferred] = {}
    for name, shape in shapes.items():
        parts = [model["frozen_param_fragments"][name].flatten() for model in models]
        if sum(len(part) for part in parts) < math.prod(shape):
            raise ModelError(f"the parts of {name} are too few for {list(shape)}", where=where, fix=_FETCH)
        named[name] = Deferred(parts[0].dtype, tuple(shape), _span(parts, 0, tuple(shape)))
    return named


def _span(parts: Sequence[Tensor], offset: int, shape: tuple[int, ...]) -> Callable[[], Tensor]:
    """What lies at ``offset`` of one-dimensional tensors laid end to end."""
    return lambda: _cut(parts, offset, math.prod(shape)).reshape(shape)


def _gathered(flat: Sequence[Sequence[Tensor]], offset: int, part: int, shape: tuple[int, ...]) -> Callable[[], Tensor]:
    """The parts of one parameter, each at the same place of a process, without the padding of the last."""

    def make() -> Tensor:
        return torch.cat([_cut(process, offset, part) for process in flat])[: math.prod(shape)].reshape(shape)

    return make


def _cut(parts: Sequence[Tensor], offset: int, count: int) -> Tensor:
    pieces = []
    for part in parts:
        first, last = max(offset, 0), min(offset + count, len(part))
        if first < last:
            pieces.append(part[first:last])
        offset -= len(part)
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces) if pieces else torch.empty(0)


def _require_used(used: int, available: int, alignment: int, where: str) -> None:
    """DeepSpeed fills up to a multiple of ``alignment``."""
    if math.ceil(used / alignment) != math.ceil(available / alignment):
        raise ModelError(
            f"the shapes ask for {used:,} numbers and the files hold {available:,}", where=where, fix=_FETCH
        )


# ----------------------------------------------------------------------------------------- torch.distributed.checkpoint

_ENTRIES = {
    *(("torch.distributed.checkpoint.metadata", name) for name in (
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    )),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("torch", "device"),
    ("collections", "OrderedDict"),
}  # fmt: skip
"""What the table of contents is made of."""


class _Contents(pickle.Unpickler):
    """Reads a ``.metadata`` file, and builds nothing but what belongs there."""

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("pathlib"):
            return PurePosixPath  # where it was saved, on whatever system
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) not in _ENTRIES and not is_dtype:
            raise ModelError(
                f"its table of contents would run code when it is unpickled, and is not read: it names {module}.{name}",
                fix="get the weights as safetensors",
            )
        return super().find_class(module, name)


class _Reader(filesystem.FileSystemReader):
    """torch's reader, with a table of contents that was read before."""

    def __init__(self, folder: Path, contents: metadata.Metadata) -> None:
        super().__init__(folder)
        self._contents = contents

    def read_metadata(self, *_: Any, **__: Any) -> metadata.Metadata:
        return self._contents


def read_dcp(folder: Path) -> Tensors:
    """The tensors of a torch.distributed.checkpoint folder, the optimizer's among them; none is in memory.

    Raises:
        ModelError: if the table of contents is damaged or would run code, names files outside of the folder, or one
            is missing.
    """
    where = str(folder)
    try:
        with (folder / ".metadata").open("rb") as source:
            contents = _Contents(source).load()
        entries = dict(contents.state_dict_metadata)
        files = {info.relative_path for info in contents.storage_data.values()}
        if contents.storage_meta is None:
            contents.storage_meta = metadata.StorageMeta()
    except ModelError as error:
        raise ModelError(error.what, where=where, fix=error.fix) from None
    except Exception as error:  # a damaged pickle can make its reader raise anything
        if is_out_of_memory(error):
            raise
        raise ModelError(
            f"the table of contents (.metadata) cannot be read: {first_line(error):.200}", where=where, fix=_FETCH
        ) from None
    if outside := sorted(name for name in files if name != PurePosixPath(name).name):
        raise ModelError(f"its table of contents names {some(outside)}, which is no file beside it", where=where)
    if missing := sorted(name for name in files if not (folder / name).is_file()):
        raise ModelError(
            f"{len(missing)} of its {len(files)} files are missing: {some(missing)}", where=where, fix=_FETCH
        )

    def reader(name: str, entry: metadata.TensorStorageMetadata) -> Callable[[], Tensor]:
        def read() -> Tensor:
            tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # that there is no process group, which is meant
                    load({name: tensor}, storage_reader=_Reader(folder, contents), no_dist=True)
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                raise ModelError(f"{name} cannot be read: {first_line(error):.200}", where=where, fix=_FETCH) from None
            return tensor

        return read

    return {
        name: Deferred(entry.properties.dtype, tuple(entry.size), reader(name, entry))
        for name, entry in entries.items()
        if isinstance(entry, metadata.TensorStorageMetadata)
    }
