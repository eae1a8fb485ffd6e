"""What ``prepare`` leaves in its folder: a dataset's rows, a ledger of seconds, and what the next call goes on from."""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from finetune.core.checksums import digest_of
from finetune.core.errors import DataError
from finetune.core.files import PARTIAL, atomic_write, atomic_write_text
from finetune.core.types import VideoProbe
from finetune.datasets.tables import read_lines
from finetune.footage import cutting, measure
from finetune.footage.filters import Span
from finetune.footage.measure import Footage, footage_of, parts_of

STATE = ".prepare"
"""Folder of what a next call goes on from; it also says that a folder is ``prepare``'s."""

METADATA, LEDGER, CLIPS = "metadata.jsonl", "ledger.jsonl", "clips"

CAPTIONS = "captions.jsonl"
"""In ``STATE``: rows of clips that are gone."""


@dataclass
class Source:
    """One video of the tree, and what becomes of it."""

    name: str
    """Relative to the tree, with forward slashes."""
    path: Path
    digest: str
    """Of its bytes."""
    stamp: tuple[int, int] = (0, 0)
    """Its size, and when it changed in ns, when they were read."""
    header: VideoProbe | None = None
    """None if it cannot be read, or is a copy of another."""
    spans: list[Span] = field(default_factory=list)


class State:
    """What stands in ``OUT/.prepare``: digests of sources, measurements, scores, and captions of clips that are gone.

    Everything is addressed by content, so a source that was moved or renamed is not measured again. What is damaged or
    of another version is made again.
    """

    def __init__(self, out: Path) -> None:
        self.folder = out / STATE

    def digests(self) -> dict[str, tuple[int, int, str]]:
        """Size, time of change in ns and digest of every source of an earlier call."""
        try:
            files = json.loads((self.folder / "files.json").read_text(encoding="utf-8"))
            return {name: (int(size), int(mtime), str(digest)) for name, (size, mtime, digest) in files.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}

    def write_digests(self, files: Mapping[str, tuple[int, int, str]]) -> None:
        """Replace them."""
        atomic_write_text(self.folder / "files.json", json.dumps(files))

    def footage(self, digest: str, detector: str, threshold: float | None) -> Footage | None:
        """The measurements of a source, if there are any by this detector."""
        try:
            head, _, body = self._measured(digest, detector, threshold).read_bytes().partition(b"\n")
            return footage_of(json.loads(head), body)
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write_footage(self, digest: str, detector: str, threshold: float | None, footage: Footage) -> None:
        """Keep the measurements of a source."""
        fields, arrays = parts_of(footage)
        head = json.dumps(fields).encode() + b"\n"
        parts = [memoryview(head), *(memoryview(array.tobytes()) for array in arrays)]
        atomic_write(self._measured(digest, detector, threshold), parts)

    def _measured(self, digest: str, detector: str, threshold: float | None) -> Path:
        name = digest_of([measure.RULE, digest, detector, threshold])
        return self.folder / "measured" / name

    def score(self, clip: str, scorer: str) -> float | None:
        """What a scorer said of a clip; None if it was not asked."""
        try:
            return float(json.loads(self._score(clip, scorer).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def write_score(self, clip: str, scorer: str, value: float) -> None:
        """Keep it."""
        atomic_write_text(self._score(clip, scorer), json.dumps(value))

    def _score(self, clip: str, scorer: str) -> Path:
        return self.folder / "scores" / digest_of([clip, scorer])

    def clean(self, out: Path) -> None:
        """Remove what a killed call left half-written. Only for who holds the lock."""
        for folder in (out, out / CLIPS, self.folder, self.folder / "measured", self.folder / "scores"):
            for leftover in folder.glob(f"*{PARTIAL}"):
                leftover.unlink(missing_ok=True)


# --- rows -------------------------------------------------------------------------------------------------------------


def clip_name(source: Source, span: Span) -> str:
    """The file name of a clip, relative to the dataset's folder: another cut, or other bytes, have another name."""
    stem = unicodedata.normalize("NFC", Path(source.name).stem)
    # To HF datasets brackets and stars are patterns, and words such as "test" name a split.
    readable = re.sub(r"[^\w-]+", "_", stem)[:40].strip("_-") or "clip"
    readable = _SPLIT_WORDS.sub(lambda match: match[0].capitalize(), readable)
    assert span.plan is not None
    digest = digest_of([source.digest, asdict(span.plan), cutting.RULE])[:10]
    return f"{CLIPS}/{readable}-{round(span.start_s * 1000):08d}-{digest}.mp4"


_SPLIT_WORDS = re.compile(
    r"(?<![^-._ 0-9])(train|training|validation|valid|dev|val|test|testing|eval|evaluation)(?![^-._ 0-9])"
)
"""Words in file names that ``datasets.load_dataset`` takes for a split, in lower case only."""

_OWN = re.compile(r"-\d{8,}-[0-9a-f]{10}\.mp4$")
"""How ``clip_name`` ends."""


def metadata_row(source: Source, span: Span) -> dict[str, Any]:
    """A clip's row in ``metadata.jsonl``, without a caption yet."""
    assert span.plan is not None
    times = span.plan.times_s
    fps = (len(times) - 1) / times[-1] if len(times) > 1 else 1 / span.seconds
    return {
        "file_name": clip_name(source, span),
        "caption": "",
        "fps": round(fps, 6),
        "frames": len(times),
        "height": span.plan.resize_hw[0],
        "width": span.plan.resize_hw[1],
        "scores": span.scores,
        "source": source.name,
        "start_s": span.start_s,
        "end_s": span.end_s,
    }


def ledger_row(source: Source, span: Span) -> dict[str, Any]:
    """A span's row in ``ledger.jsonl``: every row has every column."""
    return {
        "source": source.name,
        "start_s": span.start_s,
        "end_s": span.end_s,
        "seconds": span.seconds,
        "outcome": "dropped" if span.reason else "kept",
        "reason": span.reason or "",
        "value": span.value,
        "limit": span.limit,
        "detail": span.detail,
        "clip": "" if span.reason else clip_name(source, span),
    }


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A JSON object per line; the file appears whole or not at all."""
    atomic_write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of ``write_rows``, perhaps edited since; none if there is no file.

    Raises:
        DataError: naming the line that is no row.
    """
    if not path.exists():
        return []
    rows: list[dict[str, Any]] = []
    for number, line in read_lines(path):
        if isinstance(line, DataError):
            raise line
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("no JSON object")
        except ValueError as error:
            fix = "mend the line, or delete the file if it holds no captions that are still wanted"
            raise DataError(f"not a row of a dataset: {error}", where=f"{path}:{number}", fix=fix) from None
        rows.append(row)
    return rows


def write_ledger(out: Path, sources: Sequence[Source]) -> None:
    """Write ``ledger.jsonl``: every second of the footage, and what became of it."""
    write_rows(out / LEDGER, [ledger_row(source, span) for source in sources for span in source.spans])


def write_dataset(out: Path, sources: Sequence[Source]) -> list[str]:
    """Write ``metadata.jsonl``, and delete the clips of earlier calls that are no longer in it.

    What others wrote into rows stays: captions, further columns, and rows that ``prepare`` did not make. Captions of
    clips that are no longer there are remembered for when they come back.

    Returns:
        Names of the clips that were deleted.
    """
    earlier = read_rows(out / METADATA)
    written: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in read_rows(out / STATE / CAPTIONS):
        written[row["file_name"]].append(row)
    for name in {str(row.get("file_name")) for row in earlier}:
        written.pop(name, None)
    for row in earlier:
        written[str(row.get("file_name"))].append(row)
    made = [metadata_row(source, span) for source in sources for span in source.spans if span.reason is None]
    names = {row["file_name"] for row in made}
    # A clip may have been given several rows.
    rows = [_merged(row, known) for row in made for known in written.get(row["file_name"], [{}])]
    gone = [row for row in chain(*written.values()) if row["file_name"] not in names and row.get("caption")]
    gone = [row for row in gone if _is_own(row)]
    foreign = [row for row in earlier if not _is_own(row)]
    write_rows(out / STATE / CAPTIONS, gone)
    if rows or foreign:
        write_rows(out / METADATA, [*rows, *foreign])
    else:
        (out / METADATA).unlink(missing_ok=True)
    wanted = names.union(str(row.get("file_name")) for row in foreign)
    deleted = sorted(name for name in clips_there(out) - wanted if _OWN.search(name))
    for name in deleted:
        (out / name).unlink()
    return deleted


def _merged(row: dict[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """A clip's row with its caption and further columns of an earlier call."""
    return row | {name: value for name, value in known.items() if name == "caption" or name not in row}


def _is_own(row: Mapping[str, Any]) -> bool:
    """Whether ``prepare`` made a row: others may well have a column ``source``."""
    return "source" in row and _OWN.search(str(row.get("file_name"))) is not None


def clips_there(out: Path) -> set[str]:
    """Names of the clips that are whole."""

    def names() -> Iterator[str]:
        with os.scandir(out / CLIPS) as entries:
            yield from (f"{CLIPS}/{entry.name}" for entry in entries if entry.name.endswith(".mp4"))

    return set(names()) if (out / CLIPS).is_dir() else set()
