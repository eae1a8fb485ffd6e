"""Datasets larger than the disk: read row by row, their media on it only until they are encoded.

What became of each row is recorded in the cache (``streams/``): the digests of its media, the video's header, its
caption. From that alone a dataset is checked, planned and trained from afterwards, with the addresses that the same
clips have as files. A record is what is gone on from, too. It names rows by file, row group and number, and not by the
``state_dict`` of ``datasets``: that is of one order of files, shared out over one number of readers, in the form of one
version of the library, and could not say that a single row is to be read again.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import uuid
import zlib
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.core import locks
from finetune.core.checksums import checksum_bytes, checksummed_json, digest_of, parse_checksummed_json
from finetune.core.errors import DataError
from finetune.core.files import atomic_write_bytes
from finetune.core.types import VideoProbe
from finetune.datasets.manifests import FileStamp, portable
from finetune.datasets.packed import MAX_MEDIA_BYTES, content_digest, fault, packed_files, value_of
from finetune.datasets.parts import RowShare, share_out
from finetune.datasets.rows import MediaPlace, RawRow, RowReport, StreamedMedia
from finetune.datasets.stream_worker import LOADERS
from finetune.datasets.tables import MAX_FILE_BYTES
from finetune.datasets.worker import Worker

WORKER = (
    "import os; os.chdir('/'); "  # `datasets` takes owner/name for a folder where there is one
    "from finetune.datasets import packed, stream_worker, worker;"
    " worker.serve(stream_worker.handle_stream, file_bytes=packed.MAX_MEDIA_BYTES)"
)

TIMEOUT_S = 3600.0
"""For one row, which in a tar stands behind others that are passed over."""

_RULE = 1
"""By which files are read and headers recorded. Another number has every stream read again."""

_WINDOW_ROWS = 512
"""That are encoded together at most: so many may have to be read again after a kill."""

_INCOMPLETE = "run `finetune precompute`, which reads streams and goes on where it stopped; with --shard, every shard"


# --------------------------------------------------------------------------------------------- what a stream is made of


@dataclass(frozen=True)
class ListedFile:
    """A file of a stream."""

    name: str
    """Its path, or its address on the hub."""
    identity: str
    """Another one where it may have changed: of name, size and time, or of an address with a commit."""


@dataclass(frozen=True)
class Listing:
    """What a stream is made of."""

    loader: str
    """Of ``datasets``."""
    files: tuple[ListedFile, ...]

    @property
    def identity(self) -> str:
        """Of the whole stream."""
        return digest_of([one.identity for one in self.files])


@dataclass(frozen=True)
class Stream:
    """A source that is read row by row."""

    path: str
    """Absolute, of files on this machine or a network drive; or a dataset's id on the hub."""
    revision: str | None
    is_hub: bool
    columns: tuple[str | None, str | None, str | None]
    """Of video, caption and image; None for the one with a usual name."""
    stills: bool
    """Whether a row that holds no video is its image."""
    room: int
    """Bytes of media that may lie on the disk at one time."""

    def folder(self, records: Path, base: Path) -> Path:
        """Where it is recorded; a project that moves as a whole takes its records along."""
        path = self.path if self.is_hub else portable(Path(self.path), base)
        return records / digest_of([_RULE, path, self.revision, self.columns, self.stills])

    def current(self) -> Listing | None:
        """What it is made of now, as far as that can be told without a network; None if it cannot."""
        path = Path(self.path)
        with suppress(OSError, DataError):
            if not self.is_hub and (files := packed_files(path)):
                return Listing(LOADERS[files[0].suffix.lower()], tuple(map(_listed, files)))
        return None

    def recorded(self, records: Path, base: Path) -> Listing | None:
        """What it was made of when it was listed last; None if it never was."""
        with suppress(OSError, ValueError):
            content = parse_checksummed_json((self.folder(records, base) / "listing.json").read_bytes())
            return Listing(content["loader"], tuple(ListedFile(*file) for file in content["files"]))
        return None

    def listed(self, records: Path, base: Path) -> Listing:
        """What it is made of, which is asked anew and recorded; where it cannot be asked, what was recorded.

        Raises:
            DataError: if it cannot be asked, and never was.
        """
        try:
            listing = self._fetched() if self.is_hub else self.current()
            if listing is None:
                fix = "name a folder of datasets.save_to_disk, or .parquet, .arrow or .tar files"
                raise DataError("there is no packed dataset", where=self.path, fix=fix)
        except DataError as error:
            if (former := self.recorded(records, base)) is None:
                raise
            print(f"note: {error.what} ({error.where}): read as it was listed before", flush=True)
            return former
        content = {"loader": listing.loader, "files": [[one.name, one.identity] for one in listing.files]}
        atomic_write_bytes(self.folder(records, base) / "listing.json", checksummed_json(json.dumps(content)))
        return listing

    def _fetched(self) -> Listing:
        with closing(Worker("dataset reader", WORKER)) as worker:
            request = {"revision": self.revision}
            fields, body = worker.ask(Path(self.path), request, most_bytes=MAX_FILE_BYTES, timeout_s=TIMEOUT_S)
        names = bytes(body).decode().splitlines()
        return Listing(fields["loader"], tuple(ListedFile(name, digest_of(name)) for name in names))


def _listed(file: Path) -> ListedFile:
    status = file.stat()
    return ListedFile(str(file), digest_of([file.name, status.st_size, status.st_mtime_ns]))


# ----------------------------------------------------------------------------------------------------------- its record


Line = dict[str, Any]
"""Of a record. ``at`` [group, index] is a row: ``row`` (video, caption, image: of media, name and bytes), ``probe``,
``keys`` of its latents, ``failed`` ones of them with the reason, and the ``room`` it wants if there was too little.
``end`` [group, rows, groups] is where a group ends, and ``fault`` why it cannot be read on from there."""


@dataclass
class FileRecord:
    """What is known of a file, from all who read of it."""

    rows: dict[tuple[int, int], Line] = field(default_factory=dict)
    ends: dict[int, int] = field(default_factory=dict)
    """By group, its rows."""
    groups: int | None = None
    """None until the first of them is read to its end."""
    faults: dict[int, tuple[str, str]] = field(default_factory=dict)
    """By group: why it cannot be read beyond its end, and the fix."""

    def add(self, line: Line) -> None:
        """Take in a line; of two about a row, the later one counts."""
        if "at" in line:
            self.rows[line["at"][0], line["at"][1]] = line
        else:
            group, self.ends[group], self.groups = line["end"]
            if "fault" in line:
                what, fix = line["fault"]
                self.faults[group] = what, fix

    def places(self) -> Iterator[tuple[int, int]]:
        """Where its rows are, those that were never read included; as far as it is known."""
        for group in range(self.groups or 0):
            for index in range(self.ends.get(group, 0)):
                yield group, index

    def is_whole(self, share: RowShare) -> bool:
        """Whether nothing of it is left to be read, of the rows of a share."""
        if self.groups is None or any(group not in self.ends for group in range(self.groups)):
            return False
        return all(place in self.rows for place in self.places() if share.holds(*place))


def read_record(folder: Path, file: ListedFile) -> FileRecord:
    """What all readers recorded of a file. Lines that are not what was written, and those cut off by a kill, do not
    count: their rows are read again.
    """
    record = FileRecord()
    for path in sorted(folder.glob(f"{file.identity}.*.jsonl")):
        for line in read_lines(path):
            record.add(line)
    return record


def read_lines(path: Path) -> Iterator[Line]:
    """The whole lines of a record."""
    with suppress(FileNotFoundError):
        for text in path.read_bytes().splitlines():
            checksum, _, content = text.partition(b" ")
            if checksum.decode("ascii", "replace") == checksum_bytes(content):
                yield json.loads(content)


def append(folder: Path, file: ListedFile, reader: str, lines: Sequence[Line]) -> None:
    """Record lines; when this returns they are on the disk.

    Args:
        folder: of the stream.
        file: that they are about.
        reader: who records; no two write to one file.
        lines: what is known.

    Raises:
        OSError: if it cannot be written.
    """
    content = [json.dumps(line, ensure_ascii=False).encode() for line in lines]
    # A line before them may have been cut off.
    text = b"\n" + b"".join(b"%s %s\n" % (checksum_bytes(line).encode(), line) for line in content)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{file.identity}.{reader}.jsonl").open("ab") as record:
        record.write(text)
        record.flush()
        os.fsync(record.fileno())


def wanted_entries(path: Path) -> set[str]:
    """The keys of latents that a record refers to: no manifest does, until the stream is read to its end."""
    return {key for line in read_lines(path) for key in line.get("keys", ())}


def record_probe(probe: VideoProbe | DataError) -> Any:
    """A header, or why there is none, as a record has it."""
    if isinstance(probe, DataError):
        return {"fault": [probe.what, probe.fix]}
    times = base64.b64encode(zlib.compress(array("d", probe.frame_times_s).tobytes())).decode()
    return {**vars(probe), "frame_times_s": times}


def recorded_probe(written: Any, where: str) -> VideoProbe | DataError:
    """A header from a record."""
    if "fault" in written:
        return DataError(written["fault"][0], where=where, fix=written["fault"][1])
    times = array("d", zlib.decompress(base64.b64decode(written["frame_times_s"])))
    return VideoProbe(**{**written, "frame_times_s": times, "corrections": tuple(written["corrections"])})


# ---------------------------------------------------------------------------------------------------- rows of a record


def recorded_rows(stream: Stream, place: MediaPlace, base: Path, report: RowReport) -> None:
    """Add the rows of a stream that was read, of which no media need be there.

    Args:
        stream: which one.
        place: where it is recorded, and which part of the dataset is wanted.
        base: folder that relative paths start at.
        report: gets the rows, what is known of their media, and an error if something was not read yet.
    """
    folder = stream.folder(place.records, base)
    listing = stream.recorded(place.records, base)
    if listing is None:
        what = "it is read as a stream, and nothing of it has been read yet"
        report.errors.append(DataError(what, where=stream.path, fix=_INCOMPLETE))
        return
    files, share = share_out(listing.files, *([] if place.part is None else [(place.part.number - 1, place.part.of)]))
    unfinished = 0
    for file in files:
        record = read_record(folder, file)
        if not record.is_whole(share):
            unfinished += 1
            continue
        for number, at in enumerate(record.places(), start=1):
            if share.holds(*at):
                report.rows.append(row_of(record.rows[at], f"{file.name}, row {number}", place.folder, report))
        for group, (what, fix) in record.faults.items():
            where = f"{file.name}, row group {group} from its row {record.ends[group] + 1} on"
            report.unusable.append(DataError(f"the file cannot be read: {what}", where=where, fix=fix))
    if unfinished:
        what = f"{unfinished} of {len(files)} files of a stream have not been read to their end"
        report.errors.append(DataError(what, where=stream.path, fix=_INCOMPLETE))


def row_of(line: Line, where: str, folder: Path, report: RowReport) -> RawRow:
    """A row of a record; what is known of its media goes into ``report``, as if they lay in ``folder``."""
    video, caption, image = line["row"]
    names: list[object] = []
    for cell in (video, image):
        if isinstance(cell, list):
            name, size = cell
            probe = recorded_probe(line["probe"], where) if cell is video and "probe" in line else None
            report.streamed.media[folder / name] = StreamedMedia(FileStamp(size, -1, content_digest(name)), probe)
        names.append(cell[0] if isinstance(cell, list) else value_of(cell, where))
    if names[0] is None:
        names[0] = DataError("the row holds no video", where=where, fix="name video_column, or leave the row out")
    for key, (what, fix) in line.get("failed", {}).items():
        report.streamed.failed[key] = DataError(what, where=where, fix=fix)
    return RawRow(names[0], value_of(caption, where), names[1], folder, where, is_streamed=True)


# ---------------------------------------------------------------------------------------------------------- reading it


@dataclass(frozen=True)
class Arrival:
    """Something that was read: a row, whose media lie in a folder, or the end of a group or file."""

    file: ListedFile
    line: Line
    video: Path | None = None
    image: Path | None = None


@dataclass
class StreamReader:
    """Reads what is wanted of one stream, so much at a time as there is room for.

    Args:
        listing: what it is made of.
        folder: where it is recorded.
        scratch: where media go; nobody else writes there.
        room: bytes of media at one time; a half is read while the other half is encoded.
        images: whether images are wanted.
        readers: as ``share_out`` takes them.
    """

    stream: Stream
    listing: Listing
    folder: Path
    scratch: Path
    room: int
    images: bool
    readers: Sequence[tuple[int, int]]
    _half: int = 0
    lost: list[DataError] = field(default_factory=list)
    """Files that could not be reached or read to their end; another time they may be."""

    def windows(self, wanted: Callable[[Line], bool]) -> Iterator[list[Arrival]]:
        """What is read, in pieces; each is to be encoded, recorded and removed before the next but one is asked for.

        Args:
            wanted: whether a row that is recorded is to be read again.
        """
        files, share = share_out(self.listing.files, *self.readers)
        with closing(Worker("dataset reader", WORKER)) as worker:
            for file in files:
                record = read_record(self.folder, file)
                again = {at for at, line in record.rows.items() if share.holds(*at) and wanted(line)}
                if again or not record.is_whole(share):
                    yield from self._windows_of(file, record, worker, lambda at: share.holds(*at), again)

    def _windows_of(
        self,
        file: ListedFile,
        record: FileRecord,
        worker: Worker,
        is_own: Callable[[tuple[int, int]], bool],
        again: set[tuple[int, int]],
    ) -> Iterator[list[Arrival]]:
        window: list[Arrival] = []
        used = group = index = 0
        while record.groups is None or group < record.groups:
            at = group, index
            if index >= record.ends.get(group, index + 1):
                group, index = group + 1, 0
                continue
            if not is_own(at) or (at in record.rows and at not in again):
                index += 1
                continue
            answer = self._ask(worker, file, at, self.most - used)
            if "full" in answer and used:
                yield self._handed_over(window)
                window, used = [], 0
                continue
            if "lost" in answer:
                what, fix = answer["lost"]
                where, fix = f"{file.name}, row group {group}", fix or "run the same command again, which goes on there"
                self.lost.append(DataError(f"the stream broke off: {what}", where=where, fix=fix))
                break
            arrival = self._arrival(file, at, answer)
            record.add(arrival.line)
            window.append(arrival)
            used += answer.get("size", 0)
            index += "at" in arrival.line
            if len(window) >= _WINDOW_ROWS:
                yield self._handed_over(window)
                window, used = [], 0
        if window:
            yield self._handed_over(window)

    def _handed_over(self, window: list[Arrival]) -> list[Arrival]:
        self._half = 1 - self._half  # or the next one's files, of the same content, were removed with this one's
        return window

    @property
    def _folder(self) -> Path:
        return self.scratch / str(self._half)

    def _arrival(self, file: ListedFile, at: tuple[int, int], answer: Mapping[str, Any]) -> Arrival:
        group = at[0]
        if "end" in answer:
            return Arrival(file, {"end": [group, answer["end"], answer["groups"]]})
        if "broken" in answer:
            return Arrival(file, {"end": [group, answer["rows"], answer["groups"]], "fault": answer["broken"]})
        if "full" in answer:  # of an empty folder: a video and an image that are too large together
            what = f"the row has {answer['full']:,} bytes; at a time {self.most:,} are read, half of stream_room"
            row: list[Any] = [fault(what, "raise stream_room, or leave the row out"), None, None]
            return Arrival(file, {"at": at, "row": row, "room": answer["full"]})
        names = [cell[0] if isinstance(cell, list) else None for cell in answer["row"]]
        paths = [self._folder / name if name else None for name in names]
        line: Line = {"at": at, "row": answer["row"]}
        if sizes := [cell["size"] for cell in answer["row"] if isinstance(cell, dict) and "size" in cell]:
            line["room"] = max(sizes)
        return Arrival(file, line, paths[0], paths[2] if self.images else None)

    def _ask(self, worker: Worker, file: ListedFile, at: tuple[int, int], room: int) -> dict[str, Any]:
        """A row as ``stream_worker`` has it. What seems damaged is read once more: a network may be at fault."""
        self._folder.mkdir(exist_ok=True)
        request = {
            "file": file.name,
            "loader": self.listing.loader,
            "group": at[0],
            "index": at[1],
            "columns": self.stream.columns,
            "stills": self.stream.stills,
            "media": str(self._folder),
            "images": self.images,
            "most": self.most,
            "room": room,
        }
        for _ in range(2):
            try:
                answer, _body = worker.ask(Path(file.name), request, most_bytes=0, timeout_s=TIMEOUT_S)
            except DataError as error:  # it crashed, or took too long
                return {"lost": [error.what, error.fix]}
            if "broken" not in answer:
                break
        return answer

    @property
    def most(self) -> int:
        """Bytes of media in a window."""
        return min(self.room // 2, MAX_MEDIA_BYTES)


@contextmanager
def scratch_folder(media: Path) -> Iterator[Path]:
    """An empty folder for the media of one reader, which is removed in the end; what killed ones left goes too."""
    with ExitStack() as lock:
        name = f".stream-{uuid.uuid4().hex[:8]}"
        for number in range(len(list(media.glob(".stream-*.lock"))) + 1):
            try:
                lock.enter_context(locks.hold(media / f".stream-{number}.lock", "precompute"))
                name = f".stream-{number}"
                break
            except locks.HeldError:
                continue
            except locks.NoLocksError:  # a name of its own, then, and what is left by others stays
                media.mkdir(parents=True, exist_ok=True)
                break
        _remove_abandoned(media, name)
        folder = media / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _remove_abandoned(media: Path, own: str) -> None:
    """Remove the folders of readers that are gone: nobody holds their lock."""
    for folder in media.glob(".stream-*"):
        if folder.is_dir() and folder.name != own:
            with suppress(OSError, locks.HeldError), locks.hold(media / f"{folder.name}.lock", "precompute"):
                shutil.rmtree(folder, ignore_errors=True)
