"""What a SOURCE turns out to be: a file or a folder of any trainer's, as named tensors that nothing has read yet."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from finetune.checkpoint.folders import step_folders
from finetune.cogvideox.components import read_json, require_plain_index
from finetune.cogvideox.model_files import MODEL_INDEX
from finetune.conversion.sat import Tensors, from_sat, is_sat
from finetune.conversion.torch_files import TORCH_SUFFIXES, read_torch_file, unwrap
from finetune.core.errors import ConfigError, ModelError, first_line, is_out_of_memory
from finetune.core.files import LORA_FILE
from finetune.core.tensor_files import DTYPES_BY_NAME, Deferred
from finetune.methods.adapter import some

_LORA_FILES = (LORA_FILE, "adapter_model.safetensors", "adapter_model.bin")

DIFFUSERS_FILES = ("diffusion_pytorch_model.safetensors.index.json", "diffusion_pytorch_model.safetensors")
"""How diffusers names the weights of a component."""

_MODEL_FILES = (
    *DIFFUSERS_FILES,
    *("model.safetensors.index.json", "model.safetensors", "pytorch_model_fsdp.bin"),
    *("pytorch_model.bin", "diffusion_pytorch_model.bin", "pytorch_model.bin.index.json"),
)
"""How diffusers, accelerate and DeepSpeed's own script name the weights of a model, in a folder without its JSON."""

_MARK = "patch_embed.text_proj.weight"
"""A tensor that every transformer has by diffusers' names: what stands before it is a trainer's wrapper."""

_WRAPPERS = re.compile(r"\b(_checkpoint_wrapped_module|_orig_mod|_fsdp_wrapped_module)\.")
"""What activation checkpointing, compilation and FSDP put into the names of what they wrap."""


@dataclass(frozen=True)
class Checkpoint:
    """Named tensors from anywhere, none of them in memory."""

    kind: str
    """What it is, for the report, such as ``SAT checkpoint``."""
    path: Path
    components: Mapping[str, Tensors]
    """``transformer``, ``vae`` and ``text_encoder`` by diffusers' names, as far as they are there."""
    left_out: tuple[str, ...] = ()
    """Names of tensors that have no use."""


def stored_tensors(path: Path) -> dict[str, Deferred]:
    """The tensors of a safetensors file; each is read when it is made.

    Raises:
        ModelError: if the file is damaged.
    """
    from safetensors import safe_open

    def reader(name: str) -> Callable[[], Tensor]:
        def read() -> Tensor:
            with safe_open(path, framework="pt", device="cpu") as source:
                tensor: Tensor = source.get_tensor(name)
                return tensor

        return read

    tensors = {}
    try:
        with safe_open(path, framework="pt", device="cpu") as source:
            for name in source.keys():  # noqa: SIM118 - not a mapping
                piece = source.get_slice(name)
                tensors[name] = Deferred(DTYPES_BY_NAME[piece.get_dtype()], tuple(piece.get_shape()), reader(name))
    except Exception as error:  # safetensors raises its own
        if is_out_of_memory(error):
            raise
        raise ModelError(
            f"the file cannot be read: {first_line(error):.200}", where=str(path), fix="fetch or copy it again"
        ) from None
    return tensors


def named_tensors(path: Path) -> Tensors:
    """The tensors of one file of weights, or of those that an index names.

    Raises:
        ModelError: if a file is missing or damaged, would run code, or is of no known kind.
    """
    if path.name.endswith(".safetensors.index.json"):
        return _together({name: stored_tensors(path.with_name(name)) for name in require_plain_index(path)}, path)
    if path.name.endswith(".bin.index.json"):
        names = {str(name) for name in read_json(path).get("weight_map", {}).values()}
        if any(name != Path(name).name for name in names):
            raise ModelError("its index names files that are not beside it", where=str(path))
        return _together({name: _from_torch(path.with_name(name)) for name in sorted(names)}, path)
    if path.suffix == ".safetensors":
        return stored_tensors(path)
    if path.suffix in TORCH_SUFFIXES:
        return _from_torch(path)
    raise ConfigError(
        f"{path.name} is no file of weights",
        where=str(path),
        fix=f"give a file *.safetensors or {', '.join(f'*{suffix}' for suffix in TORCH_SUFFIXES)}, or a folder",
    )


def _from_torch(path: Path) -> dict[str, Tensor]:
    return unwrap(read_torch_file(path), str(path))


def _together(files: Mapping[str, Tensors], where: Path) -> dict[str, Tensor | Deferred]:
    together: dict[str, Tensor | Deferred] = {}
    for file, tensors in files.items():
        if twice := sorted(together.keys() & tensors.keys()):
            raise ModelError(f"{some(twice)} stand in more than one file, such as {file}", where=str(where))
        together |= tensors
    return together


# ------------------------------------------------------------------------------------------------------- in a folder


def files_of(source: Path) -> tuple[str, list[Path]]:
    """Which files of a source hold its weights, and what it is: ``file``, ``SAT checkpoint``, ``diffusers folder``...

    Raises:
        ConfigError: if there is nothing that can be converted.
    """
    if source.is_file():
        return "file", [source]
    if not source.is_dir():
        raise ConfigError("there is no such file or folder", where=str(source))
    if (source / MODEL_INDEX).is_file() or (source / "transformer" / "config.json").is_file():
        return "diffusers folder", [source]
    if (source / "config.json").is_file() and _first(source, DIFFUSERS_FILES):
        return "diffusers folder", [source]
    if step_folders(source) or (source / "state.json").is_file():
        raise ConfigError("this is a run of this package's", where=str(source), fix=f"run `finetune export {source}`")
    for kind, find in (("DCP", _dcp), ("ZeRO", _zero), ("SAT", _sat)):
        if paths := find(source):
            return kind, paths
    for names in (_LORA_FILES, _MODEL_FILES):
        if path := _first(source, names):
            return "file", [path]
    if len(alone := sorted(source.glob("*.safetensors"))) == 1:  # an adapter that another program named
        return "file", alone
    raise ConfigError(
        "the folder holds no checkpoint that is known here",
        where=str(source),
        fix="give a folder of SAT, DeepSpeed, FSDP or torch.distributed.checkpoint, or the file of weights itself",
    )


def _first(folder: Path, names: tuple[str, ...]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _dcp(folder: Path) -> list[Path]:
    """A folder of torch.distributed.checkpoint: itself, or the one that accelerate's FSDP makes for the model."""
    candidates = [folder, *sorted(folder.glob("pytorch_model_fsdp_*"))]
    return [path for path in candidates if (path / ".metadata").is_file()][:1]


def _zero(folder: Path) -> list[Path]:
    """The folder with DeepSpeed's files: itself, that of the tag in ``latest``, or accelerate's ``pytorch_model``."""
    latest = folder / "latest"
    tag = latest.read_text(encoding="utf-8", errors="replace").strip()[:200] if latest.is_file() else ""
    candidates = [folder, *([folder / tag] if tag and Path(tag).name == tag else []), folder / "pytorch_model"]
    return [path for path in candidates if any(path.glob("*_optim_states.pt"))][:1]


def _sat(folder: Path) -> list[Path]:
    """The files of a SAT folder: the tag in ``latest``, and below ``transformer`` and ``vae`` of a published one."""
    files = []
    for part in (folder, folder / "transformer"):
        latest = part / "latest"
        tags = [latest.read_text(encoding="utf-8", errors="replace").strip()[:200]] if latest.is_file() else []
        folders = [part, *(part / tag for tag in tags if tag and Path(tag).name == tag)]
        shares = [path for each in folders for path in sorted(each.glob("mp_rank_*_model_states.pt"))]
        if len(shares) > 1:
            raise ModelError(
                f"the transformer is split over {len(shares)} files by model parallelism",
                where=str(part),
                fix="merge it where it was trained, with SAT's own script for model parallelism",
            )
        files += shares
    return files + sorted((folder / "vae").glob("*.pt"))


# ------------------------------------------------------------------------------------------------------- which tensors


def by_component(tensors: Tensors, path: Path) -> Checkpoint:
    """The components of a checkpoint whose tensors are SAT's, or a transformer's by diffusers' names.

    Raises:
        ModelError: if they are neither.
    """
    if is_sat(tensors):
        model = from_sat(tensors, str(path))
        return Checkpoint("SAT checkpoint", path, model.components, tuple(model.left_out))
    marks = [name for name in tensors if name == _MARK or name.endswith(f".{_MARK}")]
    if len(marks) != 1:
        raise ModelError(
            f"these are no tensors of a CogVideoX by SAT's or diffusers' names: {some(tensors) or 'there are none'}",
            where=str(path),
            fix="give a checkpoint of CogVideoX's transformer, or a LoRA for it",
        )
    prefix = marks[0].removesuffix(_MARK)
    inside = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    own = {_WRAPPERS.sub("", name): tensor for name, tensor in inside.items()}
    left_out = tuple(name for name in tensors if not name.startswith(prefix))
    return Checkpoint("checkpoint of diffusers' names", path, {"transformer": own}, left_out)


def merge_checkpoints(checkpoints: list[Checkpoint], path: Path) -> Checkpoint:
    """One checkpoint of several files, each of other components.

    Raises:
        ModelError: if two hold the same component.
    """
    components: dict[str, Tensors] = {}
    for checkpoint in checkpoints:
        if twice := components.keys() & checkpoint.components.keys():
            raise ModelError(f"two files hold a {min(twice)}, such as {checkpoint.path.name}", where=str(path))
        components |= checkpoint.components
    left_out = tuple(name for checkpoint in checkpoints for name in checkpoint.left_out)
    return Checkpoint(checkpoints[0].kind, path, components, left_out)


def dtype_of(tensors: Tensors) -> torch.dtype:
    """The dtype of most numbers of a component."""
    numbers: dict[torch.dtype, int] = {}
    for tensor in tensors.values():
        numbers[tensor.dtype] = numbers.get(tensor.dtype, 0) + tensor.numel()
    return max(numbers, key=lambda dtype: numbers[dtype])
