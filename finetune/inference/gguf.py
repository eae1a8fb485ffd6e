"""A transformer from a GGUF file, held in the file's bits; diffusers reads the format, but not for CogVideoX."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune.cogvideox.components import loading
from finetune.cogvideox.load import empty_transformer, misfits, place, sine_positions
from finetune.core.errors import ConfigError


def gguf_faults(file: Path) -> Iterator[ConfigError]:
    """Why a file cannot be read as GGUF, from its first bytes."""
    where = f"--transformer {file}"
    if importlib.util.find_spec("gguf") is None:
        yield ConfigError("gguf is not installed", where=where, fix="pip install 'cogvideox-finetune[gguf]'")
    try:
        with file.open("rb") as stream:
            genuine = stream.read(4) == b"GGUF"
    except OSError as error:
        yield ConfigError(f"the file cannot be read: {error.strerror}", where=where)
    else:
        if not genuine:
            yield ConfigError("this is no GGUF file", where=where, fix="fetch it again")


def load_gguf(file: Path, folder: Path, *, device: torch.device, dtype: torch.dtype) -> Any:
    """The denoiser in evaluation mode; each linear layer of the file's quantised weights is decoded as it computes.

    Args:
        file: with diffusers' names.
        folder: of the base's JSON.
        device: where weights go.
        dtype: of what computes, and of every other weight.

    Raises:
        ConfigError: if a tensor is missing, unknown or of another shape.
        ModelError: if the file is damaged.
    """
    from diffusers.models.model_loading_utils import load_gguf_checkpoint

    transformer = empty_transformer(folder, dtype=dtype, device="meta")
    with loading("transformer", file):
        tensors = load_gguf_checkpoint(str(file))
        layers = {f"{name}.weight" for name, layer in transformer.named_modules() if isinstance(layer, nn.Linear)}
        tensors = {name: tensor if name in layers else _decoded(tensor) for name, tensor in tensors.items()}
    shapes = {name: tuple(getattr(tensor, "quant_shape", tensor.shape)) for name, tensor in tensors.items()}
    if faults := misfits(transformer, shapes):
        raise ConfigError(
            "; ".join(faults),
            where=f"--transformer {file}",
            fix="give a file of this model with diffusers' names (transformer_blocks.0.attn1.to_q.weight)",
        )
    place(transformer, tensors.items(), device, _GgufLayers(tensors, dtype))
    if transformer.patch_embed.use_positional_embeddings:
        transformer.patch_embed.pos_embedding = sine_positions(transformer).to(device)
    return transformer.eval().requires_grad_(False)


class _GgufLayers:
    """Puts layers that decode their weights in the places of those that are quantised: a ``cogvideox.Placement``."""

    def __init__(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self._tensors, self._dtype = tensors, dtype

    def prepare(self, module: nn.Module) -> None:
        from diffusers.quantizers.gguf.utils import _replace_with_gguf_linear

        _replace_with_gguf_linear(module, self._dtype, self._tensors)

    def put(self, module: nn.Module, name: str, tensor: Tensor, device: torch.device) -> bool:
        from diffusers.quantizers.gguf.utils import GGUFParameter

        if not isinstance(tensor, GGUFParameter):
            return False
        owner, _, leaf = name.rpartition(".")
        module.get_submodule(owner)._parameters[leaf] = tensor.to(device)
        return True


def _decoded(tensor: Tensor) -> Tensor:
    from diffusers.quantizers.gguf.utils import GGUFParameter, dequantize_gguf_tensor

    whole: Tensor = dequantize_gguf_tensor(tensor) if isinstance(tensor, GGUFParameter) else tensor
    return whole
