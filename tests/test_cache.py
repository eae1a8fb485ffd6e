"""The store itself: entries that prove themselves whole, manifests, verify, gc. No model and no video is needed."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import load_file

from finetune.core.checksums import checksummed_json, digest_of
from finetune.core.errors import CacheError, DataError
from finetune.core.types import Bucket, ClipPlan
from finetune.datasets import cache_admin
from finetune.datasets.cache import Cache, Encoding
from finetune.datasets.manifests import (
    FORMAT,
    UNKNOWN,
    FileStamp,
    Manifest,
    ManifestItem,
    differences,
    portable,
    read_content,
)

BUCKET = Bucket(9, 64, 64)
PLAN = ClipPlan(tuple(range(9)), (64, 64), (0, 0), BUCKET)


ENCODING = Encoding("v" * 32, "t" * 32, "bf16", 16, "fp16", None, "rule-1")


def clip_address(media="m" * 32, plan=PLAN, *, image=None, corrections=(), **changes):
    return replace(ENCODING, **changes).latents_address(media, plan, image=image, corrections=corrections)


def caption_address(text="a red circle", dtype="fp32", **changes):
    return replace(ENCODING, dtype=dtype, **changes).prompt_address(text)


def posterior(seed=0, image_draws=0):
    generator = torch.Generator().manual_seed(seed)
    mean, std = torch.randn(2, 4, 3, 8, 8, generator=generator)
    image = torch.randn(image_draws, 4, 1, 8, 8, generator=generator) if image_draws else None
    return mean, std.abs(), image


def filled(root: Path, captions=("a", "b")) -> tuple[Cache, Manifest, Path]:
    """A cache with one clip per caption and a complete manifest over them."""
    cache = Cache(root / "cache")
    items = []
    empty = caption_address("")
    cache.write_prompt(empty, torch.zeros(16, 32), tokens=1)
    for number, caption in enumerate(captions):
        address, prompt = clip_address(f"{number:032d}"), caption_address(caption)
        mean, std, _ = posterior(number)
        cache.write_latents(address, mean, std, None)
        cache.write_prompt(prompt, torch.full((16, 32), float(number)), tokens=3)
        items.append(
            ManifestItem(
                clip=f"clips/{number}.mp4",
                where=f"metadata.jsonl:{number + 1}",
                caption=caption,
                bucket=BUCKET,
                repeats=1.0,
                holdout=False,
                latents_key=digest_of(address),
                prompt_key=digest_of(prompt),
                media_digest=f"{number:032d}",
            )
        )
    manifest = Manifest(
        items=tuple(items),
        empty_prompt_key=digest_of(empty),
        request={"data": {"fps": 8}},
        inputs={str(root / "clips/0.mp4"): FileStamp(3, 5, "d"), str(root): FileStamp(-1, -1, "names")},
        prompts={"a validation prompt": digest_of(caption_address(captions[0]))},
        images={str(root / "still.png"): "k" * 32},
        skipped={"too short": 2},
        notes=("a note",),
    )
    cache_path = cache.save_manifest(manifest, root)
    return cache, replace(manifest, images={}), cache_path


# ------------------------------------------------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    "change",
    [
        {"media": "n" * 32},
        {"image": "i" * 32},
        {"plan": replace(PLAN, frame_indices=(0, 0, *range(1, 8)))},
        {"plan": replace(PLAN, resize_hw=(64, 65))},
        {"plan": replace(PLAN, crop_yx=(0, 1))},
        {"plan": replace(PLAN, bucket=Bucket(9, 64, 80))},
        {"pixel_rule": "rule-2"},
        {"vae": "w" * 32},
        {"dtype": "fp32"},
        {"latents_dtype": "fp32"},
        {"image_draws": 4},
        {"condition_frames": "last"},
        {"corrections": ("bwdif-auto-1",)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_whatever_decides_the_latents_changes_their_key(change):
    assert digest_of(clip_address(**change)) != digest_of(clip_address())


def test_a_plain_video_keeps_the_address_it_had_before_there_were_corrections():
    assert "corrections" not in clip_address() and clip_address(corrections=()) == clip_address()
    assert digest_of(clip_address()) == "52ecfed70a3bafcbc85692b52acbef16"


@pytest.mark.parametrize(
    "change", [{"text": "b"}, {"text": "A red circle"}, {"text_encoder": "u"}, {"max_length": 14}, {"dtype": "bf16"}]
)
def test_whatever_decides_an_embedding_changes_its_key(change):
    assert digest_of(caption_address(**change)) != digest_of(caption_address())


def test_equal_content_has_an_equal_key_and_kinds_never_share_one():
    assert digest_of(clip_address()) == digest_of(
        clip_address(plan=ClipPlan(PLAN.frame_indices, (64, 64), (0, 0), BUCKET))
    )
    still = ENCODING.image_address("i", BUCKET)
    assert still["kind"] == "images" and digest_of(still) != digest_of({**still, "kind": "latents"})


# --------------------------------------------------------------------------------------------------------- entries


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_what_is_written_is_read_back_to_the_bit(tmp_path, dtype):
    cache = Cache(tmp_path)
    mean, std, image = posterior(image_draws=3)
    address, prompt = clip_address(latents_dtype=dtype, image_draws=3), caption_address()
    cache.write_latents(address, mean, std, image)
    cache.write_prompt(prompt, torch.arange(64.0).reshape(8, 8).bfloat16(), tokens=5)
    item = ManifestItem("a.mp4", "", "", BUCKET, 1.0, False, digest_of(address), digest_of(prompt), "m")
    entry = cache.read(item)
    stored = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    assert torch.equal(entry.latents_mean, mean.to(stored)) and entry.latents_mean.dtype == stored
    assert torch.equal(entry.latents_std, std.to(stored))
    assert entry.image_latents is not None and torch.equal(entry.image_latents, image.to(stored))
    assert torch.equal(entry.prompt_embeds, torch.arange(64.0).reshape(8, 8).bfloat16())
    assert cache.prompt_tokens(digest_of(prompt)) == 5
    still, pixels = (
        ENCODING.image_address("i", BUCKET),
        torch.arange(192).byte().view(3, 8, 8),
    )
    cache.write_image(still, pixels)
    assert torch.equal(cache.read_image(digest_of(still)), pixels)


def test_an_entry_is_an_ordinary_safetensors_file_that_carries_its_address(tmp_path):
    cache = Cache(tmp_path)
    mean, std, _ = posterior()
    cache.write_latents(clip_address(), mean, std, None, made_with={"tiled": False})
    path = cache.path("latents", digest_of(clip_address()))
    theirs = load_file(path)
    assert torch.equal(theirs["latents_mean"], mean.half())
    with safe_open(path, "pt") as opened:
        metadata = opened.metadata()
    assert json.loads(metadata["address"]) == json.loads(json.dumps(clip_address()))
    assert digest_of(json.loads(metadata["address"])) == metadata["key"] == path.stem
    content = path.read_bytes()
    data = 8 + int.from_bytes(content[:8], "little")
    assert xxhash.xxh3_128_hexdigest(content[data:]) == metadata["data_checksum"]
    assert content[37:69].decode() == metadata["checksum"]  # as docs/cache.md says
    assert xxhash.xxh3_128_hexdigest(content[:37] + b"0" * 32 + content[69:data]) == metadata["checksum"]
    assert list(tmp_path.rglob("*.partial")) == []


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e6], ids=["nan", "inf", "beyond fp16"])
def test_values_that_are_not_finite_are_refused_by_name(tmp_path, bad):
    mean, std, _ = posterior()
    std[0, 0, 0, 0] = bad
    with pytest.raises(CacheError, match=r"latents_std has values that are not finite in torch\.float16"):
        Cache(tmp_path).write_latents(clip_address(), mean, std, None)
    assert list(tmp_path.rglob("*.safetensors")) == []


def test_a_missing_entry_names_the_clip_and_the_command(tmp_path):
    item = ManifestItem("videos/a.mp4#2", "", "", BUCKET, 1.0, False, "ab" * 16, "cd" * 16, "m")
    with pytest.raises(CacheError, match=r"missing[\s\S]*videos/a.mp4#2[\s\S]*finetune precompute"):
        Cache(tmp_path).read(item)


# ------------------------------------------------------------------------------------------------------- manifests


def test_a_manifest_is_read_back_and_moves_with_its_folder(tmp_path):
    _, manifest, path = filled(tmp_path)
    content = read_content(path)
    elsewhere = Manifest.from_content(content, Path("/moved"))
    assert elsewhere.inputs == {"/moved/clips/0.mp4": FileStamp(3, 5, "d"), "/moved": FileStamp(-1, -1, "names")}
    assert elsewhere.images == {"/moved/still.png": "k" * 32}
    here = Manifest.from_content(content, tmp_path)
    assert replace(here, images={}) == manifest and here.digest == manifest.digest
    assert str(tmp_path / "clips") not in path.read_text()


def test_the_digest_is_the_data_and_its_order_and_nothing_else(tmp_path):
    _, manifest, _ = filled(tmp_path)
    items = manifest.items
    same = replace(manifest, request={}, prompts={}, inputs={}, items=(replace(items[0], clip="renamed"), *items[1:]))
    assert same.digest == manifest.digest
    for other in (
        replace(manifest, items=items[::-1]),
        replace(manifest, items=items[:1]),
        replace(manifest, items=(replace(items[0], repeats=2.0), *items[1:])),
        replace(manifest, items=(replace(items[0], holdout=True), *items[1:])),
        replace(manifest, empty_prompt_key="x"),
    ):
        assert other.digest != manifest.digest


def test_differences_are_named_field_by_field():
    recorded = {"data": {"fps": 8, "buckets": ["9x64x64"], "trigger": ""}, "model": {"vae": "a"}}
    asked = {"data": {"fps": 16, "buckets": ["9x64x80"], "span": "all"}, "model": {"vae": UNKNOWN}}
    assert differences(recorded, asked) == [
        'data.buckets[0]: "9x64x64" -> "9x64x80"',
        "data.fps: 8 -> 16",
        'data.span: (nothing) -> "all"',
        'data.trigger: "" -> (nothing)',
    ]
    assert differences(recorded, recorded) == []
    assert differences({"a": ["x"]}, {"a": ["x", "y"]}) == ['a: ["x"] -> ["x","y"]']


def test_paths_inside_the_base_are_portable():
    value = {"a": Path("/base/clips"), "b": (Path("/other"), 3), "c": "text"}
    assert portable(value, Path("/base")) == {"a": "clips", "b": ["/other", 3], "c": "text"}


def test_a_newer_cache_is_left_alone(tmp_path):
    cache, _, path = filled(tmp_path)
    content = {name: value for name, value in json.loads(path.read_text()).items() if name != "checksum"}
    path.write_bytes(checksummed_json(json.dumps({**content, "format": FORMAT + 1})))
    with pytest.raises(CacheError, match="newer version"):
        cache_admin.gc(cache, delete=True)
    assert len(cache.keys("latents")) == 2
    path.write_text("{")
    with pytest.raises(CacheError, match="damaged"):
        cache_admin.gc(cache, delete=True)
    assert len(cache.keys("latents")) == 2


# --------------------------------------------------------------------------------------------------------- digests


def test_a_digest_is_taken_once_and_again_only_when_the_file_may_have_changed(tmp_path, monkeypatch):
    file = tmp_path / "a.mp4"
    file.write_bytes(b"one")
    os.utime(file, (1, 1))
    cache, reads = Cache(tmp_path / "cache"), []
    real = digest_reader(reads)
    monkeypatch.setattr("finetune.datasets.cache.digest_file", real)
    digest = cache.digest_file(file)
    assert cache.digest_file(file) == digest and len(reads) == 2 and not cache.root.exists()  # asking makes no cache
    cache.root.mkdir()
    assert cache.digest_file(file) == digest and len(reads) == 3
    reads.clear()
    assert cache.digest_file(file) == digest and not reads
    os.utime(file, (2, 2))
    assert cache.digest_file(file) == digest and len(reads) == 1  # touched: read once more, and remembered again
    assert cache.digest_file(file) == digest and len(reads) == 1
    file.write_bytes(b"two")
    os.utime(file, (3, 3))
    assert cache.digest_file(file) != digest


def digest_reader(reads):
    from finetune.core.checksums import digest_file

    return lambda path: (reads.append(path), digest_file(path))[1]


def test_a_file_younger_than_the_clock_can_tell_is_never_trusted_by_its_time(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("one")
    cache = Cache(tmp_path / "cache")
    stamp = cache.stamp(file)
    assert stamp.mtime_ns == -1
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    file.write_text("two")
    os.utime(file, ns=times)  # same size, same time: only the bytes tell
    assert cache.is_unchanged(file, stamp) is False


def test_unchanged_changed_and_gone(tmp_path):
    file, cache = tmp_path / "a.txt", Cache(tmp_path / "cache")
    file.write_text("one")
    os.utime(file, (1, 1))
    stamp = cache.stamp(file)
    assert stamp.mtime_ns == 10**9 and cache.is_unchanged(file, stamp) is True
    os.utime(file, (5, 5))
    assert cache.is_unchanged(file, stamp) is True
    file.write_text("longer")
    assert cache.is_unchanged(file, stamp) is False
    file.unlink()
    assert cache.is_unchanged(file, stamp) is None
    with pytest.raises(DataError, match="cannot be read"):
        cache.stamp(file)


def test_a_folder_is_what_its_files_are_called(tmp_path):
    folder, cache = tmp_path / "clips", Cache(tmp_path / "cache")
    folder.mkdir()
    (folder / "a.mp4").write_text("a")
    stamp = cache.stamp(folder)
    (folder / "a.mp4").write_text("b")
    (folder / "sub").mkdir()
    (folder / ".hidden").touch()
    assert cache.is_unchanged(folder, stamp) is True
    (folder / "b.mp4").touch()
    assert cache.is_unchanged(folder, stamp) is False


def test_reading_needs_no_write_access(tmp_path, monkeypatch):
    cache, manifest, _ = filled(tmp_path)
    file = tmp_path / "a.mp4"
    file.write_bytes(b"one")
    os.utime(file, (1, 1))

    def refused(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("finetune.datasets.cache.atomic_write_bytes", refused)
    assert cache.digest_file(file) == cache.digest_file(file)
    assert cache.read(manifest.items[0]).latents_mean.shape == (4, 3, 8, 8)


# ---------------------------------------------------------------------------------------------------------- upkeep


def test_verify_finds_a_single_flipped_bit_and_can_delete(tmp_path):
    cache, manifest, path = filled(tmp_path)
    path.write_bytes(manifest.to_bytes(tmp_path))
    report = cache_admin.verify(cache)
    assert report.ok and report.checked == 5 and "all whole" in str(report)
    victim = cache.path("latents", manifest.items[1].latents_key)
    content = bytearray(victim.read_bytes())
    content[-17] ^= 1
    victim.write_bytes(content)
    report = cache_admin.verify(cache)
    assert [damage.path for damage in report.damaged] == [victim] and not report.missing and not report.ok
    assert victim.exists()
    report = cache_admin.verify(cache, delete=True)
    assert not victim.exists()
    assert report.missing == (f"latents/{manifest.items[1].latents_key} of manifest {path.stem[:12]}",)
    assert "finetune precompute" in str(report)


AT_ONCE = {"grace_s": 0}


def test_gc_reports_first_and_deletes_only_what_nothing_refers_to(tmp_path):
    cache, _, path = filled(tmp_path)
    orphan = clip_address("o" * 32)
    mean, std, _ = posterior()
    cache.write_latents(orphan, mean, std, None)
    report = cache_admin.gc(cache, grace_s=0)
    assert (report.entries, report.manifests, report.deleted) == (1, 0, False)
    assert "would remove 1 entries" in str(report) and report.held_back == ""
    assert cache.has("latents", digest_of(orphan)) and not cache.lock.exists()
    report = cache_admin.gc(cache, delete=True)
    assert (report.entries, report.young) == (0, 1) and "younger than 1 h: they stay" in str(report)
    report = cache_admin.gc(cache, delete=True, **AT_ONCE)
    assert report.entries == 1 and report.bytes > 0 and not cache.has("latents", digest_of(orphan))
    assert len(cache.keys("latents")) == 2 and len(cache.keys("prompts")) == 3
    assert cache_admin.gc(cache, delete=True, **AT_ONCE).entries == 0
    path.unlink()  # canary: without its manifest everything is garbage
    assert cache_admin.gc(cache, grace_s=0).entries == 5


def test_gc_keeps_what_an_unfinished_precompute_wants(tmp_path):
    cache, manifest, path = filled(tmp_path)
    cache.save_manifest(manifest.pending(), tmp_path)
    assert json.loads(path.read_text())["complete"] is False
    assert cache_admin.gc(cache, delete=True, **AT_ONCE).entries == 0
    assert cache_admin.verify(cache).ok  # and what it has not written yet is not missed
    assert cache_admin.stats(cache).manifests[0].complete is False


def test_gc_forgets_what_was_not_used_for_long(tmp_path):
    cache, _, path = filled(tmp_path)
    os.utime(path, (time.time() - 40 * 86_400,) * 2)
    assert cache_admin.gc(cache, unused_days=50, grace_s=0).entries == 0
    report = cache_admin.gc(cache, delete=True, unused_days=30, **AT_ONCE)
    assert (report.entries, report.manifests) == (5, 1) and not path.exists()


def test_gc_takes_an_old_format_for_garbage(tmp_path):
    cache, _, path = filled(tmp_path)
    path.write_text(json.dumps({"format": 1, "complete": True}, indent=1))
    report = cache_admin.gc(cache, grace_s=0)
    assert (report.entries, report.manifests) == (5, 1)


def test_gc_leaves_unfinished_files_that_may_still_be_written_and_what_was_moved_aside_lately(tmp_path):
    cache, _, _ = filled(tmp_path)
    fresh, stale = cache.root / "latents" / "aa" / "x.partial", cache.root / "prompts" / "y.partial"
    aside, old = cache.root / "latents" / "aa" / "x.1.damaged", cache.root / "prompts" / "y.1.damaged"
    for path in (fresh, stale, aside, old):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"half")
    for path in (stale, old):
        os.utime(path, (time.time() - 3601,) * 2)
    report = cache_admin.gc(cache, delete=True, **AT_ONCE)
    assert report.leftovers == 2 and fresh.exists() and aside.exists() and not stale.exists() and not old.exists()


def test_stats_count_what_is_there(tmp_path):
    cache, _, path = filled(tmp_path)
    stats = cache_admin.stats(cache)
    assert stats.entries == {"latents": 2, "prompts": 3, "images": 0}
    assert stats.bytes["latents"] == sum(
        entry.stat().st_size for entry in (cache.root / "latents").rglob("*.safetensors")
    )
    assert stats.manifests[0].name == path.stem and stats.manifests[0].clips == 2
    assert "2 clips" in str(stats)
