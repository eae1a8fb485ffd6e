"""Control videos: rows that name one, what the cache holds of it, a widened model, its training and its export."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from worlds import merged, run_values

from finetune.caching.check import check_dataset
from finetune.caching.precompute import precompute
from finetune.cogvideox.encode import encode_video
from finetune.cogvideox.load import load_vae
from finetune.cogvideox.spec import spec_of
from finetune.config.schema import RunConfig
from finetune.core.errors import DataError
from finetune.datasets.cache import Cache
from finetune.inference.modes import read_frames
from finetune.inference.videos import Frames, write_mp4


def negative(frames: Frames) -> Frames:
    return 255 - frames


@pytest.fixture(scope="module")
def clips(tmp_path_factory, demo_clips) -> Path:
    """The demo's clips, each with its negative as a control video in a column of the table."""
    folder = tmp_path_factory.mktemp("control") / "clips"
    shutil.copytree(demo_clips, folder)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for row in rows:
        video = folder / row["file_name"]
        row["control"] = f"controls/{video.name}"
        write_mp4(folder / row["control"], negative(read_frames(video)), 8)
    write_rows(folder, rows)
    return folder


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


@pytest.fixture
def home(tmp_path, clips, tiny_model) -> Callable[..., RunConfig]:
    """The configuration of a control run over a copy of the clips, in a folder of its own."""
    shutil.copytree(clips, tmp_path / "clips")

    def make(variant: str = "5b", **changes: Any) -> RunConfig:
        values = merged(run_values(tiny_model(variant), Path("clips"), Path("run")), {"model": {"control": True}})
        return RunConfig.from_dict(merged(values, changes), base=tmp_path)

    return make


# ------------------------------------------------------------------------------------------------------------ the data


def test_a_control_is_cut_as_its_clip_and_encoded_as_its_mode(home):
    config = home(data={"sources": [{"path": "clips", "random_flip": True}]})
    report = precompute(config, progress=False)
    item = next(item for item in report.manifest.items if item.flipped_key)
    frames = read_frames(config.base / "clips" / "controls" / Path(item.clip).name)[:9]
    vae, cache = load_vae(config.model), Cache(config.cache.dir)
    for key, pixels in ((item.latents_key, frames), (item.flipped_key, frames[:, :, ::-1])):
        control = cache.read(replace(item, latents_key=key)).control_latents
        expected, _ = encode_video(vae, torch.from_numpy(pixels.copy()).permute(3, 0, 1, 2)[None])
        assert control is not None and torch.equal(control, expected[0].half())


def test_a_run_without_control_keeps_its_addresses(home, demo_clips, tmp_path):
    """Rows that name controls are as good as any others, for a model that takes none."""
    config, other = home(), home(model={"control": False})
    shutil.copytree(demo_clips, tmp_path / "plain")
    plain = home(model={"control": False}, data={"sources": [{"path": "plain"}]})
    controlled, ours, theirs = (
        [item.latents_key for item in precompute(one, progress=False).manifest.items] for one in (config, other, plain)
    )
    assert ours == theirs and not {*controlled} & {*ours}


def test_rows_whose_control_does_not_fit_are_faults(home, tmp_path):
    folder = tmp_path / "clips"
    rows = rows_of(folder)
    frames = read_frames(folder / rows[0]["control"])
    rows[0]["control"] = ""
    rows[1]["control"] = "controls/nowhere.mp4"
    write_rows(folder, rows)
    with pytest.raises(DataError) as caught:
        check_dataset(home(), spec_of(home().model), progress=False)
    message = str(caught.value)
    assert "metadata.jsonl:1" in message and "names no control" in message and "nowhere.mp4" in message
    for row, wrong in zip(rows, (frames[:-1], frames[:, :48], frames[:, ::2, ::2], frames), strict=True):
        row["control"] = f"controls/new-{Path(row['file_name']).name}"
        write_mp4(folder / row["control"], wrong, 5)  # whatever its rate
    write_rows(folder, rows)
    with pytest.raises(DataError) as caught:
        check_dataset(home(), spec_of(home().model), progress=False)
    message = str(caught.value)
    assert message.count("is not that of its video") == 2  # half the size is the same shape
    assert "its length is not" in message and f"{len(frames) - 1} frames" in message and "48x64" in message


def test_a_control_may_lie_beside_its_clip(home, tmp_path):
    folder = tmp_path / "beside"
    for row in rows_of(tmp_path / "clips"):
        name = Path(row["file_name"]).stem
        for file, to in ((row["file_name"], f"{name}.mp4"), (row["control"], f"{name}.control.mp4")):
            (folder / to).parent.mkdir(exist_ok=True)
            shutil.copy(tmp_path / "clips" / file, folder / to)
        (folder / f"{name}.txt").write_text(row["prompt"])
    config = home(data={"sources": [{"path": "beside"}]})
    clips = check_dataset(config, spec_of(config.model), progress=False).clips
    assert [clip.companions[0].path.name for clip in clips] == [
        f"{clip.sample.video.stem}.control.mp4" for clip in clips
    ]
    without = home(model={"control": False}, data={"sources": [{"path": "beside"}]})
    assert len(check_dataset(without, spec_of(without.model), progress=False).clips) == len(clips) == 4
    next(folder.glob("*.control.mp4")).with_suffix(".txt").write_text("its own caption")  # then it is a clip
    assert len(check_dataset(without, spec_of(without.model), progress=False).clips) == 5
