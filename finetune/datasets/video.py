"""Media files in, pixels out: headers, frames and images.  (SIGNATURES; being filled in)"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from torch import Tensor

from finetune.errors import DataError
from finetune.types import Bucket, Clip, ClipPlan, VideoProbe

PIXEL_RULE = "bicubic-1"
"""Names the arithmetic from decoded frame to pixel; part of a cache address, so that changing it re-encodes."""


@dataclass(frozen=True)
class DecodeJob:
    """One clip to decode; ``key`` is the caller's own, handed back with the result."""

    key: int
    path: Path
    probe: VideoProbe
    plan: ClipPlan


def probe(path: Path) -> VideoProbe:
    """Read a video's header and frame times without decoding it whole. Raises DataError."""
    raise NotImplementedError


def decode(path: Path, probe: VideoProbe, plan: ClipPlan) -> Clip:
    """Decode, resize and crop one planned clip. Raises DataError."""
    raise NotImplementedError


def load_image(path: Path) -> Tensor:
    """Load an image as uint8 RGB [3, H, W], upright. Raises DataError."""
    raise NotImplementedError


def fit_image(image: Tensor, bucket: Bucket) -> Tensor:
    """Resize and crop an image [3, H, W] uint8 by the rule for frames, to [3, bucket.height, bucket.width]."""
    raise NotImplementedError


class DecodePool:
    """Decode worker processes; ``workers=0`` works inline. Use as a context manager."""

    def __init__(self, workers: int = 2, *, in_flight: int | None = None, timeout_s: float = 600.0) -> None:
        raise NotImplementedError

    def probe_many(self, paths: Sequence[Path]) -> Iterator[tuple[Path, VideoProbe | DataError]]:
        """Probe every path, in order."""
        raise NotImplementedError

    def decode_many(self, jobs: Iterable[DecodeJob]) -> Iterator[tuple[DecodeJob, Clip | DataError]]:
        """Decode every job, in order; at most ``in_flight`` clips are held at a time."""
        raise NotImplementedError

    def close(self) -> None:
        """Stop the workers; safe to call twice."""
        raise NotImplementedError

    def __enter__(self) -> DecodePool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
