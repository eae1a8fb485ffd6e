"""LoKr: Kronecker products of small matrices as updates of some linear layers, through peft."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from finetune.cogvideox.spec import BLOCK_LAYERS
from finetune.core.rng import generator
from finetune.core.types import Strict
from finetune.methods.adapter import count_lines, load_strictly
from finetune.methods.lora import ADAPTER, adapted_layers, require_bare, whole
from finetune.methods.targets import Targets, linear_layers, listed, select, selects

if TYPE_CHECKING:
    from torch import Tensor, nn

_LARGEST = 16_384


class LokrMethod(Strict):
    """Train the Kronecker product of two small matrices beside some linear layers (LyCORIS, Yeh et al. 2023);
    everything else stays frozen in the model's dtype.
    """

    kind: Literal["lokr"] = "lokr"
    rank: int = Field(16, ge=1, le=_LARGEST)
    """Rank of the second factor. From half of that factor's longer side on, it is trained whole."""
    alpha: float = Field(16, ge=1e-6, le=1e6)
    """The update counts ``alpha / rank``, also where a factor is trained whole. The exported file carries it."""
    targets: Targets = "attention"
    """Which linear layers, as a LoRA's: ``attention``, ``attention+ff``, ``all-linear``, or regular expressions."""
    decompose_factor: Annotated[int, Field(ge=1, le=_LARGEST)] | Literal[-1] = 8
    """Size of the first factor: [8, 8] beside [out / 8, in / 8]. Where it does not divide a side, peft takes the
    nearest that does; -1 makes both factors as alike in size as can be, which trains least."""
    decompose_both: bool = False
    """Train the first factor at ``rank`` too, where that is below half of its longer side."""

    @property
    def scaling(self) -> float:
        """What the Kronecker product is multiplied by."""
        return self.alpha / self.rank

    @property
    def summary(self) -> str:
        """For titles."""
        return f"LoKr, rank {self.rank}, alpha {self.alpha:g}, factor {self.decompose_factor}"

    def alike(self, blocks: int) -> bool:
        """Whether every one of so many blocks has the same layers adapted."""
        names = [[f"transformer_blocks.{index}.{layer}" for layer in BLOCK_LAYERS] for index in range(blocks)]
        return len({tuple(map(self.matches, block)) for block in names}) <= 1

    def matches(self, name: str) -> bool:
        """Whether a linear layer of this name gets an adapter."""
        return selects(self.targets, name)

    def select(self, linear: Sequence[str]) -> list[str]:
        """Which of a model's ``linear`` layers get an adapter. Raises as ``targets.select``."""
        return select(self.targets, linear)

    def weights(self, inputs: int, outputs: int) -> int:
        """How many numbers train for a linear layer of such sides."""
        from peft.tuners.lokr.layer import factorization

        def factor(rows: int, columns: int, *, whole: bool) -> int:
            return rows * columns if whole else self.rank * (rows + columns)

        (rows, more_rows), (columns, more_columns) = (
            factorization(side, self.decompose_factor) for side in (outputs, inputs)
        )
        first = factor(rows, columns, whole=not self.decompose_both or self.rank >= max(rows, columns) / 2)
        return first + factor(more_rows, more_columns, whole=self.rank >= max(more_rows, more_columns) / 2)

    def apply(self, transformer: nn.Module, *, seed: int) -> None:
        """Freeze ``transformer`` and insert the adapter, in place. Until it is trained, the model computes what it did.

        Adapter parameters are float32, the base keeps its dtype. The initial values follow from ``seed`` and each
        layer's name.

        Raises:
            ConfigError: if a target matches nothing, or an adapter is in place already.
        """
        require_bare(transformer)
        names = self.select(linear_layers(transformer))
        import torch
        from peft import LoKrConfig

        from finetune.methods.lokr_linear import initialise

        model: Any = transformer
        transformer.requires_grad_(False)
        with torch.random.fork_rng(devices=[]):  # peft fills the new layers from the global generator; we refill them
            model.add_adapter(LoKrConfig(**self.peft_settings(names)), ADAPTER)
        for name in names:
            initialise(transformer.get_submodule(name), ADAPTER, generator(seed, "lokr", name))

    def peft_settings(self, names: Sequence[str]) -> dict[str, Any]:
        """What decides the adapter's function, as peft's ``LoKrConfig`` has it, JSON types.

        Args:
            names: of the layers that are adapted.
        """
        return {
            "r": self.rank,
            "alpha": whole(self.alpha),
            "decompose_factor": self.decompose_factor,
            "decompose_both": self.decompose_both,
            "target_modules": list(names),
            "rank_pattern": {},
            "alpha_pattern": {},
        }

    def trainable(self, transformer: nn.Module) -> dict[str, nn.Parameter]:
        """The adapter's parameters by peft's state-dict names, in the model's order."""
        named = transformer.named_parameters()
        return {name.removesuffix(f".{ADAPTER}"): parameter for name, parameter in named if parameter.requires_grad}

    def state(self, transformer: nn.Module) -> dict[str, Tensor]:
        """The trainable tensors (not copies), named as in ``trainable``."""
        return {name: parameter.detach() for name, parameter in self.trainable(transformer).items()}

    def load_state(self, transformer: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Copy ``tensors`` into the model; see ``load_strictly``."""
        load_strictly(self.trainable(transformer), tensors)

    def peft_state(self, transformer: nn.Module) -> dict[str, Tensor]:
        """What ``save_lora_weights(transformer_lora_layers=...)`` of a diffusers pipeline takes."""
        return self.state(transformer)

    def lora_metadata(self, transformer: nn.Module) -> dict[str, Any]:
        """The adapter's settings for ``save_lora_weights(transformer_lora_adapter_metadata=...)``, JSON types."""
        return self.peft_settings(sorted(name for name, _ in adapted_layers(transformer)))

    def describe(self, transformer: nn.Module) -> list[tuple[str, str]]:
        """What trains, as lines of (label, value)."""
        both = ", both factors" if self.decompose_both else ""
        return [
            ("method", "LoKr"),
            ("adapted layers", f"{sum(1 for _ in adapted_layers(transformer))} ({listed(self.targets)})"),
            ("rank, alpha", f"{self.rank}{both}, {self.alpha:g} (scale {self.scaling:g})"),
            ("first factor", f"{self.decompose_factor}"),
            *count_lines(transformer),
        ]
