"""What programs make of an adapter's or a transformer's file, by their own rules, from its tensors' names.

Sources: diffusers ``loaders/lora_pipeline.py`` (``CogVideoXLoraLoaderMixin``); ComfyUI ``comfy/lora.py`` and
``comfy/weight_adapter``; kijai's ComfyUI-CogVideoXWrapper ``model_loading.py`` and ``lora_utils.py``.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass

from finetune.conversion.lora_layouts import LAYOUTS, Layout, split_name
from finetune.conversion.stored import StoredLora, follows_control
from finetune.core.files import TRAINABLE
from finetune.methods.adapter import COMPONENT, METADATA_KEY
from finetune.methods.lora import ranks_by_name


@dataclass(frozen=True)
class Loading:
    """What will happen to a file in one program."""

    program: str
    loads: bool
    """Whether all of it takes effect, as it was trained so far as the file tells."""
    outcome: str

    def __str__(self) -> str:
        return f"{self.program}: {'yes' if self.loads else 'no'}, {self.outcome}"


def lora_loadings(lora: StoredLora) -> tuple[Loading, ...]:
    """What every program makes of a LoRA's file."""
    return tuple(rule(lora) for rule in (_diffusers, _comfyui, _kijai, _init_from, _generate))


def transformer_loadings(layout: Layout | None, *, has_config: bool) -> tuple[Loading, ...]:
    """What every program makes of a whole transformer's weights.

    Args:
        layout: of its names; None where they are unknown.
        has_config: whether diffusers' ``config.json`` stands beside them.
    """
    is_folder = layout is LAYOUTS["bare"] and has_config
    lacking = "" if is_folder else "it takes diffusers' names, and config.json beside them"
    native = layout is LAYOUTS["comfyui"]
    return (
        Loading("diffusers", is_folder, lacking or "CogVideoXTransformer3DModel.from_pretrained takes the folder"),
        Loading("ComfyUI", native, "as a diffusion model" if native else "it knows a CogVideoX by ComfyUI's own names"),
        Loading("ComfyUI, kijai's wrapper", is_folder, lacking or "as the transformer of a diffusers pipeline"),
        Loading("method.init_from", False, "it takes adapters; a run begins from a whole model with model.pretrained"),
        Loading("generate --transformer", is_folder, lacking or "as it is"),
    )


def _diffusers(lora: StoredLora) -> Loading:
    return Loading("diffusers", *_stock(lora))


def _stock(lora: StoredLora) -> tuple[bool, str]:
    names = [name for name in lora.shapes if "dora_scale" not in name]  # dropped with a warning
    if strange := [name for name in names if "lora" not in name]:
        return False, f"load_lora_weights refuses a file with tensors such as {strange[0]}"
    if not any(name.startswith(f"{COMPONENT}.") for name in names):
        return False, f"load_lora_weights loads nothing and only warns: no name begins with {COMPONENT}."
    if lora.layout is None or lora.layout.name != "diffusers":
        return False, "its names are none of a CogVideoX transformer"
    stated = METADATA_KEY in lora.metadata
    if stated and lora.settings[0] and not lora.settings[0].get("target_modules"):
        return False, "load_lora_weights fails for want of target_modules among the settings in its header"
    if len(names) < len(lora.shapes):
        return False, "the magnitudes of its DoRA are dropped with a warning"
    alphas, where = lora.alphas(read=False)
    if not alphas:
        return True, "with alpha taken as the rank: the update counts 1, whatever it was trained at"
    scales = lora.scales(read=False).values()
    if not stated and not all(math.isclose(scale, 1.0, rel_tol=1e-5) for scale in scales):
        trained = f"its update counts 1, and was trained to count {max(scales):g} by its alpha {where}"
        return False, f"{trained}, which load_lora_weights does not read; `finetune convert` writes it where it does"
    return True, f"at strength 1 as trained, by its alpha {where}"


def _comfyui(lora: StoredLora) -> Loading:
    if lora.uses_dora:
        return Loading("ComfyUI", False, "it divides a DoRA by the norms of the base's weights, not of the sum's")
    layouts = (LAYOUTS["comfyui"], LAYOUTS["kohya-comfyui"])
    stems = [split_name(name)[0] for name in lora.shapes if not name.endswith("lora_magnitude_vector")]
    count = sum(any(layout.module_of(stem) for layout in layouts) for stem in stems)
    if count < len(lora.shapes):
        lost = f"{len(lora.shapes) - count} of {len(lora.shapes)} tensors find no place"
        fix = "" if follows_control(lora.file, lora.shapes) else "; `finetune merge --to comfyui` renames them"
        return Loading("ComfyUI", False, f"{lost}, which its log warns of{fix}")
    without = "" if lora.states_alpha else "; without .alpha tensors the update counts 1"
    return Loading("ComfyUI", True, f"every tensor finds its place{without}")


def _kijai(lora: StoredLora) -> Loading:
    program = "ComfyUI, kijai's wrapper"
    scaled = re.search("orbit|dimensionx", str(lora.file).lower())
    trap = f"; its path holds {scaled[0]!r}, for which the wrapper multiplies by 1 / rank" if scaled else ""
    if any("lora_B" in name for name in lora.shapes):
        loads, outcome = _stock(lora)
        return Loading(program, loads and not trap, f"through diffusers: {outcome}{trap}")
    layouts = (LAYOUTS["kohya"], LAYOUTS["videox-fun"])
    stems = [split_name(name)[0] for name in lora.shapes]
    if not all(any(layout.module_of(stem) for layout in layouts) for stem in stems):
        return Loading(program, False, "it takes names of diffusers' or kohya's layout")
    if lora.uses_dora:
        return Loading(program, False, "it merges the update without DoRA's magnitudes")
    scale = "alpha / rank" if lora.states_alpha else "1, for want of .alpha tensors"
    outcome = f"merged into the weights at {scale}"
    return Loading(program, not trap, outcome + trap)


def _init_from(lora: StoredLora) -> Loading:
    program = "method.init_from"
    if lora.layout is None or lora.layout.name not in ("diffusers", "bare"):
        return Loading(program, False, "it takes diffusers' names, into which `finetune convert` brings a LoRA")
    scales = sorted(lora.scales(read=False).values())
    if not math.isclose(scales[0], scales[-1], rel_tol=1e-5):
        return Loading(program, False, "its layers' updates count differently, which `finetune convert` evens out")
    rank, rooted = lora.common_rank, lora.settings[0].get("use_rslora") is True
    options = [f"ranks: {json.dumps(others)}"] if (others := ranks_by_name(lora.ranks, rank)) else []
    options += ["use_rslora: true"] if rooted else []
    options += ["use_dora: true"] if lora.uses_dora else []
    alpha = scales[0] * (math.sqrt(rank) if rooted else rank)
    settings = ", ".join([f"rank: {rank}", f"alpha: {alpha:g}", *options])
    return Loading(program, True, f"with method {{{settings}}} and the targets above")


def _generate(lora: StoredLora) -> Loading:
    program = "generate --adapter"
    if lora.file.name == TRAINABLE:
        return Loading(program, True, "as the checkpoint it is in")
    if any(name.startswith(f"{COMPONENT}.") and ".lora_A" in name for name in lora.shapes):
        loads, outcome = _stock(lora)
        return Loading(program, loads, f"through diffusers: {outcome}")
    return Loading(program, False, "it takes diffusers' layout, into which `finetune convert` brings a LoRA")
