"""Frames to mp4, GIF and PNG."""

from __future__ import annotations

import io

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from finetune.core.errors import FinetuneError
from finetune.inference.videos import contact_sheet, gif_bytes, side_by_side, write_mp4


def moving(frames: int = 9, height: int = 32, width: int = 48) -> np.ndarray:
    """A bright bar that moves over a coloured ground, so that order, size and colours can be told."""
    video = np.zeros((frames, height, width, 3), np.uint8)
    video[..., 2] = 120
    for index in range(frames):
        video[index, :, index * 4 : index * 4 + 8, 0] = 220
    return video


def read_mp4(path) -> tuple[np.ndarray, dict]:
    reader = imageio_ffmpeg.read_frames(str(path))
    meta = next(reader)
    width, height = meta["size"]
    return np.stack([np.frombuffer(raw, np.uint8).reshape(height, width, 3) for raw in reader]), meta


def test_mp4_holds_what_was_written(tmp_path):
    ours = moving()
    path = write_mp4(tmp_path / "deep" / "a.mp4", ours, 8)
    theirs, meta = read_mp4(path)
    assert theirs.shape == ours.shape
    assert meta["codec"] == "h264" and meta["pix_fmt"].startswith("yuv420p") and meta["fps"] == 8
    error = ours.astype(float) - theirs.astype(float)
    assert 10 * np.log10(255**2 / (error**2).mean()) > 25  # the rest is 4:2:0 colour at the bar's edges
    assert [file.name for file in path.parent.iterdir()] == ["a.mp4"]


@pytest.mark.parametrize(("height", "width"), [(31, 48), (32, 47), (17, 33), (1, 1)])
def test_odd_sizes_are_padded_to_even(tmp_path, height, width):
    theirs, _ = read_mp4(write_mp4(tmp_path / "a.mp4", moving(3, height, width), 8))
    assert theirs.shape == (3, height + height % 2, width + width % 2, 3)


def test_one_frame_and_fractional_fps(tmp_path):
    theirs, meta = read_mp4(write_mp4(tmp_path / "a.mp4", moving(1), 23.976))
    assert len(theirs) == 1 and meta["fps"] == pytest.approx(23.98, abs=0.01)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = write_mp4(tmp_path / "a.mp4", moving(), 8)
    before = path.read_bytes()
    theirs = imageio_ffmpeg.write_frames

    def broken(*args, **options):
        return theirs(*args, **{**options, "output_params": ["-no_such_option", "1"]})

    monkeypatch.setattr(imageio_ffmpeg, "write_frames", broken)
    with pytest.raises(FinetuneError, match="could not be written") as caught:
        write_mp4(path, np.zeros((200, 64, 64, 3), np.uint8), 8)
    assert str(path) in caught.value.where
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"]


@pytest.mark.parametrize(
    "frames",
    [np.zeros((2, 8, 8, 3), np.float32), np.zeros((3, 2, 8, 8), np.uint8), np.zeros((0, 8, 8, 3), np.uint8)],
    ids=["float", "channels first", "empty"],
)
def test_wrong_frames_are_refused(tmp_path, frames):
    for write in (
        lambda: write_mp4(tmp_path / "a.mp4", frames, 8),
        lambda: gif_bytes(frames, 8),
        lambda: contact_sheet([("a", frames)], tmp_path / "a.png"),
    ):
        with pytest.raises(ValueError, match="frames are uint8"):
            write()
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_suffix_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"\.mp4"):
        write_mp4(tmp_path / "a.webm", moving(), 8)


def test_gif_plays_every_frame_at_the_right_speed():
    gif = Image.open(io.BytesIO(gif_bytes(moving(), 8)))
    assert gif.n_frames == 9 and gif.info["loop"] == 0
    assert gif.info["duration"] == 120  # 125 ms, to whole hundredths of a second


def test_equal_frames_are_not_lost_from_a_gif():
    gif = Image.open(io.BytesIO(gif_bytes(np.repeat(moving(1), 8, axis=0), 8)))
    total = 0
    for index in range(gif.n_frames):
        gif.seek(index)
        total += gif.info["duration"]
    assert total == 8 * 120


def test_side_by_side_shows_base_and_adapter(tmp_path):
    # Colours that no antialiased letter of a label has.
    dark, bright = np.zeros((9, 64, 64, 3), np.uint8), np.zeros((9, 64, 64, 3), np.uint8)
    dark[..., 0], bright[..., 1] = 180, 180
    rows = [("a red ring " * 40, [dark, bright]), ("a circle", [dark, dark])]
    path = side_by_side(rows, ["base", "adapter"], tmp_path / "grid.png", columns=3)
    picture = np.asarray(Image.open(path).convert("RGB"))
    left, right = picture[:, : picture.shape[1] // 2], picture[:, picture.shape[1] // 2 :]
    cells = 3 * (2 * 64) ** 2  # 64 pixels are shown at twice their size
    assert [(half == (0, 180, 0)).all(-1).sum() for half in (left, right)] == [0, cells]
    assert [(half == (180, 0, 0)).all(-1).sum() for half in (left, right)] == [2 * cells, cells]


def test_side_by_side_refuses_a_row_that_lacks_a_video(tmp_path):
    with pytest.raises(ValueError, match="1 videos for 2 headings"):
        side_by_side([("a", [moving()])], ["base", "adapter"], tmp_path / "grid.png")
    with pytest.raises(ValueError, match="no video"):
        contact_sheet([], tmp_path / "grid.png")


def test_contact_sheet_takes_videos_of_any_size(tmp_path):
    path = contact_sheet([("long", moving(49, 60, 90)), ("one frame", moving(1, 200, 300))], tmp_path / "sheet.png")
    assert Image.open(path).size[0] > 6 * 90
