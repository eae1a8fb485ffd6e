"""``finetune cache pack``: lay entries that have files of their own into shards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

from finetune.core.errors import CacheError
from finetune.core.files import disk_fix, human_size, require_space
from finetune.core.terminal import Bar
from finetune.datasets.cache import Cache
from finetune.datasets.cache_admin import Damage, lock_out_jobs
from finetune.datasets.entries import fault_of
from finetune.datasets.manifests import KINDS, Kind
from finetune.datasets.shards import SHARD_BYTES, Row, groups


@dataclass(frozen=True)
class PackReport:
    """What ``pack`` did."""

    entries: int
    """Laid into new shards."""
    bytes: int
    shards: int
    """New ones."""
    damaged: tuple[Damage, ...] = ()
    """Files that are not what was written; they stay as they are."""
    held_back: str = ""
    """Why nothing was packed; empty otherwise."""

    def __str__(self) -> str:
        if self.held_back:
            return f"nothing was packed: {self.held_back}; run it again later"
        lines = [f"packed {self.entries} entries ({human_size(self.bytes)}) into {self.shards} new shards"]
        lines += [f"  damaged, not packed: {one.path}: {one.reason}" for one in self.damaged]
        if self.damaged:
            lines.append("take the damaged files out with `finetune cache verify --delete`")
        return "\n".join(lines)


def pack(cache: Cache, *, alone: bool = False, shard_bytes: int = SHARD_BYTES, progress: bool = False) -> PackReport:
    """Lay every entry that has a file of its own into shards, and remove its file when shard and index are on the disk.

    Addresses stay, so nothing is encoded again. It takes the cache's lock for itself: while a job uses the cache,
    nothing is packed, and the report says so. Killed at any moment it loses nothing, and the next call goes on.

    Args:
        cache: which one.
        alone: the caller knows that no job uses the cache; asked for where the file system has no locks.
        shard_bytes: about how large a shard becomes. The disk must have room for one more.
        progress: draw a bar.

    Raises:
        CacheError: if the cache cannot be locked or written to, or the disk has no room for a shard.
    """
    shards, size, packed = 0, 0, 0
    damaged: list[Damage] = []

    def contents(group: list[Row]) -> Iterator[tuple[Kind, str, bytes]]:
        for kind, key, _, _ in group:
            path = cache.path(kind, key)
            content = path.read_bytes()
            if reason := fault_of(content, kind, key):
                damaged.append(Damage(path, reason))
            else:
                yield kind, key, content

    with ExitStack() as lock:
        try:
            if held_back := lock_out_jobs(lock, cache, "cache pack", alone=alone):
                return PackReport(0, 0, 0, held_back=held_back)
            cache.shards.mend_indexes()
            cache.shards.entries()  # what was read before nobody could change anything may be of shards that are gone
            files = [
                Row(kind, path.stem, 0, path.stat().st_size)
                for kind in KINDS
                for path in cache.files(kind)
                if not _is_packed(cache, kind, path.stem)
            ]
            with Bar(total=len(files), desc="packing entries", disable=not progress) as bar:
                for group in groups(files, shard_bytes):
                    require_space(
                        cache.root,
                        sum(row.size for row in group) + 256 * len(group),
                        kind=CacheError,
                        what="the next shard",
                        fix="make room for one more (`finetune cache gc`)",
                    )
                    rows = cache.shards.write(contents(group))
                    for row in rows:
                        cache.path(row.kind, row.key).unlink(missing_ok=True)
                    shards, size = shards + bool(rows), size + sum(row.size for row in rows)
                    packed += len(rows)
                    bar.update(len(group))
        except OSError as error:
            what = f"the cache cannot be packed: {error.strerror}"
            fix = f"{disk_fix(error)}; what is packed already stays"
            raise CacheError(what, where=str(cache.root), fix=fix) from error
    return PackReport(packed, size, shards, tuple(damaged))


def _is_packed(cache: Cache, kind: Kind, key: str) -> bool:
    """Whether an entry that has a file of its own lies whole in a shard as well; its file is then removed.

    So it is where a call was killed before it had removed them. A damaged copy is dropped, and packed anew.
    """
    place = cache.shards.entries(refresh=False)[kind].get(key)
    if place is None:
        return False
    if fault_of(place.read(), kind, key):
        cache.shards.drop(kind, key)
        return False
    cache.path(kind, key).unlink(missing_ok=True)
    return True
