"""A first configuration: what ``finetune init`` writes, and every file in ``configs/``, from ``templates/``."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from finetune.cogvideox.model_files import HUB_IDS, json_folder, known_model, published_variant
from finetune.cogvideox.spec import ModelSpec, read_spec
from finetune.config.document import Dumper
from finetune.core.errors import ConfigError, DataError
from finetune.core.files import atomic_write_bytes, atomic_write_text
from finetune.core.gpu import OVERHEAD_GIB
from finetune.core.text import text_fault
from finetune.core.types import Bucket

if TYPE_CHECKING:
    from finetune.diagnosis.frames import Encoded

TEMPLATES = Path(__file__).parent.parent / "templates"

Method = Literal["lora", "full"]

CACHE = "cache"
"""``cache.dir`` of a new file."""

_COMMENT_COLUMN = 25


@dataclass(frozen=True)
class Recipe:
    """A model, a method and the memory techniques that fit them to a card: a row of ``templates/recipes.yaml``."""

    model: str
    """One of ``model_files.KNOWN_MODELS``."""
    method: Method
    card_gib: int
    peak_gib: float
    """What the planner predicts for the training phase, at the native bucket and batch size 1."""
    goal_gib: float = 0.0
    """What it is meant to allocate at most; 0 for plain checkpointing."""
    memory: Mapping[str, Any] = field(default_factory=dict)
    """The memory section; empty for plain checkpointing."""
    optimizer: Mapping[str, str] = field(default_factory=dict)
    """What is added to the optimizer section."""
    words: str = ""
    """What the memory section does, for a heading."""

    @property
    def name(self) -> str:
        """Of its file in ``configs/``."""
        return f"cogvideox-{self.model}-{self.method}{f'-{self.card_gib}gb' if self.memory else ''}.yaml"


_ROWS = [Recipe(**row) for row in yaml.safe_load((TEMPLATES / "recipes.yaml").read_text(encoding="utf-8"))]

EXAMPLES = tuple(row for row in _ROWS if not row.memory)
"""Every model and method with plain gradient checkpointing, and the card that is for."""

RECIPES = tuple(row for row in _ROWS if row.memory)
"""The rows of the project's memory goals, in their order."""


def recipe_for(model: str, method: str, card_gib: float | None) -> Recipe:
    """The row for the largest card that is not larger than this one, for rows for larger cards are faster; where two
    are for the same, that with a memory section. Plain checkpointing where there is none, or nothing is known of the
    card.

    Args:
        model: one of ``model_files.KNOWN_MODELS``; an image-to-video model has the blocks and tokens of its twin.
        method: ``lora`` or ``full``.
        card_gib: the card's memory.
    """
    (plain,) = (row for row in EXAMPLES if (row.model, row.method) == (model, method))
    if card_gib is None:
        return plain
    twins = [row for row in RECIPES if (row.model, row.method) == (model.removesuffix("-i2v"), method)]
    fitting = [row for row in (*twins, plain) if row.card_gib <= card_gib]
    return max(fitting, key=lambda row: row.card_gib, default=plain)  # the first of equals


@dataclass(frozen=True)
class Settings:
    """What of a starting configuration depends on the clips."""

    buckets: tuple[Bucket, ...]
    bucket_words: str = "frames x height x width; several sort the clips by shape"
    image_buckets: tuple[Bucket, ...] = ()
    images: bool = False
    """Whether still images among them are trained on."""
    span: str = "head"
    rank: int = 128
    alpha: int = 64
    schedule: str = "cosine"
    warmup_steps: int = 50
    steps: int = 1500
    accumulation: int = 1
    holdout: float = 0.1
    every: int = 100
    sample_every: int = 500
    samples: tuple[tuple[str, str], ...] = ()
    """Prompts, each with the path of its image, as it stands in the file, or nothing."""

    @classmethod
    def usual(cls, spec: ModelSpec, method: Method) -> Settings:
        """Where nothing is known of the clips."""
        prompt = "a sailing boat crosses a calm bay at sunset, seen from the shore"
        steps = 1500 if method == "lora" else 3000
        return cls((spec.training_bucket,), steps=steps, samples=() if spec.image_to_video else ((prompt, ""),))


@dataclass(frozen=True)
class Starter:
    """What a starting configuration is made for."""

    pretrained: str
    """As it will stand in ``model.pretrained``."""
    spec: ModelSpec
    method: Method
    recipe: Recipe | None
    """The memory settings it is written with, and their figures; None for a model that was never published."""
    card_gib: float | None
    clips: str
    cache_dir: str
    output_dir: str
    command: str
    """What wrote it."""
    settings: Settings
    measured: str = ""
    """What was measured with ``recipe``, in words; empty where nothing was."""

    def notes(self, file: str = "run.yaml") -> list[str]:
        """Whether it fits the card, in words; empty if nothing is to be said. ``file`` is how commands call it."""
        if self.card_gib is None or self.recipe is None or self.recipe.peak_gib + OVERHEAD_GIB <= self.card_gib:
            return []
        return [
            f"this is predicted to need about {self.recipe.peak_gib + OVERHEAD_GIB:.1f} GiB, and the card has"
            f" {self.card_gib:g}: `finetune plan --config {shlex.quote(file)} --budget {self.card_gib:g}GB` says which"
            " memory section fits, or choose a smaller model, a smaller bucket or a larger card"
        ]

    def text(self, file: str) -> str:
        """The commented configuration.

        Args:
            file: how the commands in its header call it, from the folder where they will be typed.
        """
        from jinja2 import Environment, StrictUndefined

        environment = Environment(
            trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined
        )
        environment.filters |= {"quote": shlex.quote, "yaml": _as_yaml}
        text = environment.from_string((TEMPLATES / "run.yaml").read_text(encoding="utf-8")).render(
            **vars(self),
            notes=self.notes(file),
            overhead_gib=OVERHEAD_GIB,
            file=file,
            export_from=os.path.normpath(Path(file).parent / self.output_dir),
            memory=self.recipe.memory if self.recipe else {},
            optimizer={"kind": "", "weights": "", **(self.recipe.optimizer if self.recipe else {})},
        )
        # Comments in one column; lines with a path have none, and a path may hold what looks like one.
        commented = r"^(?! *(?:- path|dir|pretrained|output_dir):)( *[^#\s].*?) +# "
        return re.sub(commented, lambda line: f"{line[1]:<{_COMMENT_COLUMN}} # ", text, flags=re.M)


def _as_yaml(path: str) -> str:
    return yaml.dump(path, Dumper=Dumper, allow_unicode=True, width=1 << 20).removesuffix("...\n").strip()


def write_starter(
    *, model: str, method: Method, card_gib: float | None, clips: Path | None, output: Path, force: bool = False
) -> list[str]:
    """Write a commented configuration.

    Where there are clips, their rows and headers decide sizes, length, rank, what is held out and the prompts.

    Args:
        model: a published model under any of its names, another hub id, or a model folder.
        method: what to train.
        card_gib: the GPU's memory, to say whether the run is predicted to fit; None says nothing of it.
        clips: file or folder with clips and captions; None leaves a placeholder.
        output: the file to write. Paths in it are relative to its folder where they were given relative.
        force: replace an existing file.

    Returns:
        Advice for the user.

    Raises:
        ConfigError: if the file exists, or a name is not one line of text.
        ModelError: if the model cannot be found, or is none.
    """
    _require_free(output, force=force)
    for option, text in (("--model", model), ("--data", str(clips or "")), ("--output", str(output))):
        if fault := text_fault(text, one_line=True):  # it would stand in a comment, and end it
            raise ConfigError(f"the name is damaged: {fault}", where=option)
    folder = Path(model).expanduser()
    known = None if folder.is_dir() else published_variant(model)
    spec = read_spec(str(json_folder(model)))
    settings, notes = _settings(spec, method, clips, output)
    starter = Starter(
        pretrained=HUB_IDS[known] if known else _from_folder_of(output, folder) if folder.is_dir() else model,
        spec=spec,
        method=method,
        recipe=recipe_for(known, method, card_gib) if known else None,
        card_gib=card_gib,
        clips="clips" if clips is None else _from_folder_of(output, clips),
        cache_dir=CACHE,
        output_dir=f"runs/{output.stem}",
        command="finetune init",
        settings=settings,
    )
    atomic_write_text(output, starter.text(str(output)))
    return [*starter.notes(str(output)), *notes]


def _require_free(output: Path, *, force: bool) -> None:
    if output.exists() and not force:
        raise ConfigError("the file exists already", where=str(output), fix="choose another --output, or pass --force")


def write_translated(source: Path, output: Path, *, force: bool = False) -> list[str]:
    """Write another trainer's script or file as a configuration of ours, which says what became of each setting.

    Args:
        source: the script or file; relative paths in it start at its folder.
        output: the file to write.
        force: replace an existing file.

    Returns:
        What to look at before a run.

    Raises:
        ConfigError: if the file exists, ``source`` is of no trainer that is known, or what it asks for is possible in
            no run of ours; the file is written in the last case, for its faults to be mended.
    """
    from finetune.config.document import Document
    from finetune.config.other_trainers import translate
    from finetune.config.schema import build

    translation = translate(source.expanduser(), output.absolute().parent)
    _require_free(output, force=force)
    atomic_write_text(output, translation.text())
    build(Document.read(output), base=output.absolute().parent)
    unmapped = [setting for setting, _ in translation.unmapped if setting.line is not None]
    counted = f"{len(unmapped)} of its settings have no counterpart: the head of the file says why of each"
    return [*translation.notes, *([counted] if unmapped else [])]


def _settings(spec: ModelSpec, method: Method, clips: Path | None, output: Path) -> tuple[Settings, list[str]]:
    """What suits the clips, where they can be read; and notes."""
    usual = Settings.usual(spec, method)
    if clips is None:
        return usual, ["put the path of your clips into data.sources"]
    if not clips.expanduser().exists():
        return usual, [f"there is nothing at {clips} yet"]
    from finetune.caching.check import cpu_cores
    from finetune.datasets.rows import MediaPlace
    from finetune.diagnosis.proposal import propose

    try:
        media = MediaPlace.of(output.absolute().parent / CACHE)
        proposal = propose(clips.expanduser(), spec, cpu_cores(), media)
    except DataError as error:
        return usual, [f"nothing is proposed for these clips: {error}"]
    samples = []
    for number, prompt in enumerate(proposal.prompts, start=1):
        image = "" if prompt.image is None else _image(prompt.image, output, number)
        samples.append((prompt.text, image))
    point = proposal.point
    notes = [f"for {proposal.clips} clips of {proposal.files}; the buckets {proposal.loss}"]
    if proposal.images:
        notes.append(
            "images: true trains on the still images too, each as a clip of one frame; take it out if they are none of"
            " the dataset"
        )
    if proposal.left_out:
        notes.append(
            f"{proposal.left_out} videos cannot be read or are too short for them: `finetune doctor` names each"
        )
    settings = Settings(
        buckets=proposal.buckets,
        image_buckets=proposal.image_buckets,
        images=proposal.images > 0,
        bucket_words=proposal.loss,
        span=proposal.span,
        rank=point.rank,
        alpha=point.alpha,
        schedule=point.schedule,
        warmup_steps=point.warmup_steps,
        steps=proposal.steps,
        accumulation=point.accumulation,
        holdout=point.holdout,
        every=point.every,
        sample_every=point.sample_every,
        samples=tuple(samples),
    )
    return settings, notes


def _image(image: Path | Encoded, output: Path, number: int) -> str:
    """A prompt's image as it stands in the file; a clip's first frame is written beside it."""
    if isinstance(image, Path):
        return str(image)
    path = output.parent / f"{output.stem}-images" / f"{number}.webp"
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_bytes(path, image.content)
    return f"{path.parent.name}/{path.name}"


def _from_folder_of(output: Path, path: Path) -> str:
    """``path`` as it has to stand in a file at ``output``."""
    path = path.expanduser()
    return str(path) if path.is_absolute() else os.path.relpath(path.absolute(), output.absolute().parent)


def example(recipe: Recipe, measured: str = "") -> Starter:
    """The file of a recipe in ``configs/``.

    Args:
        recipe: one of ``EXAMPLES`` and ``RECIPES``.
        measured: what was measured, in words.
    """
    spec = read_spec(str(known_model(recipe.model)))
    return Starter(
        pretrained=HUB_IDS[recipe.model],
        spec=spec,
        method=recipe.method,
        recipe=recipe,
        card_gib=recipe.card_gib,
        clips="../clips",
        cache_dir="../cache",
        output_dir=f"../runs/{recipe.name.removesuffix('.yaml')}",
        command="scripts/make_configs.py",
        settings=Settings.usual(spec, recipe.method),
        measured=measured,
    )
