"""Files of ``torch.save``: read as tensors only, mapped instead of loaded, and written tensor by tensor.

Such a file is a pickle, which can name any function to be called. torch's own restricted reader builds tensors and
plain containers. What else the trainers put beside them (DeepSpeed's loss scaler, numpy's random state) is read as an
empty object, so that nothing of it runs; a file that names anything else is refused.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals, set_default_mmap_options, skip_data

from finetune.core.errors import ModelError, first_line, is_out_of_memory
from finetune.core.tensor_files import Deferred, content_of
from finetune.methods.adapter import some

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")

_TRAINERS = {
    *("deepspeed", "numpy", "argparse", "collections", "accelerate", "transformers", "diffusers", "sat", "megatron"),
    *("omegaconf", "pathlib", "datetime", "enum", "_codecs", "torch"),
}
"""Packages whose objects stand in trainers' checkpoints beside the tensors."""


class _Placeholder:
    """Stands for an object of a trainer's, and has nothing of it."""

    def __new__(cls, *_: Any, **__: Any) -> _Placeholder:
        return object.__new__(cls)

    def __setstate__(self, _: Any) -> None: ...


def read_torch_file(path: Path) -> Any:
    """What a file of ``torch.save`` holds; its tensors are mapped, and take memory as they are copied.

    Raises:
        ModelError: if it is damaged, of a form that cannot be mapped, or would run code.
    """
    where = str(path)
    try:
        names = get_unsafe_globals_in_checkpoint(path)
    except Exception as error:  # a hostile file can make its reader raise anything
        if is_out_of_memory(error):
            raise
        raise ModelError(
            f"the file cannot be read as one of torch.save: {first_line(error):.200}",
            where=where,
            fix="fetch or copy it again; one from before torch 1.6 is loaded and saved again where you trust it",
        ) from None
    if foreign := [name for name in names if name.split(".")[0] not in _TRAINERS]:
        raise ModelError(
            f"the file would run code when it is unpickled, and is not read: it names {some(foreign)}",
            where=where,
            fix="get the weights as safetensors, or save the tensors alone where you trust the file:"
            " torch.save({name: t for name, t in state_dict.items() if torch.is_tensor(t)}, 'NEW.pt')",
        )
    try:
        with safe_globals([(_Placeholder, name) for name in names]):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise ModelError(
            f"the file cannot be read as tensors: {first_line(error):.200}",
            where=where,
            fix="fetch or copy it again",
        ) from None


def write_torch_file(path: Path, tensors: Mapping[str, Tensor | Deferred], *within: str) -> None:
    """Write ``torch.save({within[0]: {...: tensors}})``, with one tensor in memory at a time.

    The file is made with room for its tensors, mapped, and filled. Its checksums of the empty room stay as they were:
    torch does not look at them, ``unzip -t`` does.

    Args:
        path: in a folder that the caller publishes whole.
        tensors: by name.
        within: the keys that lead to the tensors, outermost first.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        value: Any = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in tensors.items()}
    for key in reversed(within):
        value = {key: value}
    with skip_data(materialize_fake_tensors=True):
        torch.save(value, path)
    with set_default_mmap_options(mmap.MAP_SHARED):
        room: Any = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    for key in within:
        room = room[key]
    with torch.no_grad():
        for name, tensor in tensors.items():
            room[name].copy_(content_of(tensor))


def unwrap(value: Any, where: str) -> dict[str, Tensor]:
    """The state dict in what a trainer saved: under ``module``, ``model`` or ``state_dict``, or the value itself.

    Raises:
        ModelError: if there is none.
    """
    for _ in range(3):
        inner = next((value[key] for key in ("module", "model", "state_dict") if _holds(value, key)), None)
        if inner is None:
            break
        value = inner
    tensors = {name: t for name, t in value.items() if isinstance(t, Tensor)} if isinstance(value, Mapping) else {}
    if not tensors:
        raise ModelError(
            "the file holds no named tensors",
            where=where,
            fix="name a checkpoint of a CogVideoX, not a file of optimizer states",
        )
    return tensors


def _holds(value: Any, key: str) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get(key), Mapping)
