"""Whether an export, loaded by diffusers' own code, is the model that was trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from finetune.cogvideox.config import ModelConfig
from finetune.cogvideox.denoise import denoise
from finetune.cogvideox.load import build_pipeline, load_scheduler, load_transformer
from finetune.cogvideox.spec import ModelSpec
from finetune.core.errors import ExportError, ModelError, is_out_of_memory
from finetune.core.files import CONTROL_FILE, LORA_FILE
from finetune.core.rng import generator
from finetune.core.tensor_files import checksum_tensor
from finetune.methods.adapter import COMPONENT, is_lokr
from finetune.methods.lora import ADAPTER, adapted_layers
from finetune.methods.merged_base import load_base


@dataclass(frozen=True)
class TrainedModel:
    """What the reloaded export has to reproduce, noted of the model as it was trained."""

    velocity: Tensor
    """``seeded_velocity``."""
    checksums: Mapping[str, str]
    """``tensor_checksums``."""
    scaling: Mapping[str, float]
    """``adapter_scaling``."""


@dataclass(frozen=True)
class Verification:
    """How closely the reloaded export reproduces the trained model."""

    max_abs_diff: float
    """Largest difference of predicted velocity."""
    tolerance: float
    """What the difference may be; see ``tolerance_of``."""


def verify(
    folder: Path, trained: TrainedModel, model: ModelConfig, spec: ModelSpec, device: torch.device, *, where: str
) -> Verification:
    """Load the export in ``folder`` with diffusers' own code, onto ``model`` where it is an adapter, and compare.

    ``where`` is what was exported, for messages.

    Raises:
        ExportError: if a tensor or a scale is not what was trained, or the forward pass differs.
    """
    dtype = model.torch_dtype()
    try:
        transformer = _reload(
            folder, model, spec, device, is_adapter=bool(trained.scaling), with_lokr=is_lokr(trained.checksums)
        )
        checksums = tensor_checksums(transformer, dtype)
    # A tensor that the file lacks stays without content, which shows only when it is read.
    except (ModelError, ValueError, RuntimeError, KeyError, TypeError) as error:
        if is_out_of_memory(error):  # says nothing of the export
            raise
        raise _not_the_same([f"it cannot be loaded: {error}"], where) from error
    problems = []
    if unequal := _unequal(trained.checksums, checksums):
        problems.append(f"{len(unequal)} of {len(trained.checksums)} tensors differ, such as {unequal[0]}")
    scaling = adapter_scaling(transformer)
    if unequal := _unequal(trained.scaling, scaling):
        name = unequal[0]
        factors = f"{scaling.get(name)} instead of {trained.scaling.get(name)} (alpha / rank)"
        problems.append(f"the update of {name} counts {factors}")
    difference = (seeded_velocity(transformer, spec, device) - trained.velocity).abs().max().item()
    tolerance = tolerance_of(trained.velocity, dtype)
    # `not <=`, so that a NaN fails too.
    if not difference <= tolerance:
        problems.append(f"predicted velocities differ by up to {difference:.3g}, allowed are {tolerance:.3g}")
    if problems:
        raise _not_the_same(problems, where)
    return Verification(difference, tolerance)


def _reload(
    folder: Path, model: ModelConfig, spec: ModelSpec, device: torch.device, *, is_adapter: bool, with_lokr: bool
) -> Any:
    """The exported transformer, or the base with the exported adapter, as anybody with diffusers would load it."""
    if not is_adapter:
        return load_transformer(ModelConfig(pretrained=str(folder)), device=device, dtype=model.torch_dtype())
    transformer = load_base(model, device=device)
    if (folder / CONTROL_FILE).is_file():
        transformer.load_state_dict(load_file(folder / CONTROL_FILE), strict=False)
    if with_lokr:  # which the pipeline's own loader refuses
        transformer.load_lora_adapter(
            str(folder), prefix=COMPONENT, weight_name=LORA_FILE, adapter_name=ADAPTER, use_safetensors=True
        )
        return transformer
    pipeline = build_pipeline(spec, transformer=transformer, scheduler=load_scheduler(model))
    pipeline.load_lora_weights(str(folder), weight_name=LORA_FILE, adapter_name=ADAPTER, use_safetensors=True)
    return transformer


def _not_the_same(problems: list[str], where: str) -> ExportError:
    return ExportError(
        "the export, loaded by diffusers, is not the model that was trained, and was deleted: " + "; ".join(problems),
        where=where,
        fix="update diffusers and peft; if it persists this is a bug, and the checkpoint itself is unharmed",
    )


def _unequal(ours: Mapping[str, object], theirs: Mapping[str, object]) -> list[str]:
    return sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))


def tensor_checksums(transformer: Any, dtype: torch.dtype) -> dict[str, str]:
    """Of every tensor of its adapter, or of all where it has none, as they are in the dtype that exports are loaded in.

    So weights can be compared with others that are no longer in memory.
    """
    from peft import get_peft_model_state_dict

    has_adapter = any(adapted_layers(transformer))
    state = get_peft_model_state_dict(transformer, adapter_name=ADAPTER) if has_adapter else transformer.state_dict()
    return {name: checksum_tensor(t.to(dtype) if t.is_floating_point() else t) for name, t in state.items()}


def adapter_scaling(transformer: Any) -> dict[str, float]:
    """By what every adapted layer multiplies its update; empty without an adapter."""
    return {name: float(layer.scaling[ADAPTER]) for name, layer in adapted_layers(transformer)}


@torch.no_grad()
def seeded_velocity(transformer: Any, spec: ModelSpec, device: torch.device) -> Tensor:
    """The velocity predicted for seeded inputs, float32 on the CPU: a few tokens, two deep in time."""
    frames = 2 * (spec.patch_size_t or 1)
    height, width = spec.sample_height, spec.sample_width
    if not spec.use_learned_positions:  # those are refused at another height or width, though not at another length
        height, width = min(height, 4 * spec.patch_size), min(width, 6 * spec.patch_size)

    def noise(name: str, *shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=generator(0, "export", name)).to(device)

    channels = spec.latent_channels
    return denoise(
        transformer,
        spec,
        noise("latents", channels, frames, height, width),
        noise("prompt", spec.max_text_seq_length, spec.text_embed_dim),
        torch.tensor([spec.num_train_timesteps // 2], device=device),
        noise("image", channels, frames if spec.control else 1, height, width) if spec.conditioned else None,
    ).cpu()


def tolerance_of(velocity: Tensor, dtype: torch.dtype) -> float:
    """The largest difference of one forward pass that is rounding.

    In float32 both sides run the same operations on the same numbers; 1e-5 of the largest output leaves room for
    kernels that are chosen by memory alignment, and for what a merged adapter adds up in another order (4e-7 through
    42 layers). In half precision diffusers also rounds the float32 adapter to the model's dtype; where training did not
    (``compute: float32``, float16, DoRA, a merged adapter), a rounding that falls the other way somewhere travels
    through every later layer: 8 units in the last place of the largest output. What hides below that (the wrong scale
    of a weak adapter) is found by comparing tensors and scales, which allows no difference at all.
    """
    relative = 1e-5 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
    return relative * velocity.abs().max().item()
