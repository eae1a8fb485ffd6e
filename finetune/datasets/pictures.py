"""One picture: how large it may be, resized and cut, its colours made those of SDR, and still images."""

from __future__ import annotations

import warnings
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

from finetune.core.errors import DataError
from finetune.core.types import Bucket, VideoProbe
from finetune.datasets.geometry import MAX_ASPECT_MISMATCH, resize_and_crop
from finetune.datasets.worker import too_much_memory

Frame = NDArray[np.uint8]

MAX_PIXELS = 2**25
"""Pixels of one frame or image: a little more than 8K UHD (7680x4320). A larger one is refused."""

COPY_AGAIN = "copy or download the file again"


def check_regular(path: Path) -> int:
    """The size of a file that can be read to its end; an empty one, a pipe or a device is refused.

    Raises:
        DataError: naming the file.
    """
    try:
        if not path.is_file():  # asked before opening, because opening a named pipe would wait for ever
            raise DataError("there is no such file" if not path.exists() else "not a regular file", where=str(path))
        size = path.stat().st_size
    except (OSError, ValueError) as error:
        raise unreadable(error, path) from None
    if size == 0:
        raise DataError("the file is empty (0 bytes)", where=str(path), fix=COPY_AGAIN)
    return size


def unreadable(error: Exception, path: Path) -> DataError:
    return DataError(f"the file cannot be read: {getattr(error, 'strerror', None) or error}", where=str(path))


def check_frame_size(height: int, width: int, where: str) -> None:
    """Refuse a picture without area, or with more than ``MAX_PIXELS``, before memory is taken for it."""
    if height < 1 or width < 1 or height * width > MAX_PIXELS:
        raise DataError(
            f"a picture of {height}x{width} (height x width) is outside what is read: 1 to {MAX_PIXELS:,} pixels",
            where=where,
            fix="scale it down first, or leave it out",
        )


# --- size and orientation ---------------------------------------------------------------------------------------------


def turn_upright(frame: Frame, orientation: int) -> Frame:
    """Turn and mirror a stored frame [H, W, 3] as one of EXIF's eight orientations asks."""
    if orientation >= 5:
        frame = frame.transpose(1, 0, 2)
    across, down = (-1 if orientation in flipped else 1 for flipped in ((2, 3, 6, 7), (3, 4, 7, 8)))
    return frame[::down, ::across]


def resize_crop(frame: Frame, resize_hw: tuple[int, int], crop_yx: tuple[int, int], size_hw: tuple[int, int]) -> Frame:
    """Resize an RGB frame [H, W, 3] with an antialiased bicubic filter, then crop it to ``size_hw``.

    The filter is Pillow's, in fixed-point arithmetic: the same pixels on every processor.
    """
    (top, left), (height, width) = crop_yx, size_hw
    if frame.shape[:2] != resize_hw:
        picture = Image.fromarray(np.ascontiguousarray(frame))
        frame = np.asarray(picture.resize((resize_hw[1], resize_hw[0]), Image.Resampling.BICUBIC))
    return frame[top : top + height, left : left + width]


# --- colours ----------------------------------------------------------------------------------------------------------
#
# HDR and wide-gamut colours as the SDR of BT.709, which is what a model's videos are. Transfer functions are those of
# ITU-R BT.2100 (PQ and HLG, the latter on a display of 1000 cd/m2) and BT.1886 (SDR, a power of 2.4). What is brighter
# than SDR shows is rolled off by the EETF of BT.2390, on the largest of R, G and B and so without a change of hue: from
# 1000 cd/m2, and what is brighter is white, to 203, the white of graphics in HDR (BT.2408). That white itself becomes
# 231 of 255; mid greys stay what they were. Primaries are converted in linear light and what lies outside of BT.709 is
# clipped, as in BT.2407 and BT.2087.

# Numbers of ITU-T H.273, which FFmpeg uses too.
HDR = {16: "pq", 18: "hlg"}

_WIDE = {9: "bt2020", 11: "p3", 12: "p3"}

SDR = "sdr", "bt709"

UNSTATED = 2

BT2020_MATRIX = 9

SOURCE_PEAK = 1000.0
"""cd/m2: of HLG by definition, of PQ by custom."""

WHITE = 203.0
"""cd/m2 of SDR's white in HDR."""

_Floats = NDArray[np.float64]

_ROWS = 256
"""Rows at a time, so that an 8K frame does not fill the memory with floating-point copies."""

_STEPS = 2**14

_FULL = 255 * 256
"""What swscale makes of white in 16 bits."""

_WHITE_POINT = 0.3127, 0.3290

_XY = {
    "bt709": ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060)),
    "bt2020": ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),
    "p3": ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
}


def to_bt709(codes: NDArray[np.uint16], transfer: str, primaries: str) -> NDArray[np.uint8]:
    """Convert one frame.

    Args:
        codes: RGB as swscale gives it, [H, W, 3], 0 to 65280.
        transfer: ``pq``, ``hlg`` or ``sdr``.
        primaries: ``bt709``, ``bt2020`` or ``p3`` (with the white of D65).

    Returns:
        SDR RGB of BT.709, uint8 [H, W, 3].
    """
    to_light, gain, to_sdr = _tables(transfer)
    matrix = conversion(primaries).astype(np.float32).T
    luminance = _rgb_to_xyz(primaries)[1].astype(np.float32)
    pixels = np.empty(codes.shape, np.uint8)
    for top in range(0, len(codes), _ROWS):
        light = to_light[codes[top : top + _ROWS]]
        if transfer == "hlg":  # the display's gamma (OOTF) goes by luminance, not by channel
            light *= ((light @ luminance) ** np.float32(0.2))[..., None]
        if transfer != "sdr":
            red, green, blue = np.moveaxis(light, -1, 0)
            largest = np.maximum(np.maximum(red, green), blue)  # five times as fast as `max`
            light *= gain[_step(largest)][..., None]
        pixels[top : top + _ROWS] = to_sdr[_step(light @ matrix)]
    return pixels


@cache
def conversion(primaries: str) -> _Floats:
    """The 3x3 matrix from linear light of these primaries to that of BT.709."""
    matrix: _Floats = np.linalg.inv(_rgb_to_xyz("bt709")) @ _rgb_to_xyz(primaries)
    return matrix


def tone_map(light: _Floats) -> _Floats:
    """BT.2390's EETF, for black at zero: from cd/m2 up to ``SOURCE_PEAK`` to cd/m2 up to ``WHITE``."""
    peak = _to_pq(np.array(SOURCE_PEAK))
    largest = float(_to_pq(np.array(WHITE)) / peak)
    knee = 1.5 * largest - 0.5
    source = _to_pq(np.minimum(light, SOURCE_PEAK)) / peak
    t = np.maximum(source - knee, 0) / (1 - knee)
    rolled_off = (
        (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (-2 * t**3 + 3 * t**2) * largest
    )
    return from_pq(np.where(source < knee, source, rolled_off) * peak)


def from_pq(signal: _Floats) -> _Floats:
    """The EOTF of PQ (BT.2100 table 4): 0 to 1 to cd/m2."""
    power = signal ** (1 / _M2)
    light: _Floats = 10000 * (np.maximum(power - _C1, 0) / (_C2 - _C3 * power)) ** (1 / _M1)
    return light


def from_hlg(signal: _Floats) -> _Floats:
    """The inverse OETF of HLG (BT.2100 table 5): 0 to 1 to the light of the scene, 0 to 1."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)


_M1, _M2, _C1, _C2, _C3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128


def _to_pq(light: _Floats) -> _Floats:
    power = (light / 10000) ** _M1
    signal: _Floats = ((_C1 + _C2 * power) / (1 + _C3 * power)) ** _M2
    return signal


@cache
def _tables(transfer: str) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.uint8]]:
    """Signal to light (1 is ``SOURCE_PEAK``; of SDR, white); light to the gain that rolls it off; light to SDR.

    Light is counted in steps of its square root, which are finer where eyes are.
    """
    signal = np.minimum(np.arange(2**16) / _FULL, 1.0)
    light = np.square(np.arange(_STEPS) / (_STEPS - 1))
    if transfer == "sdr":
        to_light, gain, white = signal**2.4, np.ones(_STEPS), 1.0
    else:
        to_light = from_hlg(signal) if transfer == "hlg" else np.minimum(from_pq(signal) / SOURCE_PEAK, 1)
        white = WHITE / SOURCE_PEAK
        gain = np.ones(_STEPS)
        gain[1:] = tone_map(SOURCE_PEAK * light[1:]) / (SOURCE_PEAK * light[1:])
    to_sdr = np.round(255 * np.minimum(light / white, 1) ** (1 / 2.4))
    return to_light.astype(np.float32), gain.astype(np.float32), to_sdr.astype(np.uint8)


def _step(light: NDArray[np.float32]) -> NDArray[np.int32]:
    steps = np.sqrt(light.clip(0, 1)) * np.float32(_STEPS - 1)
    return np.asarray(steps + np.float32(0.5), np.int32)


@cache
def _rgb_to_xyz(primaries: str) -> _Floats:
    """From linear RGB, whose white is D65, to CIE XYZ (SMPTE RP 177)."""
    xyz = np.array([[x / y, 1, (1 - x - y) / y] for x, y in (*_XY[primaries], _WHITE_POINT)]).T
    matrix: _Floats = xyz[:, :3] * np.linalg.solve(xyz[:, :3], xyz[:, 3])
    return matrix


def colours_by_number(transfer: int, primaries: int, matrix: int) -> tuple[str, str]:
    """Transfer and primaries as ``to_bt709`` names them, by the numbers of H.273."""
    gamut = _WIDE.get(primaries, "bt709")
    if primaries == UNSTATED and (transfer in HDR or matrix in (BT2020_MATRIX, 10)):
        gamut = "bt2020"
    return HDR.get(transfer, "sdr"), gamut


# --- still images -----------------------------------------------------------------------------------------------------

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF")
"""What Pillow may take a file for. It knows forty formats by their content, whatever a file is called; one of them
(EPS) runs another program."""

_IMAGE_FIX = "save it again as PNG or JPEG, or leave it out"


def read_image(path: Path) -> Frame:
    """Load a still image as upright RGB, uint8 [H, W, 3].

    EXIF orientation is applied; HDR and wide colours that AVIF or PNG state by number become SDR; transparency is laid
    on black; 16-bit grey is scaled, not clipped. Of an animation the first picture is taken.

    Raises:
        DataError: if the file is not an image of ``IMAGE_FORMATS``, is damaged, or is too large.
    """
    with _opened(path) as image:
        return _to_rgb(image, _stated_colours(path, image.format), str(path))


def probe_image(path: Path) -> VideoProbe:
    """The header of a still image, as of a video of one frame; upright, as ``read_image`` gives it. Raises as that."""
    with _opened(path) as image:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
        height, width = (image.width, image.height) if turned else (image.height, image.width)
    return VideoProbe(1, 1.0, height, width, array("d", [0.0]), orientation=1, still=True)


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """An image whose header is read and within bounds. Raises as ``read_image``, also for what is done with it."""
    where = str(path)
    check_regular(path)
    try:
        _check_webp_canvas(path)
        with warnings.catch_warnings():
            # Pillow only warns between its limit and twice that; our own limit, below both, is checked right after.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path, formats=IMAGE_FORMATS)
        with image:
            check_frame_size(image.height, image.width, where)  # from the header, before the pixels are read
            yield image
    except DataError:
        raise
    except Image.DecompressionBombError as error:
        what = f"a picture larger than is read, at most {MAX_PIXELS:,} pixels ({error})"
        raise DataError(what, where=where, fix=_IMAGE_FIX) from None
    except MemoryError:
        raise too_much_memory(where) from None
    except Exception as error:  # of a damaged file Pillow's parsers raise anything: struct.error, KeyError, EOFError...
        reason = str(error) or type(error).__name__
        raise DataError(f"not an image that can be read ({reason:.300})", where=where, fix=_IMAGE_FIX) from None


def read_fitted_image(path: Path, bucket: Bucket) -> Frame:
    """Load a still image and cut it to a bucket's height and width by the rule of frames.

    Returns:
        uint8 RGB [3, bucket.height, bucket.width].

    Raises:
        DataError: as ``read_image``, or if too little of the picture would remain.
    """
    fitted = fit_to_bucket(read_image(path), bucket, str(path))
    return np.ascontiguousarray(fitted.transpose(2, 0, 1))


def fit_to_bucket(picture: Frame, bucket: Bucket, where: str) -> Frame:
    """Resize a picture [H, W, 3] to cover a bucket and crop its centre. Raises DataError for another shape altogether.

    A picture one pixel high and a million wide is small; enlarged until it covers a bucket it fills the memory.
    """
    height, width = picture.shape[:2]
    resize_hw, crop_yx = resize_and_crop((height, width), bucket)
    kept = bucket.height * bucket.width / (resize_hw[0] * resize_hw[1])
    if kept * MAX_ASPECT_MISMATCH < 1:
        raise DataError(
            f"{bucket} would keep {kept:.1%} of a picture of {height}x{width}",
            where=where,
            fix="cut the picture to the clip's shape, or leave it out",
        )
    return resize_crop(picture, resize_hw, crop_yx, (bucket.height, bucket.width))


def _stated_colours(path: Path, kind: str | None) -> tuple[str, str]:
    """What an AVIF's ``colr`` box or a PNG's ``cICP`` chunk says; SDR of BT.709 where there is none."""
    with path.open("rb") as file:
        head = file.read(2**16)
    name, size = {"AVIF": (b"colrnclx", 2), "PNG": (b"\0\0\0\4cICP", 1)}.get(kind or "", (b"", 0))
    at = head.find(name) + len(name)
    if not size or name not in head or len(head) < at + 3 * size:
        return SDR
    primaries, transfer, matrix = (int.from_bytes(head[at + i * size : at + (i + 1) * size], "big") for i in range(3))
    return colours_by_number(transfer, primaries, matrix)


def _to_rgb(image: Image.Image, colours: tuple[str, str], where: str) -> Frame:
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith(("I", "F")):
        return _wide_grey(np.asarray(upright), where)
    transparent = upright.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in upright.info
    if transparent:
        upright = upright.convert("RGBA")
    if colours != SDR:
        alpha = upright.getchannel("A") if transparent else None
        upright = Image.fromarray(to_bt709(np.asarray(upright.convert("RGB"), np.uint16) * 256, *colours))
        if alpha is not None:
            upright.putalpha(alpha)
    if transparent:
        upright = Image.alpha_composite(Image.new("RGBA", upright.size, (0, 0, 0, 255)), upright)
    return np.asarray(upright.convert("RGB"))


def _wide_grey(values: NDArray[np.generic], where: str) -> Frame:
    """Grey wider than 8 bits. Pillow's own conversion clips at 255, which turns a 16-bit image white."""
    if not np.issubdtype(values.dtype, np.integer) or values.min() < 0 or values.max() > 65535:
        raise DataError("grey values are not 0 to 65535", where=where, fix="save the image with 8 bits per channel")
    return np.repeat(((values.astype(np.uint32) + 128) // 257).astype(np.uint8)[..., None], 3, axis=2)


def _check_webp_canvas(path: Path) -> None:
    """Refuse a WebP image by the canvas its header states: Pillow up to 12 allocates that, twice, to open the file."""
    with path.open("rb") as file:
        head = file.read(30)
    if head[:4] != b"RIFF" or head[8:12] != b"WEBP" or len(head) < 30:
        return
    if head[12:16] == b"VP8X":
        width, height = (1 + int.from_bytes(head[at : at + 3], "little") for at in (24, 27))
    elif head[12:16] == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    else:
        width, height = (int.from_bytes(head[at : at + 2], "little") & 0x3FFF for at in (26, 28))
    check_frame_size(height, width, str(path))
