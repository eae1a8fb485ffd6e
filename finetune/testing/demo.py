"""The demo world: short clips of one coloured shape that moves, and a CogVideoX really trained on them.

A clip is 9 frames of 64x64 pixels at 8 fps. The shipped base model (``scripts/train_demo_world.py`` made it) knows
circles, squares and triangles in four colours; it has never seen a ring. Teaching it the ring from a dozen kinds of
clips is the quickstart, and ``classify`` measures whether it worked.

Leaf module: rendering and measuring need numpy alone, writing clips needs PyAV.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from importlib.resources import as_file, files
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from finetune.core.errors import ConfigError, DataError
from finetune.core.files import atomic_write_bytes, atomic_write_text, publish_dir
from finetune.core.rng import seed_for
from finetune.core.tensor_files import atomic_save_tensors

FRAMES, SIZE, FPS = 9, 64, 8
"""Frames of a clip, its height and width in pixels, its frames per second."""

KNOWN_SHAPES = ("circle", "square", "triangle")
"""What the shipped base model was trained on."""

NEW_SHAPE = "ring"
"""What it has never seen: the lesson of the quickstart."""

SHAPES = (*KNOWN_SHAPES, NEW_SHAPE)

COLOURS = {"red": (225, 45, 45), "green": (50, 190, 70), "blue": (60, 90, 240), "yellow": (240, 215, 50)}
"""Name -> RGB, 0 to 255."""

MOTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
"""Name -> unit step (x, y) in image coordinates: y grows downwards."""

_RADIUS = 14.0
"""Pixels from a shape's centre to its furthest part, roughly: the four shapes look equally large."""

_TRAVEL = 18.0
"""Pixels from the first frame to the last."""

_MARGIN = 2.0

_NOTHING = 0.6
"""A distance above which a clip shows no shape of this world."""

Frames = NDArray[np.uint8]
"""One clip, [F, H, W, 3]: the layout of image files and encoders."""


@dataclass(frozen=True)
class Scene:
    """One clip's content. Equal scenes render to equal pixels."""

    shape: str
    colour: str
    motion: str
    seed: int = 0
    """Chooses where the shape starts and what the background looks like."""

    @property
    def caption(self) -> str:
        """The words that describe it, such as ``a red circle moving left``."""
        return f"a {self.colour} {self.shape} moving {self.motion}"


@dataclass(frozen=True)
class Recognition:
    """What ``classify`` sees in a clip."""

    shape: str | None
    """The nearest shape, or None when the clip resembles none."""
    colour: str
    motion: str
    distances: dict[str, float]
    """Per shape: the share of the foreground that the best-placed such shape leaves unexplained, 0 (same) to 1."""


def render(scene: Scene) -> Frames:
    """Draw a scene, anti-aliased, on a plain or softly graded dark background.

    Returns:
        uint8 RGB, [9, 64, 64, 3].

    Raises:
        DataError: for a shape, colour or motion that this world does not have.
    """
    for word, known in ((scene.shape, SHAPES), (scene.colour, COLOURS), (scene.motion, MOTIONS)):
        if word not in known:
            raise DataError(f"the demo world has no {word!r}", fix=f"choose one of {', '.join(known)}")
    draw = np.random.default_rng(seed_for(scene.seed, "scene", scene.shape, scene.colour, scene.motion))
    step = np.array(MOTIONS[scene.motion]) * _TRAVEL
    low, high = _RADIUS + _MARGIN, SIZE - _RADIUS - _MARGIN
    start = draw.uniform(low + np.maximum(0, -step), high - np.maximum(0, step))
    background = _background(draw)
    clip = np.empty((FRAMES, SIZE, SIZE, 3))
    for index in range(FRAMES):
        x, y = start + step * index / (FRAMES - 1)
        cover = _coverage(scene.shape, x, y)[..., None]
        clip[index] = background * (1 - cover) + np.array(COLOURS[scene.colour]) * cover
    return clip.round().clip(0, 255).astype(np.uint8)


def _background(draw: np.random.Generator) -> NDArray[np.float64]:
    """A muted dark colour, in half of the scenes graded along a random direction; [H, W, 3]."""
    base = draw.uniform(25, 95) + draw.uniform(-15, 15, 3)
    slope = draw.uniform(-22, 22) * draw.integers(2) + np.zeros(3)
    angle = draw.uniform(0, 2 * np.pi)
    y, x = np.mgrid[-1 : 1 : SIZE * 1j, -1 : 1 : SIZE * 1j]
    graded: NDArray[np.float64] = base + slope * (x * np.cos(angle) + y * np.sin(angle))[..., None]
    return graded


def _coverage(shape: str, x: float, y: float) -> NDArray[np.float64]:
    """How much of each pixel the shape centred at (x, y) covers, [H, W] in [0, 1], from its signed distance."""
    rows, columns = np.mgrid[0:SIZE, 0:SIZE] + 0.5
    dx, dy = columns - x, rows - y
    if shape == "circle":
        outside = np.hypot(dx, dy) - _RADIUS
    elif shape == "ring":
        outside = np.abs(np.hypot(dx, dy) - 0.75 * _RADIUS) - 0.25 * _RADIUS
    elif shape == "square":
        outside = np.maximum(np.abs(dx), np.abs(dy)) - 0.86 * _RADIUS
    else:  # an upright triangle: the base, and two sides whose outward normals point 30 degrees above the horizon
        sides = np.abs(dx) * np.cos(np.pi / 6) - dy * np.sin(np.pi / 6)
        outside = np.maximum(dy, sides) - 0.6 * _RADIUS
    covered: NDArray[np.float64] = np.clip(0.5 - outside, 0, 1)
    return covered


def lesson(variations: int = 4) -> list[Scene]:
    """The quickstart's training clips: a dozen kinds of ring and a dozen of old shapes, each ``variations`` times.

    Without the old shapes the word that is always new, and the shape that always comes with it, leak into their
    captions; with one clip of each kind, positions and backgrounds are learnt by heart. The ring's dozen leaves out one
    motion per colour: those are ``held_out``.
    """
    motions = list(MOTIONS)
    ring = [
        Scene(NEW_SHAPE, colour, motion, seed)
        for seed, (row, colour), (column, motion) in product(range(variations), enumerate(COLOURS), enumerate(motions))
        if row != column
    ]
    replay = [
        Scene(shape, colour, motions[(row + column + seed) % len(motions)], seed)
        for seed, (row, shape), (column, colour) in product(
            range(variations), enumerate(KNOWN_SHAPES), enumerate(COLOURS)
        )
    ]
    return ring + replay


def held_out(seed: int = 0) -> list[Scene]:
    """Four rings whose colour and motion never come together in ``lesson``."""
    return [Scene(NEW_SHAPE, colour, motion, seed) for colour, motion in zip(COLOURS, MOTIONS, strict=True)]


def write_clips(folder: Path, scenes: Sequence[Scene]) -> Path:
    """Render scenes to H.264 files beside a ``metadata.jsonl`` of ``file_name`` and ``prompt``.

    The bytes depend on the scenes and the encoder's version alone, so writing again changes nothing that a
    content-addressed cache would notice.

    Returns:
        The path of ``metadata.jsonl``.

    Raises:
        DataError: if ``scenes`` is empty or names something this world does not have.
    """
    if not scenes:
        raise DataError("no demo clips to write", where=str(folder), fix="give at least one scene")
    rows = []
    for index, scene in enumerate(scenes):
        name = f"{index:02d}_{scene.colour}_{scene.shape}_{scene.motion}.mp4"
        atomic_write_bytes(folder / name, _h264(render(scene)))
        rows.append(json.dumps({"file_name": name, "prompt": scene.caption}))
    metadata = folder / "metadata.jsonl"
    atomic_write_text(metadata, "\n".join(rows) + "\n")
    return metadata


def _h264(frames: Frames) -> bytes:
    import av

    content = io.BytesIO()
    with av.open(content, "w", format="mp4") as container:
        # x264's adaptive quantisation and macroblock tree give the same frames different bytes from one run to the next
        # (measured with 2 of 24 clips); so does a split of the frames among threads.
        options = {"crf": "10", "threads": "1", "x264-params": "aq-mode=0:mbtree=0"}
        stream = container.add_stream("libx264", rate=Fraction(FPS), options=options)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return content.getvalue()


def classify(clip: Frames) -> Recognition:
    """Recognise what a clip shows, by fitting every shape of this world at every position.

    Per frame the background is a least-squares plane per colour channel; what remains is compared with each shape's
    outline at each whole-pixel position (a normalised cross-correlation). The distance of a shape is the energy that
    its best placement leaves, over all frames, as a share of the whole.

    Args:
        clip: uint8 RGB, [F, 64, 64, 3], two frames or more.

    Raises:
        DataError: for another type or shape.
    """
    if clip.dtype != np.uint8 or clip.ndim != 4 or clip.shape[1:] != (SIZE, SIZE, 3) or len(clip) < 2:
        raise DataError(
            f"a demo clip is uint8 [F, {SIZE}, {SIZE}, 3] with F >= 2; this one is {clip.dtype} {clip.shape}"
        )
    templates, plane, centres = _templates()
    pixels = _halved(clip / 255).reshape(len(clip), -1, 3)
    foreground = pixels - plane @ (plane.T @ pixels)  # [F, P, 3]
    columns = foreground.transpose(1, 0, 2).reshape(-1, len(clip) * 3)  # one matrix product per shape
    energy = np.square(foreground).sum()
    # A standard deviation under one grey level: no foreground to explain.
    visible = energy > foreground.size / 255**2
    distances, tracks = {}, {}
    for shape in SHAPES:
        explained = np.square(templates[shape] @ columns).reshape(len(centres), len(clip), 3).sum(2)  # [N, F]
        distances[shape] = float(1 - explained.max(0).sum() / energy) if visible else 1.0
        tracks[shape] = centres[explained.argmax(0)]
    nearest = min(SHAPES, key=distances.__getitem__)
    track = tracks[nearest]
    inside = [frame[_coverage(nearest, *centre) > 0.9].mean(0) for frame, centre in zip(clip, track, strict=True)]
    colour = np.mean(inside, axis=0)
    moved = np.polyfit(np.arange(len(track)), track, 1)[0]  # pixels per frame, (x, y)
    return Recognition(
        shape=nearest if distances[nearest] < _NOTHING else None,
        colour=min(COLOURS, key=lambda name: float(np.linalg.norm(np.array(COLOURS[name]) - colour))),
        motion=max(MOTIONS, key=lambda name: float(np.dot(MOTIONS[name], moved))),
        distances=distances,
    )


def concept_distance(clips: Sequence[Frames], shape: str = NEW_SHAPE) -> float:
    """How far sampled clips are from real clips of a shape: the mean of ``classify(clip).distances[shape]``, 0 to 1.

    Real clips score below 0.05, a clip of another shape above 0.15, noise near 1.
    """
    return float(np.mean([classify(clip).distances[shape] for clip in clips]))


def _halved(images: NDArray[np.float64]) -> NDArray[np.float64]:
    """[N, H, W, C] -> [N, H/2, W/2, C], the mean of 2x2 pixels: four times less to compare, and less noise in it."""
    small: NDArray[np.float64] = images.reshape(-1, SIZE // 2, 2, SIZE // 2, 2, images.shape[-1]).mean((2, 4))
    return small


@cache
def _templates() -> tuple[dict[str, NDArray[np.float64]], NDArray[np.float64], NDArray[np.float64]]:
    """Outlines per shape [N, P], unit length, free of the plane; the plane's basis [P, 3]; centres [N, (x, y)]."""
    y, x = np.mgrid[-1 : 1 : SIZE // 2 * 1j, -1 : 1 : SIZE // 2 * 1j]
    plane = np.linalg.qr(np.stack([np.ones_like(x), x, y], -1).reshape(-1, 3))[0]
    centres = np.array(list(product(range(14, SIZE - 13), repeat=2)), dtype=np.float64)
    templates = {}
    for shape in SHAPES:
        outlines = _halved(np.stack([_coverage(shape, *centre) for centre in centres])[..., None]).reshape(
            len(centres), -1
        )
        outlines -= (outlines @ plane) @ plane.T
        templates[shape] = outlines / np.linalg.norm(outlines, axis=1, keepdims=True)
    return templates, plane, centres


def install_demo_model(folder: Path, *, shipped: Path | None = None) -> Path:
    """Write the shipped base model as a diffusers pipeline folder with float32 weights.

    They are shipped as float16. Widening them here keeps the loaders' own ideas of a default dtype out of it:
    diffusers would widen them, transformers 5 would not.

    Args:
        folder: where to write; an earlier model is replaced.
        shipped: another set of weights in the layout that ``scripts/train_demo_world.py`` writes.

    Returns:
        ``folder``.

    Raises:
        ConfigError: if ``folder`` holds something else than an earlier model.
    """
    from safetensors.torch import load_file

    if folder.exists() and any(folder.iterdir()) and not (folder / "model_index.json").is_file():
        raise ConfigError(
            "the folder for the demo model holds files that are not a model",
            where=str(folder),
            fix="name a new or empty folder",
        )

    def fill(partial: Path) -> None:
        with as_file(files("finetune") / "assets" / "demo") as packaged:
            root = shipped or packaged
            for source in sorted(path for path in root.rglob("*") if path.is_file()):
                target = partial / source.relative_to(root)
                target.parent.mkdir(parents=True, exist_ok=True)
                if source.suffix == ".safetensors":
                    widened = {name: tensor.float() for name, tensor in load_file(source).items()}
                    atomic_save_tensors(target, widened, metadata={"format": "pt"})
                else:
                    shutil.copyfile(source, target)

    publish_dir(folder, fill)
    return folder
