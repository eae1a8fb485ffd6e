"""A model's folder from named tensors: written tensor by tensor, loaded by the libraries' own code, and compared.

diffusers' layout and SAT's. Each component is written from tensors that are made one at a time, so what is in memory is
one tensor. Then, one component after the other, a module is filled with the source's tensors and another is loaded from
what was written: their tensors have to be equal bit for bit, and so does one forward pass, up to rounding.
"""

from __future__ import annotations

import gc
import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune.cogvideox.components import CONFIG_FILES, read_json
from finetune.cogvideox.load import Component, empty_component, misfits, place, sine_positions
from finetune.cogvideox.model_files import MODEL_INDEX, local_folder
from finetune.cogvideox.spec import ModelSpec
from finetune.conversion.checkpoint_files import dtype_of, named_tensors
from finetune.conversion.sat import POSITIONS, Tensors, from_sat, to_sat
from finetune.conversion.torch_files import write_torch_file
from finetune.conversion.verify import seeded_velocity, tolerance_of
from finetune.core.distributed import compute_device
from finetune.core.errors import ExportError, ModelError, is_out_of_memory
from finetune.core.files import atomic_write_text, require_space
from finetune.core.rng import generator
from finetune.core.tensor_files import Deferred, atomic_save_tensors, checksum_tensor, content_of, file_bytes

COMPONENTS: tuple[Component, ...] = ("transformer", "vae", "text_encoder")

_STEMS: Mapping[str, str] = {"transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
"""Of the weight files; T5's is transformers' ``model``."""

_SHARD_BYTES = 5 * 1000**3
"""As diffusers cuts its files."""

_SIDE_FILES = 1 << 20

SAT_TAG = "1"
"""The name of the only checkpoint in a SAT folder that is written here."""

_SAT_FILES: Mapping[str, tuple[str, str]] = {
    "transformer": (f"transformer/{SAT_TAG}/mp_rank_00_model_states.pt", "module"),
    "vae": ("vae/3d-vae.pt", "state_dict"),
}
"""Where CogVideo's ``sat/`` looks for a component, and the key that its tensors stand under."""

_SAT_T5 = "t5-v1_1-xxl"


@dataclass(frozen=True)
class Model:
    """Components to write, and the JSON that says what they are."""

    components: Mapping[Component, Tensors]
    """By diffusers' names, with nothing missing and nothing too much (``checked_components``)."""
    json: Path
    """A diffusers folder, perhaps without weights."""
    spec: ModelSpec
    """Of that folder."""
    where: str
    """The source, for messages."""


@dataclass(frozen=True)
class Comparison:
    """How closely a component that was loaded again computes what the source's tensors do."""

    component: Component
    tensors: int
    """Equal bit for bit, all of them."""
    max_abs_diff: float
    tolerance: float

    def __str__(self) -> str:
        return (
            f"{self.component}: {self.tensors} tensors equal, largest difference of a forward pass"
            f" {self.max_abs_diff:.2g} (allowed {self.tolerance:.2g})"
        )


# ------------------------------------------------------------------------------------------------------ before the work


def checked_components(components: Mapping[str, Tensors], json_folder: Path, where: str) -> dict[Component, Tensors]:
    """The components, each with the tensors that its JSON asks for.

    A table of positions that diffusers computes is compared with diffusers' own and left out.

    Raises:
        ModelError: if a tensor is missing, unknown or of another shape, or the positions are not those of the model.
    """
    checked: dict[Component, Tensors] = {}
    for component in COMPONENTS:
        tensors = components.get(component)
        if tensors is None:
            continue
        module: Any = empty_component(json_folder, component, torch.float32)
        if component == "transformer" and POSITIONS in tensors and POSITIONS not in module.state_dict():
            _require_sines(module, content_of(tensors[POSITIONS]), where)
            tensors = {name: tensor for name, tensor in tensors.items() if name != POSITIONS}
        if faults := misfits(module, {name: tuple(tensor.shape) for name, tensor in tensors.items()}):
            raise ModelError(
                f"the {component}'s tensors are not those of {json_folder.name}: " + "; ".join(faults),
                where=where,
                fix="give the checkpoint of a whole model, and name another model's JSON with --model if it is one",
            )
        checked[component] = tensors
    return checked


def _require_sines(module: Any, stored: Tensor, where: str) -> None:
    if not module.patch_embed.use_positional_embeddings:
        raise ModelError(
            "the transformer has a table of positions, and a model of these shapes has none",
            where=where,
            fix="name the model with --model",
        )
    sines = sine_positions(module)
    # Half precision moves a sine by up to 2^-8.
    if stored.shape != sines.shape or not torch.allclose(stored.float(), sines.float(), atol=2**-7, rtol=0):
        raise ModelError(
            "the transformer's positions are not the sines that diffusers computes for it",
            where=where,
            fix="name a model in diffusers' format with the size it was trained at: --model FOLDER",
        )


def cast(tensors: Tensors, dtype: torch.dtype | None) -> Tensors:
    """The same tensors in ``dtype``, each made when it is asked for; as they are if None."""

    def converted(tensor: Tensor | Deferred) -> Tensor | Deferred:
        if dtype is None or tensor.dtype == dtype or not tensor.dtype.is_floating_point:
            return tensor
        return Deferred(dtype, tuple(tensor.shape), lambda: content_of(tensor).to(dtype))

    return {name: converted(tensor) for name, tensor in tensors.items()}


def require_room(folder: Path, model: Model) -> None:
    """Refuse to begin what the disk has no room for. Raises ExportError."""
    require_space(
        folder,
        sum(file_bytes(tensors) for tensors in model.components.values()) + _SIDE_FILES,
        kind=ExportError,
        what="the conversion",
        fix="make room, or convert to another disk with --out",
    )


# ---------------------------------------------------------------------------------------------------- diffusers' layout


def write_diffusers(folder: Path, model: Model) -> None:
    """Write the components and the scheduler's JSON into ``folder`` as diffusers lays them out."""
    for component, tensors in model.components.items():
        target = folder / component
        target.mkdir()
        _write_shards(target, _STEMS.get(component, "model"), tensors)
        config = {k: v for k, v in read_json(model.json / CONFIG_FILES[component]).items() if k != "_name_or_path"}
        atomic_write_text(target / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    (folder / "scheduler").mkdir()
    shutil.copyfile(model.json / CONFIG_FILES["scheduler"], folder / CONFIG_FILES["scheduler"])


def complete_pipeline(folder: Path, model: Model, base: str | None) -> tuple[str, ...]:
    """Put what the source had not beside what ``write_diffusers`` wrote, from the files of a model on this machine.

    Args:
        folder: as ``write_diffusers`` left it.
        model: what was written.
        base: a diffusers folder or hub id; None for none.

    Returns:
        The components that are still missing; without any, the folder gets its ``model_index.json``.
    """
    lacking = []
    found = local_folder(base) if base is not None else None
    for name in ("text_encoder", "tokenizer", "vae", "transformer"):
        if (folder / name).is_dir():
            continue
        if found is not None and any((found / name).glob("*")):
            link_or_copy_tree(found / name, folder / name)
        else:
            lacking.append(name)
    if not lacking:
        shutil.copyfile(model.json / MODEL_INDEX, folder / MODEL_INDEX)
    return tuple(lacking)


def _write_shards(folder: Path, stem: str, tensors: Tensors) -> None:
    """Safetensors files of at most ``_SHARD_BYTES``, with an index where they are several."""
    shards: list[dict[str, Tensor | Deferred]] = [{}]
    room = _SHARD_BYTES
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if size > room and shards[-1]:
            shards.append({})
            room = _SHARD_BYTES
        shards[-1][name] = tensor
        room -= size
    names = [f"{stem}-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [f"{stem}.safetensors"]
    for file, shard in zip(names, shards, strict=True):
        atomic_save_tensors(folder / file, shard, {"format": "pt"})  # transformers refuses a file that does not say so
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(t.numel() * t.element_size() for t in tensors.values())},
            "weight_map": {name: file for file, shard in zip(names, shards, strict=True) for name in shard},
        }
        atomic_write_text(folder / f"{stem}.safetensors.index.json", json.dumps(index, indent=2, sort_keys=True))


def link_or_copy_tree(source: Path, target: Path) -> None:
    """The files of a folder in another: linked where the file system allows it, else copied."""

    def link_or_copy(file: str, copy: str) -> str:
        real = Path(file).resolve()  # the hub's cache keeps links
        try:
            os.link(real, copy)
        except OSError:
            shutil.copyfile(real, copy)
        return copy

    shutil.copytree(source, target, copy_function=link_or_copy, dirs_exist_ok=True)


# --------------------------------------------------------------------------------------------------------- SAT's layout


def write_sat(folder: Path, model: Model) -> None:
    """Write transformer and VAE into ``folder`` where CogVideo's ``sat/`` reads them."""
    for component, tensors in model.components.items():
        file, key = _SAT_FILES[component]
        (folder / file).parent.mkdir(parents=True)
        write_torch_file(folder / file, sat_tensors(component, tensors, model), key)
    if "transformer" in model.components:
        atomic_write_text(folder / "transformer" / "latest", SAT_TAG)


def add_sat_text(folder: Path, base: Path) -> None:
    """Put the text encoder and tokenizer of a diffusers folder, if it has them, where SAT's configurations name T5."""
    for name in ("text_encoder", "tokenizer"):
        if (base / name).is_dir():
            link_or_copy_tree(base / name, folder / _SAT_T5)


def sat_tensors(component: Component, tensors: Tensors, model: Model) -> Tensors:
    """A component's tensors by SAT's names, with the sines that SAT stores and diffusers computes."""
    if component == "transformer":
        module: Any = empty_component(model.json, component, dtype_of(tensors))
        if module.patch_embed.use_positional_embeddings and POSITIONS not in tensors:
            tensors = {**tensors, POSITIONS: sine_positions(module)}
        return {f"model.diffusion_model.{name}": tensor for name, tensor in to_sat(component, tensors).items()}
    return to_sat(component, tensors)


# ------------------------------------------------------------------------------------------------------- the comparison


def compare(folder: Path, model: Model, to: str) -> list[Comparison]:
    """Load what was written, and compare it with the source's tensors.

    Args:
        folder: as ``write_diffusers`` or ``write_sat`` left it.
        model: what was written.
        to: ``diffusers`` or ``sat``.

    Raises:
        ExportError: if anything differs.
    """
    return [
        _compared(folder, replace(model, components={component: tensors}), component, to)
        for component, tensors in model.components.items()
    ]


def _compared(folder: Path, model: Model, component: Component, to: str) -> Comparison:
    device = compute_device()
    expected = model.components[component]
    dtype = dtype_of(expected)

    def outcome(module: nn.Module) -> tuple[dict[str, str], Tensor]:
        checksums = {name: checksum_tensor(tensor) for name, tensor in module.state_dict().items()}
        return checksums, _probe(module.to(device), component, model.spec, device)

    ours, output = outcome(_from_tensors(folder, model, component, dtype))
    gc.collect()  # never two in memory
    try:
        theirs, reloaded = outcome((_from_sat if to == "sat" else _from_diffusers)(folder, model, component, dtype))
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise _not_the_same(component, f"it cannot be loaded: {error}", model.where) from error
    if unequal := sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)):
        what = f"{len(unequal)} of {len(ours)} tensors differ, such as {unequal[0]}"
        raise _not_the_same(component, what, model.where)
    difference = (output - reloaded).abs().max().item()
    tolerance = tolerance_of(output, dtype)
    if math.isnan(difference) or difference > tolerance:
        what = f"a forward pass differs by up to {difference:.3g}, allowed are {tolerance:.3g}"
        raise _not_the_same(component, what, model.where)
    return Comparison(component, len(expected), difference, tolerance)


def _not_the_same(component: str, what: str, where: str) -> ExportError:
    return ExportError(
        f"the {component} that was written is not the source's, and was deleted: {what}",
        where=where,
        fix="update diffusers and transformers; if it persists this is a bug, and the source is unharmed",
    )


def _from_tensors(_: Path, model: Model, component: Component, dtype: torch.dtype) -> nn.Module:
    module: Any = empty_component(model.json, component, dtype)
    tensors = model.components[component]
    place(module, ((name, content_of(tensor)) for name, tensor in tensors.items()), torch.device("cpu"))
    if component == "transformer" and module.patch_embed.use_positional_embeddings:
        module.patch_embed.pos_embedding = sine_positions(module)
    filled: nn.Module = module
    return filled


def _from_diffusers(folder: Path, _: Model, component: Component, dtype: torch.dtype) -> nn.Module:
    import diffusers
    import transformers

    kind: Any = {
        "transformer": diffusers.CogVideoXTransformer3DModel,
        "vae": diffusers.AutoencoderKLCogVideoX,
        "text_encoder": transformers.T5EncoderModel,
    }[component]
    module: nn.Module = kind.from_pretrained(
        str(folder / component), torch_dtype=dtype, use_safetensors=True, local_files_only=True
    )
    return module.eval()


def _from_sat(folder: Path, model: Model, component: Component, dtype: torch.dtype) -> nn.Module:
    file = folder / _SAT_FILES[component][0]
    read = from_sat(named_tensors(file), str(file)).components[component]
    checked = checked_components({component: read}, model.json, str(file))
    return _from_tensors(folder, replace(model, components=checked), component, dtype)


@torch.no_grad()
def _probe(module: Any, component: Component, spec: ModelSpec, device: torch.device) -> Tensor:
    """What a component makes of seeded inputs, float32 on the CPU."""
    if component == "transformer":
        return seeded_velocity(module, spec, device)
    if component == "text_encoder":
        words = torch.arange(1, 17, device=device)[None] % module.config.vocab_size
        output: Tensor = module(words)[0]
        return output.float().cpu()
    latents = torch.randn(1, spec.latent_channels, 2, 2, 2, generator=generator(0, "convert", "vae"))
    decoded: Tensor = module.decode(latents.to(device, next(module.parameters()).dtype)).sample
    return decoded.float().cpu()
