"""A LoRA of what a full fine-tuning changed: the largest singular directions of each layer's difference from its base.

The difference of a weight is approximated by ``up @ down`` of a rank, which is the best there is of that rank (Eckart &
Young); both halves get the square roots of the singular values. What lies in weights that no LoRA of these layers has,
such as biases and norms, is left out and counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from finetune.conversion.lora_layouts import Lora
from finetune.conversion.sat import Tensors
from finetune.core.distributed import compute_device
from finetune.core.errors import ConfigError
from finetune.core.rng import seed_for
from finetune.core.tensor_files import content_of
from finetune.methods.adapter import some
from finetune.methods.lora import LoraMethod

LAYERS = "attention+ff"
"""Which linear layers get an update: those of the blocks, which LoRA presets and every program's layout know."""

MOST_RANK = 512
"""Tried, where the rank is to follow from the singular values."""

_SPARE = 16
"""Directions more than wanted that are followed, and in how many rounds: then the wanted ones are exact to some digits
(Halko et al. 2011)."""
_ROUNDS = 4


@dataclass(frozen=True)
class Extracted:
    """What of a difference a LoRA holds."""

    lora: Lora
    rank: int
    kept: float
    """Share of the layers' squared difference."""
    worst: tuple[str, float]
    """The layer that loses most, and its share."""
    elsewhere: float
    """Share of the whole squared difference that lies in other weights."""

    def __str__(self) -> str:
        name, share = self.worst
        text = f"rank {self.rank} holds {self.kept:.1%} of what {len(self.lora.ranks)} layers changed by"
        text += f" (least of {name}: {share:.1%})"
        return text + f"; {self.elsewhere:.1%} of the whole change is in other weights, which it leaves out"


def extract_lora(trained: Tensors, base: Tensors, wanted: float, where: str) -> Extracted:
    """Approximate a full fine-tuning by a LoRA on its base.

    Args:
        trained: of a transformer, by diffusers' names.
        base: of the model it was trained from.
        wanted: a rank; or, below 1, the share of the squared difference to keep, from which the rank follows.
        where: the source, for messages.

    Raises:
        ConfigError: if the two are not of one model, nothing differs, or no rank up to 512 keeps the share.
    """
    if wanted <= 0 or (wanted >= 1 and wanted != int(wanted)):
        raise ConfigError(
            f"{wanted:g} is neither a rank nor a share", where="--extract-lora", fix="give 64, say, or 0.9 for its rank"
        )
    shapes, own = ({name: tuple(t.shape) for name, t in tensors.items()} for tensors in (base, trained))
    if unequal := sorted(name for name in shapes.keys() | own.keys() if shapes.get(name) != own.get(name)):
        raise ConfigError(
            f"the base is of another model: {len(unequal)} tensors differ in name or shape, such as {some(unequal, 2)}",
            where=where,
            fix="name the model that it was trained from: --model FOLDER",
        )
    layers = LoraMethod(targets=LAYERS)
    device, follow = compute_device(), MOST_RANK if wanted < 1 else int(wanted)
    halves: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    squares: dict[str, float] = {}
    elsewhere = 0.0
    for name in base:
        difference = content_of(trained[name]).to(device).float() - content_of(base[name]).to(device).float()
        module = name.removesuffix(".weight")
        square = float(difference.double().square().sum())
        if difference.ndim == 2 and module != name and layers.matches(module):
            squares[module] = square
            halves[module] = _largest(difference, follow, module)
        else:
            elsewhere += square
    whole = sum(squares.values())
    if not whole:
        raise ConfigError("no layer of its blocks differs from the base", where=where, fix="name another base: --model")
    rank = follow if wanted >= 1 else _rank_that_keeps(wanted, halves, whole)
    values = {module: singular[:rank] for module, (_, singular, _) in halves.items()}
    shares = {
        module: float(values[module].double().square().sum()) / square if square else 1.0
        for module, square in squares.items()
    }
    worst = min(shares, key=lambda module: shares[module])
    return Extracted(
        _as_lora(halves, rank),
        rank,
        kept=sum(shares[module] * square for module, square in squares.items()) / whole,
        worst=(worst, shares[worst]),
        elsewhere=elsewhere / (whole + elsewhere),
    )


def _largest(difference: Tensor, rank: int, module: str) -> tuple[Tensor, Tensor, Tensor]:
    """U, S, V of a matrix's largest singular values, on the CPU; exact where it is small."""
    if min(difference.shape) <= rank + _SPARE:
        u, s, vh = torch.linalg.svd(difference, full_matrices=False)
        v = vh.T
    else:
        with torch.random.fork_rng(devices=[difference.device] if difference.is_cuda else []):
            torch.manual_seed(seed_for(0, "extract", module))  # it draws from the global generator
            u, s, v = torch.svd_lowrank(difference, q=rank + _SPARE, niter=_ROUNDS)
    return u[:, :rank].cpu(), s[:rank].cpu(), v[:, :rank].cpu()


def _rank_that_keeps(share: float, halves: Mapping[str, tuple[Tensor, Tensor, Tensor]], whole: float) -> int:
    length = max(len(singular) for _, singular, _ in halves.values())
    kept = torch.zeros(length, dtype=torch.float64)
    for _, singular, _ in halves.values():
        kept[: len(singular)] += singular.double().square()
    reached = (kept.cumsum(0) >= share * whole).nonzero()
    if not len(reached):
        raise ConfigError(
            f"rank {length} keeps {float(kept.sum()) / whole:.1%} of the difference, and {share:.1%} is wanted",
            where="--extract-lora",
            fix="ask for less, or hand on the whole transformer",
        )
    return int(reached[0]) + 1


def _as_lora(halves: Mapping[str, tuple[Tensor, Tensor, Tensor]], rank: int) -> Lora:
    tensors: dict[str, Tensor] = {}
    for module, (u, singular, v) in halves.items():
        root = singular[:rank].sqrt()
        down, up = (root * v[:, :rank]).T, u[:, :rank] * root
        missing = rank - len(root)  # of a layer narrower than the rank
        tensors[f"{module}.lora_A.weight"] = torch.nn.functional.pad(down, (0, 0, 0, missing)).contiguous()
        tensors[f"{module}.lora_B.weight"] = torch.nn.functional.pad(up, (0, missing)).contiguous()
    return Lora(tensors, dict.fromkeys(halves, float(rank)))
