"""Moving a cache, or what one configuration needs of it, between machines: as a folder, itself a cache, or as a tar.

Every file is verified on its way, and what is there already is passed over, so that the same command goes on where one
was stopped. ``docs/cache.md`` describes the archive for other tools.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, cast

from finetune.core.checksums import parse_checksummed_json
from finetune.core.errors import CacheError
from finetune.core.files import PARTIAL, disk_fix, human_size, move, require_space
from finetune.core.terminal import Bar
from finetune.datasets.cache import Cache
from finetune.datasets.cache_admin import Damage, missing_entries, needed_entries
from finetune.datasets.entries import fault_of
from finetune.datasets.manifests import KINDS, DamagedManifestError, Kind, manifest_fault, read_content

_NAME = re.compile(
    r"(latents|prompts|images)/([0-9a-f]{2})/(\2[0-9a-f]{30})\.safetensors|manifests/([0-9a-f]{32})\.json"
)
"""Of a member: where the file lies in a cache."""

_MEMBER_OVERHEAD = 2048
"""Bytes that a file takes beside its content, at least, in an archive."""


@dataclass(frozen=True)
class TransferReport:
    """What ``export_cache`` or ``import_cache`` did."""

    target: Path
    entries: int
    """Copied."""
    bytes: int
    kept: int
    """Entries that the target had already."""
    damaged: tuple[Damage, ...]
    """Not copied: they are not, to the bit, what was written."""
    missing: tuple[str, ...]
    """Entries that the manifests promise and the target lacks, in words."""
    notes: tuple[str, ...] = ()
    """Of what was passed over."""

    @property
    def ok(self) -> bool:
        """Whether all was whole, and the manifests' entries are all there."""
        return not self.damaged and not self.missing

    def __str__(self) -> str:
        lines = [f"{self.target}: {self.entries} entries copied ({human_size(self.bytes)}), {self.kept} were there"]
        lines += [f"  damaged, not copied: {one.path}: {one.reason}" for one in self.damaged]
        lines += [f"  missing: {one}" for one in self.missing]
        lines += [f"  {note}" for note in self.notes]
        if not self.ok:
            lines.append("mend it where it came from (`finetune cache verify`) and run the same command again")
        return "\n".join(lines)


_Members = Iterable[tuple[str, Callable[[], bytes]]]
"""Names as ``_NAME`` has them, each with what reads its file."""


def export_cache(cache: Cache, target: Path, *, manifest: str | None = None, progress: bool = False) -> TransferReport:
    """Copy manifests and entries to a folder, which then is a cache, or into an archive.

    Args:
        cache: where they are.
        target: a folder, which may be a cache already, or a file that ends with ``.tar``.
        manifest: name of the one whose entries are wanted; None for all there is.
        progress: draw a bar.

    Raises:
        CacheError: if ``target`` cannot be written or is an archive that is there already, if entries of ``manifest``
            are missing, or a manifest is damaged.
    """
    if re.search(r"\.(tar\.\w+|tgz|zip)$", target.name, re.IGNORECASE):
        raise CacheError("an archive of a cache is a plain .tar", where=str(target), fix="let its name end with .tar")
    if target.resolve() == cache.root.resolve():
        raise CacheError("that is the cache itself", where=str(target), fix="name another folder, or a .tar")
    is_tar = target.suffix == ".tar"
    if is_tar and target.exists():
        raise CacheError("the archive is there already", where=str(target), fix="name another, or delete it first")
    with cache.in_use("cache export"):
        sizes = {kind: cache.sizes(kind) for kind in KINDS}
        paths = cache.manifest_paths()
        if manifest is not None:
            paths = [path for path in paths if path.stem == manifest]
            if missing := [line for path in paths for line in missing_entries(path, sizes)]:
                what = f"{len(missing)} entries are missing, such as {missing[0]}"
                raise CacheError(what, where=str(cache.root), fix="run `finetune precompute` first")
            needed = needed_entries([content for path, content in cache.manifests() if path in paths])
            sizes = {kind: {key: sizes[kind][key] for key in needed[kind]} for kind in KINDS}
        there = {} if is_tar else Cache(target).all_keys()
        lacking = [size for kind in KINDS for key, size in sizes[kind].items() if key not in there.get(kind, ())]
        require_space(
            target,
            sum(lacking) + _MEMBER_OVERHEAD * len(lacking) - (_size(_unfinished(target)) if is_tar else 0),
            kind=CacheError,
            what="the copy",
            fix="make room, or name a larger disk",
            files=32 if is_tar else 2 * len(lacking),
        )
        members = [*((f"manifests/{path.name}", path.read_bytes) for path in paths), *_entries(cache, sizes)]
        if is_tar:
            return _write_tar(members, target, progress=progress)
        return _take_in(members, Cache(target), cache.root, progress=progress)


def import_cache(cache: Cache, source: Path, *, progress: bool = False) -> TransferReport:
    """Take in what ``export_cache`` wrote, or any cache's folder; what is there already stays as it is.

    Args:
        cache: where it goes.
        source: a cache's folder, or an archive.
        progress: draw a bar.

    Raises:
        CacheError: if ``source`` cannot be read as either, or the cache cannot be written; what was taken in stays.
    """
    if source.is_dir():
        other = Cache(source)
        if not any((source / name).is_dir() for name in (*KINDS, "manifests")):  # a lock in it would be litter
            raise CacheError("the folder holds no cache", where=str(source), fix="name what was exported")
        with other.in_use("cache import"):
            manifests = ((f"manifests/{path.name}", path.read_bytes) for path in other.manifest_paths())
            members = [*manifests, *_entries(other, other.all_keys())]
            if not members:
                raise CacheError("the folder holds no cache", where=str(source), fix="name what was exported")
            return _take_in(members, cache, source, progress=progress)
    try:
        with tarfile.open(source, "r:*") as archive:
            files = ((member.name, partial(_content, archive, member)) for member in archive if member.isreg())
            return _take_in(files, cache, source, progress=progress)
    except (tarfile.TarError, EOFError) as error:
        fix = "copy it again; what was taken in from it stays, and the same command goes on from there"
        raise CacheError(f"the archive cannot be read: {error}", where=str(source), fix=fix) from None
    except OSError as error:
        raise CacheError(f"cannot be read: {error.strerror or error}", where=str(source)) from None


def _entries(cache: Cache, keys: Mapping[Kind, Iterable[str]]) -> Iterator[tuple[str, Callable[[], bytes]]]:
    for kind in KINDS:
        for key in sorted(keys[kind]):
            yield f"{kind}/{key[:2]}/{key}.safetensors", partial(cache.content, kind, key)


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    return cast(BinaryIO, archive.extractfile(member)).read()


def _fault(name: re.Match[str], content: bytes) -> str:
    kind, _, key, manifest = name.groups()
    return manifest_fault(content, manifest) if manifest else fault_of(content, cast(Kind, kind), key)


def _take_in(members: _Members, cache: Cache, source: Path, *, progress: bool) -> TransferReport:
    copied, size, kept = 0, 0, 0
    damaged, notes = [], []
    manifests: dict[str, bytes] = {}
    with cache.in_use("cache import"):
        there = cache.all_keys()
        for name, read in Bar(members, desc="copying entries", disable=not progress):
            match = _NAME.fullmatch(name)
            if match is None:
                notes.append(f"passed over, no file of a cache: {name}")
                continue
            kind, _, key, manifest = match.groups()
            if not manifest and key in there[cast(Kind, kind)]:
                kept += 1
                continue
            content = read()
            if reason := _fault(match, content):
                damaged.append(Damage(source / name, reason))
            elif manifest:  # of two, the later one counts: the export was stopped between them
                manifests[manifest] = content
            else:
                cache.publish(cache.path(cast(Kind, kind), key), content)
                copied, size = copied + 1, size + len(content)
        paths = [cache.root / "manifests" / f"{manifest}.json" for manifest in manifests]
        for path in paths:  # last, so that they promise nothing that was still to come
            notes += _file_manifest(cache, path, manifests[path.stem])
        there = cache.all_keys()
        missing = [line for path in paths for line in missing_entries(path, there)]
    return TransferReport(cache.root, copied, size, kept, tuple(damaged), tuple(missing), tuple(notes))


def _file_manifest(cache: Cache, path: Path, content: bytes) -> list[str]:
    """File a manifest, unless a complete one answers the same request here; a note where that one has other clips."""
    with suppress(FileNotFoundError, DamagedManifestError):
        present = read_content(path)
        if present is not None and present["complete"]:
            other = present["digest"] != parse_checksummed_json(content)["digest"]
            return [f"manifest {path.stem[:12]} is complete here already, with other clips: it stays"] if other else []
    cache.publish(path, content)
    return []


# ------------------------------------------------------------------------------------------------------------- archives


def _unfinished(target: Path) -> Path:
    """What an export that was stopped has written of ``target``; one name, so that the next goes on with it."""
    return target.with_name(f"{target.name}{PARTIAL}")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _write_tar(members: _Members, target: Path, *, progress: bool) -> TransferReport:
    unfinished = _unfinished(target)
    copied, size = 0, 0
    damaged = []
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        written, end = _members_in(unfinished)
        with unfinished.open("r+b" if unfinished.exists() else "wb") as file:
            file.truncate(end)
            file.seek(end)
            with tarfile.open(fileobj=file, mode="w") as archive:
                for name, read in Bar(members, desc="copying entries", disable=not progress):
                    if name in written and not name.startswith("manifests/"):  # which may have changed since
                        continue
                    content = read()
                    if reason := _fault(cast("re.Match[str]", _NAME.fullmatch(name)), content):
                        damaged.append(Damage(target / name, reason))
                        continue
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    archive.addfile(member, BytesIO(content))
                    copied, size = copied + (not name.startswith("manifests/")), size + len(content)
            file.flush()
            os.fsync(file.fileno())
        if not damaged:
            move(unfinished, target)
    except OSError as error:
        raise CacheError(
            f"the archive cannot be written: {error.strerror or error}", where=str(target), fix=disk_fix(error)
        ) from error
    kept = sum(not name.startswith("manifests/") for name in written)
    return TransferReport(target, copied, size, kept, tuple(damaged), ())


def _members_in(unfinished: Path) -> tuple[Collection[str], int]:
    """The members that an unfinished archive holds whole, and where the last of them ends."""
    names, end = set(), 0
    if _size(unfinished):
        try:
            with tarfile.open(unfinished, "r:") as archive:
                for member in archive:
                    after = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                    if after > _size(unfinished):
                        break
                    names.add(member.name)
                    end = after
        except tarfile.TarError:  # cut off in a header: what stood before it is whole
            pass
    return names, end
