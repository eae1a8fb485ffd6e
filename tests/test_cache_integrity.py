"""No damage to a file of the cache goes unseen, and no full or failing disk leaves half of one."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import resource
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from broken_disk import disk, forked, mount_small_disk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune.core.checksums import digest_of, parse_checksummed_json
from finetune.core.errors import CacheError
from finetune.core.types import Bucket, ClipPlan
from finetune.datasets import cache as reading
from finetune.datasets import cache_admin
from finetune.datasets.cache import Cache, Encoding
from finetune.datasets.entries import fault_of
from finetune.datasets.manifests import (
    DamagedManifestError,
    FileStamp,
    Manifest,
    ManifestItem,
    manifest_fault,
    read_content,
)

ROOT = Path(__file__).parents[1]
BUCKET = Bucket(9, 16, 16)
ENCODING = Encoding("v", "t", "fp32", 4, "fp16", 1, "rule")
KINDS_OF_FILE = ("latents", "prompts", "images", "manifest", "memo")


@dataclass
class World:
    """A small cache with two files of every kind, and the means to write each of them again."""

    folder: Path

    @property
    def cache(self) -> Cache:
        """As a process that has read nothing yet sees it."""
        return Cache(self.folder / "cache")

    def clip(self, number: int) -> dict[str, object]:
        return ENCODING.latents_address(f"{number:032d}", ClipPlan(tuple(range(9)), (16, 16), (0, 0), BUCKET))

    def prompt(self, number: int) -> dict[str, object]:
        return ENCODING.prompt_address(f'caption {number} with "checksum":" in it and ünicode')

    def image(self, number: int) -> dict[str, object]:
        return ENCODING.image_address(f"image {number}", BUCKET)

    def encode(self, kind: str, number: int) -> None:
        """Write one entry, as precompute would."""
        generator = torch.Generator().manual_seed(number)
        if kind == "latents":
            mean, std, image = torch.randn(3, 2, 1, 2, 2, generator=generator)
            self.cache.write_latents(self.clip(number), mean, std.abs(), image[None], made_with={"tiled": False})
        elif kind == "prompts":
            self.cache.write_prompt(self.prompt(number), torch.randn(4, 2, generator=generator), tokens=3)
        else:
            pixels = torch.randint(0, 256, (3, 2, 2), dtype=torch.uint8, generator=generator)
            self.cache.write_image(self.image(number), pixels)

    def key(self, kind: str, number: int) -> str:
        return digest_of({"latents": self.clip, "prompts": self.prompt, "images": self.image}[kind](number))

    def manifest(self, number: int) -> Manifest:
        items = [
            ManifestItem(
                f"{one}.mp4",
                f"rows:{one}",
                str(self.prompt(one)["text"]),
                BUCKET,
                1.0,
                False,
                self.key("latents", one),
                self.key("prompts", one),
                f"{one:032d}",
            )
            for one in range(2)
        ]
        inputs = {str(self.folder / "0.mp4"): FileStamp(3, 5, "d")}
        return Manifest(tuple(items), self.key("prompts", 0), {"data": {"fps": 8 + number}}, inputs)

    def source(self, number: int) -> Path:
        return self.folder / f"{number}.mp4"

    def path(self, kind: str, number: int) -> Path:
        root = self.folder / "cache"
        if kind == "manifest":
            return root / "manifests" / f"{self.manifest(number).name}.json"
        if kind == "memo":
            return root / "digests" / f"{digest_of(str(self.source(number).absolute()))}.json"
        return self.cache.path(kind, self.key(kind, number))

    def item(self, number: int) -> ManifestItem:
        return self.manifest(0).items[number]


def make_world(folder: Path) -> World:
    world = World(folder)
    for number in range(2):
        for kind in ("latents", "prompts", "images"):
            world.encode(kind, number)
        world.cache.save_manifest(world.manifest(number), folder)
        world.source(number).write_bytes(b"a video" * (number + 1))
        os.utime(world.source(number), (1 + number, 1 + number))
        world.cache.stamp(world.source(number))
    return world


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> tuple[World, dict[Path, bytes]]:
    """One world for many cases, each of which leaves it as it was; and its files' bytes."""
    world = make_world(tmp_path_factory.mktemp("integrity"))
    paths = [world.path(kind, number) for kind in KINDS_OF_FILE for number in range(2)]
    return world, {path: path.read_bytes() for path in paths}


# ------------------------------------------------------------------------------------------------------ every last bit


def detector(world: World, kind: str, number: int) -> Callable[[bytes], bool]:
    """Whether content in the place of a file is refused, by the very function that reading asks."""
    if kind in ("latents", "prompts", "images"):
        key = world.key(kind, number)
        return lambda content: bool(fault_of(content, kind, key))  # type: ignore[arg-type]
    if kind == "manifest":
        name = world.path(kind, number).stem
        return lambda content: bool(manifest_fault(content, name))

    def refused(content: bytes) -> bool:
        try:
            parse_checksummed_json(content)
        except ValueError:
            return True
        return False

    return refused


@pytest.mark.parametrize("kind", KINDS_OF_FILE)
def test_every_flipped_bit_and_every_truncation_is_seen(shared, kind):
    world, originals = shared
    whole = originals[world.path(kind, 0)]
    refused = detector(world, kind, 0)
    assert not refused(whole)
    damaged = bytearray(whole)
    for at in range(len(whole)):
        for bit in range(8):
            damaged[at] ^= 1 << bit
            assert refused(bytes(damaged)), f"bit {bit} of byte {at}"
            damaged[at] ^= 1 << bit
        assert refused(whole[:at]), f"cut off after {at} bytes"
    assert len(whole) > 150


def test_the_rule_in_the_documentation_is_the_rule(shared):
    world, originals = shared
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "cache.md").read_text(), re.DOTALL)
    (code,) = [block for block in blocks if "entry_is_whole" in block]
    theirs: dict[str, Callable[[bytes], bool]] = {}
    exec(compile(code, "docs/cache.md", "exec"), theirs)  # type: ignore[arg-type]
    for kind in ("latents", "prompts", "images"):
        whole = originals[world.path(kind, 0)]
        assert theirs["entry_is_whole"](whole)
        for at in range(0, len(whole), 7):
            assert not theirs["entry_is_whole"](whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :])


# ------------------------------------------------------------------------------------------------------ any damage


@st.composite
def damages(draw: st.DrawFn) -> Callable[[bytes, bytes], bytes]:
    """A function of a file and of another file of its kind to the damaged file."""
    what = draw(st.sampled_from(["flips", "cut", "zeros", "noise", "appended", "swapped", "spliced", "empty"]))
    places = draw(st.lists(st.integers(0, 2**20), min_size=1, max_size=12))
    length, byte = draw(st.integers(1, 600)), draw(st.binary(min_size=1, max_size=64))

    def damage(whole: bytes, other: bytes) -> bytes:
        content, at = bytearray(whole), places[0] % len(whole)
        if what == "flips":
            for place in places:
                content[place // 8 % len(content)] ^= 1 << place % 8
        elif what == "cut":
            del content[at:]
        elif what == "zeros":
            content[at : at + length] = bytes(len(content[at : at + length]))
        elif what == "noise":
            content[at : at + len(byte)] = byte
        elif what == "appended":
            content += byte
        elif what == "swapped":
            content = bytearray(other)
        elif what == "spliced":
            content[at:] = other[at:]
        else:
            content.clear()
        return bytes(content)

    return damage


def survives_damage(world: World, originals: dict[Path, bytes], kind: str, damage: Callable) -> None:
    """Damage one file, use the cache as a run does, and see the damage named and mended."""
    path, other = world.path(kind, 0), world.path(kind, 1)
    whole = originals[path]
    content = damage(whole, originals[other])
    path.write_bytes(content)
    same = content == whole
    cache = world.cache
    try:
        found = {damage.path for damage in cache_admin.verify(cache).damaged}
        assert found == (set() if same or kind == "memo" else {path})
        if kind == "memo":  # a wrong digest would give a video another clip's latents
            assert cache.stamp(world.source(0)).digest == reading.digest_file(world.source(0))
            return
        read = {
            "latents": lambda: cache.read(world.item(0)),
            "prompts": lambda: (cache.prompt_tokens(path.stem), cache.read_prompt(path.stem)),
            "images": lambda: cache.read_image(path.stem),
            "manifest": lambda: read_content(path),
        }[kind]
        if same:
            read()
            return
        with pytest.raises(CacheError) as caught:
            read()
        said = str(caught.value)
        assert "damaged" in said and str(path) in said and (kind != "latents" or "0.mp4" in said)
        assert "anew" in said
        if kind == "manifest":
            assert isinstance(caught.value, DamagedManifestError)
            cache.move_manifest_aside(path)
            assert not path.exists()
            cache.save_manifest(world.manifest(0), world.folder)
        else:
            assert path.stem not in cache.keys(kind)  # so the next precompute encodes it
            world.encode(kind, 0)
        assert path.read_bytes() == whole
        read()
    finally:
        path.write_bytes(whole)
        for aside in world.cache.root.rglob("*.damaged"):
            aside.unlink()


def damaging(examples: int) -> Callable:
    relaxed = settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
    return lambda test: relaxed(given(kind=st.sampled_from(KINDS_OF_FILE), damage=damages())(test))


@damaging(300)
def test_any_damage_is_seen_named_and_mended(shared, kind, damage):
    survives_damage(*shared, kind, damage)


@pytest.mark.slow
@damaging(2000)
def test_any_damage_is_seen_named_and_mended_in_two_thousand_cases(shared, kind, damage):
    survives_damage(*shared, kind, damage)


def flip(path: Path, at: int = -3) -> bytes:
    """Flip a bit of a file; returns what it held."""
    whole = path.read_bytes()
    content = bytearray(whole)
    content[at] ^= 4
    path.write_bytes(content)
    return whole


@pytest.mark.parametrize("kind", ["latents", "prompts", "images"])
def test_without_the_check_damage_would_be_trained_on(tmp_path, monkeypatch, kind):
    """The canary of the property above."""
    world = make_world(tmp_path)
    read = {
        "latents": lambda: world.cache.read(world.item(0)).latents_std,
        "prompts": lambda: world.cache.read_prompt(world.key("prompts", 0)),
        "images": lambda: world.cache.read_image(world.key("images", 0)),
    }[kind]
    before = read()
    flip(world.path(kind, 0))
    monkeypatch.setattr(reading, "fault_of", lambda content, kind, key: "")
    assert not torch.equal(read(), before)
    monkeypatch.undo()
    with pytest.raises(CacheError, match="damaged"):
        read()


def test_without_the_check_a_damaged_memo_would_name_other_bytes(tmp_path, monkeypatch):
    world = make_world(tmp_path)
    path, truth = world.path("memo", 0), world.cache.stamp(world.source(0)).digest
    path.write_bytes(path.read_bytes().replace(truth.encode(), b"0" * 32))
    assert world.cache.stamp(world.source(0)).digest == truth
    path.write_bytes(path.read_bytes().replace(truth.encode(), b"0" * 32))
    monkeypatch.setattr(reading, "parse_checksummed_json", json.loads)
    assert world.cache.stamp(world.source(0)).digest == "0" * 32


# ------------------------------------------------------------------------------------------------- once per process


@pytest.fixture
def counted(monkeypatch) -> list[str]:
    """Keys of the entries that were verified."""
    seen: list[str] = []
    real = reading.fault_of

    def counting(content, kind, key):
        seen.append(key)
        return real(content, kind, key)

    monkeypatch.setattr(reading, "fault_of", counting)
    return seen


def test_an_entry_is_verified_once_per_process_and_again_when_its_file_changed(tmp_path, counted):
    world = make_world(tmp_path)
    cache, key = world.cache, world.key("latents", 0)
    for _ in range(3):
        cache.read(world.item(0))
    assert sorted(counted) == sorted([key, world.key("prompts", 0)])
    world.encode("latents", 0)  # by another process: equal bytes in another file
    cache.read(world.item(0))
    assert counted.count(key) == 2
    flip(world.path("latents", 0))
    with pytest.raises(CacheError, match="damaged"):
        cache.read(world.item(0))


def test_threads_may_read_the_same_entries_at_once(tmp_path, counted):
    world = make_world(tmp_path)
    cache, errors = world.cache, []

    def work() -> None:
        try:
            for _ in range(20):
                for number in range(2):
                    cache.read(world.item(number))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and 4 <= len(counted) <= 4 * 8


def test_a_damaged_entry_on_a_drive_that_is_read_only_stays_and_is_told_of(tmp_path, monkeypatch):
    world = make_world(tmp_path)
    flip(world.path("latents", 0))
    monkeypatch.setattr(reading.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.EROFS, "Read-only")))
    with pytest.raises(CacheError, match=r"damaged[\s\S]*0\.mp4[\s\S]*cannot be moved aside[\s\S]*verify --delete"):
        world.cache.read(world.item(0))
    assert world.path("latents", 0).exists()


def test_an_entry_that_was_written_anew_meanwhile_keeps_its_name(tmp_path, monkeypatch):
    """Another process mends it between our reading and our renaming."""
    world = make_world(tmp_path)
    whole = flip(world.path("latents", 0))
    real = reading.os.replace

    def mended_first(source, target):
        monkeypatch.setattr(reading.os, "replace", real)
        world.encode("latents", 0)
        real(source, target)

    monkeypatch.setattr(reading.os, "replace", mended_first)
    with pytest.raises(CacheError, match="damaged"):
        world.cache.read(world.item(0))
    assert world.path("latents", 0).read_bytes() == whole
    assert list(world.cache.root.rglob("*.damaged")) == []


def test_an_entry_that_another_machine_wrote_anew_is_read_once_more(tmp_path, monkeypatch):
    """On NFS an open file whose name another client gave to an equal one is stale."""
    world = make_world(tmp_path)
    real, stale = Path.open, [OSError(errno.ESTALE, "Stale file handle")]

    class Stale(io.FileIO):
        def readinto(self, buffer: object) -> int:
            raise stale.pop()

    monkeypatch.setattr(reading.Path, "open", lambda path, mode: Stale(path) if stale else real(path, mode))
    assert world.cache.read(world.item(0)).latents_mean.ndim == 4 and not stale


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES])
def test_a_file_that_cannot_be_read_is_named(tmp_path, monkeypatch, number):
    world = make_world(tmp_path)
    monkeypatch.setattr(
        reading.Path, "open", lambda *_, **__: (_ for _ in ()).throw(OSError(number, os.strerror(number)))
    )
    for read in (lambda: world.cache.read(world.item(0)), lambda: world.cache.prompt_tokens(world.key("prompts", 0))):
        with pytest.raises(CacheError, match=f"cannot be read: {os.strerror(number)}"):
            read()


# ------------------------------------------------------------------------------------------------------- the disk


ERRORS = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT, errno.EACCES)


@pytest.mark.parametrize("number", ERRORS, ids=errno.errorcode.get)
def test_a_disk_that_fails_anywhere_is_named_and_leaves_nothing_half_written(tmp_path, number):
    world = make_world(tmp_path)
    before = {path: path.read_bytes() for path in world.cache.root.rglob("*") if path.is_file()}
    folders = {path for path in world.cache.root.rglob("*") if path.is_dir()}

    def forget() -> None:
        for path in sorted(set(world.cache.root.rglob("*")) - set(before) - folders, reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()

    for write in (
        lambda: world.encode("latents", 7),
        lambda: world.encode("prompts", 7),
        lambda: world.encode("images", 7),
        lambda: world.cache.save_manifest(world.manifest(7), tmp_path),
    ):
        with disk() as seen:
            write()
        (new,) = {path for path in world.cache.root.rglob("*") if path.is_file()} - set(before)
        assert {"_create", "_write", "_sync", "_rename"} <= set(seen.calls)
        for call, name in enumerate(seen.calls):
            forget()
            tolerated = name == "_sync" and number == errno.EACCES  # folders that cannot be flushed, on some drives
            with disk(fail_at=call, error=number):
                try:
                    write()
                except CacheError as error:
                    said = str(error)
                    assert f"cannot be written: {os.strerror(number)}" in said and "MiB to write" in said
                    assert "free\n" in said and str(new) in said and "what is encoded already stays" in said
                else:
                    assert tolerated
            assert list(world.cache.root.rglob("*.partial")) == []
            assert {path: path.read_bytes() for path in before} == before
            assert not new.exists() or name == "_sync"  # the flush of the folder comes after the rename
            write()  # the disk works again
            assert new.exists()
        assert cache_admin.verify(world.cache).ok
        forget()


@pytest.mark.parametrize("what", ["full", "limited"])
def test_a_disk_that_is_really_full_and_a_file_that_may_not_grow(tmp_path, what):
    """A tmpfs of 64 kB where the system lets us mount one, and RLIMIT_FSIZE."""

    def fill() -> tuple[int, str, int, bool, int] | None:
        if what == "full" and not mount_small_disk(tmp_path, "64k"):
            return None
        if what == "limited":
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (600, resource.RLIM_INFINITY))
        world, written, message = World(tmp_path), 0, ""
        try:
            for written in range(1000):
                world.encode("latents", written)
        except CacheError as error:
            message = str(error).splitlines()[0]
        partials = len(list(world.cache.root.rglob("*.partial")))
        return written, message, partials, cache_admin.verify(world.cache).ok, len(world.cache.keys("latents"))

    seen = forked(fill)
    if seen is None:
        pytest.skip("no file system can be mounted here")
    written, message, *state = seen
    words = {
        "full": "No space left on device; 0.001 MiB to write, 0.000 MiB free",
        "limited": "File too large; 0.001 MiB to",
    }
    assert f"the cache cannot be written: {words[what]}" in message and state == [0, True, written]
    assert 5 < written < 20 if what == "full" else written == 0
