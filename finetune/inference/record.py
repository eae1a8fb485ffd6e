"""What a video was made from, in the mp4 itself and as JSON beside it: enough to make it again."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from finetune.cogvideox.components import read_json
from finetune.core.checksums import digest_file, digest_of
from finetune.core.errors import ConfigError, DataError, FinetuneError, raise_all
from finetune.datasets.decode import opened
from finetune.inference.adapters import AdapterSource, read_sources
from finetune.inference.request import GenerateRequest

_PACKAGES = ("cogvideox-finetune", "torch", "diffusers", "transformers", "peft")

ELSEWHERE: Mapping[str, Any] = {
    "out": Path(),
    "gif": False,
    "device": None,
    "budget": None,
    "offload": "auto",
    "parallel": None,
    "preview": None,
}
"""What of a request makes no other frames: where they are computed and what is written."""


class VideoRecord(BaseModel):
    """One video: its request with every value that was left out filled in, and what cannot be read off a request."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    format: Literal[1] = 1
    request: GenerateRequest
    """Of this one video."""
    digests: dict[str, str]
    """Of adapters, images and videos by their content, of folders of models by sizes and times; by path."""
    base: str = ""
    """``base_digest`` of the transformer; empty where it is not known yet, or its file is among ``digests``."""
    device: str
    """Kind of device that computed it."""
    versions: dict[str, str]

    def describes(self, other: VideoRecord) -> bool:
        """Whether both are of one request: the same model, numbers and files, by their content."""
        return (self.comparable(), self.digests) == (other.comparable(), other.digests)

    def comparable(self) -> GenerateRequest:
        """The request without what makes no other frames."""
        return replace(self.request, **ELSEWHERE)


def record_of(request: GenerateRequest, sources: Mapping[Path, AdapterSource], device: str) -> VideoRecord:
    """The record of a video that is about to be made.

    Args:
        request: of this one video; nothing in it is left open.
        sources: its adapters, by path.
        device: kind of device.
    """
    # A run's newest checkpoint is another one tomorrow.
    adapters = tuple(replace(adapter, path=sources[adapter.path].found) for adapter in request.adapters)
    digests = {str(sources[adapter.path].found): sources[adapter.path].digest for adapter in request.adapters}
    digests |= {str(path): digest_file(path) for path in _files(request) if path.is_file()}
    folders = [Path(folder) for folder in (request.base, request.transformer) if folder is not None]
    digests |= {str(folder): _stamp(folder) for folder in folders if folder.is_dir()}
    request = replace(request, adapters=adapters)
    return VideoRecord(request=request, digests=digests, device=device, versions=_versions())


def _files(request: GenerateRequest) -> Iterable[Path]:
    """The images, videos and files of weights that a request names."""
    named = [
        request.gguf,
        *(path for prompt in request.prompts for path in (*prompt.images, prompt.video, prompt.control)),
    ]
    return dict.fromkeys(path for path in named if path is not None)


def _stamp(folder: Path) -> str:
    """Sizes and times of a model's weights: whoever exports to the same folder again means other videos."""
    paths = sorted(folder.rglob("*.safetensors"))
    status = {path.relative_to(folder).as_posix(): path.stat() for path in paths}
    return digest_of({name: [one.st_size, one.st_mtime_ns] for name, one in status.items()})


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):  # run from a source tree that was never installed
            versions[name] = version(name)
    return versions


# -------------------------------------------------------------------------------------------------- reading it back


def read_video_record(path: Path) -> VideoRecord:
    """The record in an mp4, or in the JSON beside a video, or that JSON itself.

    Raises:
        ConfigError: if there is none.
    """
    where = f"--from {path}"
    try:
        text = path.read_text(encoding="utf-8") if path.suffix == ".json" else _comment(path)
        if not text and path.with_suffix(".json").is_file():  # re-encoded, or a GIF
            read_json(path.with_suffix(".json"))  # of reasonable size
            text = path.with_suffix(".json").read_text(encoding="utf-8")
        return VideoRecord.model_validate_json(text)
    except (FinetuneError, OSError, UnicodeDecodeError) as error:
        what = error.what if isinstance(error, FinetuneError) else str(error)
        raise ConfigError(f"its record cannot be read: {what}", where=where) from None
    except ValidationError as error:
        raise ConfigError(
            f"it holds no record of `finetune generate`: {error.errors()[0]['msg']}",
            where=where,
            fix="give the mp4 as it was written, or the .json that was written beside it",
        ) from None


def _comment(path: Path) -> str:
    try:
        with opened(path) as (container, _):
            return str(container.metadata.get("comment", ""))
    except DataError:
        if not path.is_file():
            raise
        return ""  # a GIF, or something else with a sidecar


def request_again(record: VideoRecord, **changes: Any) -> GenerateRequest:
    """The request that makes a video again, but for ``changes``; files that it still names are what they were.

    Raises:
        ConfigError: if an adapter, image or video is gone or has changed.
    """
    # Of another model, other weights are expected.
    same_base = not changes.keys() & {"base", "revision", "transformer"}
    own = {"device": "cpu" if record.device == "cpu" else None, "base_digest": record.base if same_base else None}
    request = replace(record.request, **{**own, **changes})
    folders = [Path(folder) for folder in (request.base, request.transformer) if folder is not None]
    named = [*(adapter.path for adapter in request.adapters), *_files(request), *folders]
    gone = {path: None for path in named if str(path) in record.digests and not path.exists()}
    sources, faults = read_sources([adapter for adapter in request.adapters if adapter.path not in gone])
    faults += [
        ConfigError(
            "it is gone, and the video was made with it",
            where=str(path),
            fix="bring it back, or name another with its option"
            + ("" if path.is_absolute() else "; the path starts at the folder that the command was typed in"),
        )
        for path in gone
    ]
    now = {str(path): source.digest for path, source in sources.items()}
    now |= {str(path): digest_file(path) for path in _files(request) if path.is_file()}
    faults += [
        ConfigError(
            "it is not what the video was made with: its content has changed",
            where=path,
            fix="bring the old one back, or name another with its option",
        )
        for path, digest in now.items()
        if record.digests.get(path, digest) != digest
    ]
    raise_all(ConfigError, faults, what="{n} things that the video was made with are missing")
    return request
