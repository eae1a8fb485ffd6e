"""Memory settings for cards of a given size: a file each in ``configs/``, and a table in ``docs/memory.md``."""

from __future__ import annotations

import os
import re
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from finetune.cogvideox.model_files import HUB_IDS, json_folder, known_model, published_variant
from finetune.cogvideox.spec import ModelSpec, read_spec
from finetune.core.errors import ConfigError
from finetune.core.files import atomic_write_text
from finetune.core.gpu import OVERHEAD_GIB
from finetune.core.text import text_fault


@dataclass(frozen=True)
class Recipe:
    """A model, a method and the memory techniques that fit them to a card."""

    model: str
    """One of ``model_files.KNOWN_MODELS``."""
    method: Literal["lora", "full"]
    card_gib: int
    goal_gib: float
    """What the training phase is meant to allocate at most, at the native bucket and batch size 1."""
    peak_gib: float
    """What the planner predicts for it; ``benchmarks/results/memory_plans.json`` has the exact figure."""
    memory: Mapping[str, str]
    """The memory section, value by value, as YAML."""
    optimizer: Mapping[str, str]
    """What is added to the optimizer section."""
    words: str
    """What it does, for a heading."""

    @property
    def name(self) -> str:
        """Of its file in ``configs/``."""
        return f"cogvideox-{self.model}-{self.method}-{self.card_gib}gb.yaml"


_LEAN = {"checkpointing": "full", "block": "lean", "modulation": "host"}

_OFFLOADED = {**_LEAN, "activations": "host"}

_RELEASED = {"checkpointing": "full", "block": "lean", "gradient_release": "exact"}

_HOST = {**_RELEASED, "optimizer_states": "host"}

_ROUNDED = {"weights": "stochastic"}

_ON_HOST = {"kind": "adamw", "weights": "kahan"}
"""On a CPU torch's fused AdamW takes 0.8 ns per weight where bitsandbytes' 8-bit one takes 18 (two cores), and random
numbers for stochastic rounding 2.5."""

RECIPES: tuple[Recipe, ...] = (
    Recipe("5b", "lora", 24, 16.6, 15.1, _LEAN, {}, "lean blocks, adaLN weights on the host"),
    Recipe("5b", "lora", 16, 12.6, 11.5, _OFFLOADED, {}, "the same, and activations on the host"),
    Recipe("5b", "lora", 12, 8.2, 7.0, {**_OFFLOADED, "base": "fp8"}, {}, "the same, and the base in fp8"),
    Recipe("5b", "lora", 8, 4.6, 3.0, {**_OFFLOADED, "streamed_blocks": "all", "text_encoder": "streamed"}, {},
           "weights streamed from the host, activations on the host"),
    # What streams makes room for decoding sampled videos; training alone would fit without.
    Recipe("2b", "lora", 8, 6.1, 4.9, {**_LEAN, "streamed_blocks": "10", "text_encoder": "streamed"}, {},
           "lean blocks, a third of the weights streamed"),
    Recipe("2b", "lora", 6, 4.4, 1.6, {**_OFFLOADED, "streamed_blocks": "all", "text_encoder": "streamed"}, {},
           "weights streamed from the host, activations on the host"),
    Recipe("5b", "full", 32, 28.1, 26.6, _RELEASED, _ROUNDED, "gradients released block by block, 8-bit Adam"),
    Recipe("5b", "full", 24, 17.4, 16.1, _HOST, _ON_HOST, "optimizer states on the host"),
    Recipe("5b", "full", 16, 10.0, 2.3, {**_HOST, "activations": "host", "streamed_blocks": "all"}, _ON_HOST,
           "weights, activations and optimizer states on the host"),
    Recipe("1.5-5b", "lora", 24, 15.3, 13.6, _OFFLOADED, {}, "lean blocks, activations and adaLN weights on the host"),
    Recipe("1.5-5b", "lora", 16, 10.9, 9.1, {**_OFFLOADED, "base": "fp8"}, {}, "the same, and the base in fp8"),
)  # fmt: skip
"""The rows of the project's memory goals, in their order."""


def recipe_for(model: str, method: str, card_gib: float) -> Recipe | None:
    """The recipe for the largest card that is not larger than ``card_gib``; None where there is none.

    Args:
        model: one of ``model_files.KNOWN_MODELS``; an image-to-video model has the blocks and tokens of its twin.
        method: ``lora`` or ``full``.
        card_gib: the card's memory.
    """
    fitting = [
        recipe
        for recipe in RECIPES
        if (recipe.model, recipe.method) == (model.removesuffix("-i2v"), method) and recipe.card_gib <= card_gib
    ]
    return max(fitting, key=lambda recipe: recipe.card_gib, default=None)


# -------- The text of a starting configuration: one template, filled by ``starter``.

_COMMENT_COLUMN = 25

_WIDTH = 100


def header(title: str, memory: str, notes: Sequence[str], command: str, file: str, export_from: str) -> str:
    """The comment at the top: what it is for, what it is predicted to need, and what to type."""
    quoted = shlex.quote(file)  # the commands are there to be copied
    commands = [
        (f"finetune check --config {quoted}", "what would be trained on; loads no weights"),
        (f"finetune precompute --config {quoted}", "encode clips and captions (training does it too)"),
        (f"finetune train --config {quoted}", "on several GPUs: accelerate launch -m finetune train --config ..."),
        (f"finetune export {shlex.quote(export_from)}", "an adapter or transformer that diffusers loads"),
    ]
    lines = [
        title,
        "",
        *textwrap.wrap(memory, _WIDTH),
        *(line for note in notes for line in textwrap.wrap(f"NOTE: {note}.", _WIDTH)),
        "",
        f"Written by {command}. Every field: docs/config.md. Relative paths start at this file's folder.",
        "To be typed in the folder where it was written:",
        "",
        *(line for words, meaning in commands for line in (f"  # {meaning}", f"  {words}")),
    ]
    return "".join(f"# {line}".rstrip() + "\n" for line in lines)


def body(
    *,
    pretrained: str,
    clips: str,
    bucket: str,
    fps: int,
    image_to_video: bool,
    cache_dir: str,
    lora: bool,
    output_dir: str,
    memory: Mapping[str, str] = MappingProxyType({}),
    optimizer: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """The sections, each line with what a person may want to know of it."""
    parts = [
        _MODEL.format(pretrained=_quoted(pretrained)),
        _DATA.format(clips=_quoted(clips), bucket=bucket, fps=fps),
        _IMAGE_DATA if image_to_video else "",
        _CACHE.format(cache_dir=_quoted(cache_dir)),
        _IMAGE_CACHE if image_to_video else "",
        _LORA if lora else _FULL,
        _OPTIMIZER.format(
            lr="1e-4" if lora else "1e-5",
            note="LoRA wants 1e-4 to 1e-3; 2e-5 hardly moves it" if lora else "a tenth of what LoRA wants",
            kind=optimizer.get("kind", "adamw8bit"),
            more="".join(
                f"  {name}: {value} # {_OPTIMIZER_NOTES[name]}\n" for name, value in optimizer.items() if name != "kind"
            ),
        ),
        _TRAIN.format(steps=1500 if lora else 3000),
        _section("memory", memory, _MEMORY_NOTES) if memory else _MEMORY,
        _VALIDATION,
        _IMAGE_SAMPLES if image_to_video else _SAMPLES,
        _REST.format(output_dir=_quoted(output_dir)),
    ]
    return "".join(_aligned(line) for part in parts for line in part.splitlines(keepends=True))


def _section(name: str, values: Mapping[str, str], notes: Mapping[str, str]) -> str:
    return f"\n{name}:\n" + "".join(f"  {key}: {value} # {notes[key]}\n" for key, value in values.items())


def _quoted(text: str) -> str:
    """A path as YAML: plain where it can only be read as itself, else in quotes."""
    plain = re.fullmatch(r"[A-Za-z./~][\w./~+-]*", text) and text not in ("true", "false", "null", "~")
    return text if plain else "'" + text.replace("'", "''") + "'"


def _aligned(line: str) -> str:
    found = re.fullmatch(r"( *[^#\s].*?) +# (.*\n)", line)
    return f"{found[1]:<{_COMMENT_COLUMN}} # {found[2]}" if found else line


_MODEL = """
model:
  pretrained: {pretrained}
  dtype: bf16 # what frozen weights are held and computed in
"""

_DATA = """
data:
  sources:
    # metadata.jsonl, csv or parquet; prompts.txt + videos.txt; or clips with a .txt of the same name beside each
    - path: {clips}
  buckets: [{bucket}] # frames x height x width; several sort the clips by shape
  fps: {fps} # the rate this model was made for
  span: head # head | center | uniform | all: which part of a longer video
  short_clips: error # error | skip | pad: what happens to a video with too few frames
  trigger: "" # a rare word put before every caption, to call what is learnt
  caption_dropout: 0.1 # how often a clip is trained on without its caption, for guidance
  holdout: 0.1 # part of the videos kept out of training, to see overfitting
"""

_IMAGE_DATA = """\
  # the image condition is a clip's own first frame, unless the dataset names an image
  image_dropout: 0.05 # how often it is withheld
"""

_CACHE = """
cache:
  dir: {cache_dir}
  mode: auto # auto | require: encode what is missing, or stop and say what
"""

_IMAGE_CACHE = """\
  image_draws: 4 # noise-augmented encodings of the image condition, per clip
"""

_LORA = """
method:
  kind: lora
  rank: 128
  alpha: 64 # the update counts alpha / rank; the exported file carries it
  targets: attention # attention | attention+ff | all-linear | a regular expression
"""

_FULL = """
method:
  kind: full
"""

_OPTIMIZER = """
optimizer:
  kind: {kind} # adamw | adamw8bit | paged_adamw8bit | torchao_adamw8bit | custom
  lr: {lr} # {note}
{more}
lr_schedule:
  kind: cosine # constant | linear | cosine
  warmup_steps: 50
"""

_TRAIN = """
train:
  steps: {steps} # or, in its place, epochs: 20
  batch_size: 1
  accumulation: 1 # micro-batches per optimizer step
  max_grad_norm: 1.0
  seed: 42
"""

_MEMORY = """
memory:
  checkpointing: full # full | selective | none: recompute blocks in the backward pass, or keep activations
"""

_MEMORY_NOTES: Mapping[str, str] = {
    "checkpointing": "full | selective: selective is faster, for 0.1 GiB a block",
    "block": "our own forward and backward pass of a block",
    "modulation": "adaLN weights stay on the host, and are applied ahead",
    "activations": "what waits for the backward pass waits on the host",
    "base": "frozen weights in 8 bits; native for model.dtype",
    "streamed_blocks": "weights are copied to the GPU block by block",
    "text_encoder": "T5 runs block by block while captions are encoded",
    "gradient_release": "one block's gradients at a time; the norm is still that of all",
    "optimizer_states": "weights are updated on the CPU",
}

_OPTIMIZER_NOTES: Mapping[str, str] = {
    "weights": "master | kahan | stochastic: fp32 copies of bf16 weights, their rounding errors, or neither",
}

_VALIDATION = """
validation:
  every: 100 # held-out loss, and the same on training clips
  sample_every: 500 # videos for these prompts, before the first step as well
"""

_SAMPLES = """\
  samples:
    - prompt: a sailing boat crosses a calm bay at sunset, seen from the shore
      seed: 0
"""

_IMAGE_SAMPLES = """\
  samples: [] # an image-to-video model samples from an image: give your own, such as
  #  - prompt: a sailing boat crosses a calm bay at sunset, seen from the shore
  #    image: boat.png
  #    seed: 0
"""

_REST = """
checkpoint:
  every: 250
  keep_last: 2
  keep_best: true # by held-out loss
  resume: latest # latest | none | a checkpoint's folder

tracking:
  kind: tensorboard

output_dir: {output_dir}
"""


# -------- A user's first configuration: what ``finetune init`` writes, and every file in ``configs/``.

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
    spec: ModelSpec
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
            bucket=str(self.spec.training_bucket),
            fps=self.spec.native_fps,
            image_to_video=self.spec.image_to_video,
            cache_dir=self.cache_dir,
            lora=self.method == "lora",
            output_dir=self.output_dir,
            memory={} if self.recipe is None else self.recipe.memory,
            optimizer={} if self.recipe is None else self.recipe.optimizer,
        )

    @property
    def _memory(self) -> str:
        at = f"at {self.spec.training_bucket} (frames x height x width) and batch size 1"
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
        spec=read_spec(str(json_folder(model))),
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
        spec=read_spec(str(known_model(known))),
        method=method,
        known=known,
        card_gib=card_gib,
        clips="../clips",
        cache_dir="../cache",
        output_dir=f"../runs/{name}",
        command="scripts/make_configs.py",
    )
