"""Records of videos: finished ones are kept, and each can be made again; and videos in columns."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from test_docs import COMMAND, commands
from test_generate import PROMPT, SMALL, bucket_of, picture, request_for, save_adapter
from waiting import HANG_S

import finetune
from finetune.cli.main import main
from finetune.cogvideox.spec import read_spec
from finetune.core.errors import ConfigError
from finetune.core.files import LORA_FILE
from finetune.core.types import Bucket
from finetune.inference import generate as generation
from finetune.inference.compare import parse_comparison
from finetune.inference.generate import generate
from finetune.inference.modes import read_frames
from finetune.inference.record import read_video_record
from finetune.inference.request import AdapterArgument, VideoPrompt, prompts_with_seeds
from finetune.inference.videos import labelled_grid, write_mp4
from finetune.testing.tiny import build_tiny


@pytest.fixture
def sampled(monkeypatch):
    """The seeds of the videos that were sampled and not kept."""
    seeds, theirs = [], generation.sample_videos

    def sample_videos(modules, requests, *args, **options):
        seeds.extend(request.seed for request in requests)
        return theirs(modules, requests, *args, **options)

    monkeypatch.setattr(generation, "sample_videos", sample_videos)
    return seeds


# -------------------------------------------------------------------------------------------------------------- records


def test_the_record_stands_in_the_mp4_and_beside_it(tiny_model, tmp_path):
    base = tiny_model("5b")
    adapters = (AdapterArgument(save_adapter(tmp_path / "one", base), 0.5),)
    (path,) = generate(request_for(base, tmp_path / "out", adapters=adapters, guidance_scale=2.5)).videos
    with av.open(str(path)) as container:
        tags = dict(container.metadata)
    assert tags["title"] == PROMPT and json.loads(tags["comment"]) == json.loads(path.with_suffix(".json").read_text())
    record = read_video_record(path)
    assert record == read_video_record(path.with_suffix(".json"))
    stated = json.loads(tags["comment"])["request"]  # defaults too, which another version may have changed
    assert stated["num_inference_steps"] == 1 and stated["dynamic_cfg"] is False and stated["strength"] == 0.8
    request = record.request
    assert [(p.prompt, p.seed) for p in request.prompts] == [(PROMPT, 5)] and request.adapters == adapters
    assert (request.base, request.bucket, request.fps, request.dtype) == (str(base), SMALL, 8.0, "fp32")
    assert (request.num_inference_steps, request.guidance_scale) == (1, 2.5)
    assert (
        set(record.digests) == {str(tmp_path / "one"), str(base)} and len(record.base) == 32 and record.device == "cpu"
    )
    assert record.versions["torch"] == torch.__version__ and {"diffusers", "peft"} <= set(record.versions)


MODES = [("5b", "text"), ("5b", "video"), ("1.5-5b-i2v", "image"), ("5b-i2v", "images"), ("5b", "extend")]


@pytest.mark.parametrize(("variant", "mode"), MODES)
def test_a_video_is_made_again_from_its_own_record(tiny_model, tmp_path, variant, mode):
    base = tiny_model(variant)
    bucket, names = bucket_of(read_spec(str(base))), ("first.png", "last.png", "clip.mp4")
    first, last, clip = (tmp_path / name for name in names)
    Image.fromarray(picture(bucket, 1)).save(first)
    Image.fromarray(picture(bucket, 2)).save(last)
    write_mp4(clip, np.stack([picture(bucket, seed) for seed in range(9)]), 8)
    given = {"image": {"image": first}, "images": {"image": first, "last_image": last}, "video": {"video": clip}}
    request = request_for(
        base,
        tmp_path / "out",
        prompts=(VideoPrompt(prompt=PROMPT, seed=3, **given.get(mode, {})),),
        adapters=(AdapterArgument(save_adapter(tmp_path / "one", base), 0.7),),
        bucket=bucket,
        num_inference_steps=2,
        extend=int(mode == "extend"),
        scheduler="ddim",
        negative_prompt="a blue square",
    )
    made = generate(request)
    again = finetune.generate(record=made.videos[0], out=tmp_path / "again")
    assert np.array_equal(again.frames[0], made.frames[0]) and not again.kept
    assert again.videos[0].read_bytes() == made.videos[0].read_bytes()
    if mode in given:
        first.write_bytes(last.read_bytes()), clip.unlink()
        with pytest.raises(ConfigError, match=r"content has changed|it is gone"):
            finetune.generate(record=made.videos[0].with_suffix(".json"), out=tmp_path / "third")


def test_what_is_given_beside_a_record_takes_the_place_of_what_is_recorded(tiny_model, tmp_path):
    base = tiny_model("5b")
    made = generate(request_for(base, tmp_path / "out"))
    other = finetune.generate(record=made.videos[0], seed=6, num_inference_steps=2, out=tmp_path / "again")
    request = read_video_record(other.videos[0]).request
    assert [(p.prompt, p.seed) for p in request.prompts] == [(PROMPT, 6)] and request.num_inference_steps == 2
    assert (request.guidance_scale, request.bucket) == (2.0, SMALL)


def test_a_record_whose_files_have_changed_is_refused(tiny_model, tmp_path):
    base = tmp_path / "model"
    shutil.copytree(tiny_model("5b"), base)
    adapter = save_adapter(tmp_path / "one", base)
    (path,) = generate(request_for(base, tmp_path / "out", adapters=(AdapterArgument(adapter),))).videos
    adapter.rename(tmp_path / "before")
    save_adapter(adapter, base, seed=1)
    with pytest.raises(ConfigError, match="it is not what the video was made with"):
        finetune.generate(record=path)
    shutil.rmtree(adapter)
    with pytest.raises(ConfigError, match="it is gone, and the video was made with it"):
        finetune.generate(record=path)
    shutil.copytree(tmp_path / "before", adapter, dirs_exist_ok=True)
    build_tiny(tmp_path / "other", "5b", seed=1)
    shutil.copytree(tmp_path / "other" / "transformer", base / "transformer", dirs_exist_ok=True)
    with pytest.raises(ConfigError, match="the transformer's weights are not those"):
        finetune.generate(record=path, out=tmp_path / "again")
    for name, content in (("x.json", "{}"), ("y.json", "nonsense"), ("z.mp4", "nonsense")):
        (tmp_path / name).write_text(content)
        with pytest.raises(ConfigError, match="it holds no record of `finetune generate`"):
            finetune.generate(record=tmp_path / name)
    with pytest.raises(ConfigError, match="its record cannot be read"):
        finetune.generate(record=tmp_path / "none.mp4")


def test_a_batch_goes_on_where_it_was_interrupted(tiny_model, tmp_path, monkeypatch, sampled):
    base = tiny_model("5b")
    adapter = save_adapter(tmp_path / "one", base)
    prompts = prompts_with_seeds(["a", "b", "c"], seeds=range(3))
    request = request_for(base, tmp_path / "out", prompts=prompts, adapters=(AdapterArgument(adapter),))
    theirs = generation.write_mp4

    def write_mp4(path, *args):
        if path.name.startswith("001"):
            raise KeyboardInterrupt
        return theirs(path, *args)

    with monkeypatch.context() as patch:
        patch.setattr(generation, "write_mp4", write_mp4)
        with pytest.raises(KeyboardInterrupt):
            generate(request)
    assert sampled == [0, 1]
    sampled.clear()
    report = generate(request)
    assert sampled == [1, 2] and [path.name[:3] for path in report.kept] == ["000"]
    assert "kept" in str(report).splitlines()[0] and len(report.frames) == 3
    assert np.array_equal(report.frames[0], read_frames(report.videos[0]))
    sampled.clear()

    # Nothing is loaded for a batch that is finished; and whatever makes other frames makes them anew.
    with monkeypatch.context() as patch:
        patch.setattr(generation, "embed_prompts", lambda *_, **__: pytest.fail("a weight was loaded"))
        assert len(generate(replace(request, gif=True)).kept) == 3
    assert len(list(request.out.glob("*.gif"))) == 3
    for changes in ({"num_inference_steps": 2}, {"adapters": ()}, {"bucket": replace(SMALL, width=32)}):
        generate(replace(request, **changes))
        assert sampled == [0, 1, 2]
        sampled.clear()
    # None of them took the place of another.
    assert {path.stem[len("000-a-seed0") :] for path in request.out.glob("000-*.mp4")} == {"", "-2", "-3", "-4"}
    assert len(generate(request).kept) == 3 and not sampled
    save_adapter(adapter, base, seed=4)
    report.videos[1].write_bytes(report.videos[1].read_bytes()[:100])
    assert not generate(request).kept


# --------------------------------------------------------------------------------------------------------- comparisons


def test_columns_are_the_requests_of_their_own(tiny_model, tmp_path):
    base = tiny_model("5b")
    adapter = save_adapter(tmp_path / "one", base)
    prompts = prompts_with_seeds([PROMPT, "a blue square"], seeds=range(5, 7))
    request = request_for(base, tmp_path / "out", prompts=prompts, adapters=(AdapterArgument(adapter, 0.5),))
    report = generate(replace(request, compare=(0.0, 1.0, 2.0)))
    for column, strength in enumerate((0.0, 0.5, 1.0)):
        alone = replace(request, out=tmp_path / f"{column}", adapters=(AdapterArgument(adapter, strength),))
        pairs = zip(generate(alone).frames, report.frames[2 * column : 2 * column + 2], strict=True)
        assert all(np.array_equal(ours, theirs) for ours, theirs in pairs)
    names = [path.name for path in report.comparisons]
    assert names == ["000-a-red-circle-moving-left-seed5.mp4", "001-a-blue-square-seed6.mp4"]
    assert sorted({path.parent.name for path in report.videos}) == ["base", "strength-1", "strength-2"]
    side_by_side = read_frames(report.comparisons[0])
    assert len(side_by_side) == 9 and side_by_side.shape[2] > 3 * 96
    assert Image.open(report.sheet).width > 3 * 96
    assert len(generate(replace(request, compare=(0.0, 1.0, 2.0))).kept) == 6


def test_checkpoints_of_a_run_stand_beside_the_base(train_tiny, tiny_model, tmp_path):
    run = train_tiny("run", train={"steps": 4}, checkpoint={"every": 2, "keep_last": 5}).run_dir
    request = request_for(tiny_model("5b"), tmp_path / "out", compare=Path(run))
    report = generate(request)
    assert [path.parent.name for path in report.videos] == ["base", "step-2", "step-4"]
    newest = generate(replace(request, compare=None, out=tmp_path / "own", adapters=(AdapterArgument(run),)))
    base = generate(replace(request, compare=None, out=tmp_path / "base"))
    assert np.array_equal(report.frames[2], newest.frames[0]) and np.array_equal(report.frames[0], base.frames[0])
    assert read_video_record(newest.videos[0]).request.adapters[0].path.name == "step-00000004"


@pytest.mark.parametrize(
    ("compare", "message"),
    [("0,1", "there is no adapter whose strength could change"), ("nowhere", "holds no checkpoints of a run")],
)
def test_a_comparison_of_nothing_is_refused(tiny_model, tmp_path, compare, message):
    with pytest.raises(ConfigError, match=message):
        generate(request_for(tiny_model("5b"), tmp_path / "out", compare=parse_comparison(compare)))


def test_a_grid_has_a_label_over_each_video_and_breaks_into_lines():
    videos = [np.full((2, 32, 96, 3), shade, np.uint8) for shade in (10, 60, 110, 160, 210)]
    grid = labelled_grid([(f"column {index}", video) for index, video in enumerate(videos)])
    one = labelled_grid([("column 0", videos[0])])
    assert grid.shape[2] == 4 * one.shape[2] and grid.shape[1] == 2 * one.shape[1]
    for index, video in enumerate(videos):
        y, x = divmod(index, 4)
        cell = grid[:, y * one.shape[1] : (y + 1) * one.shape[1], x * one.shape[2] : (x + 1) * one.shape[2]]
        assert np.array_equal(cell[:, -36:-4, 4:-4], video) and cell[:, :20].min() < 100  # the label's ink
    with pytest.raises(ValueError, match="of one size and length"):
        labelled_grid([("a", videos[0]), ("b", videos[0][:1])])


# ------------------------------------------------------------------------------------------------------- page and help


def test_the_commands_of_the_page_run_as_they_stand(tiny_model, train_tiny, tmp_path, monkeypatch, capfd):
    """On tiny models in place of the published ones, at their size, in two steps."""
    text = (Path(finetune.__file__).parents[1] / "docs" / "inference.md").read_text(encoding="utf-8")
    run = train_tiny("runs/run", train={"steps": 2}, checkpoint={"every": 1, "keep_last": 9}).run_dir
    save_adapter(tmp_path / "kites", tiny_model("5b"))
    shutil.copy(save_adapter(tmp_path / "film", tiny_model("5b"), seed=1) / LORA_FILE, tmp_path / "film.safetensors")
    (rows,) = re.findall(r"```json\n(.*?)```", text, re.S)
    (tmp_path / "rows.jsonl").write_text(rows.replace("49x480x720", "9x64x64"))
    for number, name in enumerate(("boat", "dusk", "night")):
        Image.fromarray(picture(Bucket(9, 64, 64), number)).save(tmp_path / f"{name}.png")
    write_mp4(tmp_path / "clip.mp4", np.stack([picture(Bucket(9, 64, 64), seed) for seed in range(9)]), 8)
    monkeypatch.chdir(tmp_path)
    lines = [command for command in commands(text) if command.startswith("finetune ") and "--budget" not in command]
    for line in lines:  # the others need a GPU, or several
        words = shlex.split(line)[1:]
        if "--model" in words:
            place = words.index("--model") + 1
            words[place] = str(tiny_model(words[place]))
        if "--from" not in words:
            words += ["--steps", "2", "--bucket", "9x64x64"]
        assert main(words) == 0, (line, capfd.readouterr().err)
    assert len(lines) == 12 and run == tmp_path / "runs" / "run"
    again, there = (tmp_path / folder / "000-a-red-kite-at-sea-seed0.mp4" for folder in ("again", "videos"))
    assert np.array_equal(read_frames(again), read_frames(there))


def test_the_help_fits_two_screens():
    environment = {**os.environ, "COLUMNS": "100", "PYTHONPATH": str(Path(finetune.__file__).parents[1])}
    words = [sys.executable, "-m", "finetune", "generate", "--help"]
    printed = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=HANG_S, check=True).stdout
    lines = printed.strip().splitlines()
    assert 40 < len(lines) <= 2 * 45 and max(map(len, lines)) <= 100
    options = [name for name in COMMAND.commands["generate"].params for name in name.opts if name.startswith("--")]
    assert len(options) > 20 and all(f"{name} " in printed for name in options)
