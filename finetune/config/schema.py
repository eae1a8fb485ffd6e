"""``RunConfig``: which sections a run has, and how it is made from a file, its overrides, or values.

A field is declared, documented and given its default where it is read; here stand those that only the loop reads
(validation, tracking), the union of methods, and what is composed of all.
"""

from __future__ import annotations

import copy
import errno
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, Field, PrivateAttr, ValidationError, field_validator

from finetune.checkpoint.folders import CheckpointConfig
from finetune.cogvideox.config import DropoutConfig, ModelConfig, ObjectiveConfig
from finetune.cogvideox.model_files import canonical_name
from finetune.config.document import Document, Dumper, Keys, dotted, quoted
from finetune.config.messages import explain
from finetune.core.checksums import digest_of
from finetune.core.errors import ConfigError, raise_all
from finetune.core.text import text_fault
from finetune.core.types import MOST_STEPS, Bucket, SamplePrompt, Strict
from finetune.datasets.cache import CacheConfig
from finetune.datasets.geometry import BucketField, ClipConfig
from finetune.datasets.samples import CaptionConfig, ValSplitConfig
from finetune.datasets.schedule import Constant, LRScheduleConfig, TrainConfig
from finetune.datasets.sources import SourceConfig
from finetune.memory.config import MemoryConfig
from finetune.methods.full import FullMethod
from finetune.methods.lokr import LokrMethod
from finetune.methods.lora import LoraMethod
from finetune.optim.optimizers import AdamW8bit, OptimizerConfig
from finetune.parallel.config import ParallelConfig


class ValidationConfig(Strict):
    """What is measured and sampled while training, and how often."""

    every: int | None = Field(200, ge=1, le=MOST_STEPS)
    """Optimizer steps between two measurements of the held-out loss, and one after the last step; null for none."""
    at_start: bool = True
    """Measure, and sample, before the first step as well: what the base model does is what the run is compared with."""
    clips: int = Field(8, ge=1, le=1_000_000)
    """At most this many held-out clips are measured, and as many training clips, whose difference is the
    generalisation gap. A measurement takes ``2 x clips x timesteps`` forward passes, a training step about four."""
    timesteps: int = Field(4, ge=1, le=1000)
    """Each clip is measured at this many timesteps, spread evenly over the noise schedule."""
    samples: tuple[SamplePrompt, ...] = ()
    """Videos to sample, each from its prompt (and image) and seed."""
    sample_every: int | None = Field(500, ge=1, le=MOST_STEPS)
    """Optimizer steps between two rounds of sampling, and one after the last step; null for none."""
    num_inference_steps: int = Field(50, ge=1, le=1000)
    """Denoising steps per sampled video."""
    guidance_scale: float = Field(6.0, ge=1, le=1_000)
    """Classifier-free guidance; 1 for none, which halves the time."""
    dynamic_cfg: bool = False
    """Let the guidance grow with the denoising steps, as CogVideoX's demo does with the DPM scheduler."""
    bucket: BucketField | None = None
    """Frames x height x width of the sampled videos; left out: the first of ``data.buckets``."""


class TrackingConfig(Strict):
    """Where the run's numbers go."""

    kind: Literal["tensorboard", "wandb", "trackio", "mlflow", "comet_ml", "swanlab", "aim", "clearml", "none"] = (
        "tensorboard"
    )
    """``tensorboard`` writes event files to ``output_dir/tensorboard``; the others are trackers that accelerate knows,
    each to be installed and signed in to beforehand; ``none`` leaves the console only."""
    every: int = Field(1, ge=1, le=MOST_STEPS)
    """Optimizer steps between two records of the training metrics. Held-out losses and videos are always recorded."""
    console_interval_s: float = Field(10.0, gt=0, le=86_400)
    """Seconds between two progress lines where the output is no terminal (a terminal's line follows every step)."""

    def accelerator_options(self, run_dir: Path) -> dict[str, Any]:
        """Arguments that ``Accelerator(...)`` needs for a ``Tracker`` of this section to write to ``run_dir``."""
        return {"log_with": None if self.kind == "none" else self.kind, "project_dir": str(run_dir)}


MethodConfig = Annotated[LoraMethod | LokrMethod | FullMethod, Field(discriminator="kind")]
"""What trains. A method prepares a transformer in place (``apply``) and from then on names what trains: by peft's
state-dict names for LoRA, by diffusers' parameter names for full fine-tuning."""


# ------------------------------------------------------------------------------------------------------------ the whole

_Model = TypeVar("_Model", bound=BaseModel)


def _defaults(section: type[_Model]) -> _Model:
    return section.model_validate({})


class DataConfig(ValSplitConfig, DropoutConfig, CaptionConfig, ClipConfig):
    """What to train on: where the clips are, how they are cut, and what is done to their captions."""

    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    """Where clips and captions come from. Several sources are read one after the other; ``repeats`` weighs them."""

    @property
    def trained_buckets(self) -> tuple[Bucket, ...]:
        """``buckets``, and those of still images where a source has some."""
        stills = self.still_buckets if any(source.images for source in self.sources) else ()
        return tuple(dict.fromkeys([*self.buckets, *stills]))

    @property
    def preserves_prior(self) -> bool:
        """Whether a source's clips are for prior preservation."""
        return any(source.prior_preservation for source in self.sources)


@dataclass(frozen=True)
class Provenance:
    """Where a configuration was written. No part of what it says, so it never makes two configurations differ."""

    base: Path = field(default_factory=Path.cwd, compare=False)
    """The folder that relative paths started at."""
    document: Document = field(default_factory=lambda: Document({}), compare=False)


class RunConfig(Strict):
    """Everything about one run. Relative paths start at the configuration file's folder; ``~`` is the home folder, and
    ``$NAME`` or ``${NAME}`` an environment variable.
    """

    model: ModelConfig
    """The base model."""
    data: DataConfig
    """The clips and captions."""
    cache: CacheConfig = _defaults(CacheConfig)
    """The store of VAE latents and text embeddings that training reads."""
    method: MethodConfig = _defaults(LoraMethod)
    """What is trained: an adapter (``lora``, where ``kind`` is left out, or ``lokr``) or the whole transformer
    (``full``)."""
    objective: ObjectiveConfig = _defaults(ObjectiveConfig)
    """What is learnt from a prediction: timesteps and their weights."""
    optimizer: OptimizerConfig = _defaults(AdamW8bit)
    """How weights are updated (``adamw8bit`` where ``kind`` is left out)."""
    lr_schedule: LRScheduleConfig = _defaults(Constant)
    """How the learning rate moves (``constant`` where ``kind`` is left out)."""
    train: TrainConfig
    """How long, and on how much at once."""
    parallel: ParallelConfig = _defaults(ParallelConfig)
    """What several processes divide among them."""
    memory: MemoryConfig = _defaults(MemoryConfig)
    """What is traded for GPU memory."""
    validation: ValidationConfig = _defaults(ValidationConfig)
    """What is measured and sampled along the way."""
    checkpoint: CheckpointConfig = _defaults(CheckpointConfig)
    """What is saved, and what a run continues from."""
    tracking: TrackingConfig = _defaults(TrackingConfig)
    """Where metrics go."""
    output_dir: Path
    """The run's folder: resolved configuration, checkpoints, metrics, samples, exports."""

    _provenance: Provenance = PrivateAttr(default_factory=Provenance)

    @field_validator("method", "optimizer", "lr_schedule", mode="before")
    @classmethod
    def _default_kind(cls, value: Any, info: Any) -> Any:
        # So that `optimizer: {lr: 2e-4}` and `--set method.rank=64` mean what they say.
        if isinstance(value, Mapping) and "kind" not in value:
            return {"kind": cls.model_fields[info.field_name].default.kind, **value}
        return value

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, base: Path | None = None) -> RunConfig:
        """Build a configuration in code, checked as strictly as a file.

        Args:
            values: what the YAML file would hold.
            base: the folder that relative paths start at; the working folder if None.

        Raises:
            ConfigError: naming every fault by its dotted path.
        """
        return build(Document(dict(values)), base=base or Path.cwd())

    @property
    def base(self) -> Path:
        """The folder that relative paths of the configuration started at; its own paths are absolute already."""
        return self._provenance.base

    def where(self, path: str) -> str:
        """Where a dotted path such as ``data.buckets.0`` was written, or its nearest written parent, for messages."""
        keys = (int(part) if part.isdecimal() else part for part in path.split("."))
        return self._provenance.document.place(tuple(keys))

    def to_dict(self) -> dict[str, Any]:
        """Every value, defaults included, as JSON types; what decides the rest of a section comes first in it."""
        values: dict[str, Any] = _leaders_first(self.model_dump(mode="json"))
        return values

    def to_yaml(self) -> str:
        """Every value, defaults included, as YAML that ``load_config`` reads back as an equal configuration."""
        return yaml.dump(self.to_dict(), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)

    @property
    def digest(self) -> str:
        """A digest of every value; equal configurations have equal digests, wherever they were written."""
        return digest_of(self.to_dict())


_LEADERS = ("kind", "path", "sources")


def _leaders_first(value: Any) -> Any:
    if isinstance(value, dict):
        ordered = sorted(value.items(), key=lambda item: item[0] not in _LEADERS)
        return {name: _leaders_first(item) for name, item in ordered}
    return [_leaders_first(item) for item in value] if isinstance(value, list) else value


# ------------------------------------------------------------------------------------------- from a file or from values


def load_config(path: str | Path, overrides: str | Iterable[str] | Mapping[str, Any] = ()) -> RunConfig:
    """``finetune.load_config``: read a file, put the overrides in its place, and validate what both say together."""
    path = as_path(path, "load_config")
    assignments: list[Any] = [None]
    if isinstance(overrides, Mapping):
        assignments = list(_leaves(overrides, ""))
    elif isinstance(overrides, Iterable):
        assignments = [overrides] if isinstance(overrides, str) else list(overrides)
    if not isinstance(overrides, Mapping) and not all(isinstance(item, str) for item in assignments):
        raise ConfigError(
            f"{overrides!r:.200} are no overrides", fix='give ["optimizer.lr=2e-4", ...] or {"optimizer.lr": 2e-4, ...}'
        )
    document = Document.read(path)
    faults: list[ConfigError] = []
    for assignment in assignments:
        try:
            if isinstance(assignment, str):
                document.override(assignment)
            else:
                target, value = assignment
                document.assign(target, copy.deepcopy(value), where=f"--set {target}={quoted(value)}")
        except ConfigError as fault:
            faults.append(fault)
    raise_all(ConfigError, faults, what="{n} overrides cannot be applied", limit=100)
    return build(document, base=path.absolute().parent)


def _leaves(values: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def as_path(value: str | os.PathLike[str], what: str) -> Path:
    """``value`` as a path with ``~`` expanded: what a public function does with a path that it is given.

    Raises:
        ConfigError: if it is none; ``what`` names the argument.
    """
    try:
        return Path(value).expanduser()
    except (TypeError, RuntimeError) as error:
        raise ConfigError(f"{value!r:.200} is no path: {error}", where=what, fix="give a str or a Path") from None


def as_config(config: RunConfig | Mapping[str, Any] | str | Path) -> RunConfig:
    """What a public function takes for a run's configuration: one that is built, the values of one, or its file.

    Raises:
        ConfigError: if it is none of these, or as ``load_config`` and ``RunConfig.from_dict``.
    """
    if isinstance(config, RunConfig):
        return config
    if isinstance(config, Mapping):
        return RunConfig.from_dict(config)
    if isinstance(config, str | os.PathLike):
        return load_config(config)
    raise ConfigError(
        f"a {type(config).__name__} is no configuration", fix="give a RunConfig, a YAML file's path, or a mapping"
    )


def validate(kind: type[_Model], document: Document) -> _Model:
    """Validate a document as a ``kind``.

    Raises:
        ConfigError: one for all faults, each with its place in the file.
    """
    headline = "{n} faults in " + (document.name or "the configuration")
    faults = [
        ConfigError(f"{dotted(path)} is damaged: {fault}", where=document.place(path))
        for path, value in _values(document.values)
        if isinstance(value, str) and (fault := text_fault(value))
    ]
    raise_all(ConfigError, faults, what=headline)
    try:
        model = kind.model_validate(document.values)
    except ValidationError as error:
        raise_all(ConfigError, explain(kind, error, document), what=headline, limit=1000)
        raise
    for path, value in _values(model):  # what pydantic accepts as a number and nobody means
        wanted = "finite number" if isinstance(value, float) and not math.isfinite(value) else ""
        if isinstance(value, int | float) and type(value) is not bool and isinstance(document.value(path), bool):
            value, wanted = document.value(path), "number"
        if wanted:
            faults.append(
                ConfigError(f"{dotted(path)} is {value}, and a {wanted} is wanted", where=document.place(path))
            )
    raise_all(ConfigError, faults, what=headline, limit=1000)
    return model


def _values(holder: Any, path: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    """(path, value) of all that sections, mappings and lists hold in the end."""
    if isinstance(holder, BaseModel | Mapping):
        items: Iterable[tuple[Any, Any]] = dict(holder).items()
    elif isinstance(holder, list | tuple):
        items = enumerate(holder)
    else:
        yield path, holder
        return
    for key, value in items:
        yield from _values(value, (*path, key))


def build(document: Document, *, base: Path) -> RunConfig:
    """Validate a document, make its paths absolute and remember where everything was written.

    Raises:
        ConfigError: one for all faults.
    """
    validated = validate(RunConfig, document)
    try:
        config = with_absolute_paths(validated, base)
    except (OSError, RuntimeError) as error:  # a name too long; links in a circle; ~nobody
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise ConfigError(f"a path cannot be used: {reason!s:.300}", where=document.name) from None
    document.places.pop((), None)  # of what is written nowhere, the file is named without its first line
    config._provenance = Provenance(base, document)
    return config


def with_absolute_paths(config: RunConfig, base: Path) -> RunConfig:
    """The same configuration with every path absolute: ``~`` expanded, relative ones started at ``base``."""
    resolved: RunConfig = _absolute(config, base)
    model = resolved.model
    # A hub id or a folder: the type cannot say which, the disk can.
    local = _resolve(Path(model.pretrained), base)
    is_path = model.pretrained.startswith((".", "~", "/", "$")) or local.is_dir()
    model = model.model_copy(update={"pretrained": str(local) if is_path else canonical_name(model.pretrained)})
    return resolved.model_copy(update={"model": model})


def _absolute(value: Any, base: Path) -> Any:
    if isinstance(value, BaseModel):
        return value.model_copy(
            update={name: _absolute(getattr(value, name), base) for name in type(value).model_fields}
        )
    if isinstance(value, tuple | list):
        return type(value)(_absolute(item, base) for item in value)
    if isinstance(value, dict):
        return {key: _absolute(item, base) for key, item in value.items()}
    return _resolve(value, base) if isinstance(value, Path) else value


def _resolve(path: Path, base: Path) -> Path:
    if "$" in str(path) and not os.path.lexists(base / path):
        path = Path(os.path.expandvars(path))
        if unset := re.search(r"\$(\w+|\{\w*\})", str(path)):
            raise RuntimeError(f"{path} names the environment variable {unset.group()}, which is not set")
    joined = (base / path.expanduser()).absolute()
    try:
        os.lstat(joined)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:  # any other may be mended before the path is used
            raise
    # Collapse ".." only where that means the same folder (behind a symbolic link it may not); links stay as named.
    collapsed = Path(os.path.normpath(joined))
    return collapsed if collapsed.resolve() == joined.resolve() else joined


def json_schema() -> dict[str, Any]:
    """The JSON schema of a run configuration, for editors and for ``docs/config.md``."""
    return RunConfig.model_json_schema()
