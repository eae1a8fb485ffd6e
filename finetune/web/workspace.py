"""What lies in the page's folder: configurations, datasets and runs, and the changes that the page makes to them."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from finetune.captioning.folder import Row, Table, TextFiles, open_dataset
from finetune.config.document import MAX_BYTES, Document
from finetune.config.schema import RunConfig, load_config
from finetune.core.errors import ConfigError, DataError, FinetuneError
from finetune.core.files import atomic_write, atomic_write_text
from finetune.core.locks import hold
from finetune.core.text import text_fault
from finetune.datasets.rows import VIDEO
from finetune.web.access import Roots
from finetune.web.form import form_of
from finetune.web.jobs import Jobs
from finetune.web.yaml_edit import put, read_text

STATE = ".finetune-ui"
"""Folder in the workspace for jobs, plans and the doctor's pages."""

EXCLUDED = ".excluded"
"""Folder in a dataset for what was taken out of it; datasets are read without their hidden folders."""

SHOWN = {
    **{".mp4": "video/mp4", ".m4v": "video/mp4", ".mov": "video/quicktime", ".webm": "video/webm"},
    **{".gif": "image/gif", ".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp"},
    ".html": "text/html",
}
"""Kinds of files that the page shows, by their ending; pages are shown in a sandbox."""

_MOST_LISTED = 200

_MAGIC = {
    **dict.fromkeys((".mp4", ".mov", ".m4v"), (4, b"ftyp")),
    **dict.fromkeys((".webm", ".mkv"), (0, b"\x1aE\xdf\xa3")),
    ".avi": (0, b"RIFF"),
    ".png": (0, b"\x89PNG\r\n\x1a\n"),
    ".webp": (8, b"WEBP"),
    **dict.fromkeys((".jpg", ".jpeg"), (0, b"\xff\xd8\xff")),
}
"""By ending, what may be uploaded: at which byte which bytes stand."""


@dataclass(frozen=True)
class ConfigFile:
    """A configuration as it is on the disk."""

    path: Path
    text: str
    document: Document | None
    """None where it is no YAML."""
    config: RunConfig | None
    """None where it says something that a run cannot be."""
    fault: str

    @property
    def digest(self) -> str:
        """Of the text: what a change of all of it was made from."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]


class Workspace:
    """The folder that the page was started for.

    Args:
        roots: it, and the folders that were named beside it.
        most_upload_bytes: of one file.
    """

    def __init__(self, roots: Roots, most_upload_bytes: int) -> None:
        self.roots, self.most_upload_bytes = roots, most_upload_bytes
        self.state = roots.workspace / STATE
        self.jobs = Jobs(self.state / "jobs", roots.workspace)
        self.plans = Jobs(self.state / "plans", roots.workspace)

    # ---------------------------------------------------------------------------------------------------- what is there

    def _folders(self, depth: int = 2) -> Iterator[Path]:
        """The workspace and its folders, hidden ones and links left out."""
        waiting = [(self.roots.workspace, 0)]
        for folder, level in waiting:
            yield folder
            if level < depth and len(waiting) < _MOST_LISTED:
                try:
                    inner = sorted(entry.path for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False))
                except OSError:
                    continue
                waiting += [(Path(path), level + 1) for path in inner if not Path(path).name.startswith(".")]

    def configs(self) -> list[str]:
        """The YAML files that could be configurations."""
        files = [path for folder in self._folders(1) for path in sorted(folder.glob("*.y*ml")) if path.is_file()]
        runs = set(self.runs())
        ours = [path for path in files if self.roots.holds(path) and self.roots.shown(path.parent) not in runs]
        return [self.roots.shown(path) for path in ours][:_MOST_LISTED]

    def runs(self) -> list[str]:
        """The folders that training wrote, newest first."""
        folders = [folder for folder in self._folders() if (folder / "config.yaml").is_file()]
        folders.sort(key=lambda folder: -folder.stat().st_mtime)
        return [self.roots.shown(folder) for folder in folders]

    def datasets(self) -> list[str]:
        """The folders that hold clips."""

        def holds_clips(folder: Path) -> bool:
            try:
                names = [entry.name.lower() for entry in os.scandir(folder)]
            except OSError:
                return False
            table = any(name.startswith("metadata.") for name in names)
            texts = {name.removesuffix(".txt") for name in names if name.endswith(".txt")}
            videos = [name for name in names if name.endswith(VIDEO.suffixes)]
            return bool(videos) and (table or not texts or any(Path(name).stem in texts for name in videos))

        return [self.roots.shown(folder) for folder in self._folders() if holds_clips(folder)]

    def adapters(self) -> list[str]:
        """Runs, their exports and their checkpoints: what an adapter may be."""
        found = []
        for run in self.runs():
            folder = self.roots.workspace / run
            parts = [folder / "export", *sorted((folder / "checkpoints").glob("step-*"), reverse=True)]
            found += [run, *(self.roots.shown(part) for part in parts if part.is_dir())]
        return found

    # -------------------------------------------------------------------------------------------------- a configuration

    def config(self, name: str) -> ConfigFile:
        """Read a configuration.

        Raises:
            ConfigError: if it lies outside, or cannot be read at all.
        """
        path = self._config_path(name)
        try:
            text = path.read_bytes()[: MAX_BYTES + 1].decode("utf-8-sig")
        except (OSError, UnicodeDecodeError):
            load_config(path)  # says why
            raise
        document = config = None
        fault = ""
        try:
            document = read_text(text, self.roots.shown(path))
            config = load_config(path)
            self.roots.require_config(config)
        except FinetuneError as error:
            fault = str(error).replace(f"{self.roots.workspace}/", "")
        return ConfigFile(path, text, document, None if fault else config, fault)

    def _config_path(self, name: str) -> Path:
        path = self.roots.inside(name, "the configuration")
        if path.suffix not in (".yaml", ".yml"):
            raise ConfigError("a configuration's name ends with .yaml", where=name)
        return path

    def usable(self, name: str) -> ConfigFile:
        """A configuration that a run can be. Raises ConfigError, with its faults, if it cannot."""
        file = self.config(name)
        if file.config is None:
            raise ConfigError(file.fault)
        return file

    def put(self, name: str, field: str, value: str, before: str) -> None:
        """Change one field of a configuration; an empty value takes it out.

        Args:
            name: the file.
            field: dotted.
            value: as the form shows it.
            before: what the form showed.

        Raises:
            ConfigError: if there is no such field, the value is no YAML, or somebody else changed it meanwhile.
        """
        with self._lock():
            file = self.config(name)
            if file.document is None:
                raise ConfigError(file.fault)
            fields = {field.path: field for section in form_of(file.document) for field in section.fields}
            if field not in fields:
                raise ConfigError(f"there is no field {field:.100}", where=name, fix="reload the page")
            if (fields[field].value or "") != before.replace("\r\n", "\n"):
                raise _changed(f"{field} of {name}", fields[field].value or "")
            self._write(file, put(file.text, field, fields[field].as_yaml(value), name=name))

    def put_section(self, name: str, section: str, value: str) -> None:
        """Change a section, or what is no field of the form, of a configuration; ``value`` is YAML."""
        with self._lock():
            file = self.config(name)
            self._write(file, put(file.text, section, value, name=name))

    def write(self, name: str, text: str, digest: str) -> None:
        """Replace a configuration's text.

        Args:
            name: the file.
            text: all of it.
            digest: ``ConfigFile.digest`` of the text that it was made from.

        Raises:
            ConfigError: if it is too long, or somebody else changed the file meanwhile.
        """
        text = text.replace("\r\n", "\n")
        fault = text_fault(text) or ("it is too long" if len(text.encode()) > MAX_BYTES else "")
        if fault:
            raise ConfigError(f"this is no configuration: {fault}", where=name)
        with self._lock():
            file = self.config(name)
            if file.digest != digest:
                raise _changed(name, "")
            self._write(file, text if text.endswith("\n") else f"{text}\n")

    def _write(self, file: ConfigFile, text: str) -> None:
        if text != file.text:
            atomic_write_text(file.path, text)

    def _lock(self) -> Any:
        return hold(self.state / "edit.lock", "the page", waiting=lambda _: None)

    # ------------------------------------------------------------------------------------------------------------ clips

    def rows(self, folder: str) -> Table | TextFiles:
        """The clips of a dataset's folder and their captions.

        Raises:
            ConfigError, DataError: if it lies outside, holds none, or keeps captions as cannot be edited.
        """
        path = self.roots.inside(folder, "the folder")
        dataset = open_dataset(path)
        for row in dataset.rows:
            self.roots.inside(row.video, row.file_name)
        return dataset

    def caption(self, folder: str, clip: str, text: str, before: str) -> None:
        """Change a clip's caption.

        Raises:
            DataError: if there is no such clip, or somebody else changed the caption meanwhile.
        """
        text, before = (" ".join(words.split()) for words in (text, before))
        if fault := text_fault(text):
            raise DataError(f"the caption is damaged: {fault}", where=clip)
        with self._lock():
            dataset = self.rows(folder)
            row = _row(dataset, clip)
            if " ".join(row.texts[0].split()) != before:
                raise _changed(f"the caption of {clip}", row.texts[0])
            row.texts[0] = text
            dataset.write()

    def exclude(self, folder: str, clip: str) -> None:
        """Take a clip out of a dataset: its row, or its files, go to ``EXCLUDED`` in the folder and can come back.

        Raises:
            DataError: if there is no such clip, or it is the last one.
        """
        with self._lock():
            dataset = self.rows(folder)
            row = _row(dataset, clip)
            if len(dataset.rows) == 1:
                raise DataError("this is the only clip", where=clip, fix="take the folder out of data.sources")
            place = self.roots.inside(folder, "the folder") / EXCLUDED
            place.mkdir(exist_ok=True)
            if isinstance(dataset, Table):
                kept = [*_excluded_rows(place), row.values]
                _write_excluded(place, kept)
                dataset.rows.remove(row)
                dataset.write()
                return
            for file in (row.video.with_suffix(".txt"), row.video):
                if file.exists():
                    target = place / file.relative_to(dataset.file)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    os.replace(file, target)

    def excluded(self, folder: str) -> list[str]:
        """The clips that were taken out of a dataset."""
        place = self.roots.inside(folder, "the folder") / EXCLUDED
        names = [str(values.get("file_name", "")) for values in _excluded_rows(place)]
        files = (file for file in place.rglob("*") if file.suffix.lower() in VIDEO.suffixes)
        return [name for name in names if name] + sorted(str(file.relative_to(place)) for file in files)

    def take_back(self, folder: str, clip: str) -> None:
        """Undo ``exclude``. Raises DataError if there is nothing of the name."""
        with self._lock():
            base = self.roots.inside(folder, "the folder")
            place = base / EXCLUDED
            if clip not in self.excluded(folder):
                raise DataError("there is no such clip", where=clip)
            rows = _excluded_rows(place)
            if row := next((values for values in rows if values.get("file_name") == clip), None):
                dataset = self.rows(folder)
                dataset.rows.append(Row(clip, base / clip, [str(row.get(dataset.column) or "")], row))
                dataset.write()
                rows.remove(row)
                _write_excluded(place, rows)
                return
            video = place / clip
            for file in (video, video.with_suffix(".txt")):
                if file.exists():
                    os.replace(file, base / file.relative_to(place))

    # ---------------------------------------------------------------------------------------------------------- uploads

    def upload(self, folder: str, name: str, source: BinaryIO) -> Path:
        """Keep an uploaded clip or image in a folder, under a name that is free.

        Raises:
            DataError: if it is neither, by its name and its first bytes, or too large.
        """
        place = self.roots.inside(folder, "the folder")
        stem, ending = re.sub(r"[^\w-]+", "-", Path(name).stem)[:80].strip("-") or "file", Path(name).suffix.lower()
        head = source.read(16)
        at, magic = _MAGIC.get(ending, (0, b""))
        if not magic or head[at : at + len(magic)] != magic:
            known = " ".join(sorted(_MAGIC))
            raise DataError("this is no clip and no image", where=name, fix=f"known are {known}, by their content too")
        target = next(path for number in range(10_000) if not (path := _numbered(place, stem, ending, number)).exists())

        def parts() -> Iterator[memoryview]:
            size = len(head)
            yield memoryview(head)
            while part := source.read(1 << 20):
                size += len(part)
                if size > self.most_upload_bytes:
                    raise DataError(f"more than {self.most_upload_bytes:,} bytes", where=name)
                yield memoryview(part)

        atomic_write(target, parts())
        return target

    def media(self, path: str) -> Path:
        """A file that the page may show.

        Raises:
            ConfigError: if it lies outside, is none of the kinds in ``SHOWN``, or is not there.
        """
        file = self.roots.inside(path, "the file")
        if file.suffix.lower() not in SHOWN or not file.is_file():
            raise ConfigError("there is nothing to show", where=path)
        return file


def _numbered(folder: Path, stem: str, ending: str, number: int) -> Path:
    return folder / f"{stem}{f'-{number}' if number else ''}{ending}"


def _changed(what: str, now: str) -> ConfigError:
    shown = f" It is now: {now:.300}" if now else ""
    return ConfigError(
        f"{what} was changed elsewhere since this page was loaded, and nothing was written.{shown}",
        fix="look at what stands there, and change it again",
    )


def _row(dataset: Table | TextFiles, clip: str) -> Row:
    row = next((row for row in dataset.rows if row.file_name == clip), None)
    if row is None:
        raise DataError("there is no such clip in the folder any more", where=clip, fix="reload the page")
    return row


def _excluded_rows(place: Path) -> list[dict[str, Any]]:
    try:
        lines = (place / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
        return [values for line in lines if isinstance(values := json.loads(line), dict)]
    except (OSError, ValueError):
        return []


def _write_excluded(place: Path, rows: list[dict[str, Any]]) -> None:
    atomic_write_text(place / "metadata.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
