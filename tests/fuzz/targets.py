"""What is fuzzed. A target takes bytes, writes them where a user's file would be, and lets the package read them.

It raises only on a bug: a ``FinetuneError`` is the package doing its work. Time and memory are the runner's business.
To add one, write a function and its seeds and put them into ``TARGETS``.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

from finetune.cogvideox.components import CONFIG_FILES
from finetune.cogvideox.model_files import known_model
from finetune.cogvideox.spec import read_spec
from finetune.config.schema import RunConfig, load_config
from finetune.core.errors import ConfigError, DataError, FinetuneError, ModelError
from finetune.datasets import tables
from finetune.datasets.samples import CaptionConfig, read_samples, source_files
from finetune.datasets.sources import CogKitSource, FolderSource, MetadataSource, PromptsSource
from finetune.datasets.tables import Table, read_table
from finetune.datasets.worker import Worker

from . import media, seeds
from .mutation import mutate


@dataclass(frozen=True)
class Target:
    """One thing to fuzz."""

    run: Callable[[bytes], object]
    """Raises only on a bug."""
    seeds: Callable[[], list[bytes]]
    """Valid and nearly valid inputs that mutation starts from."""
    tokens: tuple[bytes, ...] = ()
    """Pieces of the format that mutation inserts."""
    seconds: float = 5.0
    """Of the processor: a case that takes longer is a bug, and ten times as long by the clock a hang."""
    memory_mib: int | None = 1024
    """What one process of this target may allocate beyond what it starts with; None for no limit."""
    mutate: Callable[[random.Random, Sequence[bytes], Sequence[bytes]], bytes] = mutate
    """Makes a case from the pool and the tokens."""


OUTCOMES: list[str] = []
"""What the last case was refused with: new words make a case worth keeping (the runner clears the list)."""


@cache
def _folder() -> Path:
    """A folder of this process, holding one clip and one image that rows may name."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    for name in ("a.mp4", "b.mp4", "a.png"):
        (folder / name).write_bytes(b"x")
    return folder


def _expect(kind: type[FinetuneError], work: Callable[[], Any]) -> Any:
    """What ``work`` returns; None where it refuses its input properly, with words that can be printed and logged."""
    try:
        return work()
    except kind as error:
        told = str(error)
        OUTCOMES.append(told)
        told.encode("utf-8")
        assert told and "\x1b" not in told and "\0" not in told, f"not fit for a terminal: {told!r}"
        return None


def fuzz_config(data: bytes) -> RunConfig | None:
    """A configuration file: read, or refused with a ``ConfigError``; what is read survives being written and read."""
    path = _folder() / "run.yaml"
    path.write_bytes(data)
    config: RunConfig | None = _expect(ConfigError, lambda: load_config(path))
    if config is not None:
        again = _folder() / "again.yaml"
        again.write_text(config.to_yaml(), encoding="utf-8")
        assert load_config(again) == config, "the resolved configuration is read back as another one"
    return config


def fuzz_override(data: bytes) -> RunConfig | None:
    """A ``--set`` assignment on top of a good file."""
    path = _folder() / "good.yaml"
    if not path.is_file():
        path.write_bytes(seeds.GOOD_CONFIG)
    # What the operating system hands over for bytes that are not UTF-8.
    text = data.decode("utf-8", "surrogateescape")
    config: RunConfig | None = _expect(ConfigError, lambda: load_config(path, [text]))
    return config


def _fuzz_table(name: str, data: bytes) -> int | None:
    folder = _folder()
    (folder / name).write_bytes(data)
    source = MetadataSource(path=Path(name))
    return _samples(folder, source)


def _samples(folder: Path, source: Any) -> int | None:
    def read(skip: bool) -> int:
        found = read_samples([source], CaptionConfig(trigger="zkx"), row_files=("image",), base=folder, skip=skip)
        for sample in found.train:
            sample.caption.encode("utf-8")
            assert sample.video.resolve().is_relative_to(folder.resolve()), "a row led out of the folder"
        json.dumps([found.notes, [str(error) for error in found.unusable]]).encode("utf-8")
        return len(found.train)

    _expect(DataError, lambda: source_files([source], folder))
    strict: int | None = _expect(DataError, lambda: read(False))
    lenient: int | None = _expect(DataError, lambda: read(True))
    assert strict is None or strict == lenient, "leaving out bad rows changed a dataset that has none"
    return lenient


def fuzz_jsonl(data: bytes) -> int | None:
    """``metadata.jsonl``: rows, or a ``DataError``; never a file outside the folder."""
    return _fuzz_table("metadata.jsonl", data)


def fuzz_csv(data: bytes) -> int | None:
    """``metadata.csv``."""
    return _fuzz_table("metadata.csv", data)


def fuzz_parquet(data: bytes) -> int | None:
    """``metadata.parquet``, read in one worker for all cases: starting one takes a second."""
    (_folder() / "metadata.parquet").write_bytes(data)
    with mock.patch.object(tables, "Worker", lambda name, program: _parquet_reader()):
        table: Table | None = _expect(
            DataError, lambda: read_table(_folder() / "metadata.parquet", ("file_name", "prompt"))
        )
    return table and len(table.rows)


class _LastingWorker(Worker):
    def close(self) -> None:
        """Stay for the next case."""


@cache
def _parquet_reader() -> Worker:
    return _LastingWorker("Parquet reader", tables.PARQUET_WORKER)


def fuzz_layouts(data: bytes) -> int | None:
    """The same bytes as ``prompts.txt`` and ``videos.txt``, as a clip's caption, and as CogKit's ids."""
    folder = _folder() / "layout"
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    for name in ("a.mp4", "videos/a.mp4"):
        (folder / name).write_bytes(b"x")
    head, _, tail = data.partition(b"\0\0")
    for name, content in (("prompts.txt", head), ("videos.txt", tail or head), ("a.txt", head)):
        (folder / name).write_bytes(content)
    (folder / "metadata.jsonl").write_bytes(head)
    (folder / "videos" / "metadata.jsonl").write_bytes(tail or head)
    counts = [_samples(_folder(), source(path=folder)) for source in (PromptsSource, FolderSource, CogKitSource)]
    return sum(count or 0 for count in counts)


def fuzz_model_json(data: bytes) -> object:
    """Any one of a checkpoint's JSON files, the others being those of a published model."""
    folder = _folder() / "model"
    files = ("model_index.json", *CONFIG_FILES.values())
    chosen = files[data[0] % len(files)] if data else files[0]
    known = known_model("5b")
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data[1:] if name == chosen else (known / name).read_bytes())
    spec = _expect(ModelError, lambda: read_spec(str(folder)))
    if spec is not None:
        spec.tokens(spec.stated_bucket)
    return spec


def fuzz_media(data: bytes) -> str:
    """A video or an image, through a pool of one worker (``media``)."""
    told = media.fuzz_media(data)
    OUTCOMES.append(told)
    return told


def remove_folder() -> None:
    """Remove what this process wrote."""
    import shutil

    media.close()
    if _folder.cache_info().currsize:
        shutil.rmtree(_folder(), ignore_errors=True)
        _folder.cache_clear()


TARGETS: dict[str, Target] = {
    "config": Target(fuzz_config, seeds.configs, seeds.YAML_TOKENS),
    "override": Target(fuzz_override, seeds.overrides, seeds.YAML_TOKENS),
    "jsonl": Target(fuzz_jsonl, seeds.jsonl, seeds.JSON_TOKENS),
    "csv": Target(fuzz_csv, seeds.csv, seeds.CSV_TOKENS),
    "parquet": Target(fuzz_parquet, seeds.parquet, seconds=60, memory_mib=None),
    "layouts": Target(fuzz_layouts, seeds.layouts, seeds.JSON_TOKENS),
    "model_json": Target(fuzz_model_json, seeds.model_json, seeds.JSON_TOKENS),
    "media": Target(fuzz_media, media.seeds, seconds=media.SECONDS, memory_mib=None, mutate=media.mutate),
}
"""Every target by the name that the runner and its report use."""
