"""A cache, or what one configuration needs of it, on its way to another machine."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
import torch

from finetune.core.checksums import digest_of
from finetune.core.errors import CacheError
from finetune.core.types import Bucket
from finetune.datasets import cache_admin
from finetune.datasets.cache import Cache, Encoding
from finetune.datasets.cache_transfer import export_cache, import_cache
from finetune.datasets.manifests import KINDS, Manifest

ENCODING = Encoding("v", "t", "fp32", 4, "fp16", None, "rule")


def prompt_key(text: str) -> str:
    return digest_of(ENCODING.prompt_address(text))


def make_cache(root: Path, captions: str = "abcd") -> tuple[Cache, list[Manifest]]:
    """Captions and two manifests: of all of them, and of the first."""
    cache = Cache(root)
    for number, caption in enumerate(captions):
        cache.write_prompt(ENCODING.prompt_address(caption), torch.full((4, 2), float(number)), tokens=1)
    images = ENCODING.image_address("i", Bucket(1, 2, 2))
    cache.write_image(images, torch.zeros(3, 2, 2, dtype=torch.uint8))
    manifests = [
        Manifest((), prompt_key(names[0]), {"captions": names}, {}, {one: prompt_key(one) for one in names}, {})
        for names in (captions, captions[0])
    ]
    for manifest in manifests:
        cache.save_manifest(manifest, root)
    return cache, manifests


def content(cache: Cache) -> dict[str, bytes]:
    return {key: cache.content(kind, key) for kind in KINDS for key in cache.keys(kind)}


TARGETS = ("copy", "copy.tar")


@pytest.mark.parametrize("name", TARGETS)
def test_a_cache_goes_there_and_back_to_the_bit(tmp_path, name):
    cache, _ = make_cache(tmp_path / "cache")
    report = export_cache(cache, tmp_path / name)
    assert report.ok and (report.entries, report.kept) == (5, 0)
    there = Cache(tmp_path / "there")
    report = import_cache(there, tmp_path / name)
    assert report.ok and report.entries == 5 and "5 entries copied" in str(report)
    assert content(there) == content(cache) and cache_admin.verify(there).ok
    assert [path.read_bytes() for path in there.manifest_paths()] == [
        path.read_bytes() for path in cache.manifest_paths()
    ]
    assert import_cache(there, tmp_path / name).kept == 5


@pytest.mark.parametrize("name", TARGETS)
def test_what_one_configuration_needs_goes_alone(tmp_path, name):
    cache, (_, small) = make_cache(tmp_path / "cache")
    assert export_cache(cache, tmp_path / name, manifest=small.name).entries == 1
    there = Cache(tmp_path / "there")
    import_cache(there, tmp_path / name)
    assert there.keys("prompts") == {prompt_key("a")} and not there.keys("images")
    assert [path.stem for path in there.manifest_paths()] == [small.name]


def test_what_is_there_stays_and_only_the_rest_is_copied(tmp_path):
    cache, (all_of_them, _) = make_cache(tmp_path / "cache")
    there = Cache(tmp_path / "there")
    export_cache(cache, there.root)
    kept, gone = there.path("prompts", prompt_key("a")), there.path("prompts", prompt_key("b"))
    gone.unlink()
    before = kept.stat()
    report = import_cache(there, cache.root)
    assert report.ok and (report.entries, report.kept) == (1, 4) and gone.exists()
    assert kept.stat().st_ino == before.st_ino
    there.save_manifest(Manifest((), prompt_key("b"), all_of_them.request, {}), tmp_path)  # of the same request
    assert "complete here already, with other clips" in str(import_cache(there, cache.root))


@pytest.mark.parametrize("name", TARGETS)
def test_a_damaged_entry_never_arrives_and_is_named_until_it_is_mended(tmp_path, name):
    cache, _ = make_cache(tmp_path / "cache")
    victim = cache.path("prompts", prompt_key("b"))
    whole = victim.read_bytes()
    victim.write_bytes(whole[:-1] + b"\x01")
    report = export_cache(cache, tmp_path / name)
    assert not report.ok and victim.name in str(report) and "not what was written" in str(report)
    victim.write_bytes(whole)
    report = export_cache(cache, tmp_path / name)
    assert report.ok and (report.entries, report.kept) == (1, 4)
    assert import_cache(Cache(tmp_path / "there"), tmp_path / name).entries == 5


def test_an_export_that_was_killed_goes_on_with_its_archive(tmp_path):
    cache, _ = make_cache(tmp_path / "cache")
    export_cache(cache, tmp_path / "whole.tar")
    archive = (tmp_path / "whole.tar").read_bytes()
    for cut in range(0, len(archive) - 2048, 700):
        (tmp_path / "cut.tar.partial").write_bytes(archive[:cut])
        report = export_cache(cache, tmp_path / "cut.tar")
        assert report.entries + report.kept == 5
        with tarfile.open(tmp_path / "cut.tar") as members:
            names = [member.name for member in members]
        assert len({one for one in names if "manifests" not in one}) == 5
        there = Cache(tmp_path / f"there-{cut}")
        assert import_cache(there, tmp_path / "cut.tar").ok and content(there) == content(cache)
        (tmp_path / "cut.tar").unlink()


def test_an_archive_that_was_cut_off_says_what_is_missing_and_keeps_what_came(tmp_path):
    cache, _ = make_cache(tmp_path / "cache")
    export_cache(cache, tmp_path / "whole.tar")
    archive = (tmp_path / "whole.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(archive[: len(archive) // 2])
    there = Cache(tmp_path / "there")
    try:
        report = import_cache(there, tmp_path / "cut.tar")
        assert not report.ok and "prompts/" in str(report)
    except CacheError as error:
        assert "cannot be read" in str(error)
    arrived = content(there)
    assert 0 < len(arrived) < 5 and arrived.items() <= content(cache).items()
    assert import_cache(there, tmp_path / "whole.tar").ok


def test_names_that_lead_out_of_the_cache_are_passed_over(tmp_path):
    cache, _ = make_cache(tmp_path / "cache")
    entry = cache.path("prompts", prompt_key("a"))
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name in ("../out.safetensors", f"/prompts/{entry.name}", f"prompts/00/{'0' * 32}.safetensors"):
            archive.add(entry, name)
    report = import_cache(Cache(tmp_path / "there"), tmp_path / "a.tar")
    assert report.entries == 0 and len(report.notes) == 2 and "another entry under this name" in str(report)
    assert [path.name for path in tmp_path.rglob("*.safetensors") if cache.root not in path.parents] == []


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("cache", "the cache itself"),
        ("there.tar", "there already"),
        ("there.tar.gz", r"a plain \.tar"),
    ],
)
def test_targets_that_cannot_be_meant_are_refused_first(tmp_path, target, message):
    cache, _ = make_cache(tmp_path / "cache")
    (tmp_path / "there.tar").touch()
    with pytest.raises(CacheError, match=message):
        export_cache(cache, tmp_path / target)


@pytest.mark.parametrize("source", ["none", "text", "empty"])
def test_what_is_no_cache_is_refused(tmp_path, source):
    (tmp_path / "text").write_text("not an archive " * 100)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CacheError, match=r"cannot be read|holds no cache"):
        import_cache(Cache(tmp_path / "cache"), tmp_path / source)


def test_an_export_of_entries_that_are_missing_is_refused(tmp_path):
    cache, (manifest, _) = make_cache(tmp_path / "cache")
    cache.path("prompts", prompt_key("b")).unlink()
    with pytest.raises(CacheError, match=r"1 entries are missing, such as prompts/.*[\s\S]*finetune precompute"):
        export_cache(cache, tmp_path / "copy", manifest=manifest.name)
