"""Filling the cache and trusting it, on tiny models and real H.264 files, in one process and in two."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from broken_disk import disk
from decoding import decode, load_image, probe
from PIL import Image
from safetensors.torch import load_file, save_file
from worlds import merged, run_values

from finetune.caching import encode as encoding
from finetune.caching import precompute as cache_plan
from finetune.caching.check import check_dataset, identities, overview, split_clips, workers_for
from finetune.caching.precompute import PrecomputeReport, ensure_cache, merge_parts, precompute
from finetune.caching.request import encoding_of, require_manifest
from finetune.cogvideox.load import load_text, load_vae
from finetune.cogvideox.model_files import known_model
from finetune.cogvideox.spec import read_spec
from finetune.config.schema import RunConfig
from finetune.core import files as space
from finetune.core.errors import CacheError, ConfigError, DataError, KilledError, ModelError
from finetune.core.types import Bucket
from finetune.datasets import cache_admin
from finetune.datasets.cache import Cache
from finetune.datasets.cache_transfer import export_cache, import_cache
from finetune.datasets.decode_pool import fit_image
from finetune.datasets.entries import read_metadata
from finetune.datasets.manifests import UNKNOWN, Manifest, read_content
from finetune.datasets.parts import Part

ROOT = Path(__file__).parents[1]


@dataclass
class Project:
    """A folder as a person has it: clips, a configuration beside them, and a cache that fills."""

    folder: Path
    model: Path
    changes: dict[str, Any]

    def config(self, **changes: Any) -> RunConfig:
        base = run_values(self.model, Path("clips"), Path("run"))
        base["cache"]["dir"] = "cache"
        base["data"]["buckets"] = ["9x32x32"]  # a quarter of the native size: a quarter of the time
        return RunConfig.from_dict(merged(merged(base, self.changes), changes), base=self.folder)

    def precompute(self, **changes: Any) -> PrecomputeReport:
        return precompute(self.config(**changes), progress=False)

    def ensure(self, **changes: Any) -> Any:
        config = self.config(**changes)
        return ensure_cache(config, read_spec(config.model.pretrained), progress=False)

    @property
    def cache(self) -> Cache:
        return Cache(self.folder / "cache")

    @property
    def manifest(self) -> Manifest:
        (path,) = self.cache.manifest_paths()
        return Manifest.from_content(read_content(path), self.folder)

    @property
    def clips(self) -> list[Path]:
        return sorted((self.folder / "clips").rglob("*.mp4"))

    def rows(self, edit: Callable[[list[dict[str, str]]], object]) -> None:
        """Edit the rows of ``metadata.jsonl``."""
        path = self.folder / "clips" / "metadata.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        edit(rows)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def project(tmp_path, tiny_model, demo_clips) -> Callable[..., Project]:
    def make(variant: str = "5b", **changes: Any) -> Project:
        shutil.copytree(demo_clips, tmp_path / "clips", dirs_exist_ok=True)
        return Project(tmp_path, tiny_model(variant), changes)

    return make


@pytest.fixture(scope="module")
def filled(tmp_path_factory, tiny_model, demo_clips) -> Callable[[str], Project]:
    """Projects whose cache is complete, by model."""

    @functools.cache
    def make(variant: str) -> Project:
        home = Project(tmp_path_factory.mktemp("filled"), tiny_model(variant), {})
        shutil.copytree(demo_clips, home.folder / "clips")
        assert encoded(home.precompute()) == (4, 5, 0)  # four captions and the empty one
        return home

    return make


@pytest.fixture
def cached(filled, tmp_path) -> Callable[..., Project]:
    """A copy of one of them."""

    def make(variant: str = "5b") -> Project:
        shutil.copytree(filled(variant).folder, tmp_path, dirs_exist_ok=True)
        return Project(tmp_path, filled(variant).model, {})

    return make


def encoded(report: PrecomputeReport) -> tuple[int, int, int]:
    return report.encoded["latents"], report.encoded["prompts"], report.encoded["images"]


# ----------------------------------------------------------------------------------------------------- what is stored


def test_latents_and_embeddings_equal_what_diffusers_computes(cached):
    home = cached()
    manifest = home.manifest
    item = next(item for item in manifest.items if "square" in item.clip)
    entry = home.cache.read(item)

    from diffusers import AutoencoderKLCogVideoX, CogVideoXPipeline

    vae = AutoencoderKLCogVideoX.from_pretrained(home.model / "vae")
    path = home.folder / item.clip
    header = probe(path)
    from finetune.datasets.geometry import plan_clips

    pixels = decode(path, header, plan_clips(header, home.config().data, 8, "")[0]).pixels
    with torch.no_grad():
        theirs = vae.encode(pixels[None].float() / 127.5 - 1).latent_dist
    assert entry.latents_mean.dtype == torch.float16
    torch.testing.assert_close(entry.latents_mean, theirs.mean[0].half(), rtol=2e-3, atol=2e-4)
    torch.testing.assert_close(entry.latents_std, theirs.std[0].half(), rtol=2e-3, atol=2e-4)
    assert entry.image_latents is None

    pipeline = CogVideoXPipeline.from_pretrained(home.model)
    for text, ours in (
        (item.caption, entry.prompt_embeds),
        ("", home.cache.read_prompt(manifest.empty_prompt_key)),
    ):
        with torch.no_grad():
            prompt, _ = pipeline.encode_prompt(text, do_classifier_free_guidance=False, max_sequence_length=16)
        assert torch.equal(ours, prompt[0])


def test_one_encoder_is_in_memory_at_a_time(project, monkeypatch):
    seen: list[Any] = []

    def vae(*args: Any, **options: Any) -> Any:
        loaded = load_vae(*args, **options)
        seen.append(weakref.ref(loaded))
        return loaded

    def text(*args: Any, **options: Any) -> Any:
        assert len(seen) == 1 and seen[0]() is None, "the VAE was still alive when T5 was loaded"
        seen.append(None)
        return load_text(*args, **options)

    monkeypatch.setattr("finetune.cogvideox.load.load_vae", vae)
    monkeypatch.setattr("finetune.cogvideox.load.load_text", text)
    project().precompute()
    assert len(seen) == 2


def test_image_draws_depend_on_content_alone(cached):
    home = cached("1.5-5b-i2v")
    first = {item.clip: home.cache.read(item).image_latents for item in home.manifest.items}
    draws = next(iter(first.values()))
    assert draws.shape == (2, 4, 1, 4, 4)
    assert not torch.equal(draws[0], draws[1])  # each draw has noise of its own
    # Another order, another batch size, another process count would all be another history: here the order is reversed.
    home.rows(lambda rows: rows.reverse())
    for item in home.precompute(cache={"image_draws": 1}).manifest.items:
        assert torch.equal(home.cache.read(item).image_latents, first[item.clip][:1])


def test_an_image_of_its_own_stands_for_the_first_frame(cached):
    home = cached("1.5-5b-i2v")
    before = home.manifest.items[0]
    still = home.folder / "clips" / "still.png"
    Image.new("RGB", (80, 70), (200, 30, 30)).save(still)
    home.rows(lambda rows: rows[0].update(image="still.png"))
    report = home.precompute()
    assert encoded(report) == (1, 0, 0)
    old, new = home.cache.read(before), home.cache.read(report.manifest.items[0])
    assert torch.equal(old.latents_mean, new.latents_mean) and not torch.equal(old.image_latents, new.image_latents)
    Image.new("RGB", (80, 70), (30, 200, 30)).save(still)
    assert encoded(home.precompute()) == (1, 0, 0)


def test_validation_prompts_and_images_are_stored(cached):
    home = cached("1.5-5b-i2v")
    Image.new("RGB", (100, 70), (10, 20, 30)).save(home.folder / "start.png")
    samples = [
        {"prompt": "a new prompt", "image": "start.png", "last_image": "end.png", "keyframes": {4: "start.png"}},
        {"prompt": "a red circle moving left", "image": "start.png"},
    ]
    Image.new("RGB", (100, 70), (90, 20, 30)).save(home.folder / "end.png")
    manifest = home.precompute(validation={"samples": samples}).manifest
    assert set(manifest.prompts) == {"a new prompt", "a red circle moving left"}
    assert manifest.prompts["a red circle moving left"] in {item.prompt_key for item in manifest.items}
    assert home.cache.read_prompt(manifest.prompts["a new prompt"]).shape == (14, 32)
    start = home.folder / "start.png"
    ours = home.cache.read_image(manifest.images[str(start)])
    assert torch.equal(ours, fit_image(load_image(start), Bucket(9, 32, 32)))
    assert set(manifest.images) == {str(start), str(home.folder / "end.png")}


# ----------------------------------------------------------------------------------------------- what is encoded again


def _touch(home: Project) -> None:
    for path in home.folder.rglob("clips/*"):
        os.utime(path, (1_000_000_000, 1_000_000_000))


def _other_bytes(home: Project) -> None:
    shutil.copy(home.clips[0], home.clips[1])


def _rename(home: Project) -> None:
    home.clips[0].rename(home.folder / "clips" / "renamed.mp4")
    home.rows(lambda rows: rows[0].update(file_name="renamed.mp4"))


def _new_weights(component: str) -> Callable[[Project], None]:
    def change(home: Project) -> None:
        copy = home.folder / "model"
        shutil.copytree(home.model, copy)
        home.model = copy
        path = next((copy / component).glob("*.safetensors"))
        tensors = load_file(path)
        name = next(name for name, tensor in tensors.items() if tensor.is_floating_point())
        tensors[name] = tensors[name] + 0.01
        save_file(tensors, path, metadata={"format": "pt"})

    return change


def _set(**changes: Any) -> Callable[[Project], None]:
    def change(home: Project) -> None:
        home.changes = merged(home.changes, changes)

    return change


FIRST_ALONE = {"kind": "any", "first_last": 0, "last": 0, "random": 0}

CHANGES = {
    "nothing": (lambda home: None, (0, 0)),
    "mtime": (_touch, (0, 0)),
    "another file name": (_rename, (0, 0)),
    "the order of rows": (lambda home: home.rows(lambda rows: rows.reverse()), (0, 0)),
    "a row less": (lambda home: home.rows(lambda rows: rows.pop()), (0, 0)),
    "repeats": (_set(data={"sources": [{"path": "clips", "repeats": 3}]}), (0, 0)),
    "holdout": (_set(data={"holdout": 1}), (0, 0)),
    "caption dropout": (_set(data={"caption_dropout": 0.5}), (0, 0)),
    "the training section": (_set(train={"steps": 9, "seed": 1}), (0, 0)),
    "one caption": (lambda home: home.rows(lambda rows: rows[0].update(prompt="a blue ring")), (0, 1)),
    "the trigger word": (_set(data={"trigger": "zkx"}), (0, 4)),
    "a validation prompt": (_set(validation={"samples": [{"prompt": "a ring"}]}), (0, 1)),
    "bucket": (_set(data={"buckets": ["9x32x48"]}), (4, 0)),
    "fps": (_set(data={"fps": 7, "short_clips": "pad"}), (4, 0)),
    "stored dtype": (_set(cache={"latents_dtype": "fp32"}), (4, 0)),
    "image draws": (_set(cache={"image_draws": 1}), (4, 0)),
    "shares of the first frame alone": (_set(data={"condition_frames": FIRST_ALONE}), (0, 0)),
    "the last frame": (_set(data={"condition_frames": "first_last"}), (4, 0)),
    "vae": (_new_weights("vae"), (4, 0)),
    "text encoder": (_new_weights("text_encoder"), (0, 5)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_encodes_again_exactly_what_it_changes(cached, name):
    change, expected = CHANGES[name]
    home = cached("1.5-5b-i2v")
    change(home)
    config = home.config()
    plan = cache_plan.plan_cache(config, read_spec(config.model.pretrained), home.cache, progress=False)
    assert (plan.missing["latents"], plan.missing["prompts"]) == expected
    if name in ("one caption", "vae", "text encoder"):  # the plan is what happens
        before = _entries(home)
        assert encoded(home.precompute())[:2] == expected
        assert before.items() <= _entries(home).items() and len(_entries(home)) == len(before) + sum(expected)


def test_another_clip_under_an_old_name_is_another_clip(cached):
    home = cached()
    before = home.manifest
    _other_bytes(home)
    report = home.precompute()
    assert encoded(report) == (0, 0, 0)  # its new content is that of the first clip, which is there
    assert report.manifest.items[1].latents_key == before.items[0].latents_key != before.items[1].latents_key


def test_equal_names_stay_apart_and_equal_clips_are_encoded_once(project):
    home = project(data={"sources": [{"path": "clips", "kind": "folder"}]})
    files = home.clips
    texts = ("a red circle moving left", "a blue square moving up", "a ring")
    for number, (source, caption) in enumerate(zip((files[0], files[1], files[0]), texts, strict=True)):
        folder = home.folder / "clips" / f"folder{number}"
        folder.mkdir()
        shutil.copy(source, folder / "clip.mp4")
        (folder / "clip.txt").write_text(caption)
    for path in (*files, home.folder / "clips" / "metadata.jsonl"):
        path.unlink()
    report = home.precompute()
    assert encoded(report) == (2, 4, 0)
    one, two, three = sorted(report.manifest.items, key=lambda item: item.clip)
    assert [item.clip for item in (one, two)] == ["clips/folder0/clip.mp4", "clips/folder1/clip.mp4"]
    assert one.latents_key != two.latents_key and one.latents_key == three.latents_key
    assert not torch.equal(home.cache.read(one).latents_mean, home.cache.read(two).latents_mean)
    assert one.prompt_key != three.prompt_key


# ------------------------------------------------------------------------------------------------ trusting a manifest


def _forbidden(*args: Any, **options: Any) -> Any:
    raise AssertionError("this must not be needed")


def test_a_complete_cache_opens_nothing(cached, monkeypatch, capsys):
    home = cached()
    manifest = home.manifest
    for name in (
        "finetune.caching.precompute.check_dataset",
        "finetune.cogvideox.load.load_vae",
        "finetune.cogvideox.load.load_text",
    ):
        monkeypatch.setattr(name, _forbidden)
    assert home.ensure().digest == manifest.digest
    assert "complete, 4 clips (0 held out), nothing to encode" in capsys.readouterr().out
    _touch(home)
    assert home.ensure(cache={"mode": "require"}).digest == manifest.digest
    with pytest.raises(AssertionError, match="must not be needed"):  # canary
        home.ensure(data={"fps": 4, "short_clips": "pad"})


def test_auto_fills_the_cache_and_says_why(project, capsys):
    home = project()
    with pytest.raises(CacheError, match="nothing has been precomputed"):
        home.ensure(cache={"mode": "require"})
    assert len(home.ensure().items) == 4
    assert "nothing has been precomputed" in capsys.readouterr().out
    shutil.copy(home.clips[0], home.clips[1])
    home.rows(lambda rows: rows[2].update(prompt="a ring"))
    home.ensure()
    said = capsys.readouterr().out
    assert f"{home.clips[1]} has changed" in said and "metadata.jsonl has changed" in said
    assert re.search(r"captions +1 +4", said)


def test_require_names_the_fields_that_differ(cached):
    home = cached()
    with pytest.raises(CacheError) as caught:
        home.ensure(
            cache={"mode": "require"}, data={"fps": 16, "trigger": "zkx"}, validation={"samples": [{"prompt": "x"}]}
        )
    said = str(caught.value)
    assert "data.fps: 8.0 -> 16.0" in said and 'data.trigger: "" -> "zkx"' in said
    assert 'validation.prompts: [] -> ["x"]' in said and "finetune precompute" in said
    assert "buckets" not in said


def test_require_accepts_absent_media_and_refuses_changed_ones(cached, capsys):
    home = cached()
    manifest = home.manifest
    shutil.copy(home.clips[0], home.clips[1])
    with pytest.raises(CacheError, match="has changed"):
        home.ensure(cache={"mode": "require"})
    shutil.rmtree(home.folder / "clips")
    assert home.ensure(cache={"mode": "require"}).digest == manifest.digest
    assert re.search(r"not on this machine and were not compared: 5 \(", capsys.readouterr().out)
    with pytest.raises(CacheError, match=r"cache\.mode: require"):
        home.ensure()


def test_a_cache_from_before_headers_were_read_so_is_planned_anew_and_not_encoded(cached, capsys):
    home = cached()
    manifest = home.manifest
    older = replace(manifest, request={**manifest.request, "format": {**manifest.request["format"]}}, kept={})
    del older.request["format"]["headers"]
    for path in (home.folder / "cache" / "manifests").iterdir():
        path.unlink()
    home.cache.save_manifest(older, home.folder)
    assert home.ensure(cache={"mode": "require"}).digest == manifest.digest
    assert "an older version read the videos' headers" in capsys.readouterr().out
    assert home.ensure().digest == manifest.digest
    said = capsys.readouterr().out
    assert "format.headers: (nothing) -> 1" in said and re.search(r"clips +0 +4", said)
    assert home.ensure(cache={"mode": "require"}) and "older version" not in capsys.readouterr().out


def test_a_project_may_move_and_its_resolved_configuration_may_be_used(project, tmp_path):
    home = project()
    manifest = home.precompute().manifest
    resolved = RunConfig.from_dict(home.config(cache={"mode": "require"}).to_dict(), base=home.folder / "run")
    assert ensure_cache(resolved, read_spec(str(home.model))).digest == manifest.digest
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("clips", "cache"):
        (home.folder / name).rename(moved / name)
    there = Project(moved, home.model, {})
    found = there.ensure(cache={"mode": "require"})
    assert found.digest == manifest.digest and all(path.startswith(str(moved)) for path in found.inputs)


def test_what_a_configuration_needs_is_exported_and_trained_from_elsewhere(cached, tmp_path, capsys):
    home = cached()
    config = home.config()
    with pytest.raises(CacheError, match="does not hold what this configuration needs"):
        require_manifest(home.config(data={"fps": 4}), home.cache)
    export_cache(home.cache, tmp_path / "a.tar", manifest=require_manifest(config, home.cache).name)
    shutil.rmtree(home.cache.root)
    import_cache(home.cache, tmp_path / "a.tar")
    assert home.ensure(cache={"mode": "require"}).digest == home.manifest.digest


def test_a_new_source_file_is_noticed(cached):
    home = cached()
    home.changes = {"data": {"sources": [{"path": "clips", "kind": "folder"}]}}
    (home.folder / "clips" / "metadata.jsonl").unlink()
    for path in home.clips:
        path.with_suffix(".txt").write_text("a red circle moving left")
    assert len(home.ensure().items) == 4
    more = home.folder / "clips" / "more"
    more.mkdir()
    shutil.copy(home.clips[0], more / "new.mp4")
    (more / "new.txt").write_text("a ring")
    assert len(home.ensure().items) == 5
    (more / "new.txt").write_text("a blue ring")
    assert home.ensure().items[-1].caption == "a blue ring"


def test_encoders_need_not_be_on_the_training_machine(cached, capsys):
    home = cached()
    manifest = home.manifest
    bare = home.folder / "bare"
    shutil.copytree(home.model, bare)
    for component in ("text_encoder", "vae"):
        next((bare / component).glob("*.safetensors")).unlink()
    home.model = bare
    assert home.ensure(cache={"mode": "require"}).digest == manifest.digest
    assert "not on this machine and not compared: vae, text_encoder" in capsys.readouterr().out


def test_an_encoder_that_is_not_whole_is_unknown(project):
    home = project()
    spec = read_spec(str(home.model))

    def fingerprints(*, fetch: bool = False, **changes: Any) -> tuple[str, str]:
        encoding = encoding_of(home.config(**changes), spec, home.cache, fetch=fetch)
        return encoding.vae, encoding.text_encoder

    assert fingerprints(model={"pretrained": "nobody/nothing", "dtype": "bf16"}) == (UNKNOWN, UNKNOWN)
    home.model = shutil.copytree(home.model, home.folder / "model")
    assert fingerprints() == fingerprints(fetch=True) and UNKNOWN not in fingerprints()
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (home.model / "text_encoder" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert fingerprints()[1] == UNKNOWN  # half downloaded is not another T5


BLOCKED = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("av", "datasets"):
            raise ImportError(f"{name} was imported")

sys.meta_path.insert(0, Block())
from finetune.config.schema import load_config
from finetune.datasets.cache import Cache
from finetune.datasets.manifests import UNKNOWN
from finetune.cogvideox.spec import read_spec
from finetune.caching.precompute import ensure_cache
config = load_config(sys.argv[1])
spec = read_spec(config.model.pretrained)
manifest = ensure_cache(config, spec)
entry = Cache(config.cache.dir).read(manifest.items[0])
assert entry.latents_mean.shape == (4, 3, 4, 4)
assert not {"av", "datasets", "diffusers", "transformers"} & set(sys.modules)
print("read", manifest.digest, flush=True)
ensure_cache(load_config(sys.argv[1], ["data.fps=4", "cache.decode_workers=0"]), spec)
"""


def test_a_complete_cache_is_read_without_decoders_or_datasets(cached):
    home = cached()
    (home.folder / "run.yaml").write_text(home.config().to_yaml())
    digest = home.manifest.digest
    finished = subprocess.run(
        [sys.executable, "-c", BLOCKED, str(home.folder / "run.yaml")],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert f"read {digest}" in finished.stdout, finished.stderr
    assert finished.returncode == 1 and "was imported" in finished.stderr  # canary: a stale manifest needs them


# ------------------------------------------------------------------------------------------------------ what goes wrong


def _break_decoding(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Files whose header is sound and whose frames are not."""
    from finetune.datasets import decode as frames

    sound = frames.read_clip

    def broken(path: Path, *rest: Any) -> Any:
        if path.name in names:
            raise DataError("frame 5 cannot be decoded", where=str(path))
        return sound(path, *rest)

    monkeypatch.setattr(frames, "read_clip", broken)


def test_unreadable_clips_are_reported_together_and_the_rest_stays(project, monkeypatch):
    home = project()
    bad = [path.name for path in home.clips[:2]]
    _break_decoding(monkeypatch, *bad)
    with pytest.raises(DataError) as caught:
        home.precompute()
    said = str(caught.value)
    assert "2 clips could not be encoded" in said and all(name in said for name in bad) and "metadata.jsonl:1" in said
    assert len(home.cache.keys("latents")) == 2 and len(home.cache.keys("prompts")) == 5
    with pytest.raises(CacheError, match="not finished"):
        home.ensure(cache={"mode": "require"})
    monkeypatch.undo()
    assert encoded(home.precompute()) == (2, 0, 0)


def test_unreadable_clips_can_be_left_out(project, monkeypatch):
    home = project(data={"unreadable_clips": "skip"})
    _break_decoding(monkeypatch, home.clips[1].name)
    report = home.precompute()
    assert report.skipped == {"unreadable": 1} and len(report.manifest.items) == 3
    assert re.search(r"left out +1 +unreadable", str(report)) and home.clips[1].name in str(report)
    assert len(home.ensure().items) == 3
    _break_decoding(monkeypatch, *(path.name for path in home.clips))
    shutil.rmtree(home.folder / "cache")
    with pytest.raises(DataError, match="no clip is left"):
        home.precompute()


def test_a_clip_whose_worker_is_killed_from_outside_is_never_left_out(project, monkeypatch, tmp_path):
    """The system ends workers for want of memory: with `skip` the dataset would shrink, and the exit code be 0."""
    killed = (
        "import os, signal; from finetune.datasets import decode, decode_pool, worker; "
        "decode.read_clip = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL); worker.serve(decode_pool.handle)"
    )
    monkeypatch.setattr("finetune.datasets.decode_pool.WORKER", killed)
    home = project(data={"unreadable_clips": "skip"}, cache={"decode_workers": 1})
    with pytest.raises(KilledError, match="SIGKILL") as caught:
        home.precompute()
    assert caught.value.where == str(home.clips[0])
    monkeypatch.undo()
    assert encoded(home.precompute())[0] == 4


def test_files_without_a_sound_header_follow_the_same_policy(project):
    home = project()
    home.clips[0].write_bytes(b"\0" * 500)
    home.clips[1].write_bytes(home.clips[1].read_bytes()[:900])
    with pytest.raises(DataError) as caught:
        home.precompute()
    assert (
        "2 clips, images or captions cannot be used" in str(caught.value)
        and not (home.folder / "cache" / "latents").exists()
    )
    home.changes = {"data": {"unreadable_clips": "skip"}}
    report = home.precompute()
    assert report.skipped == {"unreadable": 2} and len(report.manifest.items) == 2
    shutil.copy(home.clips[2], home.clips[0])  # mended: it is noticed
    assert len(home.ensure().items) == 3


def test_a_file_that_changes_while_it_is_encoded_is_not_stored(project, monkeypatch):
    home = project()
    victim, real = home.clips[0], encoding.encode_video

    def meddle(vae: Any, pixels: torch.Tensor) -> Any:
        victim.write_bytes(victim.read_bytes() + b"\0")
        return real(vae, pixels)

    monkeypatch.setattr(encoding, "encode_video", meddle)
    with pytest.raises(DataError, match="changed while it was being encoded"):
        home.precompute()
    assert len(home.cache.keys("latents")) == 3


def test_the_disk_is_asked_first(project, monkeypatch):
    home = project()
    monkeypatch.setattr(space, "free_space", lambda path: 50_000)
    with pytest.raises(CacheError) as caught:
        home.precompute()
    # 4 clips x 2 x (4x3x4x4) x 2 bytes and 5 captions x 16 x 32 x 4 bytes: 13 312 bytes, and 8 kB for each of 9 files
    assert "encoding 9 entries needs 0.0" in str(caught.value) and "has 0.048 MiB free" in str(caught.value)
    assert str(home.cache.root) in str(caught.value)
    assert not (home.folder / "cache" / "latents").exists()
    monkeypatch.setattr(space, "free_space", lambda path: 200_000)
    assert encoded(home.precompute()) == (4, 5, 0)
    monkeypatch.setattr(space, "free_space", lambda path: 0)
    assert encoded(home.precompute()) == (0, 0, 0)  # nothing is missing, so nothing is asked for


@pytest.mark.parametrize(
    ("encode", "fix"), [("encode_video", "cache.vae_tiling"), ("encode_prompts", "text_batch_size")]
)
def test_a_gpu_that_is_too_small_is_told_of(project, monkeypatch, encode, fix):
    def full(*_: Any) -> Any:
        raise torch.AcceleratorError("CUDA error: out of memory")  # as where pinned memory or a workspace runs out

    monkeypatch.setattr(encoding, encode, full)
    with pytest.raises(CacheError, match=f"memory does not hold[\\s\\S]*{fix}"):
        project().precompute()


def test_long_captions_are_named(project):
    home = project()
    long = "a red circle " * 10
    home.rows(lambda rows: rows[0].update(prompt=long.strip()))
    for _ in range(2):  # also where its embedding is reused
        report = home.precompute()
        assert "longer than the 16 tokens" in str(report) and "1 ('a red circle a red circle" in str(report)


@pytest.mark.parametrize("kind", ["latents", "prompts", "images"])
def test_a_damaged_entry_is_made_again_by_the_same_command(project, kind, capsys):
    home = project("1.5-5b-i2v", validation={"samples": [{"prompt": "a ring", "image": "clips/still.png"}]})
    Image.new("RGB", (64, 64), "red").save(home.folder / "clips" / "still.png")
    manifest = home.ensure()
    key = {
        "latents": manifest.items[1].latents_key,
        "prompts": manifest.items[1].prompt_key,
        "images": next(iter(manifest.images.values())),
    }[kind]
    path = home.cache.path(kind, key)
    whole = path.read_bytes()
    path.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    home.ensure()  # its size and name say nothing
    with pytest.raises(CacheError, match="damaged"):
        home.cache.read_image(key) if kind == "images" else home.cache.read(manifest.items[1])
    with pytest.raises(CacheError, match=f"1 of . entries under .*{kind} are missing"):
        home.ensure(cache={"mode": "require"})
    capsys.readouterr()
    assert home.ensure().digest == manifest.digest
    title = {"latents": "clips", "prompts": "captions", "images": "images"}[kind]
    assert re.findall(r"^(\w+) +[1-9]\d* ", capsys.readouterr().out, re.MULTILINE) == [title]
    assert path.read_bytes() == whole and cache_admin.verify(home.cache).ok


def test_a_damaged_manifest_is_made_anew_without_encoding_anything(project, monkeypatch, capsys):
    home = project()
    home.precompute()
    (path,) = home.cache.manifest_paths()
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'"holdout": false', b'"holdout": true ', 1))
    with pytest.raises(CacheError, match=rf"manifest of the cache is damaged[\s\S]*{path.name}[\s\S]*precompute"):
        home.ensure(cache={"mode": "require"})
    monkeypatch.setattr("finetune.cogvideox.load.load_vae", _forbidden)
    monkeypatch.setattr("finetune.cogvideox.load.load_text", _forbidden)
    home.ensure()
    assert f"warning: a manifest of the cache is damaged: its checksum does not fit: moved aside as {path}" in (
        capsys.readouterr().out
    )
    assert path.read_bytes() == whole and list(home.cache.root.rglob("*.damaged")) == []
    assert cache_admin.gc(home.cache, delete=True, grace_s=0).entries == 0


def test_a_cache_without_checksums_is_encoded_anew_and_said_to_be_old(project):
    home = project()
    old = home.cache.root / "manifests" / f"{'0' * 32}.json"
    old.parent.mkdir(parents=True)
    old.write_text(json.dumps({"format": 1, "complete": True}, indent=1))
    with pytest.raises(CacheError, match="1 manifests of an older format, without checksums, are of no use any more"):
        home.ensure(cache={"mode": "require"})
    assert encoded(home.precompute()) == (4, 5, 0)
    assert cache_admin.gc(home.cache, delete=True).manifests == 1 and not old.exists()


@pytest.mark.parametrize("share", [0.6, *(pytest.param(number / 20, marks=pytest.mark.slow) for number in range(21))])
def test_a_disk_that_fills_up_stops_with_a_message_and_goes_on_where_it_stopped(project, share):
    home = project()
    with disk() as seen:
        home.precompute()
    whole, calls = _entries(home), len(seen.calls)
    shutil.rmtree(home.cache.root)
    with disk(fail_at=int((calls - 1) * share)) as failing:
        try:
            home.precompute()
        except CacheError as error:
            assert "No space left on device" in str(error) and "free" in str(error)
            assert str(home.cache.root) in str(error) and "make room" in str(error)
        else:  # a digest that is not remembered costs time, no more
            # Only what is made first of all, the folder of the digests and what lies in it.
            assert failing.calls[int((calls - 1) * share)] in ("_create", "_write", "_sync", "_rename", "_mkdir")
            assert share < 0.5
    assert list(home.cache.root.rglob("*.partial")) == [] and cache_admin.verify(home.cache).damaged == ()
    stored = len(_entries(home))
    report = home.precompute()
    assert sum(encoded(report)) == len(whole) - stored and _entries(home) == whole


def test_the_holdout_is_chosen_by_content(project):
    home = project(data={"holdout": 1})
    held = {item.media_digest for item in home.precompute().manifest.items if item.holdout}
    assert len(held) == 1
    home.rows(lambda rows: rows.reverse())
    assert {item.media_digest for item in home.precompute().manifest.items if item.holdout} == held


def test_a_held_out_source_that_shares_a_video_is_told_of(project):
    home = project(data={"sources": [{"path": "clips"}, {"path": "other", "split": "holdout"}]})
    shutil.copytree(home.folder / "clips", home.folder / "other")
    report = home.precompute()
    assert encoded(report)[0] == 4 and sum(item.holdout for item in report.manifest.items) == 4
    assert any("flatters the held-out loss" in note for note in report.manifest.notes)


def _count_held_out(home: Project) -> tuple[int, int, int]:
    """Clips held out as `check` counts them, as precompute does, and as counting by name would."""
    config, spec = home.config(), read_spec(str(home.model))
    clips = check_dataset(config, spec, progress=False).clips
    drawn, names = identities(config, clips, progress=False), {clip.sample.video: clip.name for clip in clips}
    counted = dict(overview(config, spec, clips, drawn)[0])["clips"]
    checked = int(re.search(r"(\d+) held out", counted).group(1))
    manifest = home.precompute().manifest
    return checked, sum(item.holdout for item in manifest.items), sum(split_clips(clips, names, config.data.holdout))


def test_check_and_the_run_hold_out_the_same_clips_where_copies_exist(project):
    home = project(data={"holdout": 0.5})
    for number in range(2):
        shutil.copy(home.clips[0], home.folder / "clips" / f"copy{number}.mp4")
    home.rows(lambda rows: rows.extend({"file_name": f"copy{n}.mp4", "prompt": f"view {n}"} for n in range(2)))
    checked, run, by_name = _count_held_out(home)
    assert checked == run == (4 if run > 3 else 2), "two of four videos, one of which stands there three times"
    assert by_name == 3, "canary: by their names, three of six"


def test_counting_reads_files_only_where_numbers_depend_on_it(project, monkeypatch):
    home = project(data={"holdout": 1})
    sizes = {path.stat().st_size for path in home.clips}
    assert len(sizes) == 4, "files of one size could be copies"
    clips = check_dataset(home.config(), read_spec(str(home.model)), progress=False).clips
    monkeypatch.setattr(Cache, "stamp", _forbidden)
    assert len(identities(home.config(), clips, progress=False)) == 4
    home.clips[1].write_bytes(home.clips[0].read_bytes())
    with pytest.raises(AssertionError):
        identities(home.config(), clips, progress=False)


def _put(home: Project, column: str, values: list[str]) -> None:
    """Write values into the first rows."""
    home.rows(lambda rows: [row.update({column: value}) for row, value in zip(rows, values, strict=False)])


CHINESE = ["\u4e00\u53ea\u732b\u5728\u8d70", "\u4e00\u53ea\u72d7\u5728\u8dd1"]


def test_captions_that_the_model_cannot_read_are_told_of(project):
    home = project()
    _put(home, "prompt", [*CHINESE, "a red \U0001f388"])
    notes = check_dataset(home.config(), read_spec(str(home.model)), progress=False).notes
    assert "3 of 4 captions hold characters that" in notes[0] and "(2 of them for the most part)" in notes[0]
    assert repr(CHINESE[0]) in notes[0] and "100% unknown" in notes[0]
    assert (
        notes[0].startswith("warning: ")
        and notes[1].startswith("warning: 2 different captions are not different to the model")
        and CHINESE[1] in notes[1]
    )
    report = home.precompute()
    assert set(notes) <= set(report.manifest.notes) and notes[0] in str(report).splitlines()
    first, second = (home.cache.read_prompt(item.prompt_key) for item in report.manifest.items[:2])
    assert torch.equal(first, second), "canary: this is what it warns of"


def test_captions_that_the_model_cannot_read_stop_it_where_that_is_asked_for(project):
    home = project(data={"unreadable_captions": "error"})
    emoji = ["a red \U0001f388", "a red \U0001f389"]
    _put(home, "prompt", [CHINESE[0], *emoji])
    with pytest.raises(DataError) as caught:
        home.precompute()
    said = str(caught.value)
    assert said.startswith("3 clips, images or captions cannot be used") and "unreadable_captions: warn" in said
    assert "100% of the caption is unknown" in said and "metadata.jsonl:1" in said
    assert said.count("another's, but for characters that are unknown") == 2 and "metadata.jsonl:3" in said
    assert not (home.folder / "cache" / "prompts").exists() and not (home.folder / "cache" / "latents").exists()
    _put(home, "prompt", ["a blue square", emoji[0], "a ring"])
    assert encoded(home.precompute())[1] == 5, "an emoji in a caption of words stops nothing"
    home.rows(lambda rows: rows[0].update(prompt=CHINESE[0]))
    prefix = {"unreadable_captions": "error", "caption_prefix": "a red circle moving left, a blue square moving up, "}
    with pytest.raises(DataError, match="100% of the caption"):  # of what was written for the clip
        home.precompute(data=prefix)
    own = {"path": str(home.folder / "clips"), "caption_prefix": prefix.pop("caption_prefix"), "trigger": "zkx"}
    with pytest.raises(DataError, match="100% of the caption"):
        home.precompute(data={**prefix, "sources": [own]})


def test_captions_are_not_compared_where_there_is_no_tokenizer(project, tmp_path):
    home = project(data={"unreadable_captions": "error"})
    home.rows(lambda rows: rows[0].update(prompt=CHINESE[0]))
    home.model = Path(shutil.copytree(home.model, tmp_path / "model"))
    shutil.rmtree(home.model / "tokenizer")
    (note,) = check_dataset(home.config(), read_spec(str(home.model)), progress=False).notes
    assert "captions were not compared" in note
    with pytest.raises(ModelError, match="no tokenizer"):
        home.precompute()


def test_a_manifest_from_before_captions_were_compared_still_answers(cached):
    home = cached()
    (manifest,) = (home.folder / "cache" / "manifests").glob("*.json")
    assert "unreadable_captions" not in manifest.read_text()
    home.ensure(cache={"mode": "require"})
    with pytest.raises(CacheError, match=r"data\.unreadable_captions"):
        home.ensure(cache={"mode": "require"}, data={"unreadable_captions": "error"})


def test_images_are_opened_before_anything_is_encoded(project):
    home = project("1.5-5b-i2v")
    clips = home.folder / "clips"
    Image.new("RGB", (64, 64), (9, 99, 199)).save(clips / "good.gif")
    Image.new("RGB", (64, 64)).save(clips / "cut.png")
    (clips / "cut.png").write_bytes((clips / "cut.png").read_bytes()[:60])
    Image.new("RGB", (640, 20)).save(clips / "wide.jpg")
    (home.folder / "start.png").write_bytes(b"no image")
    names = ["good.gif", "cut.png", "wide.jpg"]
    _put(home, "image", names)
    spec = read_spec(str(home.model))
    samples = {"validation": {"samples": [{"prompt": "a ring", "image": "start.png"}]}}
    with pytest.raises(DataError) as caught:
        check_dataset(home.config(**samples), spec, progress=False)
    said = str(caught.value)
    assert said.startswith("3 clips, images or captions") and "good.gif" not in said
    assert "clips/cut.png, first frame of" in said and "metadata.jsonl:2" in said
    assert "would keep" in said and "start.png (validation.samples)" in said
    home.changes = {"data": {"unreadable_clips": "skip"}}
    report = home.precompute()
    assert len(report.manifest.items) == 2 and report.skipped == {"unreadable": 2}
    for name in ("cut.png", "wide.jpg"):
        Image.new("RGB", (64, 64), (200, 0, 0)).save(clips / name)
    assert len(home.ensure().items) == 4, "that they were mended is noticed"


def test_check_dataset_plans_without_weights(project, monkeypatch):
    home = project()
    monkeypatch.setattr("finetune.cogvideox.load.load_vae", _forbidden)
    report = check_dataset(home.config(), read_spec(str(home.model)), progress=False)
    assert [clip.name for clip in report.clips] == [f"clips/{path.name}" for path in home.clips]
    assert "4 clips from 4 videos, 4 distinct captions, at 8 fps" in str(report)
    assert "bucket 9x32x32: 4 clips of 1.1 s; 100% of the picture and" in str(report)
    with pytest.raises(DataError, match="4 clips, images or captions cannot be used"):
        check_dataset(home.config(data={"buckets": ["17x32x32"]}), read_spec(str(home.model)), progress=False)
    with pytest.raises(DataError, match="no clip is left to train on: 4 videos too short"):
        skipping = home.config(data={"buckets": ["17x32x32"], "short_clips": "skip"})
        check_dataset(skipping, read_spec(str(home.model)), progress=False)
    assert not (home.folder / "cache").exists()


def test_what_is_cut_off_is_said_with_the_bucket_that_keeps_more(project):
    """In `check`, in `precompute`, and, from the manifest alone, in the run sheet."""
    from fuzz import boxes

    home = project(data={"buckets": ["9x64x32"]})
    for path in home.clips:  # 12 frames of 96x48, so three quarters of each picture and a quarter of its time are lost
        boxes.ffmpeg("-f", "lavfi", "-i", f"testsrc2=s=96x48:r=8:d=1.5,hue=h={len(path.name)}", path)
    share = "25% of the picture and 75% of the seconds are kept"
    size = (
        "warning: bucket 9x64x32 keeps 25% of the picture of 4 clips of 48x96 (height x width): 9x32x64 would keep 100%"
    )
    seconds = "warning: bucket 9x64x32 keeps 75% of the seconds of 4 videos: "
    report = str(check_dataset(home.config(), read_spec(str(home.model)), progress=False))
    assert f"bucket 9x64x32: 4 clips of 1.1 s; {share}" in report and size in report and seconds in report
    report = str(home.precompute())
    assert f"bucket 9x64x32: {share}" in report and size in report and seconds in report
    manifest = home.ensure()
    assert manifest.kept == {"9x64x32": share} and size in manifest.notes
    plain = str(home.precompute(data={"buckets": ["9x32x64"], "span": "uniform"}))  # canary
    assert "100% of the picture and 100% of the seconds" in plain and "warning" not in plain


def test_a_model_of_one_size_says_that_none_keeps_more(project):
    from finetune.caching.planned_clips import PlannedClip, kept_warnings
    from finetune.cogvideox.model_files import known_model
    from finetune.core.types import Sample, VideoProbe
    from finetune.datasets.geometry import picture_kept, plan_clips

    spec = read_spec(str(known_model("5b-i2v")))
    config = project(data={"buckets": ["49x480x720"]}).config().data
    probe = VideoProbe(100, 8.0, 720, 480, tuple(n / 8 for n in range(100)), 1)
    sample = Sample(Path("a.mp4"), "a", None, "a:1")
    clips = [PlannedClip("a.mp4", sample, probe, plan, False) for plan in plan_clips(probe, config, 8, "a")]
    picture, seconds = kept_warnings(clips, config, spec, 8)
    assert "44% of the picture of 1 clips of 720x480" in picture and "no size that keeps more" in picture
    assert "49% of the seconds of 1 videos: data.span: all would keep 98%" in seconds
    # Ten seconds hold one clip of 49 frames and three of 25.
    spec = read_spec(str(known_model("5b")))
    ten = replace(probe, frames=80, frame_times_s=probe.frame_times_s[:80], height=480, width=720)
    clips = [PlannedClip("a.mp4", sample, ten, plan, False) for plan in plan_clips(ten, config, 8, "a")]
    (seconds,) = kept_warnings(clips, config, spec, 8)
    assert seconds.endswith("61% of the seconds of 1 videos: data.span: all with 25x480x720 would keep 94%")
    # A web dataset has a thousand shapes: the sizes that serve most clips are named, the rest is counted.
    clips = [replace(clips[0], probe=replace(ten, height=480 + 8 * n)) for n in range(90)]
    *pictures, rest = [line for line in kept_warnings(clips, config, spec, 8) if "of the picture" in line]
    numbers = [int(line.split("of the picture of ")[1].split()[0]) for line in (*pictures, rest)]
    assert len(pictures) == 3 and "clips of more shapes" in rest
    assert sum(numbers) == sum(picture_kept((480 + 8 * n, 720), clips[0].plan.bucket) < 0.8 for n in range(90))


def test_decode_workers_share_the_machine(project, monkeypatch):
    config = project().config(cache={"decode_workers": None})
    monkeypatch.setattr("finetune.caching.check.cpu_cores", lambda: 16)
    assert [workers_for(config, 100, processes) for processes in (1, 2, 4, 8)] == [4, 4, 2, 1]
    assert workers_for(config, 2) == 2 and workers_for(project().config(), 100) == 0


# -------------------------------------------------------------------------------------------------------------- tiling


def test_tiling_follows_free_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (12 * 2**30, 24 * 2**30))
    for name in ("memory_reserved", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device: 0)
    card, cpu = torch.device("cuda", 0), torch.device("cpu")
    cases = [
        (card, Bucket(49, 480, 720), False),
        (card, Bucket(81, 768, 1360), True),
        (cpu, Bucket(81, 768, 1360), False),
    ]
    assert all(encoding.needs_tiling(device, torch.bfloat16, bucket) is tiled for device, bucket, tiled in cases)


def test_tiling_is_recorded_and_leaves_the_address_alone(project):
    home = project(data={"buckets": ["9x64x64"]})
    vae = load_vae(home.config().model)
    assert encoding.set_tiling(vae, "on", Bucket(9, 64, 64)) is True  # its tiles are 32x32
    assert encoding.set_tiling(vae, "on", Bucket(9, 32, 32)) is False
    assert encoding.set_tiling(vae, "off", Bucket(9, 64, 64)) is False and vae.use_tiling is False
    keys = {item.latents_key for item in home.precompute(cache={"vae_tiling": "on"}).manifest.items}
    assert json.loads(_metadata(home.cache.path("latents", min(keys)))["made_with"])["tiled"] is True
    assert encoded(home.precompute(cache={"vae_tiling": "off"})) == (0, 0, 0)


# ------------------------------------------------------------------------------------------------ killed, and together


def test_what_another_machine_wrote_may_not_be_listed_yet(project, monkeypatch):
    """As on NFS, where a folder's listing may be half a minute old."""
    home = project()
    listed = Cache.sizes
    monkeypatch.setattr(Cache, "sizes", lambda cache, kind: dict([*listed(cache, kind).items()][1:]))
    report = home.precompute()
    assert encoded(report) == (4, 5, 0)
    assert report.bytes == sum(path.stat().st_size for path in home.cache.root.rglob("*.safetensors"))


def test_stopped_midway_it_goes_on_where_it_stopped(project, monkeypatch):
    """By whatever: an interrupt at the third clip stands for SIGKILL, which tests/test_soak.py sends in earnest."""
    home, real, begun = project(), encoding.encode_video, []

    def interrupted(vae: Any, pixels: torch.Tensor) -> Any:
        begun.append(vae)
        if len(begun) == 3:
            raise KeyboardInterrupt
        return real(vae, pixels)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(encoding, "encode_video", interrupted)
        home.precompute()
    stored = home.cache.keys("latents")
    leftover = home.cache.path("latents", "ab" * 16).with_suffix(".safetensors.1-2.partial")
    leftover.parent.mkdir(exist_ok=True)
    leftover.write_bytes(b"half an entry")
    with pytest.raises(CacheError, match="begun for this configuration and not finished"):
        home.ensure(cache={"mode": "require"})
    assert cache_admin.gc(home.cache, delete=True, grace_s=0).entries == 0  # nothing of the interrupted work is garbage
    report = home.precompute()
    assert len(stored) == report.encoded["latents"] == report.reused["latents"] == 2
    assert cache_admin.verify(home.cache).ok and home.cache.keys("latents") >= stored
    os.utime(leftover, (time.time() - 7200,) * 2)
    assert cache_admin.gc(home.cache, delete=True).leftovers == 1 and not leftover.exists()


TOGETHER = """
import sys
from finetune.datasets import decode as frames
from finetune.core.errors import DataError
from finetune.caching import encode as encoding
from finetune.config.schema import load_config
from finetune.cogvideox.spec import read_spec
from finetune.caching.precompute import ensure_cache, precompute
from finetune.core.distributed import ProcessGroup

ranks = ProcessGroup.current()
assert ranks.world == 2 and ranks.device.type == "cpu"

def attempt(title, *overrides):
    try:
        report = precompute(load_config(sys.argv[1], overrides), distributed=ranks, progress=False)
        said = f"{report.encoded['latents']} {report.encoded['prompts']} {report.manifest.digest}"
    except Exception as error:
        said = f"{type(error).__name__}: {error}".splitlines()[0]
    tell(title, said)

def tell(title, said):
    # Each rank to its own file: on a shared pipe two lines can meet.
    with open(f"{sys.argv[2]}.{ranks.rank}", "a") as log:
        print(f"{title}: {said}", file=log)

attempt("shared")
config = load_config(sys.argv[1])
manifest = ensure_cache(config, read_spec(config.model.pretrained))
tell("trusted", manifest.digest)

real_encode, real_read = encoding.encode_video, frames.read_clip
if ranks.rank == 1:
    def crash(*args): raise ZeroDivisionError("out of luck")
    encoding.encode_video = crash
attempt("crashed", "cache.latents_dtype=bf16")
encoding.encode_video = real_encode

def broken(path, *rest): raise DataError("no frame", where=str(path))
frames.read_clip = broken
attempt("undecodable", "cache.latents_dtype=fp32")
attempt("unplanned", "data.sources.0.path=nowhere")
"""


def test_two_processes_share_the_work_agree_and_never_wait_for_one_that_failed(project, launcher):
    home = project("1.5-5b-i2v")
    (home.folder / "run.yaml").write_text(home.config().to_yaml())
    (home.folder / "together.py").write_text(TOGETHER)
    ends = launcher.run(
        "launcher_cases:script", *(str(home.folder / name) for name in ("together.py", "run.yaml", "said"))
    )
    assert [end.code for end in ends] == [0, 0], "\n".join(end.log[-3000:] for end in ends)
    said = {}
    for rank in "01":
        for line in (home.folder / f"said.{rank}").read_text().splitlines():
            title, _, text = line.partition(": ")
            said[rank, title] = text
    one, other = (said[rank, "shared"].split() for rank in "01")
    assert one == other and one[:2] == ["4", "5"]  # four clips and five captions, each encoded by one of the two
    assert said["0", "trusted"] == said["1", "trusted"] == one[2]

    assert said["1", "crashed"] == "ZeroDivisionError: out of luck"
    assert said["0", "crashed"] == "LaunchError: process 1 stopped: ZeroDivisionError: out of luck"
    stored = [json.loads(_metadata(path)["address"])["dtype"] for path in home.cache.files("latents")]
    assert stored.count("fp16") == 4 and stored.count("bf16") == 2  # what the other process encoded stays
    assert said["0", "undecodable"] == said["1", "undecodable"]
    assert said["0", "undecodable"].startswith("DataError: 4 clips could not be encoded")
    assert said["0", "unplanned"] == said["1", "unplanned"] and "DataError" in said["0", "unplanned"]

    together = _entries(home)
    shutil.rmtree(home.folder / "cache")
    assert home.precompute().manifest.digest == one[2]
    alone = _entries(home)
    assert len(alone) == 9 and alone.items() <= together.items()  # to the byte, image draws included


def _entries(home: Project) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (home.folder / "cache").rglob("*.safetensors")}


def _metadata(path: Path) -> dict[str, str]:
    with path.open("rb") as entry:
        return read_metadata(entry, path.stem)


# ------------------------------------------------------------------------------------------------- documentation, real


def test_the_sizes_in_the_documentation_are_computed_from_the_shapes():
    text = (ROOT / "docs" / "cache.md").read_text()
    rows = re.findall(r"^\| (5b|1\.5-5b) \| (\d+x\d+x\d+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", text, re.MULTILINE)
    assert len(rows) >= 2
    for variant, shape, latents, captions, images in rows:
        spec = read_spec(str(known_model(variant)))
        bucket = Bucket(*map(int, shape.split("x")))
        plain = encoding.clip_bytes(spec, bucket, "fp16", draws=0)
        drawn = encoding.clip_bytes(spec, bucket, "fp16", draws=4) - plain
        ours = [plain, cache_plan.prompt_bytes(spec, "bf16"), drawn]
        for written, size in zip((latents, captions, images), ours, strict=True):
            assert float(written) == pytest.approx(1000 * size / 2**30, abs=0.006), (variant, shape)


def test_the_reader_in_the_documentation_reads(cached, monkeypatch, capsys):
    home = cached()
    manifest = home.manifest
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "cache.md").read_text(), re.DOTALL)
    (code,) = [block for block in blocks if "load_file" in block]
    monkeypatch.chdir(home.folder)
    exec(compile(code, "docs/cache.md", "exec"), {})
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 4 and said[0] == f"{manifest.items[0].clip} {manifest.items[0].caption} (4, 3, 4, 4)"


def test_the_space_that_is_asked_for_is_the_space_that_is_taken(project):
    home = project("1.5-5b-i2v")
    config = home.config()
    plan = cache_plan.plan_cache(config, read_spec(str(home.model)), home.cache, progress=False)
    home.precompute()
    entries = [path for kind in ("latents", "prompts") for path in home.cache.files(kind)]
    stored = sum(tensor.nbytes for path in entries for tensor in load_file(path).values())
    manifest = next((home.cache.root / "manifests").iterdir()).stat().st_size
    overhead = plan.needed_bytes - stored - cache_plan.ENTRY_OVERHEAD * len(entries) - 2 * manifest
    assert len(entries) == 9 and abs(overhead) < 500  # a note or two in the manifest
    on_disk = sum(path.stat().st_blocks * 512 for path in home.cache.root.rglob("*") if path.is_file())
    assert stored < on_disk < plan.needed_bytes + 4096 * len(list((home.cache.root / "digests").iterdir()))


def test_real_clips(real_clips, tmp_path, tiny_model):
    home = Project(tmp_path, tiny_model(), {})
    sources = [{"path": str(real_clips / name)} for name in ("steamboat_willie", "cogvideox_samples")]
    report = home.precompute(data={"sources": sources, "buckets": ["9x48x80", "9x80x48"]}, cache={"decode_workers": 1})
    assert encoded(report) == (8, 9, 0)
    assert {str(item.bucket) for item in report.manifest.items} == {"9x48x80"}


# --------------------------------------------------------------------------------------------------- parts of a dataset


def part(home: Project, name: str, **changes: Any) -> PrecomputeReport:
    return precompute(home.config(**changes), progress=False, part=Part.parse(name))


def test_parts_in_any_order_make_what_one_command_makes_and_the_last_merges_them(project, filled):
    home = project()
    assert encoded(part(home, "3/3")) == (1, 2, 0) and encoded(part(home, "1/3")) == (2, 2, 0)
    with pytest.raises(
        CacheError, match=r"2 of 9 entries are not there[\s\S]*missing[\s\S]*`finetune precompute --shard 2/3` again"
    ):
        merge_parts(home.config(), progress=False)
    assert cache_admin.gc(home.cache, grace_s=0).entries == 0  # they are still wanted
    last = part(home, "2/3")
    assert last.part is None and "9" in str(last)
    assert home.manifest.digest == filled("5b").manifest.digest  # the only one that is left
    assert _entries(home) == _entries(filled("5b"))
    assert home.ensure(cache={"mode": "require"}).complete


def test_a_merge_proves_every_entry_to_be_whole(project):
    home = project()
    part(home, "1/2")
    whole = home.manifest.items[1]
    path = home.cache.path("latents", whole.latents_key)
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(
        CacheError, match=rf"latents/{whole.latents_key} \({whole.clip}[\s\S]*damaged[\s\S]*--shard 1/2` again"
    ):
        part(home, "2/2")
    assert encoded(part(home, "1/2")) == (1, 0, 0) and path.read_bytes() == content
    assert home.manifest.complete and len(home.manifest.items) == 4


def test_more_parts_than_clips_and_a_part_that_runs_again(project):
    home = project()
    for number in (1, 1, 6, 2, 3, 4, 5):
        report = part(home, f"{number}/6")
    assert report.part is None and len(home.manifest.items) == 4
    assert home.ensure().digest == home.manifest.digest


def test_a_clip_that_a_part_could_not_decode_is_left_out_of_the_whole(project, monkeypatch):
    home = project(data={"unreadable_clips": "skip"})
    lost = home.clips[1].name
    _break_decoding(monkeypatch, lost)
    for number in (1, 2):
        report = part(home, f"{number}/2")
    assert report.part is None and report.skipped == {"unreadable": 1} and len(home.manifest.items) == 3
    assert any(note.startswith("left out: ") and lost in note for note in home.manifest.notes)


@pytest.mark.parametrize("text", ["0/4", "5/4", "3", "a/b", "1/0", "-1/4", ""])
def test_a_part_that_cannot_be_is_refused(text):
    with pytest.raises(ConfigError, match="from 1/16 to 16/16"):
        Part.parse(text)


@pytest.mark.slow  # a minute: each task's process imports everything
def test_parts_go_through_ray_where_it_is_installed(project):
    """Two tasks on a local Ray, without its dashboard."""
    ray = pytest.importorskip("ray", reason="ray is an extra")
    from finetune.caching.ray_data import precompute_on_ray

    home = project()
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=80 << 20)
    try:
        report = precompute_on_ray(home.config(), 2, num_gpus=0)
    finally:
        ray.shutdown()
    assert report.part is None and len(home.manifest.items) == 4 and home.manifest.complete


def test_a_part_opens_its_own_videos_alone(project, monkeypatch):
    from finetune.datasets import decode as frames

    home, opened = project(cache={"decode_workers": 0}), set()
    real = frames.probe_file

    def counted(path: Path) -> Any:
        opened.add(path.name)
        return real(path)

    monkeypatch.setattr(frames, "probe_file", counted)
    part(home, "1/2")
    assert len(opened) == 2
