"""What is in a folder of clips: every file, each folder once, what belongs to which clip, and what nobody reads."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from finetune.datasets.rows import IMAGE_SUFFIXES, OTHER_IMAGE_SUFFIXES, VIDEO_SUFFIXES, alike, is_inside
from finetune.errors import DataError
from finetune.text import text_fault

PICTURES = (*IMAGE_SUFFIXES, *OTHER_IMAGE_SUFFIXES)

_MOST_FILES = 4_000_000
_OF_USE = (*VIDEO_SUFFIXES, *PICTURES, ".txt")


@dataclass
class Listing:
    """What is in a folder and its sub-folders, each folder once however many links lead to it."""

    files: list[Path] = field(default_factory=list)
    """Sorted."""
    faults: list[DataError] = field(default_factory=list)
    """Folders that are not read, and names that are no text: what is in them may be part of the dataset."""
    hidden: list[Path] = field(default_factory=list)
    """Videos that are left out because a name begins with a dot."""
    again: list[Path] = field(default_factory=list)
    """Links to folders that are read under another name."""


def list_folder(folder: Path, *, allow_outside: bool) -> Listing:
    """List every file in a folder and its sub-folders.

    Args:
        folder: the dataset's folder.
        allow_outside: follow links to folders outside of it; those to folders inside are followed in any case.

    Raises:
        DataError: if there is no such folder, or it holds too many files.
    """
    if not folder.is_dir():
        raise DataError("there is no such folder", where=str(folder), fix="check data.sources")
    listing = Listing()
    root = os.path.realpath(folder)
    seen: set[str] = set()
    places = [(folder, False)]
    links: list[Path] = []
    count = 0
    while places or links:
        # Links come last, so that a folder is read under its own name and not again under a link's.
        place, hidden = places.pop() if places else (links.pop(), False)
        real = os.path.realpath(place)
        if not hidden:
            if not allow_outside and not is_inside(real, root):
                told = f"{place.name} is a link to a folder outside of {folder}, which is not read"
                fix = "set allow_outside: true for a folder that you trust, or name it as a source of its own"
                listing.faults.append(DataError(told, where=str(place), fix=fix))
                continue
            if real in seen:
                if place.is_symlink():
                    listing.again.append(place)
                continue
            seen.add(real)
        try:
            entries = sorted(os.scandir(place), key=lambda entry: entry.name)
        except OSError as error:
            if not hidden:
                told = f"the folder cannot be read: {error.strerror}"
                listing.faults.append(DataError(told, where=str(place), fix="make it readable, or take it out"))
            continue
        count += len(entries)
        if count > _MOST_FILES:
            fix = "name the folder of the clips, or list them in a metadata file"
            raise DataError(f"more than {_MOST_FILES:,} files are in the folder", where=str(folder), fix=fix)
        for entry in entries:
            path, suffix = place / entry.name, os.path.splitext(entry.name)[1].lower()  # noqa: PTH122
            is_link = entry.is_symlink()
            is_folder = entry.is_dir(follow_symlinks=False) or (is_link and path.is_dir())
            if hidden or entry.name.startswith("."):
                if is_folder and not is_link:
                    places.append((path, True))
                elif suffix in VIDEO_SUFFIXES and not entry.name.startswith("._"):  # which macOS puts beside every file
                    listing.hidden.append(path)
            elif (is_folder or suffix in _OF_USE) and (fault := text_fault(entry.name, one_line=True)):
                # No record of the run could name it, and no terminal should.
                told = f"a {'folder' if is_folder else 'file'}'s name is damaged: {fault}"
                listing.faults.append(DataError(told, where=str(path), fix="rename it, in UTF-8"))
            elif is_folder and is_link:
                links.append(path)
            elif is_folder:
                places.append((path, False))
            elif is_link and suffix not in _OF_USE and not path.exists():
                told = f"{entry.name} is a link that leads nowhere"
                listing.faults.append(DataError(told, where=str(path), fix="mend it, or take it out"))
            else:
                listing.files.append(path)
    listing.files.sort()
    # A folder may be hidden by its own name and read under that of a link.
    listing.hidden = sorted(path for path in listing.hidden if os.path.realpath(path.parent) not in seen)
    return listing


class Beside:
    """Files that lie beside videos under their names; where a name is no video's, case and Unicode form do not matter.

    Args:
        files: of the whole dataset.
        videos: those of them that are videos.
        suffixes: in lower case, of those that are looked for.
    """

    def __init__(self, files: Iterable[Path], videos: Iterable[Path], suffixes: tuple[str, ...]) -> None:
        stems = {video.with_suffix("") for video in videos}
        self._groups: dict[object, list[Path]] = {}
        for file in files:
            if file.suffix.lower() in suffixes:
                stem = file.with_suffix("")
                self._groups.setdefault(stem if stem in stems else self._key(stem), []).append(file)

    @staticmethod
    def _key(stem: Path) -> tuple[Path, str]:
        return stem.parent, alike(stem.name)

    def _group(self, video: Path) -> list[Path]:
        stem = video.with_suffix("")
        return self._groups.get(stem) or self._groups.get(self._key(stem), [])

    def of(self, video: Path) -> Path | None:
        """The file beside a video, if there is one. Raises DataError if there are several."""
        found = self._group(video)
        if len(found) > 1:
            names = " and ".join(file.name for file in found)
            raise DataError(f"{names} could both belong to it", where=str(video), fix="leave one of them there")
        return found[0] if found else None

    def of_any(self, videos: Iterable[Path]) -> bool:
        """Whether a file lies beside any of the videos."""
        return any(self._group(video) for video in videos)

    def of_none(self, videos: Iterable[Path]) -> list[Path]:
        """The files that lie beside none of the videos."""
        taken = {file for video in videos for file in self._group(video)}
        return [file for files in self._groups.values() for file in files if file not in taken]


def left_out(folder: Path, listing: Listing) -> list[str]:
    """Notes on what a folder of clips holds and nobody reads."""
    others = [file for file in listing.files if file.suffix.lower() not in _OF_USE]
    notes = []
    if others:
        kinds = Counter(file.suffix.lower() or "without ending" for file in others)
        told = ", ".join(f"{count} {kind:.20}" for kind, count in kinds.most_common(8))
        notes.append(f"{len(others)} files in {folder} are of no kind that is read: {told}; such as {others[0].name}")
    if listing.hidden:
        name = listing.hidden[0].relative_to(folder).as_posix()
        notes.append(
            f"{len(listing.hidden)} videos in {folder} have a name or folder that begins with a dot, such as {name}"
        )
    if listing.again:
        name = listing.again[0].relative_to(folder).as_posix()
        notes.append(f"{len(listing.again)} links in {folder} lead to a folder that is read already, such as {name}")
    return notes
