"""Which frames, at which size: compared with exact rational arithmetic and with hand-made cases."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from pydantic import ValidationError

from finetune.core.errors import DataError
from finetune.core.types import Bucket, VideoProbe
from finetune.datasets.geometry import (
    MAX_ASPECT_MISMATCH,
    ClipConfig,
    better_size,
    choose_bucket,
    frame_indices,
    parse_bucket,
    part_of,
    picture_kept,
    plan_clips,
    plan_notes,
    resize_and_crop,
    seconds_fitting,
    seconds_kept,
    seconds_of,
)

SPANS = ("head", "center", "uniform", "all")


def cfr(frames: int, fps: float) -> tuple[float, ...]:
    return tuple(i / fps for i in range(frames))


def matroska(frames: int, fps: float) -> tuple[float, ...]:
    return tuple(round(1000 * i / fps) / 1000 for i in range(frames))


def probe_of(frames: int = 100, fps: float = 8.0, height: int = 480, width: int = 720) -> VideoProbe:
    return VideoProbe(frames, fps, height, width, cfr(frames, fps), 1)


def nearest_exactly(frames: int, source_fps: Fraction, clip_frames: int, fps: Fraction) -> tuple[int, ...]:
    """Nearest source frame in rational numbers; the earlier of a tie."""
    chosen = []
    for i in range(clip_frames):
        position = Fraction(i) * source_fps / fps
        below = math.floor(position)
        chosen.append(min(below if position - below <= Fraction(1, 2) else below + 1, frames - 1))
    return tuple(chosen)


@pytest.mark.parametrize("times", [cfr, matroska])
@pytest.mark.parametrize("source_fps", [Fraction(30), Fraction(24), Fraction(30000, 1001), Fraction(25), Fraction(60)])
@pytest.mark.parametrize("fps", [8, 16])
def test_head_is_the_nearest_frame_in_time(times, source_fps, fps):
    ours = frame_indices(times(240, float(source_fps)), 25, fps, "head")
    theirs = nearest_exactly(240, source_fps, 25, Fraction(fps))
    assert ours == [theirs]


def test_the_container_does_not_decide_a_tie():
    # 30 -> 8 fps: every second target lies exactly between two frames; Matroska's milliseconds move them apart.
    assert frame_indices(cfr(240, 30), 49, 8, "head") == frame_indices(matroska(240, 30), 49, 8, "head")
    assert frame_indices(cfr(60, 30), 3, 8, "head") == [(0, 4, 7)]  # 3.75 -> 4, the tie 7.5 -> 7


@pytest.mark.parametrize("span", SPANS)
def test_a_source_at_the_target_rate_gives_consecutive_frames(span):
    for start in frame_indices(cfr(49, 8), 49, 8, span):
        assert start == tuple(range(49))


def test_vfr_is_chosen_by_time_not_by_number():
    # One second at 4 fps, then one at 20 fps: a stride over frame numbers would run through the second one too slowly.
    times = tuple(i / 4 for i in range(4)) + tuple(1 + i / 20 for i in range(21))
    (ours,) = frame_indices(times, 5, 2, "head")
    assert [times[i] for i in ours] == [0.0, 0.5, 1.0, 1.5, 2.0]


def test_uniform_reaches_the_end():
    # The known trap: stride = n // F over 97 frames is 1, and the second half is never seen.
    assert frame_indices(cfr(97, 8), 49, 8, "uniform") == [tuple(range(0, 97, 2))]
    for frames in (49, 50, 73, 96, 100, 1000):
        (ours,) = frame_indices(cfr(frames, 30), 49, 8, "uniform")
        theirs = np.linspace(0, frames - 1, 49)
        assert ours[0] == 0 and ours[-1] == frames - 1
        assert np.abs(np.array(ours) - theirs).max() <= 0.5 + 1e-6
        assert len(set(ours)) == 49


def test_uniform_of_one_frame_is_the_first():
    assert frame_indices(cfr(10, 8), 1, 8, "uniform") == [(0,)]


def test_center_leaves_as_much_before_as_after():
    (ours,) = frame_indices(cfr(101, 8), 49, 8, "center")
    assert ours == tuple(range(26, 75))
    (ours,) = frame_indices(cfr(300, 30), 9, 8, "center")
    assert abs(ours[0] - (299 - ours[-1])) <= 1


@pytest.mark.parametrize("source_fps", [6.0, 8.0, 23.976, 24.0, 30.0, 59.94])
@pytest.mark.parametrize("frames", [1, 9, 49])
def test_all_shares_no_frame_and_takes_as_many_as_fit(source_fps, frames):
    times = cfr(int(source_fps * 40), source_fps)
    clips = frame_indices(times, frames, 8, "all")
    used = [index for clip in clips for index in set(clip)]
    assert len(used) == len(set(used)), "a source frame is in two clips"
    assert all(len(clip) == frames and list(clip) == sorted(clip) for clip in clips)
    grid = math.floor((times[-1] * 8 + 0.5 + 1e-6 - (frames - 1)) / frames) + 1  # starts 0, F/8, 2F/8... that still fit
    if source_fps >= 8:
        assert len(clips) == grid
    else:  # one source frame cannot be shared, so a slow source may fit fewer
        assert 0.7 * grid <= len(clips) <= grid


def test_all_never_drifts_into_a_repeat():
    # 23.976 against 24: nearest frames slip by one every 1000, which must fall between clips and not inside one.
    for clip in frame_indices(cfr(5000, 24000 / 1001), 49, 24, "all"):
        assert len(set(clip)) == 49


def test_frames_a_millisecond_apart_are_not_shared_by_two_clips():
    times = [3.875, 3.876, 4.376, 4.876]  # the first two tie for the time at which the second clip begins
    assert frame_indices(times, 1, 4, "all") == [(0,), (1,), (2,), (3,)]


def test_a_slower_source_repeats_frames_and_keeps_its_speed():
    times = cfr(30, 4)
    (ours,) = frame_indices(times, 49, 8, "head")
    assert len(set(ours)) == 25
    assert max(abs(times[index] - i / 8) for i, index in enumerate(ours)) <= 0.125 + 1e-9
    notes = plan_notes(
        probe_of(30, 4), plan_clips(probe_of(30, 4), ClipConfig(buckets=["49x480x720"]), 8, "x")[0], 8, "head"
    )
    assert len(notes) == 1 and "24 of 49 frames repeat" in notes[0]


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize(("frames", "fits"), [(49, True), (48, False), (1, False)])
def test_short_videos(span, frames, fits):
    assert bool(frame_indices(cfr(frames, 8), 49, 8, span)) is fits
    (padded,) = frame_indices(cfr(frames, 8), 49, 8, span, pad=True)
    assert padded == (*range(frames), *[frames - 1] * (49 - frames))


def test_the_last_frame_may_lie_half_an_interval_early():
    # 180 frames at 30 fps are shown for 6 s: 49 frames at 8 fps, although the last one starts at 5.967 s.
    assert frame_indices(cfr(180, 30), 49, 8, "head")[0][-1] == 179
    assert frame_indices(cfr(177, 30), 49, 8, "head") == []


def test_impossible_arguments_are_refused():
    for arguments in (((), 9, 8), (cfr(9, 8), 0, 8), (cfr(9, 8), 9, 0), (cfr(9, 8), 9, math.nan)):
        with pytest.raises(ValueError):
            frame_indices(*arguments, "head")


@pytest.mark.parametrize(
    "bucket", [Bucket(49, 480, 720), Bucket(49, 720, 480), Bucket(81, 768, 1360), Bucket(9, 64, 64)]
)
def test_resize_covers_and_crop_is_centred(bucket):
    rng = np.random.default_rng(7)
    for height, width in [*rng.integers(1, 5000, (300, 2)).tolist(), [480, 720], [360, 640], [1080, 1920], [65, 97]]:
        (new_height, new_width), (top, left) = resize_and_crop((height, width), bucket)
        scale = max(Fraction(bucket.height, height), Fraction(bucket.width, width))
        theirs = math.floor(height * scale + Fraction(1, 2)), math.floor(width * scale + Fraction(1, 2))
        assert (new_height, new_width) == theirs
        assert new_height >= bucket.height and new_width >= bucket.width
        assert new_height == bucket.height or new_width == bucket.width
        assert 0 <= new_height - bucket.height - 2 * top <= 1 and 0 <= new_width - bucket.width - 2 * left <= 1


def test_a_source_of_the_bucket_size_is_left_alone():
    assert resize_and_crop((480, 720), Bucket(49, 480, 720)) == ((480, 720), (0, 0))


def test_shape_comes_before_frames_and_area():
    buckets = (Bucket(49, 720, 480), Bucket(17, 480, 720), Bucket(49, 480, 480))
    assert choose_bucket(probe_of(100, height=1080, width=1920), buckets, 8, "head") == buckets[1]
    assert choose_bucket(probe_of(100, height=1920, width=1080), buckets, 8, "head") == buckets[0]
    assert choose_bucket(probe_of(100, height=1000, width=1000), buckets, 8, "head") == buckets[2]


def test_aspect_distance_is_a_ratio():
    # 1.414 is halfway between 1 and 2 as a ratio; by difference it would be nearer to 1.
    buckets = (Bucket(9, 100, 100), Bucket(9, 100, 200))
    assert choose_bucket(probe_of(height=1000, width=1420), buckets, 8, "head") == buckets[1]
    assert choose_bucket(probe_of(height=1000, width=1410), buckets, 8, "head") == buckets[0]


def test_then_the_most_frames_that_fit():
    buckets = (Bucket(9, 480, 720), Bucket(81, 480, 720), Bucket(49, 480, 720))
    assert [choose_bucket(probe_of(n), buckets, 8, "head").frames for n in (200, 81, 80, 49, 48, 9, 3)] == [
        81,
        81,
        49,
        49,
        9,
        9,
        9,
    ]


def test_then_the_largest_area_without_enlarging():
    buckets = (Bucket(9, 240, 360), Bucket(9, 960, 1440), Bucket(9, 480, 720))
    chosen = [
        choose_bucket(probe_of(height=h, width=h * 3 // 2), buckets, 8, "head").height
        for h in (2000, 960, 700, 480, 300, 100)
    ]
    assert chosen == [960, 960, 480, 480, 240, 240]


def test_choice_does_not_depend_on_the_order_of_different_buckets():
    buckets = [Bucket(f, h, w) for f in (9, 49) for h, w in ((64, 64), (480, 720), (960, 1440), (720, 480))]
    for height, width in ((480, 720), (100, 900), (2000, 1000)):
        probe = probe_of(30, height=height, width=width)
        orders = [[buckets[i] for i in np.random.default_rng(seed).permutation(8)] for seed in range(20)]
        assert len({choose_bucket(probe, order, 8, "head") for order in orders}) == 1


def test_short_clip_policies():
    short = probe_of(41)
    config = ClipConfig(buckets=["49x480x720", "81x480x720"])
    with pytest.raises(DataError, match=r"clip has 41 frames.*49x480x720, needs 49") as caught:
        plan_clips(short, config, 8, "a.mp4 (metadata.jsonl:3)")
    assert caught.value.where == "a.mp4 (metadata.jsonl:3)" and "at most 41 frames" in caught.value.fix
    assert plan_clips(short, config.model_copy(update={"short_clips": "skip"}), 8, "x") == []
    (plan,) = plan_clips(short, config.model_copy(update={"short_clips": "pad"}), 8, "x")
    assert plan.bucket.frames == 49 and plan.frame_indices[-9:] == (40,) * 9


def test_a_picture_of_another_shape_is_refused():
    config = ClipConfig(buckets=["9x64x64"])
    assert plan_clips(probe_of(height=64, width=int(64 * MAX_ASPECT_MISMATCH)), config, 8, "x")
    with pytest.raises(DataError, match="would keep"):
        plan_clips(probe_of(height=2, width=5000), config, 8, "x")


@pytest.mark.parametrize(
    ("source_fps", "end_s", "cause"), [(8, 3, "the clip is short"), (4, 10, "the video has 4 fps")]
)
def test_the_cause_of_repeated_frames_is_named_for_parts_of_a_video_too(source_fps, end_s, cause):
    probe, config = probe_of(20 * source_fps, source_fps), ClipConfig(buckets=["49x480x720"], short_clips="pad")
    (plan,) = plan_clips(probe, config, 8, "x", (2, 2 + end_s))
    (note,) = plan_notes(probe, plan, 8, "head", part_of(probe, (2, 2 + end_s))[0])
    assert f": {cause}, 8 fps are wanted" in note


def test_notes_tell_of_enlarging_and_speed():
    config = ClipConfig(buckets=["9x480x720"], span="uniform")
    probe = probe_of(90, height=240, width=360)
    notes = plan_notes(probe, plan_clips(probe, config, 8, "x")[0], 8, "uniform")
    assert any("enlarged 2.00 times" in note for note in notes) and any("plays 11 times" in note for note in notes)
    corrected = replace(probe, corrections=("bwdif-auto-1", "hlg-bt2020-1"))
    told = plan_notes(corrected, plan_clips(corrected, config, 8, "x")[0], 8, "uniform")
    assert told[:2] == (
        "interlaced: made progressive (bwdif)",
        "HDR (HLG, BT.2020): tone-mapped to SDR (BT.2390)",
    )
    fitting = probe_of(90)
    assert plan_notes(fitting, plan_clips(fitting, ClipConfig(buckets=["9x480x720"]), 8, "x")[0], 8, "head") == ()


@pytest.mark.parametrize(
    ("source_hw", "bucket", "kept", "better"),
    [
        ((720, 480), Bucket(9, 480, 720), 4 / 9, Bucket(9, 720, 480)),  # portrait cut to landscape
        ((480, 720), Bucket(9, 480, 720), 1.0, None),
        ((1080, 1920), Bucket(9, 480, 720), 480 * 720 / (480 * 853), Bucket(9, 432, 784)),
        ((64, 64), Bucket(9, 32, 96), 1 / 3, Bucket(9, 48, 48)),
        ((100, 300), Bucket(9, 16, 16), 1 / 3, None),  # nothing smaller than one token
    ],
)
def test_the_share_of_a_picture_and_the_size_that_keeps_more(source_hw, bucket, kept, better):
    assert picture_kept(source_hw, bucket) == pytest.approx(kept, rel=1e-3)
    assert better_size(source_hw, bucket, 16, lambda size: True) == better


@pytest.mark.parametrize("source_hw", [(720, 480), (1920, 1080), (333, 1000), (480, 640)])
def test_the_better_size_keeps_at_least_nine_tenths_of_usual_shapes(source_hw):
    bucket = Bucket(9, 480, 720)
    size = better_size(source_hw, bucket, 16, lambda size: True) or bucket
    assert picture_kept(source_hw, size) >= 0.89 and size.height * size.width <= 480 * 720
    assert size.height % 16 == size.width % 16 == 0


def test_a_size_that_the_model_does_not_take_is_not_named():
    assert better_size((720, 480), Bucket(9, 480, 720), 16, lambda size: size == Bucket(9, 480, 720)) is None


@pytest.mark.parametrize(
    ("span", "frames", "kept_s"),
    # 12 s at 8 fps: one clip of 49 is 49/8 s, of 25 three fit one after the other.
    [("head", 49, 49 / 8), ("center", 49, 49 / 8), ("all", 49, 49 / 8), ("all", 25, 75 / 8), ("uniform", 49, 12.0)],
)
def test_the_seconds_that_clips_show(span, frames, kept_s):
    for source_fps in (8.0, 24.0):
        probe = probe_of(int(12 * source_fps), source_fps)
        config = ClipConfig(buckets=[f"{frames}x480x720"], span=span)
        assert seconds_of(probe) == pytest.approx(12)
        assert seconds_kept(probe, plan_clips(probe, config, 8, "x"), 8) == pytest.approx(kept_s, abs=0.15)
        assert seconds_fitting(probe, frames, 8, span) == pytest.approx(kept_s, abs=0.15)
    padded = plan_clips(probe_of(20), ClipConfig(buckets=["49x480x720"], short_clips="pad"), 8, "x")
    assert seconds_kept(probe_of(20), padded, 8) == seconds_of(probe_of(20)) == 2.5


@pytest.mark.parametrize("written", ["49x480x720", " 49 x 480X720 ", [49, 480, 720], (49, 480, 720), "49×480×720"])
def test_buckets_are_read(written):
    assert parse_bucket(written) == Bucket(49, 480, 720)
    config = ClipConfig(buckets=[written])
    assert config.model_dump(mode="json")["buckets"] == ["49x480x720"]
    assert ClipConfig.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    "written",
    [
        "49x480",
        "480p",
        [49, 480],
        [49, 480.0, 720],
        [True, 480, 720],
        "0x480x720",
        "49x0x720",
        "49x9999x720",
        "99999x8x8",
        None,
        49,
        "-1x4x4",
    ],
)
def test_bad_buckets_are_refused(written):
    with pytest.raises(ValidationError, match="bucket"):
        ClipConfig(buckets=[written])


@pytest.mark.parametrize(
    "change", [{"buckets": []}, {"fps": 0}, {"fps": -8}, {"span": "tail"}, {"short_clips": "drop"}, {"stride": 2}]
)
def test_bad_clip_configs_are_refused(change):
    with pytest.raises(ValidationError):
        ClipConfig.model_validate({"buckets": ["9x64x64"], **change})


def test_every_field_is_documented():
    assert len(ClipConfig.model_fields) >= 5
    assert all(field.description for field in ClipConfig.model_fields.values())
