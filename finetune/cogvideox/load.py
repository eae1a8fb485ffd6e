"""A checkpoint's components, each loaded in the dtype it will run in; and the way back to a folder."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from finetune.cogvideox.fingerprint import note_base, require_as_published
from finetune.cogvideox.weights import (
    Placement,
    make_room,
    noting,
    on_meta,
    place,
    require_all_weights,
    require_exact,
    stored_tensors,
)
from finetune.errors import FinetuneError, ModelError, is_out_of_memory
from finetune.facts import (
    CONFIG_FILES,
    SchedulerClass,
    read_json,
    read_part,
    require_loadable,
    require_own_files,
    require_tokenizer,
    resolve_pretrained,
)
from finetune.files import atomic_write_text
from finetune.ranks import require_cudnn
from finetune.section import Strict

if TYPE_CHECKING:
    from diffusers import (
        AutoencoderKLCogVideoX,
        CogVideoXDDIMScheduler,
        CogVideoXDPMScheduler,
        CogVideoXTransformer3DModel,
    )
    from transformers import T5EncoderModel, T5Tokenizer

_TRANSFORMER_STEM, _TEXT_STEM = "diffusion_pytorch_model", "model"
"""How diffusers and transformers name their weight files."""
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class ModelConfig(Strict):
    """Which checkpoint is fine-tuned, and in which precision its frozen weights are held."""

    pretrained: str
    """A CogVideoX checkpoint in diffusers format: a folder, or an id on the Hugging Face hub such as
    ``zai-org/CogVideoX-5b``."""
    revision: str | None = None
    """Branch, tag or commit on the hub; left out, its main branch. A commit makes a run repeatable."""
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """What weights are held and computed in. ``auto`` is ``fp32`` where the stored transformer is, else ``bf16``.
    LoRA weights, the optimizer's master copies and the loss are float32 in any case."""

    def torch_dtype(self) -> torch.dtype:
        """The dtype that ``dtype`` stands for; ``auto`` looks at the transformer's files, and so needs them here.

        Raises:
            ModelError: if ``auto`` has to look and the transformer cannot be found.
        """
        if self.dtype != "auto":
            return _DTYPES[self.dtype]
        folder = resolve_pretrained(self.pretrained, self.revision, components=["transformer"])
        return torch.float32 if _stored_dtype(folder / "transformer") == "F32" else torch.bfloat16


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
    with _loading("transformer", folder):
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
        folder: of the checkpoint; ``facts.known_model`` has those of the published ones.
        dtype: of its weights.
        device: of its weights; ``meta`` takes no memory either.
        placement: as for ``load_transformer``.
        layers: number of its blocks; as the configuration says if None.

    Raises:
        ModelError: if the configuration cannot be read, or is none of a transformer.
    """
    read_part(folder, "transformer")
    with _loading("transformer", folder):
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
    with _loading("vae", folder):
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
    with _loading("tokenizer", folder):
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
    with _loading("text_encoder", folder):
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
    with _loading("scheduler", folder):
        name = read_json(folder / CONFIG_FILES["scheduler"]).get("_class_name")
        if not isinstance(name, str) or name not in get_args(SchedulerClass):
            raise ValueError(f"_class_name is {name!r}; expected {' or '.join(get_args(SchedulerClass))}")
        return getattr(diffusers, name).from_pretrained(folder / "scheduler")


@contextmanager
def _loading(component: str, folder: Path) -> Iterator[None]:
    """Turn what the libraries raise over a damaged or incomplete folder into one kind of error."""
    try:
        yield
    except FinetuneError:
        raise
    except Exception as error:  # tokenizers raises plain ones, safetensors its own
        if is_out_of_memory(error):  # says nothing of the folder
            raise
        raise ModelError(
            f"the {component} cannot be loaded: {error}",
            where=str(folder / component),
            fix="fetch the whole folder again: its weights have to be safetensors files, and its JSON theirs",
        ) from error


def _stored_dtype(folder: Path) -> str | None:
    """The dtype of most stored numbers, in safetensors' spelling (``BF16``); None where no weights are stored.

    The first file tells: a checkpoint is saved in one dtype, but for a few tables such as learned positions.
    """
    path = next(iter(sorted(folder.glob("*.safetensors"))), None)
    if path is None:
        return None
    require_own_files(folder)
    from safetensors import safe_open

    numbers: Counter[str] = Counter()
    with _loading(folder.name, folder.parent), safe_open(path, framework="pt", device="cpu") as source:
        for name in source.keys():  # noqa: SIM118 - not a mapping
            piece = source.get_slice(name)  # its entry in the table of contents; no tensor is read
            numbers[piece.get_dtype()] += math.prod(piece.get_shape())
    return numbers.most_common(1)[0][0] if numbers else None


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
