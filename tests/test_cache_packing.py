"""Entries in shards: read as if they had files of their own, whatever happened to them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from broken_disk import CALLS, disk

from finetune.core import files
from finetune.core.checksums import digest_of
from finetune.core.errors import CacheError
from finetune.core.types import Bucket, ClipPlan
from finetune.datasets import cache_admin
from finetune.datasets.cache import Cache, Encoding
from finetune.datasets.cache_packing import pack
from finetune.datasets.cache_transfer import export_cache
from finetune.datasets.manifests import KINDS, Manifest, ManifestItem
from finetune.datasets.shards import index_fault, index_of, remove

ENCODING = Encoding("v", "t", "fp32", 4, "fp16", None, "rule")
BUCKET = Bucket(1, 2, 2)
SMALL = 1300
"""Bytes of a shard here: some two entries."""


def add_clip(cache: Cache, number: int) -> ManifestItem:
    clip = ENCODING.latents_address(f"{number:032d}", ClipPlan((0,), (2, 2), (0, 0), BUCKET))
    caption = ENCODING.prompt_address(f"caption {number}")
    mean = torch.full((2, 1, 2, 2), float(number))
    cache.write_latents(clip, mean, mean.abs(), None)
    cache.write_prompt(caption, torch.full((4, 2), float(number)), tokens=number)
    return ManifestItem(
        f"{number}.mp4", "rows:1", "", BUCKET, 1.0, False, digest_of(clip), digest_of(caption), f"{number:032d}"
    )


def make_cache(root: Path, clips: int = 4) -> tuple[Cache, Manifest]:
    cache = Cache(root)
    items = tuple(add_clip(cache, number) for number in range(clips))
    manifest = Manifest(items, items[0].prompt_key, {"clips": clips}, {})
    cache.save_manifest(manifest, root)
    return cache, manifest


@pytest.fixture
def packed(tmp_path) -> tuple[Cache, Manifest]:
    """Four clips and their captions in shards, as a process sees them that has read nothing yet."""
    cache, manifest = make_cache(tmp_path / "cache")
    assert pack(cache, shard_bytes=SMALL).entries == 8
    return Cache(cache.root), manifest


def contents(cache: Cache) -> dict[str, bytes]:
    return {key: cache.content(kind, key) for kind in KINDS for key in cache.keys(kind)}


def is_whole(cache: Cache, manifest: Manifest) -> bool:
    for number, item in enumerate(manifest.items):
        entry = Cache(cache.root).read(item)
        assert float(entry.latents_mean.mean()) == float(entry.prompt_embeds.mean()) == number
    return len(contents(Cache(cache.root))) == 2 * len(manifest.items) and cache_admin.verify(Cache(cache.root)).ok


def flip(cache: Cache, kind: str, key: str) -> Path:
    shard, offset, size = cache.shards.entries()[kind][key]
    content = bytearray(shard.read_bytes())
    content[offset + size - 3] ^= 1
    shard.write_bytes(content)
    return shard


# -------------------------------------------------------------------------------------------------------- both kinds


def test_packed_entries_are_read_listed_verified_counted_and_exported_as_before(tmp_path):
    cache, manifest = make_cache(tmp_path / "cache")
    before, sizes = contents(cache), {kind: cache.sizes(kind) for kind in KINDS}
    report = pack(cache, shard_bytes=SMALL)
    assert (report.entries, report.bytes) == (8, sum(map(len, before.values()))) and report.shards >= 3
    assert not any(cache.files(kind) for kind in KINDS) and len(cache.shards.paths()) == report.shards
    for seen in (cache, Cache(cache.root)):  # that knew them as files, and that knows nothing
        assert contents(seen) == before and {kind: seen.sizes(kind) for kind in KINDS} == sizes
        assert all(seen.has("latents", item.latents_key) for item in manifest.items)
        assert [seen.prompt_tokens(item.prompt_key) for item in manifest.items] == [0, 1, 2, 3]
    assert is_whole(cache, manifest)
    stats = cache_admin.stats(cache)
    assert stats.packed == 8 and f"8 of them in {report.shards} shards" in str(stats)
    export_cache(cache, tmp_path / "copy")
    assert contents(Cache(tmp_path / "copy")) == before
    assert not pack(cache).entries and contents(cache) == before


def test_files_and_shards_together_are_one_cache(packed):
    cache, manifest = packed
    item = add_clip(cache, 4)
    assert len(cache.keys("latents")) == 5 and cache_admin.verify(cache).checked == 10
    assert float(cache.read(item).latents_mean.mean()) == 4
    assert pack(cache).entries == 2 and float(cache.read(item).latents_mean.mean()) == 4
    assert is_whole(cache, Manifest((*manifest.items, item), item.prompt_key, {}, {}))


def test_nothing_is_packed_while_a_job_uses_the_cache(tmp_path):
    cache, manifest = make_cache(tmp_path / "cache")
    with Cache(cache.root).in_use("train"):
        report = pack(cache)
        assert "nothing was packed: the cache is in use (train" in str(report) and not report.entries
    assert pack(cache).entries == 8 and is_whole(cache, manifest)


def test_a_damaged_file_is_named_and_stays_a_file(tmp_path):
    cache, manifest = make_cache(tmp_path / "cache")
    path = cache.path("latents", manifest.items[0].latents_key)
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    report = pack(cache)
    assert report.entries == 7 and [one.path for one in report.damaged] == [path] and path.exists()


# ----------------------------------------------------------------------------------------------------------- killed


class Killed(BaseException):
    """What ends a process at once: nothing in the package catches it."""


@pytest.mark.parametrize("work", ["pack", "gc"])
def test_killed_at_any_moment_nothing_is_lost_and_the_next_call_finishes(tmp_path, monkeypatch, work):
    """Every call that changes the disk is the last one in turn; a removal as well."""

    def killed_at(last: int) -> bool:
        cache, manifest = make_cache(tmp_path / f"{last}", clips=3)
        if work == "gc":
            others = Cache(cache.root)
            for number in range(10, 16):
                add_clip(others, number)
            pack(cache)
        calls = iter(range(last, -1, -1))

        def dying(real):
            def call(*arguments, **options):
                if next(calls, 0) == 0:
                    raise Killed
                return real(*arguments, **options)

            return call

        with monkeypatch.context() as patch:
            for name in CALLS:
                patch.setattr(files, name, dying(getattr(files, name)))
            patch.setattr(Path, "unlink", dying(Path.unlink))
            try:
                run(cache)
            except Killed:
                pass
            else:
                return False
        assert is_whole_of(cache, manifest)
        run(Cache(cache.root))
        assert is_whole_of(cache, manifest) and len(contents(Cache(cache.root))) == 6
        assert not any(cache.files(kind) for kind in KINDS)
        assert all(not index_fault(shard) for shard in cache.shards.paths())
        return True

    def is_whole_of(cache: Cache, manifest: Manifest) -> bool:
        fresh = Cache(cache.root)
        return all(float(fresh.read(item).latents_mean.mean()) == n for n, item in enumerate(manifest.items))

    def run(cache: Cache) -> None:
        if work == "pack":
            pack(cache, shard_bytes=SMALL)
        else:
            assert not cache_admin.gc(cache, delete=True, grace_s=0).held_back

    deaths = next(last for last in range(1000) if not killed_at(last))
    assert deaths > 10


def test_a_file_goes_only_when_its_copy_in_a_shard_is_whole(packed):
    """A pack was killed before it removed the file, and the copy was damaged since."""
    cache, manifest = packed
    add_clip(Cache(cache.root), 1)
    flip(cache, "latents", manifest.items[1].latents_key)
    assert pack(Cache(cache.root)).entries == 1 and is_whole(cache, manifest)


@pytest.mark.parametrize("fail_at", [2, 3, 10, 13])
def test_a_full_disk_is_named_and_nothing_is_lost(tmp_path, fail_at):
    """Nor is room taken by a shard whose index did not fit."""
    cache, manifest = make_cache(tmp_path / "cache")
    with disk(fail_at=fail_at), pytest.raises(CacheError, match=r"cannot be packed: No space[\s\S]*already stays"):
        pack(cache)
    assert is_whole(cache, manifest)
    assert not cache.shards.paths() and pack(cache).entries == 8


def test_a_shard_asks_for_room_first(tmp_path, monkeypatch):
    cache, manifest = make_cache(tmp_path / "cache")
    monkeypatch.setattr(files, "free_space", lambda path: 100)
    with pytest.raises(CacheError, match="the next shard needs"):
        pack(cache)
    assert is_whole(cache, manifest) and not cache.shards.paths()


# ---------------------------------------------------------------------------------------------------------- damaged


@pytest.mark.parametrize("verified", [False, True])
def test_a_damaged_packed_entry_is_named_counts_as_missing_and_is_encoded_anew(packed, verified):
    cache, manifest = packed
    item = manifest.items[1]
    shard = flip(cache, "latents", item.latents_key)
    if verified:
        report = cache_admin.verify(cache, delete=True)
        assert [one.path for one in report.damaged] == [shard] and item.latents_key in str(report)
        assert report.missing == (f"latents/{item.latents_key} of manifest {manifest.name[:12]}",)
    else:
        with pytest.raises(CacheError, match=rf"damaged[\s\S]*{shard.name} \(latents/{item.latents_key}\) \(1.mp4\)"):
            cache.read(item)
    for seen in (cache, Cache(cache.root)):
        assert not seen.has("latents", item.latents_key) and len(seen.keys("latents")) == 3
    with pytest.raises(CacheError, match="missing"):
        cache.read(item)
    add_clip(Cache(cache.root), 1)
    assert float(cache.read(item).latents_mean.mean()) == 1 and is_whole(cache, manifest)


def test_a_shard_loses_nothing_with_its_index(packed):
    """As long as the shard is whole, an index that is gone, cut off, or of other rows is made anew."""
    cache, manifest = packed
    before = contents(cache)
    first, second, third, *_ = cache.shards.paths()
    swapped = index_of(first).read_bytes()
    index_of(first).unlink()
    index_of(second).write_bytes(index_of(second).read_bytes()[:-9])
    index_of(third).write_bytes(bytes(reversed(swapped)))
    fresh = Cache(cache.root)
    assert contents(fresh) == before
    report = cache_admin.verify(fresh, delete=True)
    assert {one.path for one in report.damaged} == {index_of(one) for one in (first, second, third)}
    assert is_whole(cache, manifest)


def test_no_flipped_bit_of_an_index_gives_other_bytes(packed):
    """A wrong offset would be taken for damage of an entry that is whole."""
    cache, manifest = packed
    before = contents(cache)
    index = index_of(cache.shards.paths()[0])
    whole = index.read_bytes()
    for at in range(0, len(whole), 41):
        index.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        assert contents(Cache(cache.root)) == before
    index.write_bytes(whole)
    assert is_whole(cache, manifest)


def test_a_shard_that_is_cut_off_names_what_went_with_its_end(packed):
    cache, _ = packed
    shard = cache.shards.paths()[0]
    shard.write_bytes(shard.read_bytes()[:-5])
    report = cache_admin.verify(Cache(cache.root))
    assert [one.path for one in report.damaged] == [shard]


# ---------------------------------------------------------------------------------------------------------- garbage


@pytest.mark.parametrize("clips", [0, 1, 5])
def test_a_shard_is_written_anew_when_more_than_half_is_unused(tmp_path, clips):
    """Six clips in one shard, of which a manifest needs some."""
    cache, manifest = make_cache(tmp_path / "cache", clips=6)
    pack(cache)
    (shard,) = cache.shards.paths()
    needed = Manifest(manifest.items[:clips], manifest.items[0].prompt_key, manifest.request, {})
    cache.save_manifest(needed, tmp_path)
    assert cache_admin.gc(cache, grace_s=3600).young == 12 - max(2 * clips, 1)
    before = cache_admin.gc(cache, grace_s=0)
    report = cache_admin.gc(cache, delete=True, grace_s=0)
    assert shard.exists() == (clips == 5)
    if clips == 5:
        assert (report.entries, report.packed) == (0, 2) and "2 more entries are unused" in str(report)
    else:
        assert report.entries == before.entries == 12 - max(2 * clips, 1) and report.bytes > 0
        assert len(contents(Cache(cache.root))) == max(2 * clips, 1)
    assert is_whole_part(cache, needed)
    assert cache_admin.gc(cache, delete=True, grace_s=0).entries == 0


def is_whole_part(cache: Cache, manifest: Manifest) -> bool:
    fresh = Cache(cache.root)
    assert all(float(fresh.read(item).latents_mean.mean()) == n for n, item in enumerate(manifest.items))
    return cache_admin.verify(fresh).ok


def test_a_reader_follows_when_its_shard_is_written_anew(packed):
    cache, manifest = packed
    cache.read(manifest.items[3])
    other = Cache(cache.root)
    for shard, rows in other.shards.by_shard().items():
        moved = [(row.kind, row.key, other.content(row.kind, row.key)) for row in rows]
        other.shards.write(moved)
        shard.unlink()
    assert float(cache.read(manifest.items[3]).latents_mean.mean()) == 3


def test_what_a_process_read_long_ago_does_not_stop_it_from_packing(packed):
    """Another process has written the shards anew since, and a file that lay in one is there again."""
    cache, manifest = packed
    first = manifest.items[0]
    content = cache.content("latents", first.latents_key)
    assert cache.shards.entries()
    other = Cache(cache.root)
    moved = [(kind, key, other.content(kind, key)) for kind in KINDS for key in other.keys(kind)]
    former = other.shards.paths()
    other.shards.write(moved)
    for shard in former:
        remove(shard)
    cache.publish(cache.path("latents", first.latents_key), content)
    assert pack(cache).entries == 0 and is_whole(cache, manifest) and not cache.files("latents")


def test_a_shard_that_is_written_while_they_are_listed_is_seen(packed, monkeypatch):
    cache, manifest = packed
    content = cache.content("latents", manifest.items[0].latents_key)
    paths = cache.shards.paths

    def listed_late() -> list[Path]:
        listed = paths()
        monkeypatch.undo()
        Cache(cache.root).shards.write([("latents", manifest.items[0].latents_key, content)])
        return listed

    monkeypatch.setattr(cache.shards, "paths", listed_late)
    assert sum(map(len, cache.shards.by_shard().values())) == 8
