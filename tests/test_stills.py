"""Still images as clips of one frame: how they are read, cut, mixed with clips, trained on, and looked at."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from decoding import load_image
from PIL import Image, ImageFilter
from pydantic import ValidationError
from worlds import assert_same_run, history, run_config, run_values, stop_after

import finetune
from finetune.caching.precompute import precompute
from finetune.cli.app import OK
from finetune.cli.main import main
from finetune.cogvideox.spec import read_spec
from finetune.config.rules import check_against
from finetune.config.schema import RunConfig, load_config
from finetune.core.errors import ConfigError, DataError
from finetune.core.types import Bucket, VideoProbe
from finetune.datasets.cache import Cache
from finetune.datasets.decode_pool import DecodeJob, DecodePool, fit_image
from finetune.datasets.geometry import ClipConfig, plan_clips
from finetune.datasets.samples import CaptionConfig, read_samples
from finetune.datasets.sources import FolderSource
from finetune.planner.estimate import longest_bucket
from finetune.trainers.loop import train


def scene(size: tuple[int, int], seed: int) -> Image.Image:
    """Smooth colours with some detail, of a width and height."""
    noise = np.random.default_rng(seed).integers(0, 255, (size[1] // 4, size[0] // 4, 3), np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.NEAREST)


def turned(path: Path) -> None:
    """Stored lying, to be shown upright."""
    exif = Image.Exif()
    exif[0x0112] = 6
    scene((96, 64), 1).save(path, exif=exif, quality=95)


def transparent(path: Path) -> None:
    picture = scene((64, 64), 2)
    picture.putalpha(128)
    picture.save(path)


def grey16(path: Path) -> None:
    Image.fromarray(np.linspace(0, 65535, 64 * 80, dtype=np.uint16).reshape(64, 80)).save(path)


def animated(path: Path) -> None:
    scene((64, 64), 3).save(path, save_all=True, append_images=[scene((64, 64), 4)])


PICTURES: dict[str, Callable[[Path], None]] = {
    "turned.jpg": turned,
    "glass.png": transparent,
    "grey.png": grey16,
    "moving.gif": animated,
    "plain.webp": lambda path: scene((100, 60), 5).save(path, lossless=True),
}


@pytest.fixture
def stills(tmp_path) -> Path:
    """A folder of three images of several shapes, each with its caption."""
    folder = tmp_path / "stills"
    folder.mkdir()
    for number, size in enumerate([(96, 64), (64, 96), (80, 80)]):
        scene(size, number).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"picture {number}")
    return folder


@pytest.fixture
def mixed(tmp_path, tiny_model, demo_clips, stills) -> Callable[..., RunConfig]:
    """``mixed("run", **changes)``: a run of the demo clips and of images, each image twice per epoch."""

    def make(name: str = "run", variant: str = "5b", **changes: Any) -> RunConfig:
        sources = [{"path": str(demo_clips)}, {"path": str(stills), "images": True, "repeats": 2}]
        data = {"sources": sources, **changes.pop("data", {})}
        return run_config(tiny_model(variant), demo_clips, tmp_path / name, data=data, **changes)

    return make


# ----------------------------------------------------------------------------------------------------- read and cut


@pytest.mark.parametrize("decoder", ["pyav", "decord"])
def test_a_still_is_read_as_first_frames_are(tmp_path, decoder):
    """Upright, on black, of 8 bits, the first picture of several; cut like a clip; in a worker."""
    config = ClipConfig(buckets=["9x32x48"])
    paths = [tmp_path / name for name in PICTURES]
    for path, make in zip(paths, PICTURES.values(), strict=True):
        make(path)
    with DecodePool(workers=1) as pool:
        probes = dict(pool.probe_many(paths))
        for path in paths:
            (plan,) = plan_clips(probes[path], config, 8, "")
            assert plan.bucket == Bucket(1, 32, 48)
            ((_, clip),) = pool.decode_many([DecodeJob(path, probes[path], plan, decoder=decoder)])
            whole = load_image(path)
            assert (probes[path].height, probes[path].width) == whole.shape[1:]
            assert torch.equal(clip.pixels[:, 0], fit_image(whole, plan.bucket)) and clip.pixels.shape[1] == 1
    assert (probes[paths[0]].height, probes[paths[0]].width) == (96, 64)


def test_a_still_that_changes_or_cannot_be_read_is_an_error(tmp_path):
    path = tmp_path / "a.png"
    scene((64, 64), 0).save(path)
    with DecodePool(workers=0) as pool:
        ((_, probe),) = pool.probe_many([path])
        (plan,) = plan_clips(probe, ClipConfig(buckets=["9x32x32"]), 8, "")
        scene((64, 32), 0).save(path)
        ((_, changed),) = pool.decode_many([DecodeJob(path, probe, plan)])
        path.write_bytes(b"no image")
        ((_, damaged),) = pool.probe_many([path])
    assert isinstance(changed, DataError) and "has changed" in changed.what
    assert isinstance(damaged, DataError) and "not an image" in damaged.what


def test_stills_have_buckets_of_their_own():
    still = VideoProbe(1, 1.0, 480, 720, [0.0], 1, still=True)
    video = VideoProbe(1, 8.0, 480, 720, [0.0], 1)

    def bucket(probe: VideoProbe, **config: Any) -> str:
        buckets = ["49x480x720", "25x480x720", "49x720x480"]
        return str(plan_clips(probe, ClipConfig(buckets=buckets, short_clips="pad", **config), 8, "")[0].bucket)

    assert ClipConfig(buckets=["49x480x720", "25x480x720"]).still_buckets == (Bucket(1, 480, 720),)
    assert bucket(still) == "1x480x720" and bucket(video) == "25x480x720"
    assert bucket(still, image_buckets=["1x256x256", "1x512x768"]) == "1x512x768"
    assert bucket(video, image_buckets="1x480x720") == "25x480x720", "no video becomes a still"
    with pytest.raises(ValidationError, match="one frame, as in 1x480x720; got 9x480x720"):
        ClipConfig(buckets=["49x480x720"], image_buckets=["9x480x720"])


FOLDERS: list[tuple[dict[str, Any], list[str], list[str]]] = [
    # what is beside ``clip.mp4`` and its caption -> the samples, and words of the error
    ({"images": True}, ["clip.mp4", "other.jpg"], []),
    ({"images": False}, ["clip.mp4"], []),
    ({"images": True, "without": "other.txt"}, [], ["there is no other.txt beside it"]),
    ({"images": True, "with": "other.heic"}, [], ["other.heic is not a known kind of video or image"]),
]


@pytest.mark.parametrize(("case", "names", "words"), FOLDERS)
def test_which_images_of_a_folder_are_clips(tmp_path, case, names, words):
    """The one beside a video is that video's first frame, and no clip."""
    for name in (
        "clip.mp4",
        "clip.png",
        "clip.txt",
        "other.jpg",
        "other.txt",
        *([case["with"]] if "with" in case else []),
    ):
        (tmp_path / name).write_text("a scene")
    if "without" in case:
        (tmp_path / case["without"]).unlink()

    def read() -> list[str]:
        source = FolderSource(path=tmp_path, images=case["images"])
        found = read_samples([source], CaptionConfig(), base=tmp_path)
        return [sample.video.name for sample in found.train]

    if words:
        with pytest.raises(DataError) as error:
            read()
        assert all(word in str(error.value) for word in words)
    else:
        assert read() == names


# ------------------------------------------------------------------------------------------------------ check and train


def test_check_counts_frames_and_no_seconds(mixed):
    config = mixed(data={"image_buckets": ["1x64x64", "1x48x80"], "holdout": 2})
    text = str(finetune.check(config))
    assert "7 clips from 4 videos and 3 still images" in text
    assert "bucket 1x64x64: 2 clips of one frame; " in text and "bucket 9x64x64: 4 clips of 1.1 s" in text
    seconds = [line for line in text.splitlines() if "of the seconds" in line]
    assert len(seconds) == 1 and "100% of the seconds" in seconds[0] and "9x64x64" in seconds[0]


def test_the_longest_bucket_may_be_an_images(mixed):
    spec = read_spec(mixed().model.pretrained)
    assert str(longest_bucket(mixed(), spec)) == "9x64x64"
    assert str(longest_bucket(mixed(data={"image_buckets": "1x640x640"}), spec)) == "1x640x640"


@pytest.mark.parametrize("variant", ["5b", "1.5-5b"])
def test_clips_and_images_train_together_and_resume_to_the_bit(mixed, variant):
    values: dict[str, Any] = {"train": {"steps": 6, "batch_size": 2, "seed": 7}}
    steps: list[Any] = []
    whole = train(mixed("whole", variant, **values), steps.append)
    part = mixed("part", variant, checkpoint={"every": 3}, **values)
    stop_after(3, part)
    assert_same_run(train(part), whole)
    manifest = precompute(part, progress=False).manifest
    frames = {item.clip.rpartition(".")[2]: item.bucket.frames for item in manifest.items}
    assert frames == {"mp4": 9, "png": 1} and len(manifest.items) == 7
    entry = Cache(part.cache.dir).read(manifest.items[-1])
    assert entry.latents_mean.shape[1] == 1 and torch.isfinite(entry.latents_mean).all()
    assert all(np.isfinite(record.losses).all() for record in steps) and len(steps) == 6


def test_videos_are_held_out_and_measured_and_images_are_not(mixed, tmp_path):
    """A loss over both would measure neither, and change with the number of images."""
    measured = {"train": {"steps": 1}, "validation": {"every": 1, "at_start": True, "timesteps": 2}}
    with_images = mixed("with", data={"holdout": 2}, **measured)
    clips_only = with_images.to_dict()
    clips_only["data"]["sources"] = clips_only["data"]["sources"][:1]
    train(with_images)
    manifest = precompute(with_images, progress=False).manifest
    assert [item.bucket.frames for item in manifest.items if item.holdout] == [9, 9]
    train(RunConfig.from_dict({**clips_only, "output_dir": str(tmp_path / "without")}))
    assert history(tmp_path / "with")[0] == history(tmp_path / "without")[0]

    only = mixed("only", data={"sources": with_images.to_dict()["data"]["sources"][1:], "holdout": 1}, **measured)
    assert sum(item.holdout for item in precompute(only, progress=False).manifest.items) == 1
    assert train(only).step == 1


RULES: list[tuple[str, dict[str, Any], str]] = [
    ("5b-i2v", {}, "an image-to-video model learns nothing from a still image"),
    ("1.5-5b-i2v", {}, "an image-to-video model learns nothing from a still image"),
    ("5b", {"image_buckets": "1x60x64"}, "height 60 is not possible"),
]


@pytest.mark.parametrize(("variant", "data", "message"), RULES)
def test_what_cannot_be_trained_on_is_refused_with_the_reason(mixed, variant, data, message):
    config = mixed("run", variant, data=data)
    findings = check_against(config, read_spec(config.model.pretrained))
    assert any(message in str(error) for error in findings.errors)
    with pytest.raises(ConfigError, match=message):
        precompute(config, progress=False)


def test_buckets_for_images_without_images_are_said_to_be_idle(mixed, demo_clips):
    config = mixed(data={"sources": [{"path": str(demo_clips)}], "image_buckets": "1x64x64"})
    warnings = check_against(config, read_spec(config.model.pretrained)).warnings
    assert any("image_buckets has no effect" in warning for warning in warnings)


def test_a_damaged_image_is_left_out_where_that_is_asked(mixed, stills):
    (stills / "1.png").write_bytes((stills / "1.png").read_bytes()[:60])
    with pytest.raises(DataError, match=r"1\.png"):
        precompute(mixed(), progress=False)
    manifest = precompute(mixed(data={"unreadable_clips": "skip"}), progress=False).manifest
    assert len(manifest.items) == 6 and manifest.skipped == {"unreadable": 1}


# ------------------------------------------------------------------------------------------------- doctor and init


def test_the_doctor_names_faults_of_stills_and_none_of_motion(tmp_path, tiny_model):
    folder = tmp_path / "stills"
    folder.mkdir()
    pictures = {"good": scene((64, 64), 1), "blurred": scene((64, 64), 2).filter(ImageFilter.GaussianBlur(9))}
    pictures |= {"black": Image.new("RGB", (64, 64)), "bars": Image.new("RGB", (64, 64)), "tall": scene((64, 160), 3)}
    pictures["bars"].paste(scene((64, 40), 4), (0, 12))
    for name, picture in pictures.items():
        picture.save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"a red {name}")
    shutil.copy(folder / "good.png", folder / "same.png")
    (folder / "same.txt").write_text("a blue one")
    values = run_values(
        tiny_model(), folder, tmp_path / "run", data={"sources": [{"path": str(folder), "images": True}]}
    )
    page = tmp_path / "page.html"
    report = finetune.doctor(values, page=page, progress=False)
    faults = {Path(clip.name).stem: {one.name for one in clip.faults if one.level != "note"} for clip in report.clips}
    assert faults == {
        **{name: {name} for name in ("blurred", "black", "bars")},
        **{"good": {"near-duplicate"}, "same": {"near-duplicate"}, "tall": {"cropped"}},
    }
    (bucket,) = report.buckets
    assert bucket.seconds is None and bucket.clips == 6 and "1x64x64" in str(report)
    assert all(len(clip.pictures) == 2 for clip in report.clips), "the source and the one frame"
    assert "frame 1 of 1" in page.read_text()


def test_init_says_what_it_does_with_images(tmp_path, capsys, monkeypatch, stills, demo_clips):
    monkeypatch.chdir(tmp_path)

    def written(clips: Path, model: str = "5b") -> tuple[str, str]:
        assert main(["init", "--model", model, "--data", str(clips), "--output", "run.yaml", "--force"]) == OK
        return (tmp_path / "run.yaml").read_text(), " ".join(capsys.readouterr().err.split())

    text, notes = written(stills)
    assert "images: true" in text and "3 still images" in notes and "buckets: [49x" in text and "0 videos" not in notes
    assert load_config("run.yaml").data.sources[0].images
    finetune.check(load_config("run.yaml"))
    text, _ = written(stills, "5b-i2v")
    assert "images: true" not in text
    for clip in demo_clips.rglob("*.mp4"):
        shutil.copy(clip, stills / clip.name)
        (stills / clip.name).with_suffix(".txt").write_text("a clip")
    text, notes = written(stills)
    config = load_config("run.yaml")
    assert "of 4 videos and 3 still images" in notes and {bucket.frames for bucket in config.data.still_buckets} == {1}
    assert "image_buckets: [1x" in text and len(config.data.still_buckets) == 3, "upright, lying and square"
    (stills / "cover.jpg").write_bytes((stills / "0.png").read_bytes())  # without a caption: none of the dataset
    text, notes = written(stills)
    assert "images: true" not in text and "of 4 videos" in notes
