"""Dataset formats: rows of files in, ``Sample`` out, every bad row reported at once.  (SIGNATURES; being filled in)"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from finetune.section import Strict
from finetune.types import Sample

Split = Literal["train", "holdout"]


class CaptionConfig(Strict):
    """What is added to every caption when it is read."""

    trigger: str = ""
    """Trigger word: put first, followed by a space, unless the caption already holds it as a whole word."""
    caption_prefix: str = ""
    """Put before every caption as written: end it with a space where one is wanted."""
    caption_suffix: str = ""
    """Put after every caption as written."""


class _Source(Strict):
    path: Path
    """File or folder; a relative path starts at the configuration file's folder."""
    repeats: float = Field(1.0, gt=0, le=10_000)
    """How often each clip is seen per epoch: 3 = three times, 0.5 = in every other epoch on average."""
    split: Split = "train"
    """``train``, or ``holdout`` for clips that are only ever validated on."""


class AutoSource(_Source):
    """A path whose format is recognised."""

    kind: Literal["auto"] = "auto"


class MetadataSource(_Source):
    """A ``jsonl``, ``csv`` or ``parquet`` file with a row per clip."""

    kind: Literal["metadata"] = "metadata"
    root: Path | None = None
    video_column: str | None = None
    caption_column: str | None = None
    image_column: str | None = None


class PromptsSource(_Source):
    """CogVideo's layout: ``prompts.txt``, ``videos.txt`` and optionally ``images.txt``."""

    kind: Literal["prompts"] = "prompts"


class CogKitSource(_Source):
    """CogKit's layout."""

    kind: Literal["cogkit"] = "cogkit"


class FolderSource(_Source):
    """Clips with a text file of the same stem beside each."""

    kind: Literal["folder"] = "folder"


def _kind(value: Any) -> str:
    return str(value.get("kind", "auto") if isinstance(value, dict) else value.kind)


SourceConfig = Annotated[
    Annotated[AutoSource, Tag("auto")]
    | Annotated[MetadataSource, Tag("metadata")]
    | Annotated[PromptsSource, Tag("prompts")]
    | Annotated[CogKitSource, Tag("cogkit")]
    | Annotated[FolderSource, Tag("folder")],
    Discriminator(_kind),
]
"""One entry of ``data.sources``."""


@dataclass(frozen=True)
class SourceRead:
    """All samples of a dataset, in the order of the configuration and of the files."""

    train: tuple[Sample, ...]
    holdout: tuple[Sample, ...]
    notes: tuple[str, ...]
    """Advice that is no error, such as duplicate rows."""


def read_samples(
    sources: Sequence[SourceConfig], captions: CaptionConfig, *, image_to_video: bool, base: Path
) -> SourceRead:
    """Read every source; all bad rows are raised together as one ``DataError``."""
    raise NotImplementedError


def source_files(sources: Sequence[SourceConfig], base: Path) -> list[Path]:
    """Metadata files (whose content matters) and folders (whose listing matters) that decide what is read."""
    raise NotImplementedError
