"""Masked loss: masks beside the clips, what the cache holds of them, and what is learnt and measured with them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from worlds import assert_same_run, history, merged, run_values, stop_after

from finetune.caching.check import check_dataset
from finetune.caching.precompute import precompute
from finetune.cogvideox.spec import read_spec
from finetune.config.schema import RunConfig
from finetune.core.errors import DataError
from finetune.datasets.cache import Cache
from finetune.datasets.dataloader import BatchMaker
from finetune.datasets.schedule import MicroBatch
from finetune.inference.modes import read_frames
from finetune.inference.videos import Frames, write_mp4
from finetune.trainers.loop import train


def left_half(frames: Frames) -> Frames:
    """White on the left, and black on the right in all but the first frame."""
    mask = np.zeros_like(frames)
    mask[:, :, : frames.shape[2] // 2] = 255
    mask[0] = 255
    return mask


@pytest.fixture(scope="module")
def clips(tmp_path_factory, demo_clips) -> Path:
    """The demo's clips: two have a mask video, one a still image for its mask, and the last has none."""
    folder = tmp_path_factory.mktemp("masked") / "clips"
    shutil.copytree(demo_clips, folder)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for row in rows[:3]:
        frames = left_half(read_frames(folder / row["file_name"]))
        row["mask"] = f"masks/{Path(row['file_name']).stem}.mp4"
        if row is rows[2]:
            row["mask"] = "masks/still.png"
            Image.fromarray(frames[1]).save(folder / row["mask"])
        else:
            write_mp4(folder / row["mask"], frames, 8)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def home(tmp_path, clips, tiny_model) -> Callable[..., RunConfig]:
    """The configuration of a masked run over a copy of the clips."""
    shutil.copytree(clips, tmp_path / "clips")

    def make(name: str = "run", **changes: Any) -> RunConfig:
        values = run_values(tiny_model("5b"), Path("clips"), Path(name), objective={"masked": {"outside": 0.25}})
        return RunConfig.from_dict(merged(values, {"cache": {"dir": "cache"}, **changes}), base=tmp_path)

    return make


def batches(config: RunConfig) -> BatchMaker:
    spec, cache = read_spec(config.model.pretrained), Cache(config.cache.dir)
    items = precompute(config, progress=False).manifest.items
    return BatchMaker(spec, cache, items, torch.zeros(226, 32), config.data, 7, config.objective)


def test_a_mask_is_cut_and_mirrored_as_its_clip_and_weighs_its_loss(home):
    made = batches(home(data={"sources": [{"path": "clips", "random_flip": True}]}))
    entries = {item.clip: made.cache.read(item) for item in made.items}
    masks = [entry.mask for entry in entries.values()]
    expected = torch.zeros(1, 3, 8, 8)
    expected[..., :4], expected[:, 0] = 1.0, 1.0
    for mask, still in zip(masks[:3], (False, False, True), strict=True):
        assert mask is not None
        assert torch.allclose(mask.float()[:, still:], expected[:, still:], atol=0.02)
    assert masks[3] is None
    flipped = next(item for item in made.items if item.flipped_key and item.unmasked_key)
    mirrored = made.cache.read(replace(flipped, latents_key=flipped.flipped_key)).mask
    assert mirrored is not None and torch.allclose(mirrored.float(), entries[flipped.clip].mask.float().flip(-1))

    batch = made.training(0, MicroBatch(items=(0, 3), slots=(0, 1)))
    weights = sorted({round(float(weight), 2) for weight in batch.mask[0].unique()})
    assert weights == [0.25, 1.0] and torch.equal(batch.mask[1], torch.ones(1, 3, 8, 8))
    assert made.training(0, MicroBatch(items=(3,), slots=(0,))).mask is None
    assert made.fixed(0, [3]).mask is None, "measurements are of the whole picture"


def test_a_run_without_masked_loss_reads_no_masks(home):
    masked = precompute(home(), progress=False).manifest.items
    plain = precompute(home(objective={"masked": None}), progress=False)
    assert plain.encoded["latents"] == 3 and plain.manifest.items[3] == masked[3]
    assert [item.latents_key for item in plain.manifest.items[:3]] == [item.unmasked_key for item in masked[:3]]
    assert plain.manifest.items[0].extras() == {} and "companions" not in plain.manifest.request


def test_masks_that_teach_nothing_are_faults(home, tmp_path):
    table = tmp_path / "clips" / "metadata.jsonl"
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    video = tmp_path / "clips" / rows[1]["mask"]
    write_mp4(video, np.zeros_like(read_frames(video)), 8)
    with pytest.raises(DataError, match="black all over the clip") as caught:
        precompute(home(), progress=False)
    assert str(video.name) in str(caught.value) and "metadata.jsonl:2" in str(caught.value)
    table.write_text("".join(json.dumps({**row, "mask": None}) + "\n" for row in rows))
    with pytest.raises(DataError, match="no training clip has a mask"):
        check_dataset(home(), read_spec(home().model.pretrained), progress=False)


def test_a_masked_run_learns_by_its_masks_is_measured_whole_and_resumes_to_the_bit(home):
    def run(name: str, masked: dict[str, Any] | None) -> tuple[Any, list[Any]]:
        steps: list[Any] = []
        changes = {"train": {"steps": 6, "batch_size": 2}, "data": {"holdout": 1}}
        changes["validation"] = {"every": 6, "at_start": True, "timesteps": 2}
        config = home(name, **changes, objective={"masked": masked})
        if name == "part":
            stop_after(3, config)
        return train(config, on_step=steps.append), steps

    (plain, before), (whole, steps) = run("plain", None), run("whole", {"outside": 0.0})
    assert history(plain.run_dir)[0] == history(whole.run_dir)[0], "the base model is measured alike, to the last digit"
    assert steps[0].losses != before[0].losses and steps[0].timesteps == before[0].timesteps
    (even, alike), (part, _) = run("even", {"outside": 1.0}), run("part", {"outside": 0.0})
    assert alike[0].losses == pytest.approx(before[0].losses, rel=1e-6), "with equal weights it is the plain loss"
    assert_same_run(part, whole)
    assert even.weights != whole.weights


def test_a_mask_may_lie_beside_its_clip(home, tmp_path):
    folder = tmp_path / "beside"
    folder.mkdir()
    rows = [json.loads(line) for line in (tmp_path / "clips" / "metadata.jsonl").read_text().splitlines()]
    for row in rows[:3]:
        name = Path(row["file_name"]).stem
        shutil.copy(tmp_path / "clips" / row["file_name"], folder / f"{name}.mp4")
        mask = Path(row["mask"])
        shutil.copy(tmp_path / "clips" / mask, folder / f"{name}.mask{mask.suffix}")
        (folder / f"{name}.txt").write_text(row["prompt"])
    items = precompute(home(data={"sources": [{"path": "beside"}]}), progress=False).manifest.items
    others = precompute(home(), progress=False).manifest.items
    assert {item.latents_key for item in items} == {item.latents_key for item in others[:3]}
