"""What one look at a video's frames measures: runs in a worker process, which decodes the file once.

The numbers do not depend on any limit: a limit can be changed, and the footage need not be decoded again.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.core.errors import DataError
from finetune.core.types import VideoProbe
from finetune.datasets.decode import probe_file, read_frames
from finetune.datasets.pictures import resize_crop, turn_upright
from finetune.footage.scenes import DetectorName, make_detector

RULE = "measure-3"
"""Names this arithmetic. Stored measurements of another one are taken again."""

SAMPLES_PER_S = 4.0
"""Frames that the slow measurements are taken of."""

_LOOKED_AT = 720
"""Pixels of the short side that frames are scaled down to before anything: four times as many a second of 4K in HDR."""

_SHORT_SIDE = 360
"""Pixels that a sample is scaled down to for sharpness and text: what is blurred in a film of 4K may be sharp enough
for training."""

_FLOW_WIDTH = 160

_CHANGE_WIDTH = 64

_THUMB = 96

_BAR_LUMA, _BAR_RANGE = 40, 16
"""A row belongs to a bar if nothing in it is brighter, and its brightest and darkest pixel are no further apart. Black
is 16 to 20 in some files, and a codec rings a little at the picture's edge."""

Gray = NDArray[np.uint8]


@dataclass(frozen=True)
class Footage:
    """One video, measured. ``n`` frames could be decoded, ``s`` of them are samples."""

    header: VideoProbe
    cuts: NDArray[np.int32]
    """Frames that begin a new scene, ascending."""
    luma: NDArray[np.float32]
    """Mean luma of every frame, 0 to 255, [n]."""
    change: NDArray[np.float32]
    """Mean absolute difference of a frame's luma from that of the frame before, in levels, [n]; 0 for the first."""
    samples: NDArray[np.int32]
    """Frame numbers, ascending, [s]."""
    bars: NDArray[np.int32]
    """Pixels of flat black at the top, bottom, left and right edge of a sample, [s, 4]."""
    motion: NDArray[np.float32]
    """Mean optical flow since the sample before, in percent of the picture's width per second, [s]; 0 for the first."""
    sharpness: NDArray[np.float32]
    """Variance of the Laplacian, [s]."""
    text: NDArray[np.float32]
    """Share of the picture that looks like lines of letters, 0 to 1, [s]."""
    hashes: NDArray[np.uint64]
    """Perceptual hash (``imagehash.phash``) of the picture without bars, [s]."""
    fault: str = ""
    """Why what follows the last of the ``n`` frames cannot be decoded; empty where all can."""

    @property
    def frames(self) -> int:
        """Frames that could be decoded."""
        return len(self.luma)


ARRAYS = {field.name: kind for field in fields(Footage) if (kind := str(field.type)).startswith("NDArray")}
"""Names of the arrays of ``Footage``."""

_DTYPES = {name: np.dtype(kind.removeprefix("NDArray[np.").removesuffix("]")) for name, kind in ARRAYS.items()}


def measure(path: Path, detector: DetectorName, threshold: float | None) -> Footage:
    """Decode a video and measure it.

    Args:
        path: the video.
        detector: of scenes; see ``scenes.make_detector``.
        threshold: of the detector.

    Raises:
        DataError: if the video cannot be read, or no frame decoded. What follows a damaged frame is not looked at
            (``Footage.fault``).
    """
    import cv2

    cv2.setNumThreads(1)  # one process per core is the parallelism
    header = probe_file(path)
    scale = min(1.0, _LOOKED_AT / min(header.height, header.width))
    size_hw = max(1, round(header.height * scale)), max(1, round(header.width * scale))
    scenes = make_detector(detector, threshold, header.fps)
    luma: list[float] = []
    change: list[float] = []
    samples: list[_Sample] = []
    before: NDArray[np.float32] | None = None
    fault = ""
    try:
        for number, frame in read_frames(path, range(header.frames), header, short_side=_LOOKED_AT):
            picture = as_shown(frame, header, size_hw)
            scenes.add(picture)
            small = np.asarray(cv2.cvtColor(_scaled(picture, _CHANGE_WIDTH), cv2.COLOR_RGB2GRAY), np.float32)
            luma.append(float(small.mean()))
            change.append(0.0 if before is None else float(np.abs(small - before).mean()))
            before = small
            slot = int(header.frame_times_s[number] * SAMPLES_PER_S)
            if not samples or slot > int(header.frame_times_s[samples[-1].number] * SAMPLES_PER_S):
                samples.append(_sample(picture, number, samples[-1] if samples else None, header))
    except DataError as error:
        if not luma:
            raise
        fault = error.what
    cuts = np.asarray(scenes.cuts(), np.int32)
    numbers = np.asarray([sample.number for sample in samples], np.int32)
    edges = np.asarray([sample.bars for sample in samples], np.float64).reshape(-1, 4)
    bars = np.ceil(edges * np.repeat(np.divide((header.height, header.width), size_hw), 2)).astype(np.int32)
    return Footage(
        header=header,
        cuts=cuts,
        luma=np.asarray(luma, np.float32),
        change=np.asarray(change, np.float32),
        samples=numbers,
        bars=bars,
        motion=np.asarray([sample.motion for sample in samples], np.float32),
        sharpness=np.asarray([sample.sharpness for sample in samples], np.float32),
        text=np.asarray([sample.text for sample in samples], np.float32),
        hashes=_hashes(samples, common_bars(bars, np.searchsorted(cuts, numbers, "right")), header),
        fault=fault,
    )


def as_shown(frame: NDArray[np.uint8], header: VideoProbe, size_hw: tuple[int, int]) -> NDArray[np.uint8]:
    """A frame of ``decode.read_frames`` as a player shows it: upright, with square pixels, of a size of its shape."""
    picture = turn_upright(frame, header.orientation)
    return np.ascontiguousarray(resize_crop(picture, size_hw, (0, 0), size_hw))


@dataclass(frozen=True)
class _Sample:
    number: int
    bars: tuple[int, int, int, int]
    motion: float
    sharpness: float
    text: float
    flow_picture: Gray
    thumb: Gray


def _sample(picture: NDArray[np.uint8], number: int, before: _Sample | None, header: VideoProbe) -> _Sample:
    import cv2

    gray = np.asarray(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), np.uint8)
    scale = _SHORT_SIDE / min(gray.shape)
    reduced = _scaled(gray, round(gray.shape[1] * scale)) if scale < 1 else gray
    flow_picture = _scaled(reduced, _FLOW_WIDTH)
    motion = 0.0
    if before is not None:
        flow = cv2.calcOpticalFlowFarneback(before.flow_picture, flow_picture, np.empty(0), 0.5, 3, 15, 3, 5, 1.2, 0)
        seconds = header.frame_times_s[number] - header.frame_times_s[before.number]
        motion = 100 * float(np.hypot(flow[..., 0], flow[..., 1]).mean()) / flow_picture.shape[1] / seconds
    return _Sample(
        number=number,
        bars=flat_bars(gray),
        motion=motion,
        sharpness=float(cv2.Laplacian(reduced, cv2.CV_32F).var()),
        text=text_share(reduced),
        flow_picture=flow_picture,
        thumb=np.asarray(cv2.resize(reduced, (_THUMB, _THUMB), interpolation=cv2.INTER_AREA), np.uint8),
    )


def _scaled(picture: NDArray[np.uint8], width: int) -> NDArray[np.uint8]:
    """Scaled down to a width, in its shape; smaller pictures as they are."""
    import cv2

    if picture.shape[1] <= width:
        return picture
    size = width, max(1, round(picture.shape[0] * width / picture.shape[1]))
    return np.asarray(cv2.resize(picture, size, interpolation=cv2.INTER_AREA), np.uint8)


def flat_bars(gray: Gray) -> tuple[int, int, int, int]:
    """How many rows and columns of flat black a picture begins and ends with: top, bottom, left, right.

    Columns are looked at within the rows that remain, so that all four sides of a small picture are found. A black
    picture is one bar: its height at the top, nothing elsewhere.
    """
    height, width = gray.shape
    top, bottom = _edges(gray)
    if top == height:
        return height, 0, 0, 0
    left, right = _edges(gray[top : height - bottom].T)
    return (height, 0, 0, 0) if left == width else (top, bottom, left, right)


def _edges(gray: Gray) -> tuple[int, int]:
    brightest = gray.max(axis=1).astype(np.int32)
    flat = (brightest <= _BAR_LUMA) & (brightest - gray.min(axis=1) <= _BAR_RANGE)
    inside = np.flatnonzero(~flat)
    return (len(flat), 0) if len(inside) == 0 else (int(inside[0]), len(flat) - 1 - int(inside[-1]))


def common_bars(bars: NDArray[np.int32], scenes: NDArray[Any]) -> NDArray[np.int32]:
    """For every sample the bars that all samples of its scene have, [s, 4]: what is black now and then is no bar.

    Args:
        bars: of every sample, [s, 4].
        scenes: number of every sample's scene, ascending, [s].
    """
    common = np.zeros_like(bars)
    for scene in np.unique(scenes):
        members = scenes == scene
        common[members] = bars[members].min(axis=0)
    return common


def text_share(gray: Gray) -> float:
    """The share of a picture that looks like lines of letters: subtitles, titles, watermarks.

    Letters are many strong edges close together, in a box that is low and wide. It knows no alphabet and needs no
    model; signs and shop fronts in the picture count as well.
    """
    import cv2

    height, width = gray.shape
    gradient = cv2.morphologyEx(gray, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8))
    strong = (gradient >= _TEXT_GRADIENT).astype(np.uint8)
    joined = cv2.morphologyEx(strong, cv2.MORPH_CLOSE, np.ones((1, max(3, height // 24)), np.uint8))
    count, _, boxes, _ = cv2.connectedComponentsWithStats(joined, connectivity=8)
    area = 0
    for left, top, box_width, box_height, _ in boxes[1:count].tolist():
        if not (height / 60 <= box_height <= height / 5 and box_width >= 2.5 * box_height):
            continue
        box = strong[top : top + box_height, left : left + box_width]
        # Letters cross the box's rows again and again; the outline of an object crosses them twice.
        strokes = np.abs(np.diff(box.astype(np.int8), axis=1)).sum() / 2 / box_height
        if strokes >= 0.8 * box_width / box_height and 0.25 <= box.mean() <= 0.9:
            area += box_width * box_height
    return float(area / (height * width))


_TEXT_GRADIENT = 80
"""Levels between neighbours: titles are made to be read."""


def _hashes(samples: list[_Sample], bars: NDArray[np.int32], header: VideoProbe) -> NDArray[np.uint64]:
    import imagehash
    from PIL import Image

    hashes = np.zeros(len(samples), np.uint64)
    for place, (sample, sides) in enumerate(zip(samples, bars.tolist(), strict=True)):
        top, bottom = (round(side * _THUMB / header.height) for side in sides[:2])
        left, right = (round(side * _THUMB / header.width) for side in sides[2:])
        inner = sample.thumb[top : _THUMB - bottom, left : _THUMB - right]
        if inner.size:
            bits = imagehash.phash(Image.fromarray(np.ascontiguousarray(inner))).hash
            hashes[place] = int.from_bytes(np.packbits(bits.reshape(-1)).tobytes(), "big")
    return hashes


# --- as a worker's answer, and in a file ------------------------------------------------------------------------------


def parts_of(footage: Footage) -> tuple[dict[str, Any], list[NDArray[Any]]]:
    """Fields for JSON, and arrays: the frames' times, then those of ``ARRAYS``."""
    header = asdict(replace(footage.header, frame_times_s=()))
    arrays = [np.asarray(footage.header.frame_times_s, np.float64), *(getattr(footage, name) for name in ARRAYS)]
    sizes = [array.size for array in arrays]
    return {"rule": RULE, "header": header, "fault": footage.fault, "sizes": sizes}, arrays


def footage_of(parts: Mapping[str, Any], body: bytes | bytearray) -> Footage:
    """The other way round; raises ValueError, KeyError or TypeError for anything that ``parts_of`` does not give."""
    kinds = [np.dtype(np.float64), *_DTYPES.values()]
    arrays: list[NDArray[Any]] = []
    at = 0
    for size, kind in zip(parts["sizes"], kinds, strict=True):
        arrays.append(np.frombuffer(body, kind, int(size), at))
        at += arrays[-1].nbytes
    times_s = array("d", arrays[0].tolist())
    corrections = tuple(parts["header"]["corrections"])
    header = VideoProbe(**{**parts["header"], "frame_times_s": times_s, "corrections": corrections})
    named = dict(zip(ARRAYS, arrays[1:], strict=True))
    named["bars"] = named["bars"].reshape(-1, 4)
    footage = Footage(header=header, fault=str(parts["fault"]), **named)
    frames, samples = footage.frames, len(footage.samples)
    shapes = {"change": frames, **dict.fromkeys(("bars", "motion", "sharpness", "text", "hashes"), samples)}
    in_order = all(bool(np.all(np.diff(array) > 0)) for array in (footage.cuts, footage.samples))
    numbers = np.concatenate([footage.cuts, footage.samples])
    inside = bool(np.all((numbers >= 0) & (numbers < frames)))
    if (
        not 0 < frames <= header.frames == len(arrays[0])
        or at != len(body)
        or not in_order
        or not inside
        or any(len(named[name]) != length for name, length in shapes.items())
    ):
        raise ValueError("its arrays do not fit each other")
    return footage
