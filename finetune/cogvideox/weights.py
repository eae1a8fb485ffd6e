"""Putting a checkpoint's tensors into a module that has none, one at a time: each where it belongs, and nowhere else.

A module is built on the meta device, which costs nothing. Then every tensor is read, cast and placed, so that beside
what is finished there is never more than the one tensor in hand.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from finetune.facts import require_plain_index
from finetune.tensorfiles import checksum_tensor


class Placement(Protocol):
    """Has a say in where a checkpoint's tensors go, and in what form."""

    def prepare(self, module: nn.Module) -> None:
        """Change ``module``, which is on the meta device, before its weights are read."""

    def put(self, module: nn.Module, name: str, tensor: Tensor, device: torch.device) -> bool:
        """Place a tensor of the checkpoint, or return False for it to be placed as it is.

        Args:
            module: the whole.
            name: of the tensor in the checkpoint.
            tensor: as stored, on the CPU; it may lie in a mapped file, so what is kept of it has to be copied.
            device: where the model goes.
        """


def stored_tensors(folder: Path, stem: str) -> Iterator[tuple[str, Tensor]]:
    """Name and content of every tensor of a component, mapped from its file: memory is taken as they are copied.

    Args:
        folder: of the component.
        stem: of its file names: ``diffusion_pytorch_model``, or ``model`` for T5.

    Raises:
        OSError: if a file is missing.
        safetensors.SafetensorError: if one is damaged.
    """
    from safetensors import safe_open

    for path in _files(folder, stem):
        with safe_open(path, framework="pt", device="cpu") as source:
            for name in source.keys():  # noqa: SIM118 - not a mapping
                yield name, source.get_tensor(name)


def noting(tensors: Iterable[tuple[str, Tensor]], checksums: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
    """The same tensors, each checksum put into ``checksums`` as it passes."""
    for name, tensor in tensors:
        checksums[name] = checksum_tensor(tensor)
        yield name, tensor


def require_exact(module: nn.Module, folder: Path, stem: str, *, allow_unexpected: bool) -> None:
    """Compare the tables of contents of a component's files with what ``module`` holds; no tensor is read.

    Raises:
        ValueError: if a weight is missing, unknown or of another shape.
        OSError, safetensors.SafetensorError: as ``stored_tensors``.
    """
    from safetensors import safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    for path in _files(folder, stem):
        with safe_open(path, framework="pt", device="cpu") as source:
            shapes |= {name: tuple(source.get_slice(name).get_shape()) for name in source.keys()}  # noqa: SIM118
    held = module.state_dict(keep_vars=True)
    missing = [names[0] for names in _aliases(module).values() if not any(name in shapes for name in names)]
    require_all_weights(
        missing=missing,
        mismatched=[
            f"{name} (stored {list(shapes[name])}, by config.json {list(tensor.shape)})"
            for name, tensor in held.items()
            if name in shapes and shapes[name] != tuple(tensor.shape)
        ],
        unexpected=[] if allow_unexpected else [name for name in shapes if name not in held],
    )


def require_all_weights(*, missing: Iterable[str], mismatched: Iterable[object], unexpected: Iterable[str]) -> None:
    """Refuse what the libraries would only warn of, and then train or sample with random numbers in a weight's place.

    Raises:
        ValueError: naming one of each.
    """
    problems = {"missing": missing, "of another shape": mismatched, "unknown": unexpected}
    found = {fault: sorted(map(str, names)) for fault, names in problems.items()}
    said = [f"{len(names)} weights are {fault}, such as {names[0]}" for fault, names in found.items() if names]
    if said:
        raise ValueError("; ".join(said))


@torch.no_grad()
def place(
    module: nn.Module,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    dtype: torch.dtype,
    device: torch.device,
    placement: Placement | None = None,
) -> None:
    """Fill ``module``, which is on the meta device and in ``dtype``, with ``tensors``; names it does not have are left.

    Args:
        module: before ``placement.prepare``.
        tensors: name and content, as ``stored_tensors`` gives them. Each is copied, so files may change afterwards.
        dtype: of everything floating.
        device: of everything.
        placement: whom to ask first.
    """
    # Tied weights have one content and several names; each may be the one that was stored.
    aliases = {name: names for names in _aliases(module).values() for name in names}
    if placement is not None:
        placement.prepare(module)
    for name, tensor in tensors:
        if name not in aliases or (placement is not None and placement.put(module, name, tensor, device)):
            continue
        kept = torch.empty(tensor.shape, dtype=dtype if tensor.is_floating_point() else tensor.dtype, device=device)
        _set(module, aliases[name], kept.copy_(tensor))


@torch.no_grad()
def make_room(module: nn.Module, device: torch.device) -> None:
    """Give every tensor of a module on the meta device memory on ``device``; nothing is written there.

    ``nn.Module.to_empty`` does that too, but not under ``FakeTensorMode``.
    """
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    aliases: dict[int, list[str]] = {}
    for name, tensor in tensors:
        aliases.setdefault(id(tensor), []).append(name)
    for names in aliases.values():
        _set(module, names, torch.empty_like(attrgetter(names[0])(module), device=device))


@contextmanager
def on_meta(dtype: torch.dtype) -> Iterator[None]:
    """Modules that are built within have shapes and no memory, and parameters in ``dtype``.

    Casting them afterwards is what ``FakeTensorMode`` does not allow.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(before)


def _files(folder: Path, stem: str) -> list[Path]:
    index = folder / f"{stem}.safetensors.index.json"
    if index.is_file():
        return [folder / name for name in require_plain_index(index)]
    return [folder / f"{stem}.safetensors"]


def _aliases(module: nn.Module) -> dict[int, list[str]]:
    """The names of each tensor of the state dict, by its identity."""
    found: dict[int, list[str]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        found.setdefault(id(tensor), []).append(name)
    return found


def _set(module: nn.Module, names: list[str], tensor: Tensor) -> None:
    before = attrgetter(names[0])(module)
    held = nn.Parameter(tensor, before.requires_grad) if isinstance(before, nn.Parameter) else tensor
    for name in names:
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, held)
