"""A checkpoint's components in memory, each in the dtype it will run in; what identifies them; and the way back.

A module is built on the meta device, which costs nothing. Then every tensor is read, cast and put in its place, and
nowhere else: beside what is finished there is never more than the one tensor in hand.
"""

from __future__ import annotations

import inspect
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor, nn

from finetune.cogvideox.captions import load_tokenizer
from finetune.cogvideox.components import loading, read_part, require_loadable, require_plain_index
from finetune.cogvideox.config import ModelConfig
from finetune.cogvideox.control import widen
from finetune.cogvideox.model_files import hub_sha256, resolve_pretrained
from finetune.cogvideox.spec import ModelSpec
from finetune.core.checksums import ChecksummedFolder, DamageError, digest_of
from finetune.core.checksums import digest_file as digest_file_now
from finetune.core.collector import collector_paused
from finetune.core.distributed import require_cudnn
from finetune.core.errors import DataError, FinetuneError, ModelError
from finetune.core.files import COMPLETE, atomic_write_text
from finetune.core.tensor_files import checksum_tensor

if TYPE_CHECKING:
    from diffusers import (
        AutoencoderKLCogVideoX,
        CogVideoXDDIMScheduler,
        CogVideoXDPMScheduler,
        CogVideoXFunControlPipeline,
        CogVideoXImageToVideoPipeline,
        CogVideoXPipeline,
        CogVideoXTransformer3DModel,
    )
    from tokenizers import Tokenizer
    from transformers import T5EncoderModel

Component = Literal["transformer", "vae", "text_encoder"]

_DIFFUSERS_STEM, _T5_STEM = "diffusion_pytorch_model", "model"
"""How diffusers and transformers name their weight files."""


# --------------------------------------------------------------------------------------------------------- components


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


def load_transformer(
    model: ModelConfig,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    placement: Placement | None = None,
    quantization: Any = None,
) -> CogVideoXTransformer3DModel:
    """The denoiser in evaluation mode, its weights in ``dtype`` from the first moment on; widened for ``control``.

    Args:
        model: which checkpoint. Its ``adapters`` are left out; ``methods.merged_base.load_base`` merges them.
        device: where its weights go.
        dtype: None for ``model.torch_dtype()``.
        placement: who decides which weights are held in another form; None for as they are.
        quantization: a ``quantization_config`` of diffusers, which then does the loading, in place of ``placement``.

    Returns:
        The module; ``base_digest`` says which weights it was filled with.

    Raises:
        ModelError: if it cannot be found or loaded, a weight is missing, superfluous or of another shape, or the folder
            is an export and not as it was written.
    """
    folder = _folder_of(model, "transformer")
    _require_as_published(folder, "transformer")
    checksums: dict[str, str] = {}
    with loading("transformer", folder):
        module: Any = _on_meta_device(folder, "transformer", dtype or model.torch_dtype())
        _require_exact(module, folder / "transformer", _DIFFUSERS_STEM)
        tensors = _noting(stored_tensors(folder / "transformer", _DIFFUSERS_STEM), checksums)
        if quantization is None:
            place(module, tensors, torch.device(device), placement)
        else:
            deque(tensors, maxlen=0)  # for the checksums
            module = _quantised(type(module), folder / "transformer", quantization, module.dtype, torch.device(device))
        _note_base(module, checksums)
        if module.patch_embed.use_positional_embeddings:
            module.patch_embed.pos_embedding = sine_positions(module).to(device)
        if model.control:
            widen(module)
    transformer: CogVideoXTransformer3DModel = module.eval()
    return transformer


def empty_transformer(
    folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    placement: Placement | None = None,
    layers: int | None = None,
) -> CogVideoXTransformer3DModel:
    """The module that ``load_transformer`` gives, from its ``config.json`` alone: nothing stands in its tensors.

    Under ``FakeTensorMode`` it takes no memory, whatever its size.

    Args:
        folder: of the checkpoint; ``model_files.known_model`` has those of the published ones.
        dtype: of its weights.
        device: of its weights; ``meta`` takes no memory either.
        placement: as for ``load_transformer``.
        layers: number of its blocks; as the configuration says if None.

    Raises:
        ModelError: if the configuration cannot be read, or is none of a transformer.
    """
    read_part(folder, "transformer")
    with loading("transformer", folder):
        changes = {} if layers is None else {"num_layers": layers}
        module: CogVideoXTransformer3DModel = _on_meta_device(folder, "transformer", dtype, **changes)
        if placement is not None:
            placement.prepare(module)
        make_room(module, torch.device(device))
    return module.eval()


def sine_positions(transformer: Any) -> Tensor:
    """The positions of a model that computes them (2B), in the dtype of its table, [1, text and video tokens, width].

    No file holds them. diffusers computes them in float64; they are then cast.
    """
    embed = transformer.patch_embed
    table: Tensor = embed._get_positional_embeddings(embed.sample_height, embed.sample_width, embed.sample_frames)
    return table.to(embed.pos_embedding.dtype)


def empty_component(folder: Path, component: Component, dtype: torch.dtype) -> nn.Module:
    """A component as its ``config.json`` describes it, on the meta device; ``place`` fills it.

    Raises:
        ModelError: if the configuration cannot be read, or is none of the component.
    """
    with loading(component, folder):
        is_text = component == "text_encoder"
        module: nn.Module = _empty_text_encoder(folder, dtype) if is_text else _on_meta_device(folder, component, dtype)
        module.eval()
    return module


def load_vae(
    model: ModelConfig, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> AutoencoderKLCogVideoX:
    """The VAE, frozen and in evaluation mode. Arguments and errors as for ``load_transformer``.

    Raises:
        LaunchError: for a GPU on which the VAE would be wrong; see ``distributed.require_cudnn``.
    """
    require_cudnn(torch.device(device))
    folder = _folder_of(model, "vae")
    with loading("vae", folder):
        module: AutoencoderKLCogVideoX = _on_meta_device(folder, "vae", dtype or model.torch_dtype())
        _require_exact(module, folder / "vae", _DIFFUSERS_STEM)
        place(module, stored_tensors(folder / "vae", _DIFFUSERS_STEM), torch.device(device))
    return module.eval().requires_grad_(False)


def load_text(
    model: ModelConfig,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    placement: Placement | None = None,
    quantization: Any = None,
) -> tuple[Tokenizer, T5EncoderModel]:
    """The tokenizer and the T5 encoder, frozen and in evaluation mode. Otherwise as ``load_transformer``."""
    folder = resolve_pretrained(model.pretrained, model.revision, components=["tokenizer", "text_encoder"])
    require_loadable(folder, "text_encoder")
    tokenizer = load_tokenizer(model)
    dtype = dtype or model.torch_dtype()
    if placement is not None and dtype == torch.float16:
        raise ModelError(
            "T5 overflows in float16 where its layers are held in another form",
            where="memory.text_encoder, model.dtype",
            fix="set model.dtype: bf16, or memory.text_encoder: streamed",
        )
    with loading("text_encoder", folder):
        encoder = _empty_text_encoder(folder, dtype)
        # A whole T5 also holds a decoder, whose weights are left where they are.
        _require_exact(encoder, folder / "text_encoder", _T5_STEM, allow_unexpected=True)
        if quantization is None:
            place(encoder, stored_tensors(folder / "text_encoder", _T5_STEM), torch.device(device), placement)
        else:
            encoder = _quantised(type(encoder), folder / "text_encoder", quantization, dtype, torch.device(device))
        if (pieces := max(tokenizer.get_vocab().values()) + 1) > encoder.config.vocab_size:
            raise ValueError(f"it knows {encoder.config.vocab_size:,} pieces, and the tokenizer has {pieces:,}")
    return tokenizer, encoder.eval().requires_grad_(False)


def _quantised(kind: Any, folder: Path, quantization: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """A component as its library loads and quantises it, each weight on ``device`` if that is a GPU."""
    places = {"device_map": {"": device}} if device.type == "cuda" else {}
    return kind.from_pretrained(
        folder,
        torch_dtype=dtype,
        quantization_config=quantization,
        local_files_only=True,
        use_safetensors=True,
        **places,
    )


def _empty_text_encoder(folder: Path, dtype: torch.dtype) -> T5EncoderModel:
    from transformers import T5Config, T5EncoderModel

    with on_meta(dtype):
        encoder = T5EncoderModel(T5Config(**read_part(folder, "text_encoder").model_dump()))
    if dtype == torch.float16:  # its outputs overflow there, so that transformers keeps these in float32
        for name, layer in encoder.named_modules():
            if name.endswith(".wo"):
                layer.float()
    return encoder


def load_scheduler(model: ModelConfig) -> CogVideoXDDIMScheduler | CogVideoXDPMScheduler:
    """The checkpoint's own sampling scheduler.

    Raises:
        ModelError: if it cannot be found, or is not one of CogVideoX's.
    """
    folder = _folder_of(model, "scheduler")
    with loading("scheduler", folder):
        return _class_of(folder, "scheduler").from_pretrained(folder / "scheduler")


def _folder_of(model: ModelConfig, component: str) -> Path:
    """The folder of the checkpoint, after a look at one of its components."""
    folder = resolve_pretrained(model.pretrained, model.revision, components=[component])
    require_loadable(folder, component)
    return folder


def _on_meta_device(folder: Path, component: str, dtype: torch.dtype, **changes: Any) -> Any:
    """A component of diffusers as its ``config.json`` describes it, but for ``changes``."""
    kind = _class_of(folder, component)
    config = kind.load_config(folder / component, local_files_only=True)
    with on_meta(dtype):
        module = kind.from_config({**config, **changes})
    if component == "transformer":
        embed = module.patch_embed
        if embed.use_positional_embeddings or embed.use_learned_positional_embeddings:
            # A table in float64, 270 MB for the 2B model, that would be cast on every forward pass. One rounding
            # either way, so the values are the same.
            embed.pos_embedding = embed.pos_embedding.to(dtype)
    return module


@collector_paused()
def _class_of(folder: Path, component: str) -> Any:
    import diffusers  # of which this loads a good part

    return getattr(diffusers, read_part(folder, component).model_dump()["class_name"])


def save_transformer(
    transformer: CogVideoXTransformer3DModel, folder: Path, *, max_shard_size: int | str = "5GB"
) -> None:
    """Write a transformer as ``from_pretrained`` reads it: ``config.json``, ``diffusion_pytorch_model*.safetensors``.

    Args:
        transformer: without adapters, unwrapped.
        folder: inside a directory that the caller publishes whole (``files.publish_dir``).
        max_shard_size: of each file, as the library reads it.

    Raises:
        ValueError: if adapters are still in it; their weights would be saved under names that nothing loads.
    """
    if adapters := getattr(transformer, "peft_config", None):
        raise ValueError(f"the transformer still holds adapters ({', '.join(adapters)}); merge or remove them first")
    transformer.save_pretrained(folder, safe_serialization=True, max_shard_size=max_shard_size)
    # diffusers writes down where the model was loaded from: a path of this machine, which is nobody else's business.
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)
    atomic_write_text(folder / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")


def pipeline_class(
    spec: ModelSpec,
) -> type[CogVideoXPipeline] | type[CogVideoXImageToVideoPipeline] | type[CogVideoXFunControlPipeline]:
    """The class of diffusers that samples with such a model."""
    from diffusers import CogVideoXFunControlPipeline, CogVideoXImageToVideoPipeline, CogVideoXPipeline

    if spec.control:
        return CogVideoXFunControlPipeline  # type: ignore[no-any-return]
    return CogVideoXImageToVideoPipeline if spec.image_to_video else CogVideoXPipeline  # type: ignore[no-any-return]


def build_pipeline(
    spec: ModelSpec,
    *,
    transformer: Any,
    scheduler: Any,
    vae: Any = None,
    tokenizer: Any = None,
    text_encoder: Any = None,
) -> Any:
    """The stock pipeline around these modules, which stay where and as they are; building one costs nothing.

    Pass ``max_sequence_length=spec.max_text_seq_length`` when calling it with prompts: the pipeline's own default is
    the first generation's, whatever the model.

    Args:
        spec: of the model.
        transformer: a ``CogVideoXTransformer3DModel``, with or without adapters, unwrapped.
        scheduler: a CogVideoX scheduler.
        vae: may be absent where latents are sampled and not decoded; an image-to-video pipeline always calls it.
        tokenizer: may be absent where embeddings are given instead of prompts.
        text_encoder: as ``tokenizer``.
    """
    pipeline = pipeline_class(spec)(
        tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, transformer=transformer, scheduler=scheduler
    )
    if vae is None:
        # The pipeline derives these from the VAE, and without one assumes the published VAE's.
        pipeline.vae_scale_factor_spatial = spec.vae_spatial
        pipeline.vae_scale_factor_temporal = spec.vae_temporal
        pipeline.vae_scaling_factor_image = spec.scaling_factor
    return pipeline


# ----------------------------------------------------------------------------------------- tensors into an empty module


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

    for path in _weight_files(folder, stem):
        with safe_open(path, framework="pt", device="cpu") as source:
            for name in source.keys():  # noqa: SIM118 - not a mapping
                yield name, source.get_tensor(name)


def _noting(tensors: Iterable[tuple[str, Tensor]], checksums: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
    """The same tensors, each checksum put into ``checksums`` as it passes."""
    for name, tensor in tensors:
        checksums[name] = checksum_tensor(tensor)
        yield name, tensor


def _require_exact(module: nn.Module, folder: Path, stem: str, *, allow_unexpected: bool = False) -> None:
    """Compare the tables of contents of a component's files with what ``module`` holds; no tensor is read.

    Raises:
        ValueError: as ``misfits`` says.
        OSError, safetensors.SafetensorError: as ``stored_tensors``.
    """
    from safetensors import safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    for path in _weight_files(folder, stem):
        with safe_open(path, framework="pt", device="cpu") as source:
            shapes |= {name: tuple(source.get_slice(name).get_shape()) for name in source.keys()}  # noqa: SIM118
    if faults := misfits(module, shapes, allow_unexpected=allow_unexpected):
        raise ValueError("; ".join(faults))


def misfits(module: nn.Module, shapes: Mapping[str, tuple[int, ...]], *, allow_unexpected: bool = False) -> list[str]:
    """What stored tensors of these shapes are otherwise than ``module`` by its configuration, in words.

    Weights that are missing, unknown or of another shape are counted, and one of each is named. The libraries would
    only warn, and then train or sample with random numbers in a weight's place.
    """
    own = module.state_dict(keep_vars=True)
    problems = {
        "missing": [names[0] for names in _names_by_tensor(module) if not any(name in shapes for name in names)],
        "of another shape": [
            f"{name} (stored {list(shapes[name])}, by config.json {list(tensor.shape)})"
            for name, tensor in own.items()
            if name in shapes and shapes[name] != tuple(tensor.shape)
        ],
        "unknown": [] if allow_unexpected else [name for name in shapes if name not in own],
    }
    return [f"{len(names)} weights are {fault}, such as {min(names)}" for fault, names in problems.items() if names]


@torch.no_grad()
def place(
    module: nn.Module,
    tensors: Iterable[tuple[str, Tensor]],
    device: torch.device,
    placement: Placement | None = None,
) -> None:
    """Fill ``module``, which is on the meta device, with ``tensors``; names it does not have are left.

    Args:
        module: before ``placement.prepare``; each of its tensors keeps its dtype.
        tensors: name and content, as ``stored_tensors`` gives them. Each is copied, so files may change afterwards.
        device: of everything.
        placement: whom to ask first.
    """
    # Tied weights have one content and several names; each may be the one that was stored.
    aliases = {name: names for names in _names_by_tensor(module) for name in names}
    if placement is not None:
        placement.prepare(module)
    for name, tensor in tensors:
        if name in aliases and (placement is None or not placement.put(module, name, tensor, device)):
            own = attrgetter(name)(module)
            _set(module, aliases[name], torch.empty(tensor.shape, dtype=own.dtype, device=device).copy_(tensor))


@torch.no_grad()
def make_room(module: nn.Module, device: torch.device) -> None:
    """Give every tensor of a module on the meta device memory on ``device``; nothing is written there.

    ``nn.Module.to_empty`` does that too, but not under ``FakeTensorMode``.
    """
    names_by_tensor: dict[int, list[str]] = {}
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    for name, tensor in tensors:
        names_by_tensor.setdefault(id(tensor), []).append(name)
    for names in names_by_tensor.values():
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


def _weight_files(folder: Path, stem: str) -> list[Path]:
    index = folder / f"{stem}.safetensors.index.json"
    if index.is_file():
        return [folder / name for name in require_plain_index(index)]
    return [folder / f"{stem}.safetensors"]


def _names_by_tensor(module: nn.Module) -> Iterable[list[str]]:
    """The names of each tensor of the state dict: tied ones have several."""
    names: dict[int, list[str]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    return names.values()


def _set(module: nn.Module, names: list[str], tensor: Tensor) -> None:
    before = attrgetter(names[0])(module)
    value = nn.Parameter(tensor, before.requires_grad) if isinstance(before, nn.Parameter) else tensor
    for name in names:
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, value)


# ------------------------------------------------------------------------------------------ what identifies the weights

_DECIDING = (".json", ".safetensors", ".model", ".txt")
"""Suffixes of the files that loading reads: configuration, weights, sentencepiece models, vocabularies."""


def fingerprint(
    folder: Path, component: Component, *, digest_file: Callable[[Path], str] = digest_file_now, form: str = ""
) -> str:
    """A digest of everything that decides what an encoder computes: the bytes of its weights and of its configuration.

    Args:
        folder: the checkpoint's local folder (``resolve_pretrained``).
        component: ``vae``, or ``text_encoder``, which covers the tokenizer.
        digest_file: how a file is digested; a caller with a memo passes its own, since T5 is 10 GB.
        form: how its weights are held while it computes, such as ``int8``; empty for as they are stored.

    Raises:
        ModelError: if the component has no weights there, or ``digest_file`` finds a file damaged.
    """
    files = _deciding_files(folder, component)
    if not any(path.suffix == ".safetensors" for path in files):
        raise ModelError(
            f"the {component} has no weights",
            where=str(folder / component),
            fix="fetch the checkpoint again; its weights have to be safetensors files",
        )
    with _damage_of_a_model():
        stored = digest_of({path.relative_to(folder).as_posix(): digest_file(path) for path in files})
    return digest_of({"stored": stored, "form": form}) if form else stored


def require_as_sent(folder: Path, component: Component, digest_file: Callable[[Path], str]) -> None:
    """Have ``digest_file`` look at those files of a component that the hub gave a hash for; others are not read.

    Raises:
        ModelError: if it finds one damaged.
    """
    with _damage_of_a_model():
        for path in _deciding_files(folder, component):
            if hub_sha256(path) is not None:
                digest_file(path)


def _deciding_files(folder: Path, component: Component) -> list[Path]:
    folders = [component, "tokenizer"] if component == "text_encoder" else [component]
    return [path for name in folders for path in sorted((folder / name).glob("*")) if path.suffix in _DECIDING]


@contextmanager
def _damage_of_a_model() -> Iterator[None]:
    try:
        yield
    except DataError as error:
        raise ModelError(error.what, where=error.where, fix=error.fix) from None


def _require_as_published(folder: Path, component: Component) -> None:
    """Verify a component of an export against the export's marker; what no marker names is not read."""
    marker = folder / COMPLETE
    if not marker.is_file() or not marker.stat().st_size:  # a model that was built here has an empty one
        return
    try:
        export = ChecksummedFolder.open(folder)
        for name in export.checksums:
            if name.startswith(f"{component}/"):
                export.verify(name)
    except (DamageError, OSError) as damage:
        raise ModelError(
            f"the {component} is damaged: {damage}",
            where=str(folder),
            fix=f"export or copy it again; whoever changed the file on purpose removes {COMPLETE} beside it",
        ) from None


def _note_base(transformer: Any, checksums: Mapping[str, str]) -> None:
    """Let ``base_digest`` know what a transformer was filled with: the checksum of every stored tensor, by name."""
    arguments = inspect.signature(type(transformer).__init__).parameters
    # What equals a default is as good as not written down: which of them are, differs between versions of diffusers.
    settings = {
        name: value
        for name, value in transformer.config.items()
        if name in arguments and value != arguments[name].default
    }
    transformer.base_digest = digest_of({"tensors": dict(checksums), "settings": settings})


def base_digest(transformer: nn.Module) -> str:
    """The identity of the stored weights that ``load_transformer`` filled a transformer with.

    It covers name, dtype, shape and content of every tensor, as stored, and the settings in ``config.json`` that are
    not diffusers' defaults. How the tensors are shared out over files does not count, nor does the form they are held
    in, nor what is trained later.
    """
    digest: str = transformer.base_digest  # type: ignore[assignment]  # a module's attributes are modules to the checker
    return digest


def require_base(
    transformer: nn.Module, recorded: str, kind: type[FinetuneError], *, by: str, where: str, fix: str
) -> None:
    """Refuse another base transformer than the recorded one; none was recorded by earlier versions, and all are taken.

    Args:
        transformer: as loaded.
        recorded: its digest in a checkpoint or an adapter's record; empty if there is none.
        kind: of the error.
        by: what recorded it, such as ``the checkpoint``.
        where: the files of both.
        fix: what to do, besides bringing the old weights back.

    Raises:
        FinetuneError: of ``kind``.
    """
    digest = base_digest(transformer)
    if recorded and digest != recorded:
        raise kind(
            f"this is not the base transformer that {by} was trained on: its weights have the digest {digest},"
            f" recorded is {recorded}",
            where=where,
            fix=f"bring the old files back, or fetch them again if these are damaged; {fix}",
        )
