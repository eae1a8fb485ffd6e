"""What a checkpoint's files may not do: read other files, choose code to run, or take all memory.

Checkpoints come from strangers. Their weights are read from safetensors alone, which hold numbers and nothing else;
this looks at the JSON beside them before a library acts on it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from pydantic import ValidationError

from finetune.errors import ModelError, raise_all
from finetune.facts.locate import COMPLETE_CHECKPOINT
from finetune.facts.parts import PARTS, Part

CONFIG_FILES = {
    "transformer": "transformer/config.json",
    "vae": "vae/config.json",
    "scheduler": "scheduler/scheduler_config.json",
    "text_encoder": "text_encoder/config.json",
}
"""Where a diffusers pipeline folder keeps the JSON of each component."""

_MOST_BYTES = 1 << 26
"""Of one JSON file; the largest, a tokenizer's vocabulary, has a few million."""
_LARGEST_NUMBER = 1_000_000
"""In a component's JSON: a vocabulary has 32 128 entries, and nothing else comes near."""
_MOST_REPEATS = 1_000
"""Of what is built once per count: layers and blocks."""
_MOST_ENTRIES = 10_000
_MOST_FAULTS = 100
_MOST_HEADER_BYTES = 100_000_000
"""What safetensors itself allows."""
_DEEPEST = 20

_ACTING_KEYS = {
    "quantization_config": "its weights are stored quantized, and this package trains on plain ones",
    "attn_implementation": "it names an attention implementation, which a library would fetch from the hub as code",
    "_attn_implementation": "it names an attention implementation, which a library would fetch from the hub as code",
}
"""Keys that make a library do more than build the model, and why they are refused."""
_WITHOUT_WEIGHTS = ("scheduler", "tokenizer")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of reasonable size. Raises ModelError."""
    try:
        if path.exists() and not path.is_file():
            raise ModelError(f"{path.name} is no file", where=str(path))
        with path.open("rb") as source:
            content = source.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise ModelError(f"{path.name} has more than {_MOST_BYTES:,} bytes", where=str(path))
        value = json.loads(content.decode("utf-8-sig"))
    except FileNotFoundError:
        raise ModelError(f"{path.name} is missing", where=str(path), fix=COMPLETE_CHECKPOINT) from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path.name} cannot be read: {error}"[:300], where=str(path)) from None
    except RecursionError:
        raise ModelError(f"{path.name} cannot be read: it is nested too deeply", where=str(path)) from None
    if not isinstance(value, dict):
        raise ModelError(f"{path.name} holds a JSON {type(value).__name__}, not an object", where=str(path))
    return value


def read_part(folder: Path, component: str) -> Part:
    """Read a component's JSON and make sure that a library may act on it.

    Raises:
        ModelError: naming every key that is refused.
    """
    path = folder / CONFIG_FILES[component]
    content = read_json(path)
    faults = list(json_faults(content, ()))
    faults += [f"{key}: {why}" for key, why in _ACTING_KEYS.items() if content.get(key) is not None]
    part: Part | None = None
    if not faults:
        try:
            part = PARTS[component].model_validate(content)
        except ValidationError as error:
            for problem in error.errors(include_url=False):
                key, said = ".".join(map(str, problem["loc"])), problem["msg"].removeprefix("Value error, ")
                given = f" (it is {problem['input']!r:.60})" if key and problem["type"] != "missing" else ""
                faults.append(f"{key or component}: {said}{given}")
    problems = [ModelError(fault[:300], where=str(path), fix=COMPLETE_CHECKPOINT) for fault in faults[:_MOST_FAULTS]]
    raise_all(ModelError, problems, what=f"{{n}} things in {path.name} are refused")
    assert part is not None
    return part


def require_loadable(folder: Path, component: str) -> None:
    """Look at a component before a library loads it: its JSON, and which files would be opened.

    Raises:
        ModelError: as ``read_part`` and ``require_own_files``.
    """
    read_part(folder, component)
    require_own_files(folder / component)


def require_own_files(place: Path) -> None:
    """Look at the files of a component that a library would open; nothing of the weights but their size is read.

    Raises:
        ModelError: if one is a pipe, a device or a folder, leads nowhere or claims more than it has, the weights are
            pickles only, or an index names files outside the folder.
    """
    stored = sorted(place.iterdir()) if place.is_dir() else []
    for path in stored:
        opened = path.suffix in (".safetensors", ".json", ".model", ".txt", ".jinja")
        if opened and not path.is_file():
            what = "is a folder" if path.is_dir() else "is a pipe or a device" if path.exists() else "is a broken link"
            raise ModelError(f"{path.name} {what}, not a file", where=str(path), fix=COMPLETE_CHECKPOINT)
        if path.suffix == ".safetensors":
            _require_sane_header(path)
        elif opened and path.stat().st_size > _MOST_BYTES:
            raise ModelError(
                f"{path.name} has more than {_MOST_BYTES:,} bytes", where=str(path), fix=COMPLETE_CHECKPOINT
            )
        if path.name.endswith(".safetensors.index.json"):
            require_plain_index(path)
    pickles = [path.name for path in stored if path.suffix in _PICKLES]
    if pickles and place.name not in _WITHOUT_WEIGHTS and not any(path.suffix == ".safetensors" for path in stored):
        raise ModelError(
            f"the {place.name} has its weights as {pickles[0]}, a format that can run code when it is read",
            where=str(place),
            fix="fetch the checkpoint's safetensors files, or convert it where you trust it: python -c "
            "\"import torch, safetensors.torch as s; s.save_file(torch.load('OLD', weights_only=True), 'NEW')\"",
        )


def _require_sane_header(path: Path) -> None:
    """A safetensors file begins with the length of its table of contents, which is read whole."""
    try:
        size = path.stat().st_size
        with path.open("rb") as source:
            length = int.from_bytes(source.read(8), "little")
    except OSError as error:
        raise ModelError(f"{path.name} cannot be read: {error.strerror}", where=str(path)) from None
    if size < 8 or length > min(size - 8, _MOST_HEADER_BYTES):
        raise ModelError(
            f"{path.name} claims a table of contents of {length:,} bytes and has {size:,} bytes in all",
            where=str(path),
            fix=COMPLETE_CHECKPOINT,
        )


def require_plain_index(path: Path) -> list[str]:
    """The weight files that an index names, each of them a plain name in the index's own folder.

    Raises:
        ModelError: if one leads elsewhere, is no safetensors file, or the index is not what it should be.
    """
    names = read_json(path).get("weight_map")
    if not isinstance(names, Mapping) or not all(isinstance(name, str) for name in names.values()):
        raise ModelError("weight_map is no mapping of weights to files", where=str(path), fix=COMPLETE_CHECKPOINT)
    shards = sorted(set(names.values()))
    for name in shards:
        plain = name == PurePosixPath(name).name == PureWindowsPath(name).name and "\0" not in name
        if not plain or not name.endswith(".safetensors"):
            raise ModelError(f"weight_map names {name!r:.100}, not a safetensors file beside it", where=str(path))
    return shards


def json_faults(value: Any, path: tuple[str, ...]) -> Iterator[str]:
    """Values that no model has and that a library would spend hours or all memory on."""
    name = ".".join(path)[-100:]
    if len(path) > _DEEPEST:
        yield f"{name}: nested too deeply"
    elif isinstance(value, Mapping | list):
        if len(value) > _MOST_ENTRIES:
            yield f"{name}: {len(value):,} entries"
            return
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from json_faults(item, (*path, str(key)))
    elif isinstance(value, str):
        if len(value) > _MOST_ENTRIES:
            yield f"{name}: a text of {len(value):,} characters"
    elif isinstance(value, int | float):
        # Learning of a number's size by printing it would take as long as the number is long.
        counts = any(word in name for word in ("layers", "blocks", "num_heads"))
        most = _MOST_REPEATS if counts else _LARGEST_NUMBER
        if not abs(value) <= most:
            shown = f"{value}" if abs(value) < 10**18 else "a number"
            yield f"{name}: {shown} is more than any model has (at most {most:,})"
