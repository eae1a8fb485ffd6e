"""HDR and wide-gamut colours as the SDR of BT.709, which is what a model's videos are: arithmetic on one frame.

Transfer functions are those of ITU-R BT.2100 (PQ and HLG, the latter on a display of 1000 cd/m2) and BT.1886 (SDR, a
power of 2.4). What is brighter than SDR shows is rolled off by the EETF of BT.2390, on the largest of R, G and B and so
without a change of hue: from 1000 cd/m2, and what is brighter is white, to 203, the white of graphics in HDR (BT.2408).
That white itself becomes 231 of 255; mid greys stay what they were. Primaries are converted in linear light and what
lies outside of BT.709 is clipped, as in BT.2407 and BT.2087.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

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
