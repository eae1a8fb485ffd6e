"""A user's first configuration: what ``finetune init`` writes, and every file in ``configs/``."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from finetune.cards import OVERHEAD_GIB
from finetune.errors import ConfigError
from finetune.facts import HUB_IDS, Facts, json_folder, known_model, published_variant, read_facts
from finetune.files import atomic_write_text
from finetune.generate_inputs import native_bucket
from finetune.recipes import Recipe, recipe_for
from finetune.starter_text import body, header
from finetune.text import text_fault

Method = Literal["lora", "full"]

LORA_PEAK_GIB: Mapping[str, float] = {"2b": 7.3, "5b": 18.3, "5b-i2v": 18.4, "1.5-5b": 29.4, "1.5-5b-i2v": 29.4}
"""What the planner predicts for a LoRA of rank 128 at the native bucket, batch size 1, full gradient checkpointing and
8-bit Adam: most GiB that torch allocates in a step; ``benchmarks/results/memory_plans.json`` has the exact figures."""

FULL_PEAK_GIB: Mapping[str, float] = {"2b": 17.6, "5b": 54.7, "5b-i2v": 54.8, "1.5-5b": 59.7, "1.5-5b-i2v": 59.7}
"""The same for full fine-tuning in bf16, with float32 master copies."""

EXAMPLE_CARDS_GIB: Mapping[tuple[str, Method], int] = {
    ("2b", "lora"): 12,
    ("5b", "lora"): 24,
    ("5b-i2v", "lora"): 24,
    ("1.5-5b", "lora"): 32,
    ("1.5-5b-i2v", "lora"): 32,
    ("2b", "full"): 24,
    ("5b", "full"): 80,
    ("5b-i2v", "full"): 80,
    ("1.5-5b", "full"): 80,
    ("1.5-5b-i2v", "full"): 80,
}
"""The examples in ``configs/``, and the card each is for."""


@dataclass(frozen=True)
class Starter:
    """What a starting configuration is made for."""

    pretrained: str
    """As it will stand in ``model.pretrained``."""
    facts: Facts
    method: Method
    known: str | None
    """Which published model it is, for the memory figures; None for another checkpoint."""
    card_gib: float | None
    clips: str
    cache_dir: str
    output_dir: str
    command: str
    """What wrote it."""
    recipe: Recipe | None = None
    """The memory settings it is written with."""
    measured: str = ""
    """What was measured with ``recipe``, in words; empty where nothing was."""

    @property
    def peak_gib(self) -> float | None:
        """Predicted memory of a training step; None where there is no figure for the model."""
        if self.recipe is not None:
            return self.recipe.peak_gib
        if self.known is None:
            return None
        return (LORA_PEAK_GIB if self.method == "lora" else FULL_PEAK_GIB)[self.known]

    def notes(self, file: str = "run.yaml") -> list[str]:
        """Whether it fits the card, in words; empty if nothing is to be said. ``file`` is how commands call it."""
        if self.card_gib is None or self.peak_gib is None or self.peak_gib + OVERHEAD_GIB <= self.card_gib:
            return []
        return [
            f"this is predicted to need about {self.peak_gib + OVERHEAD_GIB:.1f} GiB, and the card has"
            f" {self.card_gib:g}: `finetune plan --config {shlex.quote(file)} --budget {self.card_gib:g}GB` says which"
            " memory section fits, or choose a smaller model, a smaller bucket or a larger card"
        ]

    def text(self, file: str) -> str:
        """The commented configuration.

        Args:
            file: how the commands in its header call it, from the folder where they will be typed.
        """
        method = "LoRA" if self.method == "lora" else "full fine-tuning"
        card = "" if self.card_gib is None else f", for a card of {self.card_gib:g} GB"
        how = "" if self.recipe is None else f": {self.recipe.words}"
        return header(
            f"{self.pretrained}: {method}{card}{how}.",
            self._memory,
            self.notes(file),
            self.command,
            file,
            os.path.normpath(Path(file).parent / self.output_dir),
        ) + body(
            pretrained=self.pretrained,
            clips=self.clips,
            bucket=str(native_bucket(self.facts)),
            fps=self.facts.native_fps,
            image_to_video=self.facts.image_to_video,
            cache_dir=self.cache_dir,
            lora=self.method == "lora",
            output_dir=self.output_dir,
            memory={} if self.recipe is None else self.recipe.memory,
            optimizer={} if self.recipe is None else self.recipe.optimizer,
        )

    @property
    def _memory(self) -> str:
        at = f"at {native_bucket(self.facts)} (frames x height x width) and batch size 1"
        if self.peak_gib is None:
            return f"Peak memory: there is no figure for this model {at}; `finetune plan` predicts one."
        measured = f"measured {self.measured}" if self.measured else "not measured"
        room = (
            "" if self.card_gib is None else f" A card of {self.card_gib:g} GB has {self.card_gib - OVERHEAD_GIB:.1f}."
        )
        return (
            f"Peak memory {at}: {self.peak_gib:.1f} GiB, predicted, {measured}; about {OVERHEAD_GIB} GiB more for the"
            f" CUDA context and fragmentation.{room}"
        )


def write_starter(
    *,
    model: str,
    method: Method,
    card_gib: float | None,
    clips: Path | None,
    output: Path,
    force: bool = False,
    command: str = "finetune init",
) -> list[str]:
    """Write a commented configuration.

    Args:
        model: a published model under any of its names, another hub id, or a model folder.
        method: what to train.
        card_gib: the GPU's memory, to say whether the run is predicted to fit; None says nothing of it.
        clips: file or folder with clips and captions; None leaves a placeholder.
        output: the file to write. Paths in it are relative to its folder where they were given relative.
        force: replace an existing file.
        command: what the file's header says it was written by.

    Returns:
        Advice for the user.

    Raises:
        ConfigError: if the file exists, or a name is not one line of text.
        ModelError: if the model cannot be found, or is none.
    """
    if output.exists() and not force:
        raise ConfigError("the file exists already", where=str(output), fix="choose another --output, or pass --force")
    for option, text in (("--model", model), ("--data", str(clips or "")), ("--output", str(output))):
        if fault := text_fault(text, one_line=True):  # it would stand in a comment, and end it
            raise ConfigError(f"the name is damaged: {fault}", where=option)
    folder = Path(model).expanduser()
    known = None if folder.is_dir() else published_variant(model)
    starter = Starter(
        pretrained=HUB_IDS[known] if known else _from_folder_of(output, folder) if folder.is_dir() else model,
        facts=read_facts(str(json_folder(model))),
        method=method,
        known=known,
        card_gib=card_gib,
        clips="clips" if clips is None else _from_folder_of(output, clips),
        cache_dir="cache",
        output_dir=f"runs/{output.stem}",
        command=command,
    )
    file = str(output)
    if known is not None and card_gib is not None and starter.notes(file):  # plain checkpointing does not fit
        starter = replace(starter, recipe=recipe_for(known, method, card_gib))
    atomic_write_text(output, starter.text(file))
    missing = [] if clips is None or clips.expanduser().exists() else [f"there is nothing at {clips} yet"]
    placeholder = ["put the path of your clips into data.sources"] if clips is None else []
    return [*starter.notes(file), *missing, *placeholder]


def _from_folder_of(output: Path, path: Path) -> str:
    """``path`` as it has to stand in a file at ``output``."""
    path = path.expanduser()
    return str(path) if path.is_absolute() else os.path.relpath(path.absolute(), output.absolute().parent)


def recipe_example(recipe: Recipe, measured: str = "") -> tuple[str, str]:
    """Name and text of a recipe's file in ``configs/``.

    Args:
        recipe: what it is made of.
        measured: what was measured, in words.
    """
    example_starter = replace(
        _example(recipe.model, recipe.method, recipe.name.removesuffix(".yaml"), recipe.card_gib),
        recipe=recipe,
        measured=measured,
    )
    return recipe.name, example_starter.text(f"configs/{recipe.name}")


def example(known: str, method: Method) -> tuple[str, str]:
    """Name and text of one file of ``configs/``."""
    name = f"cogvideox-{known}-{method}"
    starter = _example(known, method, name, EXAMPLE_CARDS_GIB[known, method])
    return f"{name}.yaml", starter.text(f"configs/{name}.yaml")


def _example(known: str, method: Method, name: str, card_gib: int) -> Starter:
    return Starter(
        pretrained=HUB_IDS[known],
        facts=read_facts(str(known_model(known))),
        method=method,
        known=known,
        card_gib=card_gib,
        clips="../clips",
        cache_dir="../cache",
        output_dir=f"../runs/{name}",
        command="scripts/make_configs.py",
    )
