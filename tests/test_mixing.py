"""What a dataset may give beside one caption per clip: several of them, chosen by address; and what sources set."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from worlds import assert_same_run, run_config, stop_after

from finetune.caching.check import check_dataset
from finetune.caching.parts import Part
from finetune.caching.precompute import ensure_cache, precompute
from finetune.cogvideox.spec import read_spec
from finetune.config.schema import RunConfig
from finetune.core.errors import ConfigError, TrainingError
from finetune.datasets import cache_admin
from finetune.datasets.cache import Cache
from finetune.datasets.cache_packing import pack
from finetune.datasets.cache_transfer import export_cache
from finetune.datasets.dataloader import BatchMaker
from finetune.datasets.decode_pool import DecodeJob, DecodePool
from finetune.datasets.geometry import ClipConfig, plan_clips
from finetune.datasets.manifests import Manifest, read_content
from finetune.datasets.samples import names_a_side
from finetune.datasets.schedule import MicroBatch
from finetune.trainers.loop import train
from finetune.trainers.replay import replay


@pytest.fixture
def home(tmp_path, tiny_model, demo_clips) -> Callable[..., RunConfig]:
    """``home("run", edit, **changes)``: a run on a copy of the demo clips, each of whose rows ``edit`` has changed."""

    def make(
        name: str,
        edit: Callable[[int, dict[str, Any]], object] = lambda *_: None,
        *,
        variant: str = "5b",
        **changes: Any,
    ) -> RunConfig:
        clips = tmp_path / "clips"
        shutil.copytree(demo_clips, clips, dirs_exist_ok=True)
        rows = [json.loads(line) for line in (demo_clips / "metadata.jsonl").read_text().splitlines()]
        for number, row in enumerate(rows):
            edit(number, row)
        (clips / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return run_config(tiny_model(variant), clips, tmp_path / name, **changes)

    return make


def two_more(number: int, row: dict[str, Any]) -> None:
    """The caption once more with spaces, which adds none, and two others; the last clip keeps its one."""
    if number < 3:
        row["captions"] = [f"{row['prompt']} ", f"clip  {number} otherwise", f"clip {number} in short"]


def batches(config: RunConfig) -> BatchMaker:
    spec, cache = read_spec(config.model.pretrained), Cache(config.cache.dir)
    manifest = ensure_cache(config, spec, progress=False)
    quiet = config.data.model_copy(update={"caption_dropout": 0.0})
    empty = cache.read_prompt(manifest.empty_prompt_key)
    return BatchMaker(spec, cache, manifest.items, empty, quiet, config.train.seed, config.objective)


def test_every_caption_is_cached_and_training_takes_one_by_its_address(home):
    plain = precompute(home("plain"), progress=False).manifest
    before = batches(home("plain"))
    config = home("run", two_more)
    report = precompute(config, progress=False)
    assert (report.encoded["latents"], report.encoded["prompts"]) == (0, 6)
    first, last = report.manifest.items[0], report.manifest.items[3]
    assert [text for text, _ in first.variants] == ["clip 0 otherwise", "clip 0 in short"]
    assert first.caption == plain.items[0].caption and last == plain.items[3] and last.variants == ()
    assert report.manifest.digest != plain.digest

    made, cache = batches(config), Cache(config.cache.dir)
    embeds = [cache.read_prompt(key) for key in first.prompt_keys]

    def taken(step: int) -> int:
        batch = made.training(step, MicroBatch(items=(0,), slots=(0,)))
        alone = before.training(step, MicroBatch(items=(0,), slots=(0,)))
        assert torch.equal(batch.noise, alone.noise) and torch.equal(batch.latents, alone.latents)
        return next(k for k, embed in enumerate(embeds) if torch.equal(batch.prompt_embeds[0], embed))

    drawn = [taken(step) for step in range(24)]
    assert set(drawn) == {0, 1, 2} and drawn == [taken(step) for step in range(24)]
    assert torch.equal(made.fixed(0, [3]).prompt_embeds[0], embeds[0]), "measurements take the first"
    last_of = made.training(5, MicroBatch(items=(3,), slots=(1,)))
    assert torch.equal(last_of.prompt_embeds, before.training(5, MicroBatch(items=(3,), slots=(1,))).prompt_embeds)


def test_a_manifest_without_extras_is_the_file_it_was(home):
    config = home("run")
    manifest = precompute(config, progress=False).manifest
    (path,) = Cache(config.cache.dir).manifest_paths()
    content = read_content(path)
    assert set(content["items"][0]) == {
        *("clip", "where", "caption", "bucket", "repeats", "holdout", "latents_key", "prompt_key", "media_digest")
    }
    assert Manifest.from_content(content, config.base).items == manifest.items
    precompute(config := home("run", two_more), progress=False)
    assert ensure_cache(config, read_spec(config.model.pretrained), progress=False).items[0].variants


def test_a_run_with_variants_resumes_to_the_bit(home):
    whole = train(home("whole", two_more, train={"steps": 4, "batch_size": 2}))
    part = home("part", two_more, train={"steps": 4, "batch_size": 2}, checkpoint={"every": 2})
    stop_after(2, part)
    assert_same_run(train(part), whole)


def test_a_replay_finds_the_caption_of_the_step(home, monkeypatch):
    config = home("run", two_more, cache={"latents_dtype": "fp32"}, train={"steps": 40})
    manifest = precompute(config, progress=False).manifest
    cache = Cache(config.cache.dir)
    chosen = manifest.items[1].variants[1][1]
    address = json.loads(_metadata(cache.path("prompts", chosen))["address"])
    huge = torch.full_like(cache.read_prompt(chosen), 3e38)
    cache.write_prompt(address, huge, tokens=4)
    with pytest.raises(TrainingError, match="non-finite"):
        train(config)
    (folder,) = (config.output_dir / "reports").iterdir()
    (again,) = replay(folder).samples
    assert again.sample.item.clip == manifest.items[1].clip and not again.is_finite


def _metadata(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, "pt") as entry:
        return dict(entry.metadata())


@pytest.mark.parametrize(
    ("captions", "message"),
    [([7], "the caption is int, not text"), (["fine", ""], "the caption is empty"), (["a\x00b"], "damaged")],
)
def test_each_of_several_captions_is_checked(home, captions, message):
    config = home("run", lambda number, row: row.update(captions=captions) if number == 1 else None)
    with pytest.raises(Exception, match=message):
        check_dataset(config, read_spec(config.model.pretrained), progress=False)


def test_check_reads_every_caption_as_the_model_does(home):
    config = home("run", lambda number, row: row.update(captions=["一只红色的风筝"] if number == 1 else []))
    (warning,) = (
        note
        for note in check_dataset(config, read_spec(config.model.pretrained), progress=False).notes
        if "does not know" in note
    )
    assert "1 of 5 captions" in warning


def of_two_sources(config: RunConfig, **own: Any) -> RunConfig:
    """The run with every clip once more, from a source that sets ``own``."""
    data = config.to_dict()["data"]
    (source,) = data["sources"]
    values = config.to_dict() | {"data": {**data, "trigger": "zkx", "sources": [source, {**source, **own}]}}
    return RunConfig.from_dict(values)


OWN_WORDS: list[tuple[dict[str, str], str]] = [
    ({"trigger": ""}, "{}"),
    ({"trigger": "abc"}, "abc {}"),
    ({"caption_prefix": "Ink. "}, "zkx Ink. {}"),
    ({"caption_suffix": ", ink"}, "zkx {}, ink"),
]


@pytest.mark.parametrize(("own", "expected"), OWN_WORDS)
def test_a_source_has_its_own_words(home, own, expected):
    config = of_two_sources(home("run"), **own)
    clips = check_dataset(config, read_spec(config.model.pretrained), progress=False).clips
    captions = [clip.sample.caption for clip in clips]
    assert captions[4:] == [expected.format(caption.removeprefix("zkx ")) for caption in captions[:4]]
    assert all(caption.startswith("zkx ") for caption in captions[:4])


def test_a_source_has_its_own_caption_dropout(home):
    config = of_two_sources(home("run"), caption_dropout=1.0)
    precompute(config, progress=False)
    made = batches(config)
    shown = made.training(0, MicroBatch(items=(0, 4), slots=(0, 1))).prompt_embeds
    assert not torch.equal(shown[0], made.empty_prompt) and torch.equal(shown[1], made.empty_prompt)
    assert torch.equal(made.fixed(4, [3]).prompt_embeds[0], made.cache.read_prompt(made.items[4].prompt_key))


def test_a_weight_multiplies_the_gradient_of_its_clips_alone(home):
    def trained(name: str, weight: float | None) -> tuple[Any, Any]:
        config = home(name, train={"steps": 2, "batch_size": 2, "max_grad_norm": None})
        values = config.to_dict()
        (source,) = values["data"]["sources"]
        sources = [source if weight is None else {**source, "weight": weight}]
        records: list[Any] = []
        report = train(RunConfig.from_dict(values | {"data": {**values["data"], "sources": sources}}), records.append)
        return report, records[0]

    (plain, first), (one, _), (_, twice) = trained("plain", None), trained("one", 1.0), trained("two", 2.0)
    assert_same_run(one, plain)
    assert twice.losses == first.losses and twice.grad_norm == pytest.approx(2 * first.grad_norm, rel=1e-5)

    config = of_two_sources(home("mixed"), weight=0.5)
    precompute(config, progress=False)
    mixed = batches(config).training(0, MicroBatch(items=(1, 6), slots=(0, 1)))
    assert mixed.weights is not None and mixed.weights.tolist() == [1.0, 0.5]


@pytest.mark.parametrize("own", [{"weight": 0.5}, {"caption_dropout": 0.0}, {"random_flip": True}], ids=str)
def test_what_only_training_does_is_refused_of_a_held_out_source(home, own):
    with pytest.raises(ConfigError, match=f"{next(iter(own))} would have no effect: what is held out"):
        of_two_sources(home("run"), split="holdout", **own)


def test_sources_that_set_nothing_ask_for_what_they_always_did(home):
    config = home("run")
    manifest = precompute(config, progress=False).manifest
    assert set(manifest.request["data"]["sources"][0]).isdisjoint(
        {"trigger", "caption_dropout", "weight", "random_flip", "images"}
    )
    assert "image_buckets" not in manifest.request["data"]
    changed = precompute(of_two_sources(config, weight=2.0, caption_dropout=0.0), progress=False).manifest
    assert changed.items[4].weight == 2.0 and changed.items[4].caption_dropout == 0.0
    assert set(changed.items[0].extras()) == set()


# ------------------------------------------------------------------------------------------------------ mirrored clips


SIDES: list[tuple[str, bool]] = [
    ("a car in the left lane", True),
    ("RIGHT, then up", True),
    ("she left", True),
    ("the leftmost door", True),
    ("turning left-handed", True),
    ("tags: left_hand, night", True),
    ("it moves rightwards.", True),
    ("turns counter-clockwise", True),
    ("bright light on a copyright page", False),
    ("a cleft rock, upright", False),
    ("straightforward", False),
]


@pytest.mark.parametrize(("caption", "says"), SIDES)
def test_which_captions_keep_a_clip_from_being_mirrored(caption, says):
    assert names_a_side(caption) is says


def flipping(home: Callable[..., RunConfig], name: str, *args: Any, **changes: Any) -> RunConfig:
    """A run of the demo clips whose source sets ``random_flip``; two of the four captions say left or right."""
    values = home(name, *args, **changes).to_dict()
    (source,) = values["data"]["sources"]
    return RunConfig.from_dict(values | {"data": {**values["data"], "sources": [{**source, "random_flip": True}]}})


def test_a_mirrored_clip_is_another_entry_and_all_else_stays(home, tmp_path):
    plain = precompute(home("plain"), progress=False).manifest
    config = flipping(home, "run", data={"holdout": 1})
    report = precompute(config, progress=False)
    items = {item.clip: item for item in report.manifest.items}
    assert [item.latents_key for item in items.values()] == [item.latents_key for item in plain.items]
    # The two whose captions name a side, and the one held out, are as they were.
    sides = [names_a_side(item.caption) for item in items.values()]
    assert sum(sides) == 2 and sum(item.holdout for item in items.values()) == 1
    expected = [not side and not item.holdout for side, item in zip(sides, items.values(), strict=True)]
    assert [bool(item.flipped_key) for item in items.values()] == expected
    assert report.encoded["latents"] == sum(expected) > 0
    assert f"{sum(expected)} of 4 clips are there mirrored" in str(report)
    (note,) = (note for note in report.manifest.notes if "not flipped" in note)
    assert note.startswith("2 rows") and "metadata.jsonl:1" in note and "metadata.jsonl:3" in note
    assert plain.digest != report.manifest.digest

    # What looks after a cache knows the entries: nothing is garbage, a copy has them, a shard too.
    cache, copy = Cache(config.cache.dir), Cache(tmp_path / "copy")
    flipped = {item.flipped_key for item in items.values() if item.flipped_key}
    cache_admin.gc(cache, delete=True)
    export_cache(cache, copy.root)
    pack(copy)
    for one in (cache, copy):
        assert cache_admin.verify(one).ok and flipped <= one.keys("latents")
    cache.path("latents", min(flipped)).unlink()
    assert ensure_cache(config, read_spec(config.model.pretrained), progress=False).digest == report.manifest.digest
    assert flipped <= cache.keys("latents")


@pytest.mark.parametrize("holdout", [1, 2])
def test_parts_of_a_dataset_encode_every_mirrored_clip_that_the_whole_needs(home, holdout):
    """A part cannot know which of its clips the whole holds out."""
    config = flipping(home, "run", lambda number, row: row.update(prompt=f"scene {number}"), data={"holdout": holdout})
    for part in ("1/2", "2/2"):
        report = precompute(config, progress=False, part=Part.parse(part))
    assert report.part is None, "merged"
    manifest = ensure_cache(config, read_spec(config.model.pretrained), progress=False)
    assert [bool(item.flipped_key) for item in manifest.items] == [not item.holdout for item in manifest.items]


@pytest.mark.parametrize("decoder", ["pyav", "decord"])
def test_the_mirror_is_exact_for_the_clip_and_for_its_image(demo_clips, decoder):
    if decoder == "decord":
        pytest.importorskip("decord")
    from decoding import probe
    from PIL import Image

    video = sorted(demo_clips.rglob("*.mp4"))[0]
    clips = ClipConfig(buckets=["9x32x48"], fps=8)
    (plan,) = plan_clips(probe(video), clips, 8, "")
    image = demo_clips.parent / "half.png"
    Image.linear_gradient("L").rotate(90).resize((50, 31)).save(image)
    jobs = [DecodeJob(video, probe(video), replace(plan, flip=flip), image, decoder) for flip in (False, True)]
    with DecodePool(workers=1) as pool:
        straight, mirrored = (clip for _, clip in pool.decode_many(jobs))
    for ours, theirs in ((mirrored.pixels, straight.pixels), (mirrored.image, straight.image)):
        assert torch.equal(ours, theirs.flip(-1)) and not torch.equal(ours, theirs)


@pytest.mark.parametrize("variant", ["5b", "5b-i2v"])
def test_training_draws_the_mirrored_clip_half_of_the_time_and_measures_the_plain_one(home, variant):
    config = flipping(home, "run", variant=variant)
    precompute(config, progress=False)
    made, index = batches(config), 1
    plain = replace(made, items=[replace(item, flipped_key="") for item in made.items])
    mirrored = replace(made, items=[replace(item, latents_key=item.flipped_key) for item in made.items])
    micro = MicroBatch(items=(index,), slots=(3,))

    def is_mirrored(step: int, micro: MicroBatch = micro) -> bool:
        batch, straight, other = (one.training(step, micro) for one in (made, plain, mirrored))
        assert torch.equal(batch.noise, straight.noise) and torch.equal(batch.timesteps, straight.timesteps)
        chosen = other if torch.equal(batch.latents, other.latents) else straight
        assert torch.equal(batch.latents, chosen.latents) and not torch.equal(other.latents, straight.latents)
        if "i2v" in variant:  # the image goes with the clip
            assert torch.equal(batch.image_latents, chosen.image_latents)
        return chosen is other

    drawn = [is_mirrored(step) for step in range(64)]
    assert 20 <= sum(drawn) <= 44 and drawn[:8] == [is_mirrored(step) for step in range(8)]
    assert torch.equal(made.fixed(index, [3]).latents, plain.fixed(index, [3]).latents)
    # One process or several, a sample of a step has its own slot and so its own draw.
    other = MicroBatch(items=(index,), slots=(4,))
    assert drawn[:16] != [is_mirrored(step, other) for step in range(16)]
    both = made.training(0, MicroBatch(items=(index, index), slots=(3, 4))).latents
    assert torch.equal(both, torch.cat([made.training(0, one).latents for one in (micro, other)]))


def test_a_run_with_mirrored_clips_resumes_to_the_bit_and_is_another_run(home):
    steps: dict[str, list[Any]] = {"plain": [], "whole": []}
    plain = train(home("plain", train={"steps": 4}), steps["plain"].append)
    whole = train(flipping(home, "whole", train={"steps": 4}), steps["whole"].append)
    part = flipping(home, "part", train={"steps": 4}, checkpoint={"every": 2})
    stop_after(2, part)
    assert_same_run(train(part), whole)
    losses = [[record.losses for record in steps[name]] for name in ("plain", "whole")]
    assert losses[0] != losses[1] and plain.step == whole.step
