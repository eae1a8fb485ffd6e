"""Still images through Pillow, of a few formats and sizes only."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from finetune.datasets.media.colour import to_bt709
from finetune.datasets.media.containers import check_regular
from finetune.datasets.media.limits import MAX_PIXELS, check_frame_size, too_much_memory
from finetune.datasets.media.stated import SDR, colours_by_number
from finetune.errors import DataError

Frame = NDArray[np.uint8]

FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF")
"""What Pillow may take a file for. It knows forty formats by their content, whatever a file is called; one of them
(EPS) runs another program."""

_FIX = "save it again as PNG or JPEG, or leave it out"


def read_image(path: Path) -> Frame:
    """Load a still image as upright RGB, uint8 [H, W, 3].

    EXIF orientation is applied; HDR and wide colours that AVIF or PNG state by number become SDR; transparency is laid
    on black; 16-bit grey is scaled, not clipped. Of an animation the first picture is taken.

    Raises:
        DataError: if the file is not an image of ``FORMATS``, is damaged, or is beyond the limits of ``limits``.
    """
    where = str(path)
    check_regular(path)
    try:
        check_webp_canvas(path)
        with warnings.catch_warnings():
            # Pillow only warns between its limit and twice that; our own limit, below both, is checked right after.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path, formats=FORMATS)
        with image:
            check_frame_size(image.height, image.width, where)  # from the header, before the pixels are read
            return _upright(image, _stated_colours(path, image.format), where)
    except DataError:
        raise
    except Image.DecompressionBombError as error:
        told = f"a picture larger than is read, at most {MAX_PIXELS:,} pixels ({error})"
        raise DataError(told, where=where, fix=_FIX) from None
    except MemoryError:
        raise too_much_memory(where) from None
    except Exception as error:  # of a damaged file Pillow's parsers raise anything: struct.error, KeyError, EOFError...
        told = str(error) or type(error).__name__
        raise DataError(f"not an image that can be read ({told:.300})", where=where, fix=_FIX) from None


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


def _upright(image: Image.Image, colours: tuple[str, str], where: str) -> Frame:
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith(("I", "F")):
        return _grey(np.asarray(upright), where)
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


def check_webp_canvas(path: Path) -> None:
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


def _grey(values: NDArray[np.generic], where: str) -> Frame:
    """Grey wider than 8 bits. Pillow's own conversion clips at 255, which turns a 16-bit image white."""
    if not np.issubdtype(values.dtype, np.integer) or values.min() < 0 or values.max() > 65535:
        raise DataError("grey values are not 0 to 65535", where=where, fix="save the image with 8 bits per channel")
    return np.repeat(((values.astype(np.uint32) + 128) // 257).astype(np.uint8)[..., None], 3, axis=2)
