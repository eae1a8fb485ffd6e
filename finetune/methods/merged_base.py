"""The base of a run: a checkpoint's transformer, with the adapters in its weights that the configuration names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from finetune.cogvideox.config import MergedAdapter, ModelConfig
from finetune.cogvideox.load import Placement, empty_transformer, load_transformer, place
from finetune.cogvideox.model_files import json_folder
from finetune.core.errors import ConfigError
from finetune.core.files import CONTROL_FILE, TRAINABLE
from finetune.methods.adapter import Adapter, read_adapter, sha256_of, some

if TYPE_CHECKING:
    from diffusers import CogVideoXTransformer3DModel

_OPTION = "model.adapters"


def load_base(
    model: ModelConfig,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    placement: Placement | None = None,
) -> CogVideoXTransformer3DModel:
    """``load_transformer``, with ``model.adapters`` merged in their order while its weights are read.

    W becomes W + s B A, s being an adapter's strength times its alpha / rank; with DoRA, each row of that is stretched
    to its learned magnitude. Sums are formed in float32 from the stored weights and rounded once, to the dtype or the
    format they are held in. ``base_digest`` stays that of the stored weights: an adapter's file has its own.

    Args:
        model: which checkpoint, and what goes into it.
        device: as for ``load_transformer``, and so are the others.
        dtype: see there.
        placement: see there.

    Raises:
        ModelError: as ``load_transformer``.
        ConfigError: if an adapter cannot be read, is not the one that was pinned, or does not fit the model, or if a
            DoRA is not the first of them.
    """
    if not (adapters := _read_acting(model)):
        return load_transformer(model, device=device, dtype=dtype, placement=placement)
    return load_transformer(model, device=device, dtype=dtype, placement=_Merging(adapters, placement))


def require_readable(model: ModelConfig) -> None:
    """Read the adapters that go into a base, before anything expensive; of the model no weight.

    Raises:
        ConfigError: as ``load_base``.
    """
    if not (adapters := _read_acting(model)):
        return
    folder = json_folder(model.pretrained, model.revision)
    module = empty_transformer(folder, dtype=torch.float32, device="meta")
    for adapter in adapters:
        adapter.require_place(module)


def _read_acting(model: ModelConfig) -> list[_Merged]:
    """Those with a strength; at 0 a DoRA's magnitudes would act as well."""
    adapters = [each for each in map(_read, model.adapters) if each.strength]
    for each in adapters[1:]:
        if each.adapter.settings["use_dora"]:
            raise ConfigError(
                "a DoRA divides by the norms of the weights that it finds: after others these are not the base's, and"
                " the sum is not what the files do when they are loaded together",
                where=each.where,
                fix="name it first, in a run that begins so; of two, merge one into a model (`finetune export RUN --to"
                " merged`)",
            )
    return adapters


def _read(merged: MergedAdapter) -> _Merged:
    adapter = read_adapter(merged.path, _OPTION)
    where = f"{_OPTION}: {adapter.path}"
    if adapter.path.name == TRAINABLE:
        raise ConfigError(
            "a run's checkpoint is no file to share, and whoever uses what is trained needs this adapter too",
            where=where,
            fix="export it with `finetune export`, and name the export's folder",
        )
    if adapter.path.with_name(CONTROL_FILE).is_file():
        raise ConfigError(
            "the adapter follows a control video: a projection trained beside it, which this would leave behind",
            where=where,
            fix="export it with `--to merged --full-pipeline`, and name that folder as model.pretrained",
        )
    if merged.sha256 is not None and (digest := sha256_of(adapter.path, where)) != merged.sha256:
        raise ConfigError(
            f"the adapter's file is another than the one that this run began with: its SHA-256 is {digest}, recorded"
            f" is {merged.sha256}",
            where=where,
            fix="bring the old file back; to train on the new one, choose another output_dir and leave sha256 out",
        )
    return _Merged(adapter, merged.strength, where)


@dataclass(frozen=True)
class _Merged:
    """An adapter that goes into weights."""

    adapter: Adapter
    strength: float
    where: str

    def require_place(self, module: nn.Module) -> None:
        """Raise ConfigError if a layer is not the model's."""
        shapes = {
            name: parameter.flatten(1).shape for name, parameter in module.named_parameters() if parameter.ndim > 1
        }
        tensors = self.adapter.tensors
        named = {f"{layer}.{part}" for layer in self.adapter.ranks for part in (_DOWN, _UP, _MAGNITUDE)}
        wrong = [name for name in tensors if name not in named]
        for layer in self.adapter.ranks:
            down, up = tensors[f"{layer}.{_DOWN}"], tensors.get(f"{layer}.{_UP}")
            if up is None or shapes.get(f"{layer}.weight") != (len(up), down.flatten(1).shape[1]):
                wrong.append(layer)
        if wrong:
            raise ConfigError(
                f"the adapter does not fit the base model: {some(wrong)} have no place in it",
                where=self.where,
                fix="name an adapter of this model",
            )

    def added_to(self, weight: Tensor, layer: str) -> Tensor:
        """The merged weight of a layer, float32 [out, in]."""
        tensors, scale = self.adapter.tensors, self.strength * self.adapter.scales[layer]
        down, up = (tensors[f"{layer}.{part}"].float().flatten(1) for part in (_DOWN, _UP))
        weight = weight + scale * (up @ down)
        if (magnitude := tensors.get(f"{layer}.{_MAGNITUDE}")) is not None:
            weight = weight * (magnitude.float().flatten() / weight.norm(dim=1))[:, None]
        return weight


_DOWN, _UP, _MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"


class _Merging:
    """Adds adapters to weights as these are read; a ``cogvideox.Placement``.

    Args:
        adapters: in the order in which they act.
        inner: who decides where and how the sums are held; None for as they are.
    """

    def __init__(self, adapters: Sequence[_Merged], inner: Placement | None) -> None:
        self._adapters, self._inner = adapters, inner

    def prepare(self, module: nn.Module) -> None:
        """Have ``inner`` change the empty module, after a look at whether the adapters fit; else ConfigError."""
        for each in self._adapters:
            each.require_place(module)
        if self._inner is not None:
            self._inner.prepare(module)

    def put(self, module: nn.Module, name: str, tensor: Tensor, device: torch.device) -> bool:
        """Place a weight with what adapters add to it; leave others to ``inner``."""
        layer = name.removesuffix(".weight")
        acting = [each for each in self._adapters if layer in each.adapter.ranks and name != layer]
        if not acting:
            return self._inner is not None and self._inner.put(module, name, tensor, device)
        weight = tensor.float().flatten(1)
        for each in acting:
            weight = each.added_to(weight, layer)
        merged = weight.view(tensor.shape)
        if self._inner is None or not self._inner.put(module, name, merged, device):
            place(module, [(name, merged)], device)
        return True
