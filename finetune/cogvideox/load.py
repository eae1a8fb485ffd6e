"""What identifies a model's parts: an encoder by the bytes of its files, the transformer by its tensors."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from finetune.cogvideox.config import ModelConfig
from finetune.cogvideox.model_files import (
    CONFIG_FILES,
    SchedulerClass,
    hub_sha256,
    loading,
    read_json,
    read_part,
    require_loadable,
    require_plain_index,
    resolve_pretrained,
)
from finetune.cogvideox.spec import ModelSpec
from finetune.cogvideox.tokenizer import require_tokenizer
from finetune.core.checksums import ChecksummedFolder, DamageError, digest_of
from finetune.core.checksums import digest_file as digest_file_now
from finetune.core.distributed import require_cudnn
from finetune.core.errors import DataError, FinetuneError, ModelError
from finetune.core.files import COMPLETE, atomic_write_text
from finetune.core.tensor_files import checksum_tensor

if TYPE_CHECKING:
    from diffusers import (
        AutoencoderKLCogVideoX,
        CogVideoXDDIMScheduler,
        CogVideoXDPMScheduler,
        CogVideoXImageToVideoPipeline,
        CogVideoXPipeline,
        CogVideoXTransformer3DModel,
    )
    from transformers import T5EncoderModel, T5Tokenizer


Component = Literal["transformer", "vae", "text_encoder"]

_COVERED: Mapping[Component, tuple[str, ...]] = {
    "transformer": ("transformer",),
    "vae": ("vae",),
    "text_encoder": ("text_encoder", "tokenizer"),
}


def fingerprint(
    folder: Path,
    component: Component,
    *,
    digest_file: Callable[[Path], str] = digest_file_now,
    form: str = "",
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
    files = _files(folder, component)
    if not any(path.suffix == ".safetensors" for path in files):
        raise ModelError(
            f"the {component} has no weights",
            where=str(folder / component),
            fix="fetch the checkpoint again; its weights have to be safetensors files",
        )
    stored = digest_of({path.relative_to(folder).as_posix(): _of_model(digest_file, path) for path in files})
    return digest_of({"stored": stored, "form": form}) if form else stored


def require_as_sent(folder: Path, component: Component, digest_file: Callable[[Path], str]) -> None:
    """Have ``digest_file`` look at those files of a component that the hub gave a hash for; others are not read.

    Raises:
        ModelError: if it finds one damaged.
    """
    for path in _files(folder, component):
        if hub_sha256(path) is not None:
            _of_model(digest_file, path)


def require_as_published(folder: Path, component: Component) -> None:
    """Verify a component of an export against the export's marker; what no marker names is not read.

    Raises:
        ModelError: if a file is not as it was written.
    """
    marker = folder / COMPLETE
    if not marker.is_file() or not marker.stat().st_size:  # a model that was built here has an empty one
        return
    try:
        sealed = ChecksummedFolder.open(folder)
        for name in sealed.checksums:
            if name.startswith(f"{component}/"):
                sealed.verify(name)
    except (DamageError, OSError) as damage:
        raise ModelError(
            f"the {component} is damaged: {damage}",
            where=str(folder),
            fix=f"export or copy it again; whoever changed the file on purpose removes {COMPLETE} beside it",
        ) from None


def _files(folder: Path, component: Component) -> list[Path]:
    parts = _COVERED[component]
    return [path for part in parts for path in sorted((folder / part).glob("*")) if path.suffix in _DECIDING]


def _of_model(digest_file: Callable[[Path], str], path: Path) -> str:
    try:
        return digest_file(path)
    except DataError as error:
        raise ModelError(error.what, where=error.where, fix=error.fix) from None


_DECIDING = (".json", ".safetensors", ".model", ".txt")
"""Suffixes of the files that loading reads: configuration, weights, sentencepiece models, vocabularies."""


# ----------------------------------------------------------------------------------------------------- the transformer


def note_base(transformer: nn.Module, checksums: Mapping[str, str]) -> None:
    """Let ``base_digest`` know what a transformer was filled with.

    Args:
        transformer: as diffusers built it.
        checksums: of every stored tensor, by name.
    """
    noted: Any = transformer
    arguments = inspect.signature(type(transformer).__init__).parameters
    # What equals a default is as good as not written down: which of them are, differs between versions of diffusers.
    settings = {
        name: value for name, value in noted.config.items() if name in arguments and value != arguments[name].default
    }
    noted.base_digest = digest_of({"tensors": dict(checksums), "settings": settings})


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
    if recorded and (found := base_digest(transformer)) != recorded:
        raise kind(
            f"this is not the base transformer that {by} was trained on: its weights have the digest {found},"
            f" recorded is {recorded}",
            where=where,
            fix=f"bring the old files back, or fetch them again if these are damaged; {fix}",
        )


# -------- Putting a checkpoint's tensors into a module that has none, one at a time: each where it belongs, and
# nowhere else.
#
# A module is built on the meta device, which costs nothing. Then every tensor is read, cast and placed, so that beside
# what is finished there is never more than the one tensor in hand.


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

    for path in _weights_files(folder, stem):
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
    for path in _weights_files(folder, stem):
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


def _weights_files(folder: Path, stem: str) -> list[Path]:
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


# -------- A checkpoint's components, each loaded in the dtype it will run in; and the way back to a folder.

_TRANSFORMER_STEM, _TEXT_STEM = "diffusion_pytorch_model", "model"
"""How diffusers and transformers name their weight files."""


def load_transformer(
    model: ModelConfig,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    placement: Placement | None = None,
) -> CogVideoXTransformer3DModel:
    """The denoiser in evaluation mode, its weights in ``dtype`` from the first moment on.

    Each weight is read, cast and put in its place by itself: beside what is finished, memory holds the one in hand. The
    first generation's table of positions is computed in float64 and then cast.

    Args:
        model: which checkpoint.
        device: where its weights go.
        dtype: None for ``model.torch_dtype()``.
        placement: who decides which weights are held in another form; None for as they are.

    Returns:
        The module; ``fingerprint.base_digest`` says which weights it was filled with.

    Raises:
        ModelError: if it cannot be found or loaded, a weight is missing, superfluous or of another shape, or the folder
            is an export and not as it was written.
    """
    folder = resolve_pretrained(model.pretrained, model.revision, components=["transformer"])
    require_loadable(folder, "transformer")
    require_as_published(folder, "transformer")
    dtype, device, own = dtype or model.torch_dtype(), torch.device(device), folder / "transformer"
    with loading("transformer", folder):
        module = _meta_transformer(folder, dtype)
        require_exact(module, own, _TRANSFORMER_STEM, allow_unexpected=False)
        checksums: dict[str, str] = {}
        tensors = noting(stored_tensors(own, _TRANSFORMER_STEM), checksums)
        place(module, tensors, dtype=dtype, device=device, placement=placement)
        note_base(module, checksums)
        embed: Any = module.patch_embed
        if embed.use_positional_embeddings:
            # No file holds it.
            table = embed._get_positional_embeddings(embed.sample_height, embed.sample_width, embed.sample_frames)
            embed.pos_embedding = table.to(device=device, dtype=dtype)
    return module.eval()


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
        module = _meta_transformer(folder, dtype, layers)
        if placement is not None:
            placement.prepare(module)
        make_room(module, torch.device(device))
    return module.eval()


def _meta_transformer(folder: Path, dtype: torch.dtype, layers: int | None = None) -> CogVideoXTransformer3DModel:
    from diffusers import CogVideoXTransformer3DModel

    config = CogVideoXTransformer3DModel.load_config(folder / "transformer", local_files_only=True)
    with on_meta(dtype):
        module = CogVideoXTransformer3DModel.from_config(config if layers is None else {**config, "num_layers": layers})
    embed: Any = module.patch_embed
    if embed.use_positional_embeddings or embed.use_learned_positional_embeddings:
        # A table in float64, 270 MB for the 2B model, that would be cast on every forward pass. One rounding either
        # way, so the values are the same.
        embed.pos_embedding = embed.pos_embedding.to(dtype)
    return module


def load_vae(
    model: ModelConfig, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> AutoencoderKLCogVideoX:
    """The VAE, frozen and in evaluation mode. Arguments and errors as for ``load_transformer``.

    Raises:
        LaunchError: for a GPU on which the VAE would be wrong; see ``ranks.require_cudnn``.
    """
    from diffusers import AutoencoderKLCogVideoX

    require_cudnn(torch.device(device))
    folder = resolve_pretrained(model.pretrained, model.revision, components=["vae"])
    require_loadable(folder, "vae")
    dtype = dtype or model.torch_dtype()
    with loading("vae", folder):
        # safetensors only: the other format is pickle, which runs code. local_files_only: what is missing here is
        # an error, not a reason to ask the hub for a model of the folder's name.
        module, report = AutoencoderKLCogVideoX.from_pretrained(
            folder / "vae",
            torch_dtype=dtype,
            low_cpu_mem_usage=True,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
        found = {fault: report[f"{fault}_keys"] for fault in ("missing", "mismatched", "unexpected")}
        require_all_weights(**found)
    return module.to(device=device, dtype=dtype).eval().requires_grad_(False)


def load_tokenizer(model: ModelConfig) -> T5Tokenizer:
    """The tokenizer alone. Raises ModelError as ``load_transformer`` does."""
    from transformers import T5Tokenizer

    folder = resolve_pretrained(model.pretrained, model.revision, components=["tokenizer"])
    require_tokenizer(folder)
    with loading("tokenizer", folder):
        tokenizer = T5Tokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        tokenizer("a caption", padding="max_length", max_length=8, truncation=True)  # as every caption will be
    return tokenizer


def load_text(
    model: ModelConfig,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    placement: Placement | None = None,
) -> tuple[T5Tokenizer, T5EncoderModel]:
    """The tokenizer and the T5 encoder, frozen and in evaluation mode. Otherwise as ``load_transformer``."""
    folder = resolve_pretrained(model.pretrained, model.revision, components=["tokenizer", "text_encoder"])
    require_loadable(folder, "text_encoder")
    tokenizer = load_tokenizer(model)
    dtype = dtype or model.torch_dtype()
    with loading("text_encoder", folder):
        encoder = _encoder(folder, dtype, torch.device(device), placement)
        if (pieces := require_tokenizer(folder) + 1) > encoder.config.vocab_size:
            raise ValueError(f"it knows {encoder.config.vocab_size:,} pieces, and the tokenizer has {pieces:,}")
    return tokenizer, encoder.eval().requires_grad_(False)


def _encoder(folder: Path, dtype: torch.dtype, device: torch.device, placement: Placement | None) -> T5EncoderModel:
    from transformers import T5Config, T5EncoderModel

    # Of these fields alone: others would change what the library does.
    config = T5Config(**read_part(folder, "text_encoder").model_dump())
    folder = folder / "text_encoder"
    with on_meta(dtype):
        encoder = T5EncoderModel(config)
    # A whole T5 also holds a decoder, whose weights are left where they are.
    require_exact(encoder, folder, _TEXT_STEM, allow_unexpected=True)
    if placement is None:
        encoder, report = T5EncoderModel.from_pretrained(
            folder, config=config, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
        require_all_weights(missing=report["missing_keys"], mismatched=report["mismatched_keys"], unexpected=())
        return encoder.to(device)
    if dtype == torch.float16:
        raise ModelError(
            "T5 overflows in float16 where its layers are held in another form",
            where="memory.text_encoder, model.dtype",
            fix="set model.dtype: bf16, or memory.text_encoder: streamed",
        )
    place(encoder, stored_tensors(folder, _TEXT_STEM), dtype=dtype, device=device, placement=placement)
    return encoder


def load_scheduler(model: ModelConfig) -> CogVideoXDDIMScheduler | CogVideoXDPMScheduler:
    """The checkpoint's own sampling scheduler.

    Raises:
        ModelError: if it cannot be found, or is not one of CogVideoX's.
    """
    import diffusers

    folder = resolve_pretrained(model.pretrained, model.revision, components=["scheduler"])
    require_loadable(folder, "scheduler")
    with loading("scheduler", folder):
        name = read_json(folder / CONFIG_FILES["scheduler"]).get("_class_name")
        if not isinstance(name, str) or name not in get_args(SchedulerClass):
            raise ValueError(f"_class_name is {name!r}; expected {' or '.join(get_args(SchedulerClass))}")
        return getattr(diffusers, name).from_pretrained(folder / "scheduler")


def save_transformer(transformer: CogVideoXTransformer3DModel, folder: Path, *, max_shard_size: str = "5GB") -> None:
    """Write a transformer as ``from_pretrained`` reads it: ``config.json``, ``diffusion_pytorch_model*.safetensors``.

    Args:
        transformer: without adapters, unwrapped.
        folder: inside a directory that the caller publishes whole (``files.publish_dir``).
        max_shard_size: of one file.

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


# -------- The stock diffusers pipeline around modules that are already loaded: for sampling, and to verify exports
# against.


def pipeline_class(spec: ModelSpec) -> type[CogVideoXPipeline] | type[CogVideoXImageToVideoPipeline]:
    """``CogVideoXImageToVideoPipeline`` or ``CogVideoXPipeline``, by the spec."""
    from diffusers import CogVideoXImageToVideoPipeline, CogVideoXPipeline

    kind: type[CogVideoXPipeline] | type[CogVideoXImageToVideoPipeline]
    kind = CogVideoXImageToVideoPipeline if spec.image_to_video else CogVideoXPipeline
    return kind


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
