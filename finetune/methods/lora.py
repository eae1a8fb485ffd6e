"""LoRA: low-rank updates of some linear layers, through peft; and merging them into what they adapt."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from finetune.cogvideox.spec import BLOCK_LAYERS
from finetune.core.errors import ConfigError
from finetune.core.files import CONTROL_FILE
from finetune.core.rng import generator
from finetune.core.types import Strict
from finetune.methods.adapter import (
    Adapter,
    count_lines,
    differences,
    load_strictly,
    read_adapter,
    read_lora_file,
    some,
)
from finetune.methods.targets import Targets, linear_layers, listed, select, selects

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

ADAPTER = "default"
"""The adapter's name inside the model. It is not part of any saved name."""

_BLOCK = re.compile(r"^transformer_blocks\.\d+")

_LARGEST_RANK = 16_384


class LoraMethod(Strict):
    """Train low-rank updates of some linear layers; everything else stays frozen in the model's dtype."""

    kind: Literal["lora"] = "lora"
    rank: int = Field(128, ge=1, le=_LARGEST_RANK)
    """Width of the update. CogVideoX's own recipe uses 128."""
    alpha: float = Field(64, ge=1e-6, le=1e6)
    """The update counts ``alpha / rank`` (``alpha / sqrt(rank)`` with ``use_rslora``). The exported file carries it."""
    ranks: dict[str, Annotated[int, Field(ge=1, le=_LARGEST_RANK)]] = Field(default_factory=dict, max_length=1_000)
    """Ranks of some layers in place of ``rank``, by a part of the layer's name; the first part that fits decides, as in
    ``{ff.net: 16, transformer_blocks.0.: 64}``. Their alpha follows: every layer's update counts what ``alpha`` and
    ``rank`` say."""
    dropout: float = Field(0, ge=0, lt=1)
    """Probability that an element of an adapted layer's input is withheld from the update."""
    targets: Targets = "attention"
    """Which linear layers: ``attention``, ``attention+ff``, ``all-linear``, or a regular expression that must match a
    module's whole name; a list takes the union."""
    use_rslora: bool = False
    """Rank-stabilised scaling (Kalajdzievski 2023): for ranks of 64 and more with alpha of the order of sqrt(rank)."""
    use_dora: bool = False
    """Learn each output's magnitude apart from its direction (Liu et al. 2024); slower per step."""
    compute: Literal["model", "float32"] = "model"
    """What the update is computed in: ``model``, ``model.dtype``, or ``float32``, which is slower by far on a GPU. The
    adapter's weights are float32 in either case. With ``use_dora``, and in fp16, it is always ``float32``."""
    init_from: Path | None = None
    """Adapter to continue from: a LoRA safetensors file, an export's folder, or one of our checkpoints."""

    @property
    def scaling(self) -> float:
        """What the low-rank product is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    @property
    def summary(self) -> str:
        """For titles."""
        return f"LoRA, rank {self.ranks_text}, alpha {self.alpha:g}"

    @property
    def ranks_text(self) -> str:
        """``rank``, and in brackets the layers of another."""
        others = ", ".join(f"{part}: {rank}" for part, rank in self.ranks.items())
        return f"{self.rank} ({others})" if others else f"{self.rank}"

    def rank_of(self, name: str) -> int:
        """Rank of the update of the layer of this name."""
        return next((rank for part, rank in self.ranks.items() if part in name), self.rank)

    def alpha_of(self, name: str) -> float:
        """What the layer's ``scaling`` is made of: by it and ``rank_of``, every update counts the same."""
        ratio = self.rank_of(name) / self.rank
        return self.alpha * (math.sqrt(ratio) if self.use_rslora else ratio)

    def alike(self, blocks: int) -> bool:
        """Whether every one of so many blocks has the same layers adapted, at the same ranks."""
        names = [[f"transformer_blocks.{index}.{layer}" for layer in BLOCK_LAYERS] for index in range(blocks)]
        return len({tuple(self.matches(name) and self.rank_of(name) for name in block) for block in names}) <= 1

    def in_float32(self, *, fp16: bool) -> bool:
        """Whether the update is computed in float32 whatever the model's dtype is, which may be ``fp16``."""
        # A DoRA divides by the norms of W + s B A, which bf16 would round to 0.4 %. And while B is small, so is what
        # A's gradients are sums of: mostly below 6e-8, fp16's last digit, the loss scale notwithstanding.
        return self.compute == "float32" or self.use_dora or fp16

    def matches(self, name: str) -> bool:
        """Whether a linear layer of this name gets an adapter."""
        return selects(self.targets, name)

    def target_modules(self, transformer: nn.Module) -> list[str]:
        """Names of the linear layers that get an adapter, in the model's order. Raises as ``select`` does."""
        return self.select(linear_layers(transformer))

    def select(self, linear: Sequence[str]) -> list[str]:
        """Which of a model's ``linear`` layers, by their names, get an adapter; in the order they are given in.

        Raises:
            ConfigError: if a target matches none, or a part of ``ranks`` is in no name; the message lists the names
                that come closest.
        """
        names = select(self.targets, linear)
        decided = {next((part for part in self.ranks if part in name), "") for name in names}
        for part in self.ranks:
            if part not in decided:
                raise _no_rank_for(part, names)
        return names

    def apply(self, transformer: nn.Module, *, seed: int) -> None:
        """Freeze ``transformer`` and insert the adapter, in place. Until it is trained, the model computes what it did.

        Adapter parameters are float32, the base keeps its dtype. The initial values follow from ``seed`` and each
        layer's name, so they depend neither on the global random state, which is left as it was, nor on the device, the
        base's dtype or which other layers are adapted.

        Raises:
            ConfigError: if a target matches nothing, an adapter is in place already, or ``init_from`` does not fit.
        """
        require_bare(transformer)
        model: Any = transformer
        names = self.target_modules(transformer)
        import torch
        from peft import LoraConfig

        from finetune.cogvideox.control import train_projection

        config = LoraConfig(lora_dropout=self.dropout, **self.peft_settings(names))
        transformer.requires_grad_(False)
        with torch.random.fork_rng(devices=[]):  # peft fills the new layers from the global generator; we refill them
            model.add_adapter(config, ADAPTER)
        narrows = not self.in_float32(fp16=model.dtype == torch.float16)
        for name in names:
            self._initialise(transformer.get_submodule(name), generator(seed, "lora", name), narrows=narrows)
        train_projection(transformer)
        if self.init_from is not None:
            self._continue_from(transformer, self.init_from)

    def peft_settings(self, names: Sequence[str]) -> dict[str, Any]:
        """What decides the adapter's function, as peft and every reader of adapter files have it, JSON types.

        Args:
            names: of the layers that are adapted.
        """
        others = [name for name in names if self.rank_of(name) != self.rank]
        return {
            "r": self.rank,
            "lora_alpha": whole(self.alpha),
            "use_rslora": self.use_rslora,
            "use_dora": self.use_dora,
            "target_modules": list(names),
            # diffusers 0.36 insists on the patterns, also where they are empty.
            "rank_pattern": {name: self.rank_of(name) for name in others},
            "alpha_pattern": {name: whole(self.alpha_of(name)) for name in others},
        }

    def _initialise(self, layer: nn.Module, generator: torch.Generator, *, narrows: bool) -> None:
        """A as peft draws it (uniform, Kaiming with a = sqrt 5), B zero, DoRA's magnitude the base's row norms."""
        import torch
        from torch import nn

        from finetune.memory.narrowed_lora import narrow

        lora: Any = layer
        down, up = lora.lora_A[ADAPTER], lora.lora_B[ADAPTER]
        # peft creates the tensors in the base's dtype; fp32 is what a learning rate of 1e-4 needs to move them at all.
        down.float()
        up.float()
        drawn = nn.init.kaiming_uniform_(torch.empty(down.weight.shape), a=math.sqrt(5), generator=generator)
        with torch.no_grad():
            down.weight.copy_(drawn)
            up.weight.zero_()
            if self.use_dora:
                # Recomputed in fp32: peft takes the norm in the base's dtype, and in bf16 the adapter would then change
                # the model before it has learned anything.
                magnitude = lora.lora_magnitude_vector[ADAPTER].float()
                magnitude.weight.copy_(torch.linalg.norm(lora.base_layer.weight.float(), dim=1))
        if narrows:
            narrow(lora, ADAPTER)

    def _continue_from(self, transformer: nn.Module, source: Path) -> None:
        from finetune.cogvideox.control import load_updates

        adapter = self.read_start(source)
        tensors = {name: tensor.float() for name, tensor in adapter.tensors.items()}
        # An adapter that was trained without a control video begins with the base's own projection.
        own = {name: p for name, p in self.trainable(transformer).items() if is_lora(name) or name in tensors}
        if problems := differences(own, tensors):
            raise _does_not_continue(adapter, problems)
        load_strictly(own, tensors)
        file = adapter.path.with_name(CONTROL_FILE)
        if file.is_file():
            try:
                load_updates(transformer, read_lora_file(file, f"method.init_from: {file}")[0])
            except ValueError as error:
                problem = f"it follows a control video (model.control), and {error}"
                raise _does_not_continue(adapter, [problem]) from None

    def read_start(self, source: Path) -> Adapter:
        """Read an adapter to continue from.

        Raises:
            ConfigError: as ``read_adapter``, or if its settings are not this method's.
        """
        adapter = read_adapter(source)
        if problems := list(self._misfits(adapter)):
            raise _does_not_continue(adapter, problems)
        return adapter

    def _misfits(self, adapter: Adapter) -> Iterator[str]:
        settings, rank, scale = adapter.settings, self.rank, adapter.scale
        if scale is None:
            yield "its layers' updates count differently (alpha / rank), which `finetune convert` can even out"
        if any(self.rank_of(layer) != own for layer, own in adapter.ranks.items() if self.matches(layer)):
            rank = settings["rank"]
            if rank != self.rank:
                yield f"method.rank is {self.rank}, the adapter has {rank}"
            if (ranks := ranks_by_name(adapter.ranks, rank)) != self.ranks:
                yield f"method.ranks is {json.dumps(self.ranks)}, the adapter has {json.dumps(ranks)}"
        for field in ("use_rslora", "use_dora"):
            if getattr(self, field) != settings[field]:
                yield f"method.{field} is {getattr(self, field)}, the adapter has {settings[field]}"
        if scale is not None:
            alpha = round(scale * (math.sqrt(rank) if settings["use_rslora"] else rank), 6)
            if not math.isclose(alpha, self.alpha, rel_tol=1e-5):
                yield f"method.alpha is {self.alpha}, the adapter has {alpha}"

    def trainable(self, transformer: nn.Module) -> dict[str, nn.Parameter]:
        """The adapter's parameters by peft's state-dict names, in the model's order."""
        return {_saved_name(name): p for name, p in transformer.named_parameters() if p.requires_grad}

    def state(self, transformer: nn.Module) -> dict[str, Tensor]:
        """The trainable tensors (not copies), named as in ``trainable``."""
        return {name: parameter.detach() for name, parameter in self.trainable(transformer).items()}

    def load_state(self, transformer: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Copy ``tensors`` into the model; see ``load_strictly``."""
        load_strictly(self.trainable(transformer), tensors)

    def peft_state(self, transformer: nn.Module) -> dict[str, Tensor]:
        """What ``save_lora_weights(transformer_lora_layers=...)`` of a diffusers pipeline takes."""
        return {name: tensor for name, tensor in self.state(transformer).items() if is_lora(name)}

    def lora_metadata(self, transformer: nn.Module) -> dict[str, Any]:
        """The adapter's settings for ``save_lora_weights(transformer_lora_adapter_metadata=...)``, JSON types.

        With them in the file, a reader scales by alpha / rank itself: nobody may scale the tensors as well. Only what
        decides the adapter's function is in them. A reader hands every entry to its own peft, which refuses options
        newer than itself, and would sample with dropout on if one were named.
        """
        model: Any = transformer
        config = model.peft_config[ADAPTER]
        return {
            **self.peft_settings([name for name, _ in adapted_layers(transformer)]),
            "target_modules": sorted(config.target_modules),  # as few names as say the same
        }

    def describe(self, transformer: nn.Module) -> list[tuple[str, str]]:
        """What trains, as lines of (label, value)."""
        from finetune.cogvideox.control import PROJECTION, projection_state

        variants = [name for name, on in (("rsLoRA", self.use_rslora), ("DoRA", self.use_dora)) if on]
        layers = dict.fromkeys(name.split(".lora_")[0] for name in self.trainable(transformer) if is_lora(name))
        projection = [("trained beside it", PROJECTION)] if projection_state(transformer) else []
        start = [("continued from", str(self.init_from))] if self.init_from is not None else []
        return [
            ("method", " + ".join(["LoRA", *variants])),
            ("adapted layers", f"{len(layers)} ({listed(self.targets)})"),
            ("rank, alpha", f"{self.ranks_text}, {self.alpha:g} (scale {self.scaling:g})"),
            *projection,
            *start,
            *count_lines(transformer),
        ]


def require_bare(transformer: nn.Module) -> None:
    """Raise ConfigError if an adapter is in place already."""
    model: Any = transformer
    if getattr(model, "peft_config", None):
        raise ConfigError(
            "the transformer already carries an adapter",
            where="method",
            fix="load the base model anew; to train an existing adapter further set method.init_from",
        )


def is_lora(name: str) -> bool:
    """Whether a tensor of ``LoraMethod.trainable`` is the adapter's own, and not of the projection beside it."""
    from finetune.cogvideox.control import PROJECTION, UPDATES

    return name.removeprefix(f"{PROJECTION}.") not in UPDATES.values()


def _no_rank_for(part: str, names: Sequence[str]) -> ConfigError:
    if any(part in name for name in names):
        what, fix = (
            f"{part!r} decides no rank: parts before it fit all of its layers",
            "put it before them, or remove it",
        )
    else:
        ends = dict.fromkeys(re.sub(r"^transformer_blocks\.\d+\.", "", name) for name in names)
        parts = [*ends, *dict.fromkeys(f"{match[0]}." for name in names if (match := _BLOCK.match(name)))]
        close = difflib.get_close_matches(part, parts, n=1, cutoff=0.5)
        what = f"no adapted layer has {part!r} in its name" + (f"; did you mean {close[0]!r}?" if close else "")
        fix = f"write a part of a layer's name, such as {some(ends)}, or have method.targets select the layer"
    return ConfigError(what, where="method.ranks", fix=fix)


def _does_not_continue(adapter: Adapter, problems: Sequence[str]) -> ConfigError:
    return ConfigError(
        "the adapter to continue from does not fit this run: " + "; ".join(problems),
        where=f"method.init_from: {adapter.path}",
        fix="give method the adapter's own settings, and train on the base model it was made for" + adapter.note,
    )


def ranks_by_name(layers: Mapping[str, int], rank: int) -> dict[str, int]:
    """A short ``LoraMethod.ranks`` that gives ``layers`` theirs, where all others have ``rank``: what a layer has in
    most blocks, and the exceptions.
    """
    inner = {name: _BLOCK.sub("", name).removeprefix(".") for name in layers}
    counts: dict[str, Counter[int]] = {}
    for name, own in layers.items():
        counts.setdefault(inner[name], Counter())[own] += 1
    usual = {part: max(ranks, key=lambda own: (ranks[own], own == rank)) for part, ranks in counts.items()}
    named = {part: own for part, own in usual.items() if own != rank}
    named |= {name: own for name, own in layers.items() if own != usual[inner[name]]}
    # The longer one decides where both fit.
    return dict(sorted(named.items(), key=lambda item: -len(item[0])))


def whole(alpha: float) -> float:
    """An integral alpha as an integer, the type that every reader of adapter files knows."""
    return int(alpha) if float(alpha).is_integer() else alpha


def _saved_name(name: str) -> str:
    """Peft's state-dict name of a parameter: without the adapter's name, and a DoRA magnitude without ``.weight``."""
    name = name.replace(f".{ADAPTER}.", ".")
    return name.removesuffix(".weight") if name.endswith(".lora_magnitude_vector.weight") else name


# --------------------------------------------------------------------------------------- merged into what it adapts


@dataclass(frozen=True)
class Merged:
    """What became of an adapter that was merged."""

    strength: float
    """1 as trained, 0 the base itself."""
    rounding: float
    """Root mean square of what rounding to the base's dtype changed, as a share of the update's; 0 in float32, where
    nothing is rounded."""

    def __str__(self) -> str:
        words = f"the adapter is merged into the base at strength {self.strength:g}"
        if self.rounding:
            words += f"; rounding to the base's dtype is {self.rounding:.1%} of its update"
        return words


def set_strength(transformer: nn.Module, strength: float) -> None:
    """Let the adapter count ``strength`` times what it was trained at, as ``pipeline.set_adapters`` does."""
    from finetune.cogvideox.control import widened

    for _, layer in adapted_layers(transformer):
        layer.set_scale(ADAPTER, strength)
    if (projection := widened(transformer)) is not None:
        projection.strength = strength


def merge(transformer: nn.Module, strength: float) -> Merged:
    """Replace every adapted layer by a plain one that computes the same, in place.

    W becomes W + s B A, s being ``strength`` times alpha / rank (alpha / sqrt(rank) with rsLoRA); with DoRA, each row
    of that is stretched to its learned magnitude. Of a LoKr the update is the Kronecker product. The sum is formed in
    float32 and rounded to the base's dtype once, so that an element is off by at most half a unit in its last place:
    2^-8 of itself in bfloat16, 2^-11 in float16.

    Args:
        transformer: with one adapter, as a method's ``apply`` inserts it.
        strength: as ``set_strength`` takes it. 0 gives the base's own weights, bit for bit, with DoRA too.
    """
    import torch

    from finetune.cogvideox.control import merge_projection

    lost, update = 0.0, 0.0
    with torch.no_grad():
        for _, layer in adapted_layers(transformer) if strength != 0 else ():
            layer.set_scale(ADAPTER, strength)
            weight: Tensor = layer.base_layer.weight
            exact = _merged_weight(layer)
            rounded = exact.to(weight.dtype)
            lost += (rounded.float() - exact).square().sum().item()
            update += (exact - weight.float()).square().sum().item()
            weight.copy_(rounded)
    merge_projection(transformer, strength)
    unloading: Any = transformer
    unloading.unload_lora()
    return Merged(strength, math.sqrt(lost / update) if update else 0.0)


def _merged_weight(layer: Any) -> Tensor:
    """What an adapted linear layer multiplies by, float32 [out, in]."""
    if not hasattr(layer, "lora_A"):  # a LoKr's
        product: Tensor = layer.get_delta_weight(ADAPTER).float()
        return product.add_(layer.base_layer.weight)
    down, up = layer.lora_A[ADAPTER].weight.float(), layer.lora_B[ADAPTER].weight.float()
    weight: Tensor = layer.base_layer.weight.float() + layer.scaling[ADAPTER] * (up @ down)
    if layer.use_dora[ADAPTER]:
        magnitude = layer.lora_magnitude_vector[ADAPTER].weight.float()
        weight *= (magnitude / weight.norm(dim=1))[:, None]
    return weight


def adapted_layers(transformer: nn.Module) -> Iterator[tuple[str, Any]]:
    """Name and module of every layer with an adapter."""
    for name, module in transformer.named_modules():
        if ADAPTER in getattr(module, "scaling", {}):
            yield name, module
