"""What a stream and its frames state about how they are to be shown: upright, progressive, opaque, in which colours."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from finetune.datasets.media.pyav_file import FIX, as_array, tag
from finetune.errors import DataError
from finetune.types import VideoProbe

ON_BLACK = "on-black-1"

_ORIENTATIONS: Mapping[tuple[int, ...], int] = {
    # the display matrix's a, b, c, d: a stored pixel right of another is shown (a, b) from it, one below (c, d)
    (1, 0, 0, 1): 1,
    (-1, 0, 0, 1): 2,
    (-1, 0, 0, -1): 3,
    (1, 0, 0, -1): 4,
    (0, 1, 1, 0): 5,
    (0, 1, -1, 0): 6,
    (0, -1, -1, 0): 7,
    (0, -1, 1, 0): 8,
}
_QUARTER_TURNS = {0: 1, 90: 6, 180: 3, 270: 8}

# Numbers of ITU-T H.273, which FFmpeg uses too.
_HDR = {16: "pq", 18: "hlg"}
_OTHER_TRANSFERS = {8: "linear light", 9: "logarithmic light", 10: "logarithmic light", 17: "SMPTE ST 428"}
_WIDE = {9: "bt2020", 11: "p3", 12: "p3"}
SDR = "sdr", "bt709"
UNSTATED = 2
BT2020_MATRIX = 9
_OTHER_MATRICES = {
    **{8: "YCgCo", 10: "BT.2020 with constant luminance", 11: "Y'D'zD'x", 12: "derived from its primaries"},
    **{13: "derived from its primaries", 14: "ICtCp", 15: "IPT-C2", 16: "YCgCo-R", 17: "YCgCo-R"},
}
_DOLBY_VISION = ("dvh1", "dvhe", "dva1", "dvav", "dav1")

_HEVC_ALPHA = b"\x4e\x01\xa5"
"""How the message begins that says what the second layer of a stream is for (alpha channel information SEI)."""

_BOTTOM_FIRST = (3, 5)  # FFmpeg's AVFieldOrder: 2 to 5 are interlaced, as stored and as shown: TT, BB, TB, BT


def stated_orientation(stream: Any, frame: Any, where: str) -> int | None:
    """How a frame is made upright, by EXIF's numbers; None where it does not say.

    FFmpeg attaches to a frame what the container (MOV's matrix, Matroska's projection) or the stream (H.264's and
    HEVC's display orientation, EXIF in Motion JPEG) says. Of what is only a tag, ``rotate`` is heeded: FFmpeg up to 4
    left it in place of MOV's matrix when it copied a video into Matroska.

    Raises:
        DataError: if it is none of the eight.
    """
    for side in frame.side_data:
        if side.type.name == "DISPLAYMATRIX":
            return _orientation(np.frombuffer(bytes(side), "<i4", 5).tolist(), where)
    degrees = tag(stream, "rotate")
    if not re.fullmatch(r"-?[0-9]{1,4}", degrees):
        return None
    if int(degrees) % 360 not in _QUARTER_TURNS:
        what = f"a tag that turns the picture by {int(degrees)} degrees; only quarter turns are read"
        raise DataError(what, where=where)
    return _QUARTER_TURNS[int(degrees) % 360]


def _orientation(matrix: list[int], where: str) -> int:
    a, b, _, c, d = matrix
    across, along = (abs(b), abs(c)), (abs(a), abs(d))
    for straight, other, key in ((along, across, (a, 0, 0, d)), (across, along, (0, b, c, 0))):
        if 50 * max(other) <= min(straight) > 0:  # a degree; how large entries are is a matter of the pixels' aspect
            return _ORIENTATIONS[tuple((entry > 0) - (entry < 0) for entry in key)]
    told = f"metadata that turn the picture by no right angle, or squash it to nothing ({a}, {b}, {c}, {d})"
    raise DataError(told, where=where, fix=FIX)


def stated_corrections(stream: Any, frame: Any, where: str) -> tuple[str, ...]:
    """Which of ``types.CORRECTIONS`` a frame needs.

    Raises:
        DataError: for colours, fields or transparency that are not read, with what converts them.
    """
    colours = stated_colours(stream, frame, where)
    converted = ["-".join((*colours, "1"))] if colours else []
    if stream.codec_context.name == "hevc" and _HEVC_ALPHA in (stream.codec_context.extradata or b""):
        raise DataError(
            "HEVC with transparency, which FFmpeg leaves out, so that what is hidden would be shown",
            where=where,
            fix=f"export it as ProRes 4444; or, if nothing in it is hidden, {_convert(where, 'null')}",
        )
    return (*_fields(stream, frame, where), *converted, *_transparency(frame, where))


def check_unchanged(stream: Any, frame: Any, frame_index: int, header: VideoProbe, where: str) -> None:
    """Refuse a frame that states something else than the first frame did, for which the file is read.

    Raises:
        DataError: naming the frame and what changes.
    """
    colours = stated_colours(stream, frame, where)
    changes = {
        "its orientation changes": stated_orientation(stream, frame, where) not in (None, header.orientation),
        "its colours change": colours != colours_of(header),
        "it becomes transparent": bool(set(_transparency(frame, where)) - set(header.corrections)),
        "it becomes interlaced": frame.interlaced_frame and not parity_of(header),
    }
    for change, happens in changes.items():
        if happens:
            fix = "cut the file where it changes, re-encode it, or leave it out"
            raise DataError(f"{change} in frame {frame_index}", where=where, fix=fix)


def parity_of(header: VideoProbe) -> str:
    """The parity with which frames are made progressive: ``auto`` (what each frame says), ``tff``, ``bff``; or ""."""
    return next((name.split("-")[1] for name in header.corrections if name.startswith("bwdif")), "")


def _fields(stream: Any, frame: Any, where: str) -> tuple[str, ...]:
    if frame.interlaced_frame:
        if stream.codec_context.name == "hevc":
            raise DataError(
                "interlaced HEVC, in which each field is a picture of its own",
                where=where,
                fix=_convert(where, "weave,bwdif"),
            )
        return ("bwdif-auto-1",)
    order = int(getattr(stream.codec_context, "field_order", 0))  # PyAV tells it from 18.1 on
    if order < 2:
        return ()
    return ("bwdif-bff-1",) if order in _BOTTOM_FIRST else ("bwdif-tff-1",)


def colours_of(header: VideoProbe) -> tuple[str, str] | None:
    """As ``stated_colours``, of the whole file."""
    names = (name.split("-") for name in header.corrections)
    return next(((name[0], name[1]) for name in names if name[0] in ("sdr", *_HDR.values())), None)


def stated_colours(stream: Any, frame: Any, where: str) -> tuple[str, str] | None:
    """Transfer (``pq``, ``hlg``, ``sdr``) and primaries (``bt709``, ``bt2020``, ``p3``) of what is not SDR of BT.709.

    None where it is: so is taken what states nothing, and the primaries of SD, which differ by a few levels. HDR and
    the matrix of BT.2020 without primaries mean those of BT.2020.

    Raises:
        DataError: for colours that are not read, with the command that converts them.
    """
    transfer, primaries, matrix = int(frame.color_trc), int(frame.color_primaries), int(frame.colorspace)
    if transfer == UNSTATED and (stream.codec_context.codec_tag in _DOLBY_VISION or _has_dolby_vision(frame)):
        raise DataError(
            "Dolby Vision without an HDR10, HLG or SDR base (profile 5): its colours mean nothing to other decoders",
            where=where,
            fix="take another version of it, or convert it with a Dolby Vision player's export or ffmpeg's libplacebo",
        )
    colours = colours_by_number(transfer, primaries, matrix)
    if matrix in _OTHER_MATRICES and not frame.format.is_rgb:
        matrix_read = "2020_ncl" if "bt2020" in colours else "709"
        raise DataError(
            f"its colours are stored as {_OTHER_MATRICES[matrix]}, which is not read",
            where=where,
            fix=_convert(where, f"zscale=m={matrix_read}"),
        )
    if transfer in _OTHER_TRANSFERS:
        raise DataError(
            f"its colours are in {_OTHER_TRANSFERS[transfer]}, which is not read",
            where=where,
            fix=_convert(where, "zscale=pin=709:p=709:t=709:m=709"),
        )
    return None if colours == SDR else colours


def colours_by_number(transfer: int, primaries: int, matrix: int) -> tuple[str, str]:
    """Transfer and primaries as ``colour.to_bt709`` names them, by the numbers of H.273."""
    gamut = _WIDE.get(primaries, "bt709")
    if primaries == UNSTATED and (transfer in _HDR or matrix in (BT2020_MATRIX, 10)):
        gamut = "bt2020"
    return _HDR.get(transfer, "sdr"), gamut


def _transparency(frame: Any, where: str) -> tuple[str, ...]:
    if frame.format.has_palette:
        transparent = bool((as_array(frame, "rgba", where)[..., 3] < 255).any())
    else:
        transparent = any(component.is_alpha for component in frame.format.components)
    return (ON_BLACK,) if transparent else ()


def _has_dolby_vision(frame: Any) -> bool:
    return any(side.type.name.startswith("DOVI") for side in frame.side_data)


def _convert(where: str, filters: str) -> str:
    encode = "-c:v libx265 -crf 12 -c:a copy"
    return f'convert it: ffmpeg -i "{Path(where).name}" -vf "{filters},format=yuv420p10le" {encode} converted.mp4'
