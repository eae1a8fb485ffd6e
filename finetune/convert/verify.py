"""Whether an export, loaded by diffusers' own code, is the model that was trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.cogvideox.config import ModelConfig
from finetune.cogvideox.denoise import denoise
from finetune.cogvideox.load import build_pipeline, load_scheduler, load_transformer
from finetune.cogvideox.spec import ModelSpec
from finetune.convert.merge import ADAPTER, Merged, adapter_scaling, tensor_checksums
from finetune.convert.source import Source
from finetune.core.errors import ExportError, ModelError, is_out_of_memory
from finetune.core.files import LORA_FILE
from finetune.core.rng import generator


@dataclass(frozen=True)
class TrainedWeights:
    """What the reloaded export has to reproduce; all tensors on the CPU."""

    velocity: Tensor
    """``forward``, float32."""
    tensors: Mapping[str, Tensor]
    """An adapter's, by peft's names; a full fine-tuning's, every parameter. Empty where an adapter was merged."""
    scaling: Mapping[str, float]
    """The factor of every layer with an adapter; empty without one."""
    checksums: Mapping[str, str] = field(default_factory=dict)
    """Of every tensor, where an adapter was merged: the sum is in no file but the export's own."""
    merged: Merged | None = None


def verify(
    folder: Path, found: Source, spec: ModelSpec, trained: TrainedWeights, device: torch.device
) -> tuple[float, float]:
    """Load the export with diffusers' own code and compare; returns the largest difference and what is allowed.

    Raises:
        ExportError: if a tensor or a scale is not what was trained, or the forward pass differs.
    """
    dtype = found.config.model.torch_dtype()
    adapter = found.lora and trained.merged is None
    try:
        transformer = _reload(folder, found, spec, device, adapter=adapter)
        if trained.merged is not None:
            problems = _unequal_checksums(trained.checksums, tensor_checksums(transformer.state_dict()))
        else:
            tensors = adapter_tensors(transformer) if adapter else dict(transformer.named_parameters())
            problems = _unequal_tensors(trained.tensors, tensors)
    # A tensor that the file lacks stays without content, which shows only when it is read.
    except (ModelError, ValueError, RuntimeError, KeyError, TypeError) as error:
        if is_out_of_memory(error):  # says nothing of the export
            raise
        raise _not_the_same(found, [f"it cannot be loaded: {error}"]) from error
    problems += _unequal_scales(trained.scaling, adapter_scaling(transformer))
    velocity = forward(transformer, spec, device)
    difference = (velocity - trained.velocity).abs().max().item()
    tolerance = tolerance_of(trained.velocity, dtype)
    # `not <=`, so that a NaN fails too.
    if not difference <= tolerance:
        problems.append(f"predicted velocities differ by up to {difference:.3g}, allowed are {tolerance:.3g}")
    if problems:
        raise _not_the_same(found, problems)
    return difference, tolerance


def _reload(folder: Path, found: Source, spec: ModelSpec, device: torch.device, *, adapter: bool) -> Any:
    """The exported transformer, or the base with the exported adapter, as anybody with diffusers would load it."""
    model = found.config.model
    if not adapter:
        return load_transformer(ModelConfig(pretrained=str(folder)), device=device, dtype=model.torch_dtype())
    transformer = load_transformer(model, device=device)
    pipeline = build_pipeline(spec, transformer=transformer, scheduler=load_scheduler(model))
    pipeline.load_lora_weights(str(folder), weight_name=LORA_FILE, adapter_name=ADAPTER, use_safetensors=True)
    return transformer


def _not_the_same(found: Source, problems: list[str]) -> ExportError:
    return ExportError(
        "the export, loaded by diffusers, is not the model that was trained, and was deleted: " + "; ".join(problems),
        where=str(found.checkpoint),
        fix="update diffusers and peft; if it persists this is a bug, and the checkpoint itself is unharmed",
    )


def tolerance_of(velocity: Tensor, dtype: torch.dtype) -> float:
    """The largest difference of one forward pass that is rounding.

    In float32 both sides run the same operations on the same numbers; 1e-5 of the largest output leaves room for
    kernels that are chosen by memory alignment, and for what a merged adapter adds up in another order (4e-7 through 42
    layers). In half precision diffusers also rounds the float32 adapter to the
    model's dtype, and a rounding that falls the other way somewhere travels through every later layer: 8 units in the
    last place of the largest output. What hides below that (the wrong scale of a weak adapter) is found by comparing
    tensors and scales, which allows no difference at all.
    """
    relative = 1e-5 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
    return relative * velocity.abs().max().item()


@torch.no_grad()
def forward(transformer: Any, spec: ModelSpec, device: torch.device) -> Tensor:
    """The velocity predicted for seeded inputs, float32 on the CPU: a few tokens, two deep in time."""
    frames = 2 * (spec.patch_size_t or 1)
    height, width = spec.sample_height, spec.sample_width
    if not spec.use_learned_positions:  # those are refused at another height or width, though not at another length
        height, width = min(height, 4 * spec.patch_size), min(width, 6 * spec.patch_size)

    def draw(name: str, *shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=generator(0, "export", name)).to(device)

    channels = spec.latent_channels
    return denoise(
        transformer,
        spec,
        draw("latents", channels, frames, height, width),
        draw("prompt", spec.max_text_seq_length, spec.text_embed_dim),
        torch.tensor([spec.num_train_timesteps // 2], device=device),
        draw("image", channels, 1, height, width) if spec.image_to_video else None,
    ).cpu()


def adapter_tensors(transformer: Any) -> dict[str, Tensor]:
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(transformer, adapter_name=ADAPTER)
    return {name: tensor.detach().cpu() for name, tensor in state.items()}


def _unequal_tensors(trained: Mapping[str, Tensor], reloaded: Mapping[str, Tensor]) -> list[str]:
    """Tensors that differ by a bit, after the rounding to the dtype they are reloaded in."""
    if trained.keys() != reloaded.keys():
        odd = sorted(trained.keys() ^ reloaded.keys())
        return [f"{len(odd)} tensors are on one side only, such as {odd[0]}"]
    unequal = [
        name
        for name, tensor in trained.items()
        if not torch.equal(tensor.to(reloaded[name].dtype), reloaded[name].cpu())
    ]
    return [f"{len(unequal)} of {len(trained)} tensors differ, such as {unequal[0]}"] if unequal else []


def _unequal_checksums(merged: Mapping[str, str], reloaded: Mapping[str, str]) -> list[str]:
    unequal = sorted(name for name in merged.keys() | reloaded.keys() if merged.get(name) != reloaded.get(name))
    return [f"{len(unequal)} of {len(merged)} merged tensors differ, such as {unequal[0]}"] if unequal else []


def _unequal_scales(trained: Mapping[str, float], reloaded: Mapping[str, float]) -> list[str]:
    unequal = sorted(name for name in trained.keys() | reloaded.keys() if trained.get(name) != reloaded.get(name))
    if not unequal:
        return []
    name = unequal[0]
    return [f"the update of {name} counts {reloaded.get(name)} instead of {trained.get(name)} (alpha / rank)"]
