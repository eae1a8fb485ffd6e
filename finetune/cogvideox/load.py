"""A checkpoint's components, each loaded in the dtype it will run in; and the way back to a folder."""

from __future__ import annotations

import json
import math
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from finetune.errors import ModelError
from finetune.facts import CONFIG_FILES, SchedulerClass, read_json, require_loadable, resolve_pretrained
from finetune.files import atomic_write_text, digest_of
from finetune.files import digest_file as digest_file_now
from finetune.section import Strict

if TYPE_CHECKING:
    from diffusers import (
        AutoencoderKLCogVideoX,
        CogVideoXDDIMScheduler,
        CogVideoXDPMScheduler,
        CogVideoXTransformer3DModel,
    )
    from transformers import T5EncoderModel, T5Tokenizer

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class ModelConfig(Strict):
    """Which checkpoint is fine-tuned, and in which precision its frozen weights are held."""

    pretrained: str
    """A CogVideoX checkpoint in diffusers format: a folder, or an id on the Hugging Face hub such as
    ``THUDM/CogVideoX-5b``."""
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
    model: ModelConfig, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> CogVideoXTransformer3DModel:
    """The denoiser in evaluation mode, its weights in ``dtype`` from the first moment on.

    Args:
        model: which checkpoint.
        device: where its weights go.
        dtype: None for ``model.torch_dtype()``.

    Raises:
        ModelError: if it cannot be found or loaded, or a weight is missing, superfluous or of another shape.
    """
    from diffusers import CogVideoXTransformer3DModel

    return _load_diffusers(CogVideoXTransformer3DModel, model, "transformer", device, dtype)


def load_vae(
    model: ModelConfig, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> AutoencoderKLCogVideoX:
    """The VAE, frozen and in evaluation mode. Arguments and errors as for ``load_transformer``."""
    from diffusers import AutoencoderKLCogVideoX

    return _load_diffusers(AutoencoderKLCogVideoX, model, "vae", device, dtype).requires_grad_(False)


def load_text(
    model: ModelConfig, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> tuple[T5Tokenizer, T5EncoderModel]:
    """The tokenizer and the T5 encoder, frozen and in evaluation mode. Otherwise as ``load_transformer``."""
    from transformers import T5EncoderModel, T5Tokenizer

    folder = resolve_pretrained(model.pretrained, model.revision, components=["tokenizer", "text_encoder"])
    for component in ("tokenizer", "text_encoder"):
        require_loadable(folder, component)
    with _loading("tokenizer", folder):
        tokenizer = T5Tokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    with _loading("text_encoder", folder):
        encoder, report = T5EncoderModel.from_pretrained(
            folder / "text_encoder",
            dtype=dtype or model.torch_dtype(),
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
        _require_all_weights(report, allow_unexpected=True)  # a whole T5 also holds a decoder
    return tokenizer, encoder.to(device).eval().requires_grad_(False)


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


def _load_diffusers(
    kind: Any, model: ModelConfig, component: str, device: torch.device | str, dtype: torch.dtype | None
) -> Any:
    folder = resolve_pretrained(model.pretrained, model.revision, components=[component])
    require_loadable(folder, component)
    dtype = dtype or model.torch_dtype()
    with _loading(component, folder):
        # safetensors only: the other format is pickle, which runs code. local_files_only: what is missing here is
        # an error, not a reason to ask the hub for a model of the folder's name.
        module, report = kind.from_pretrained(
            folder / component,
            torch_dtype=dtype,
            low_cpu_mem_usage=True,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
        _require_all_weights(report, allow_unexpected=False)
    # The dtype again, for buffers: the sine table of the first generation is built in float64, 270 MB for the 2B
    # model, and cast on every forward pass. One rounding either way, so the values are the same.
    return module.to(device=device, dtype=dtype).eval()


@contextmanager
def _loading(component: str, folder: Path) -> Iterator[None]:
    """Turn what the libraries raise over a damaged or incomplete folder into one kind of error."""
    from safetensors import SafetensorError

    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"the {component} cannot be loaded: {error}",
            where=str(folder / component),
            fix="fetch the checkpoint again; its weights have to be safetensors files",
        ) from error


def _require_all_weights(report: dict[str, Any], *, allow_unexpected: bool) -> None:
    # Both libraries would only warn, and train or sample with random numbers in the place of a missing weight.
    problems = {"missing": report["missing_keys"], "of another shape": report["mismatched_keys"]}
    if not allow_unexpected:
        problems["unknown"] = report["unexpected_keys"]
    said = [
        f"{len(names)} weights are {fault}, such as {sorted(names)[0]}" for fault, names in problems.items() if names
    ]
    if said:
        raise ValueError("; ".join(said))


def _stored_dtype(folder: Path) -> str | None:
    """The dtype of most stored numbers, in safetensors' spelling (``BF16``); None where no weights are stored.

    The first file tells: a checkpoint is saved in one dtype, but for a few tables such as learned positions.
    """
    path = next(iter(sorted(folder.glob("*.safetensors"))), None)
    if path is None:
        return None
    with _loading(folder.name, folder.parent), path.open("rb") as source:
        # Eight bytes of length, then a JSON table of contents; no tensor is read.
        (length,) = struct.unpack("<Q", source.read(8).ljust(8, b"\0"))
        if length > _MOST_HEADER_BYTES:
            raise ValueError(f"{path.name} claims a table of contents of {length:,} bytes")
        numbers: Counter[str] = Counter()
        for name, entry in json.loads(source.read(length)).items():
            if name != "__metadata__":
                numbers[entry["dtype"]] += math.prod(entry["shape"])
        return numbers.most_common(1)[0][0] if numbers else None


_MOST_HEADER_BYTES = 100_000_000
"""What safetensors itself allows."""
_COVERED = {"vae": ("vae",), "text_encoder": ("text_encoder", "tokenizer")}


def fingerprint(
    folder: Path,
    component: Literal["vae", "text_encoder"],
    *,
    digest_file: Callable[[Path], str] = digest_file_now,
) -> str:
    """A digest of everything that decides what an encoder computes: the bytes of its weights and of its configuration.

    Args:
        folder: the checkpoint's local folder (``resolve_pretrained``).
        component: ``vae``, or ``text_encoder``, which covers the tokenizer.
        digest_file: how a file is digested; a caller with a memo passes its own, since T5 is 10 GB.

    Raises:
        ModelError: if the component has no weights there.
    """
    parts = _COVERED[component]
    files = [path for part in parts for path in sorted((folder / part).glob("*")) if path.suffix in _DECIDING]
    if not any(path.suffix == ".safetensors" for path in files):
        raise ModelError(
            f"the {component} has no weights",
            where=str(folder / component),
            fix="fetch the checkpoint again; its weights have to be safetensors files",
        )
    return digest_of({path.relative_to(folder).as_posix(): digest_file(path) for path in files})


_DECIDING = (".json", ".safetensors", ".model", ".txt")
"""Suffixes of the files that loading reads: configuration, weights, sentencepiece models, vocabularies."""


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
