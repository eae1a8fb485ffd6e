"""LoRA files of every program: read with their scale, written in any layout, read again and compared."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from finetune.checkpoint.folders import EMA
from finetune.conversion.lora_layouts import LAYOUTS, Lora, detect, from_diffusers, is_lora, to_diffusers
from finetune.conversion.model_card import PEFT_CONFIG, PEFT_FILE, LayoutName
from finetune.conversion.stored import StoredLora, find_files, read_headers, require_lora_alone
from finetune.core.errors import ConfigError, ExportError
from finetune.core.files import atomic_write_text
from finetune.core.tensor_files import add_metadata, atomic_save_tensors
from finetune.methods.adapter import COMPONENT, METADATA_KEY, read_lora_file, refuse_lokr, some
from finetune.methods.lora import whole

MAGNITUDE = "lora_magnitude_vector"
"""How a DoRA's tensor of magnitudes ends."""

Describe = Callable[[str], Mapping[str, str]]
"""Metadata for a file's header, given the SHA-256 of its tensors."""


def read_lora(path: Path) -> tuple[Lora, StoredLora, list[str]]:
    """A LoRA by our names, whoever wrote it, and what is to be known about it.

    Args:
        path: a file, or the folder of an export, an adapter, a checkpoint or a run.

    Returns:
        The LoRA, with an alpha for each module so that alpha / rank is what its update counts; its header; notes.

    Raises:
        ConfigError: if there is none, or it is damaged.
    """
    where = str(path)
    (file, *_), notes = find_files(path)
    forms, metadata = read_headers([file])
    shapes = {name: form.shape for name, form in forms.items()}
    refuse_lokr(shapes, file)
    layout = detect(shapes)
    if layout is None or not any(map(is_lora, shapes)):
        raise ConfigError(
            "this is no LoRA of a CogVideoX", where=where, fix=f"see what it is: `finetune inspect {path}`"
        )
    require_lora_alone(file, shapes)
    stored = StoredLora(file, shapes, metadata, layout)
    lora = to_diffusers(read_lora_file(file, where)[0], layout)
    if empty := [module for module, rank in lora.ranks.items() if not rank]:
        raise ConfigError(f"{empty[0]} has rank 0: the file is not whole", where=where, fix="fetch or export it again")
    scales = stored.scales(read=True)
    if not stored.alphas(read=True)[0]:
        notes.append(f"{path} states no alpha: it is taken as the rank, as every program does")
    if (file.parent / EMA).is_file():
        notes.append(f"{path} also holds an average of the weights, which was not taken: an export has it")
    alphas = {module: scales[module] * rank for module, rank in lora.ranks.items()}
    return Lora(lora.tensors, alphas), stored, notes


def write_lora(lora: Lora, layout: LayoutName, target: Path, base: str, describe: Describe) -> tuple[Path, ...]:
    """Write a LoRA as a program reads it, read it again and compare.

    Args:
        lora: with an alpha for every module.
        layout: whose names.
        target: the file; for peft the folder.
        base: its model, which peft's settings name.
        describe: see there.

    Returns:
        The files.

    Raises:
        ConfigError: if the layout has no name for a module, or its readers do not compute a DoRA.
        ExportError: if what was written is not what was given; it is deleted then.
        OSError: if it cannot be written.
    """
    file = target / PEFT_FILE if layout == "peft" else target
    tensors = from_diffusers(lora, LAYOUTS[layout])
    settings = peft_settings(lora)
    header: dict[str, str] = {"format": "pt"}
    if layout == "diffusers":
        named = {f"{COMPONENT}.{name}": value for name, value in settings.items()}
        header[METADATA_KEY] = json.dumps(named, indent=2, sort_keys=True)
    atomic_save_tensors(file, tensors, header)
    add_metadata(file, describe)
    if layout == "peft":
        _write_peft_settings(target, settings, base)
    try:
        _require_same(lora, read_lora(file)[0], str(file))
    except ExportError:
        file.unlink()
        raise
    return (file, target / PEFT_CONFIG) if layout == "peft" else (file,)


def peft_settings(lora: Lora) -> dict[str, Any]:
    """What peft, and diffusers through it, has to know of a LoRA: what most layers have, and the others one by one."""
    ranks = lora.ranks
    rank, alpha = (Counter(values).most_common(1)[0][0] for values in (ranks.values(), lora.alphas.values()))
    return {
        "r": rank,
        "lora_alpha": whole(alpha),
        "use_rslora": False,
        "use_dora": any(name.endswith(MAGNITUDE) for name in lora.tensors),
        "target_modules": sorted(ranks),
        "rank_pattern": {module: own for module, own in ranks.items() if own != rank},
        "alpha_pattern": {module: whole(own) for module, own in lora.alphas.items() if own != alpha},
    }


def _write_peft_settings(folder: Path, settings: dict[str, Any], base: str) -> None:
    from peft import LoraConfig

    LoraConfig(base_model_name_or_path=base, inference_mode=True, **settings).save_pretrained(str(folder))
    path = folder / PEFT_CONFIG
    content = json.loads(path.read_text(encoding="utf-8"))
    content["target_modules"] = sorted(content["target_modules"])  # a set, in an order of its own
    atomic_write_text(path, json.dumps(content, indent=2, sort_keys=True) + "\n")


def _require_same(ours: Lora, theirs: Lora, where: str) -> None:
    unequal = [*(ours.tensors.keys() ^ theirs.tensors.keys())]
    unequal = unequal or [name for name, t in ours.tensors.items() if not torch.equal(t.cpu(), theirs.tensors[name])]
    # Where alpha is a tensor it is in float32.
    unequal += [
        module for module in ours.ranks if not math.isclose(ours.alphas[module], theirs.alphas[module], rel_tol=1e-6)
    ]
    if unequal:
        raise ExportError(
            f"what was written is not what was given, and was deleted: {some(sorted(unequal))}", where=where
        )
