"""musubi-tuner's dataset TOML: which folders and lists it names, and what it says that cannot be meant here."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.core.errors import DataError, raise_all
from finetune.datasets.tables import read_text

MAX_BYTES = 1 << 20
"""Of a TOML file."""

_SHAPES = {
    **dict.fromkeys(("resolution", "target_frames", "max_frames", "enable_bucket", "bucket_no_upscale"), "buckets"),
    **dict.fromkeys(("frame_extraction", "frame_stride", "frame_sample"), "span"),
    "source_fps": "fps",
}
"""What decides here about frames and sizes: a field of ``data``."""

_UNREAD = ("cache_directory", "batch_size", "debug_dataset", "caption_extension")
"""What is said elsewhere here, or checked for itself."""


@dataclass(frozen=True)
class MusubiDataset:
    """One ``[[datasets]]`` of the file."""

    path: Path
    """A folder of clips or images with a ``.txt`` beside each, or a list of them."""
    is_list: bool
    has_images: bool
    repeats: float


def read_musubi(file: Path, *, images: bool = False) -> tuple[list[MusubiDataset], list[str]]:
    """The datasets of a TOML file, and a note on what of it is not read.

    Args:
        file: the TOML.
        images: accept datasets of images.

    Raises:
        DataError: if the file cannot be read, or for all that it asks for and cannot be meant here.
    """
    try:
        content = tomllib.loads(read_text(file, most_bytes=MAX_BYTES))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise DataError(f"not valid TOML: {error!s:.200}", where=str(file), fix="correct it") from None
    general, written = content.get("general", {}), content.get("datasets", [])
    tables = isinstance(general, dict) and isinstance(written, list) and all(isinstance(part, dict) for part in written)
    if not tables or not written:
        fix = "write [[datasets]] with a video_directory or a video_jsonl_file"
        raise DataError("there is no list of [[datasets]]", where=str(file), fix=fix)
    datasets: list[MusubiDataset] = []
    faults: list[DataError] = []
    ignored: dict[str, str] = {}
    for number, part in enumerate(written, start=1):
        try:
            datasets.append(_dataset({**general, **part}, file, f"{file}, dataset {number}", images))
        except DataError as fault:
            faults.append(fault)
        ignored |= {name: _SHAPES[name] for name in {**general, **part} if name in _SHAPES}
    raise_all(DataError, faults, what="{n} datasets cannot be used")
    listed = ", ".join(f"{name} (data.{field})" for name, field in sorted(ignored.items()))
    notes = [f"of {file.name} is not read, for this run's configuration decides: {listed}"] if ignored else []
    return datasets, notes


_PATHS = ("video_directory", "video_jsonl_file", "image_directory", "image_jsonl_file")


def _dataset(values: dict[str, Any], file: Path, where: str, images: bool) -> MusubiDataset:
    if unknown := sorted(values.keys() - {*_PATHS, "num_repeats", *_SHAPES, *_UNREAD}):
        fix = "take it out here: control videos and the like are not trained on"
        raise DataError(f"{', '.join(unknown)} cannot be meant here", where=where, fix=fix)
    paths = [(name, values[name]) for name in _PATHS if name in values]
    if len(paths) != 1 or not isinstance(paths[0][1], str) or not paths[0][1]:
        raise DataError(f"it wants one of {', '.join(_PATHS)}", where=where, fix="write one of them")
    is_list, has_images = paths[0][0].endswith("_jsonl_file"), paths[0][0].startswith("image_")
    if has_images and not images:
        fix = "set images: true for the source to train on each as a clip of one frame (text-to-video), or take it out"
        raise DataError("it is a dataset of images", where=where, fix=fix)
    extension = values.get("caption_extension", ".txt")
    if not is_list and extension != ".txt":
        fix = f"rename the captions, or list them in {'an image' if has_images else 'a video'}_jsonl_file"
        raise DataError(f"captions in files of {extension!r:.40}: only .txt is read", where=where, fix=fix)
    repeats = values.get("num_repeats", 1)
    if not isinstance(repeats, int) or isinstance(repeats, bool) or not 1 <= repeats <= 10_000:
        raise DataError(f"num_repeats is {repeats!r:.40}", where=where, fix="write a whole number from 1 to 10 000")
    return MusubiDataset(file.parent / Path(paths[0][1]).expanduser(), is_list, has_images, float(repeats))
