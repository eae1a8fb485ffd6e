"""Several LoRAs as one, by weight; one of a lower rank; or one in another program's layout.

The sum of w_i s_i B_i A_i is [w_1 s_1 B_1, w_2 s_2 B_2, ...] times [A_1; A_2; ...], at the sum of their ranks: nothing
is lost, and no base model is needed. A lower rank is the nearest there is (Eckart and Young), by a singular value
decomposition of each layer's update.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from finetune.cogvideox.model_files import HUB_IDS
from finetune.conversion.lora_files import MAGNITUDE, peft_settings, read_lora, write_lora
from finetune.conversion.lora_layouts import Lora
from finetune.conversion.model_card import LayoutName, lora_metadata
from finetune.conversion.stored import published_bases
from finetune.core.errors import ConfigError, ExportError
from finetune.core.files import disk_fix, from_here, require_writable
from finetune.inference.request import AdapterArgument


@dataclass(frozen=True)
class MergeReport:
    """What was written."""

    files: tuple[Path, ...]
    layers: int
    ranks: tuple[int, ...]
    """All that occur."""
    error: float | None
    """Of a lower rank, root mean square over all layers, as a share of the update; None where nothing is lost."""
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        ranks = ", ".join(map(str, self.ranks))
        lines = [f"wrote {', '.join(from_here(file) for file in self.files)}: {self.layers} layers of rank {ranks}"]
        if self.error is not None:
            lines.append(f"the lower rank loses {self.error:.2%} of the update (root mean square)")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def merge(sources: Sequence[AdapterArgument], output: Path, layout: LayoutName, rank: int | None) -> MergeReport:
    """Write the sum of LoRAs as one; arguments and errors stand at ``finetune.merge``."""
    for source in sources:
        if not math.isfinite(source.strength):
            raise ConfigError(f"a weight of {source.strength} is no number", where=str(source.path))
    _require_new(output, layout)
    loras, headers, notes = zip(*(read_lora(source.path.expanduser()) for source in sources), strict=True)
    combined = combine([(lora, source.strength) for lora, source in zip(loras, sources, strict=True)], rank)
    settings = peft_settings(combined.lora)
    bases = published_bases(
        {name: shape for header in headers for name, shape in header.layers.items()}, is_whole=False
    )
    variant = bases[0] if len(bases) == 1 else None
    carried = headers[0].metadata if len(headers) == 1 else {}

    def describe(sha256: str) -> dict[str, str]:
        own = lora_metadata(output.stem, variant, settings["r"], settings["lora_alpha"], sha256)
        merged_from = ", ".join(f"{source.path.name}:{source.strength:g}" for source in sources)
        kept = {key: value for key, value in carried.items() if key.startswith(("modelspec.", "ss_"))}
        return {**own, **kept, **{key: own[key] for key in _OF_THE_FILE}, "modelspec.merged_from": merged_from}

    try:
        files = write_lora(combined.lora, layout, output, HUB_IDS[variant] if variant else "", describe)
    except OSError as error:
        raise ExportError(f"it cannot be written: {error}", where=str(output), fix=disk_fix(error)) from error
    ranks = tuple(sorted(set(combined.lora.ranks.values())))
    return MergeReport(files, len(combined.lora.ranks), ranks, combined.error, tuple(n for each in notes for n in each))


_OF_THE_FILE = (
    *("modelspec.title", "modelspec.hash_sha256", "sshs_model_hash"),
    *("ss_output_name", "ss_network_dim", "ss_network_alpha"),
)
"""Metadata that another file's would be wrong for."""


def _require_new(output: Path, layout: LayoutName) -> None:
    if output.exists() and not (layout == "peft" and output.is_dir() and not any(output.iterdir())):
        raise ConfigError("there is something already", where=f"--out {output}", fix="name another, or remove it")
    if layout != "peft" and output.suffix != ".safetensors":
        fix = f"name a file such as {output}.safetensors"
        raise ConfigError("the name of an adapter's file ends in .safetensors", where=f"--out {output}", fix=fix)
    require_writable(output.parent, kind=ExportError, what="the adapter", where=f"--out {output}")


@dataclass(frozen=True)
class Combined:
    """Several LoRAs as one."""

    lora: Lora
    error: float | None
    """Of a lower rank: root mean square of what is lost, as a share of the update's; None where nothing is."""


def combine(sources: Sequence[tuple[Lora, float]], rank: int | None) -> Combined:
    """The LoRA whose update is the sum of others', each times its weight.

    Args:
        sources: LoRA and weight; one alone at weight 1 and full rank stays as it is.
        rank: at most, of each layer; None for the sum of all.

    Raises:
        ConfigError: if their layers are not of one model, or one is a DoRA.
    """
    if rank is None and len(sources) == 1 and sources[0][1] == 1:
        return Combined(sources[0][0], None)
    _require_one_model([lora for lora, _ in sources])
    modules = list(dict.fromkeys(module for lora, _ in sources for module in lora.ranks))
    tensors: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    lost = total = 0.0
    for module in modules:
        parts = [(lora, weight) for lora, weight in sources if module in lora.ranks]
        down, up = _concatenated(module, parts)
        if rank is not None:
            down, up, dropped, square = _truncated(down, up, rank)
            lost, total = lost + dropped, total + square
        tensors |= {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
        alphas[module] = float(len(down))
    return Combined(Lora(tensors, alphas), None if rank is None else math.sqrt(lost / total) if total else 0.0)


def _require_one_model(loras: Sequence[Lora]) -> None:
    if any(name.endswith(MAGNITUDE) for lora in loras for name in lora.tensors):
        raise ConfigError(
            "a DoRA cannot be added to another or brought to a lower rank: its magnitudes scale the base's weights too",
            fix="merge each into the base with `finetune export RUN --to merged`, or use them together in `generate`",
        )
    shapes: dict[str, tuple[int, int]] = {}
    for lora in loras:
        for module in lora.ranks:
            shape = (len(lora.tensors[f"{module}.lora_B.weight"]), lora.tensors[f"{module}.lora_A.weight"].shape[1])
            if shapes.setdefault(module, shape) != shape:
                sizes = f"{list(shapes[module])} in one and {list(shape)} in another"
                raise ConfigError(
                    f"they are of different models: {module} is {sizes}",
                    fix="`finetune inspect` says which base each has",
                )


def _concatenated(module: str, sources: Iterable[tuple[Lora, float]]) -> tuple[Tensor, Tensor]:
    """A [ranks, in] and B [out, ranks] of a module, float32, B with every scale and weight in it. Those of the first
    generation's convolution keep its form: [ranks, in, height, width] and [out, ranks, 1, 1].
    """
    downs, ups = [], []
    for lora, weight in sources:
        down, up = (lora.tensors[f"{module}.lora_{half}.weight"].float() for half in "AB")
        downs.append(down)
        ups.append(up * (weight * lora.alphas[module] / len(down)))
    return torch.cat(downs), torch.cat(ups, dim=1)


def _truncated(down: Tensor, up: Tensor, rank: int) -> tuple[Tensor, Tensor, float, float]:
    """The nearest pair of at most ``rank``; the square of what is lost, and of all."""
    # B A = Q_b (R_b R_a^T) Q_a^T: what is decomposed is as small as the ranks, not as the layer.
    left, inner = torch.linalg.qr(up.flatten(1).double())
    right, outer = torch.linalg.qr(down.flatten(1).double().T)
    u, values, v = torch.linalg.svd(inner @ outer.T)
    rank = min(rank, len(values))
    root = values[:rank].sqrt()
    lower = (root[:, None] * (v[:rank] @ right.T)).float().view(rank, *down.shape[1:])
    higher = ((left @ u[:, :rank]) * root).float().view(len(up), rank, *up.shape[2:])
    squares = values.square()
    return lower, higher, squares[rank:].sum().item(), squares.sum().item()
