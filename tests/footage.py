"""Raw footage for tests, made on the spot: textures that move, neither static nor blurred, and no text."""

from __future__ import annotations

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
