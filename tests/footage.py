"""Raw footage for tests, made on the spot: textures that move, neither static nor blurred, and no text."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from fuzz import boxes
from numpy.typing import NDArray
from PIL import Image

H264 = ("-c:v", "libx264", "-crf", "12", "-preset", "ultrafast", "-pix_fmt", "yuv420p")

SIZE_HW = 144, 192

Frames = NDArray[np.uint8]


def scene(seed: int, frames: int, *, grey: bool = False, size_hw: tuple[int, int] = SIZE_HW) -> Frames:
    """Frames of blocks of random colours that move 2 pixels a frame to the right, uint8 [F, H, W, 3].

    Each seed has a brightness and a hue of its own, so that two of them are two scenes to every detector.
    """
    height, width = size_hw
    rng = np.random.default_rng(seed)
    base = rng.integers(30, 190, 1 if grey else 3)
    blocks = base + rng.integers(0, 60, (height // 8 + 1, width // 4 + 1, 1 if grey else 3))
    tile = np.broadcast_to(blocks, (*blocks.shape[:2], 3)).astype(np.uint8)
    picture = np.asarray(Image.fromarray(tile).resize((2 * width, height), Image.Resampling.NEAREST))
    return np.stack([np.roll(picture, 2 * number, axis=1)[:, :width] for number in range(frames)])


def encode(path: Path, frames: Frames, *arguments: str, fps: float = 16, before: tuple[str, ...] = ()) -> Path:
    """Write frames, uint8 or uint16 [F, H, W, 3], with FFmpeg; H.264 where nothing else is asked for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = path.with_suffix(".raw")
    raw.write_bytes(frames.tobytes())
    layout = "rgb24" if frames.dtype == np.uint8 else "rgb48le"
    source = ("-f", "rawvideo", "-pix_fmt", layout, "-s", f"{frames.shape[2]}x{frames.shape[1]}", "-r", f"{fps}")
    boxes.ffmpeg(*before, *source, "-i", raw, *(arguments or H264), path)
    raw.unlink()
    return path


def footage_of_every_kind(raw: Path) -> Path:
    """Write a tree of footage with everything that trees of footage have, good and bad."""
    film = encode(raw / "day1" / "film.mp4", np.concatenate([scene(1, 36), scene(2, 20), scene(3, 10)]))
    shutil.copy(film, raw / "day2 copy.mp4")
    boxes.ffmpeg("-i", film, "-vf", "scale=160:120", "-an", *H264, raw / "smaller.mp4")
    (raw / "truncated.mp4").write_bytes(film.read_bytes()[: film.stat().st_size // 2])
    encode(raw / "day2" / "film.mp4", scene(4, 20))  # another video of the same name
    encode(raw / "black.mp4", np.zeros((20, *SIZE_HW, 3), np.uint8))
    encode(raw / "still.mp4", np.repeat(scene(5, 1), 20, axis=0))
    encode(raw / "boxed.mp4", np.pad(scene(6, 20), ((0, 0), (20, 20), (0, 0), (0, 0))))
    encode(raw / "portrait.mp4", scene(7, 20, size_hw=(192, 96)))
    encode(raw / "tiny.mp4", scene(8, 20, size_hw=(48, 64)))
    av1 = ("-c:v", "libsvtav1", "-preset", "12", "-crf", "20", "-pix_fmt", "yuv420p")
    encode(raw / "av1.mkv", scene(9, 20), *av1)
    variable = ("-vf", "setpts='if(lt(N,10),N,10+2*(N-10))/16/TB'", "-fps_mode", "vfr", *H264)
    encode(raw / "variable.mp4", scene(10, 24), *variable)
    turned = encode(raw / "turned0.mp4", scene(11, 20))
    boxes.ffmpeg("-display_rotation", "90", "-i", turned, "-c", "copy", raw / "turned.mp4")
    turned.unlink()
    hdr = ("-color_primaries", "bt2020", "-color_trc", "smpte2084", "-colorspace", "bt2020nc")
    layout = ("-vf", "scale=out_color_matrix=bt2020", "-pix_fmt", "yuv420p10le")
    encode(raw / "hdr.mp4", scene(12, 20), "-c:v", "libx265", "-preset", "ultrafast", *layout, *hdr)
    fields = ("-vf", "interlace", "-flags", "+ilme+ildct", *H264)
    encode(raw / "interlaced.mp4", scene(13, 40), *fields, fps=32)
    boxes.ffmpeg("-f", "lavfi", "-i", "sine=d=1", raw / "audio.mp4")
    (raw / "page.mp4").write_text("<!doctype html><title>Log in</title>")
    (raw / "notes.txt").write_text("shot on a Sunday")
    return raw
