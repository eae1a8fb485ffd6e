"""Sampled frames made smoother and larger: frames in between, and super-resolution by weights that are given.

Nothing is fetched: the weights are a file of the user's, read as tensors only.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune.core.errors import ConfigError, first_line, is_out_of_memory
from finetune.core.terminal import Bar
from finetune.inference.videos import Frames

_log = logging.getLogger(__name__)

MINTERPOLATE = "minterpolate"
"""ffmpeg's motion-compensated interpolation."""

TILE = 512
"""Frames that are larger, in pixels each way, are enlarged in parts."""

OVERLAP = 32
"""Pixels around a part that the network sees besides, and whose result is thrown away."""

_MOST = 8
"""Frames that one becomes; beyond that nothing is interpolated but a still."""

_TICKS_PER_S = 90_000


@dataclass(frozen=True)
class Interpolation:
    """How frames in between are made."""

    method: str
    """``minterpolate``."""
    factor: int = 2
    """How many times as many frames per second."""


def parse_interpolation(text: str) -> Interpolation:
    """Read ``minterpolate`` or ``minterpolate:4``, four times as many frames per second; two times where none is said.

    Raises:
        ConfigError: for another method, or a factor that is none.
    """
    method, _, factor = text.partition(":")
    where = f"--interpolate {text}"
    if method != MINTERPOLATE:
        raise ConfigError(f"there is no interpolation {method!r:.60}", where=where, fix=f"give {MINTERPOLATE}")
    if factor and not (factor.isdecimal() and 2 <= int(factor) <= _MOST):
        raise ConfigError(f"{factor!r:.20} times as many frames", where=where, fix=f"give 2 to {_MOST}")
    return Interpolation(method, int(factor or 2))


class Postprocess:
    """What is done to frames before they become a file; its weights are read, and found usable, when it is made.

    Args:
        upscale: a file of super-resolution weights; None for none.
        interpolation: None for none.
        device: where the network runs.

    Raises:
        ConfigError: if ``spandrel`` is missing, or the weights are none of a super-resolution network that it knows.
    """

    def __init__(self, upscale: Path | None, interpolation: Interpolation | None, device: torch.device) -> None:
        self._network = None if upscale is None else load_upscaler(upscale)
        self._interpolation = interpolation
        self._device = device

    def __call__(self, frames: Frames, fps: float) -> tuple[Frames, float]:
        """Frames uint8 [F, H, W, 3] and their rate, before and after; interpolated first, while they are small."""
        if self._interpolation is not None:
            frames = interpolate(frames, fps, self._interpolation)
            fps *= self._interpolation.factor
        if self._network is not None:
            frames = upscale(frames, self._network, self._device)
        return frames, fps


# ----------------------------------------------------------------------------------------------------- super-resolution


@dataclass(frozen=True)
class Upscaler:
    """A super-resolution network, on the CPU."""

    network: Any
    """A ``spandrel.ImageModelDescriptor``: [1, 3, H, W] in 0..1 to [1, 3, scale * H, scale * W]."""
    scale: int
    tiles: bool
    """Whether a picture may be enlarged in parts; some networks do that themselves, some look at all of it."""


def load_upscaler(path: Path) -> Upscaler:
    """Read super-resolution weights (ESRGAN, SwinIR, DAT, HAT and what else spandrel knows) as tensors only.

    Args:
        path: ``.safetensors``, ``.pth`` or ``.ckpt``.

    Raises:
        ConfigError: if ``spandrel`` is missing, or the file is none of such weights.
    """
    where, fix = f"--upscale {path}", "name a .safetensors or .pth file of a super-resolution network, such as ESRGAN"
    if not path.is_file():
        raise ConfigError("there is no such file", where=where, fix=fix)
    try:
        import spandrel
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision of another build than torch's
        raise ConfigError(
            f"enlarging needs spandrel: {first_line(error)}",
            where=where,
            fix="pip install 'cogvideox-finetune[upscale]', with a torchvision of the build that torch is of",
        ) from None
    try:
        network = spandrel.ModelLoader().load_from_state_dict(spandrel.canonicalize_state_dict(_tensors(path)))
    except Exception as error:  # unpicklers, detectors and constructors of thirty architectures
        what = f"these are no super-resolution weights that spandrel knows: {first_line(error):.200}"
        raise ConfigError(what, where=where, fix=fix) from error
    if not isinstance(network, spandrel.ImageModelDescriptor) or (network.input_channels, network.output_channels) != (
        *(3, 3),
    ):
        raise ConfigError("the network does not make a colour picture from one", where=where, fix=fix)
    return Upscaler(network.eval(), network.scale, network.tiling == spandrel.ModelTiling.SUPPORTED)


def _tensors(path: Path) -> dict[str, Any]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        stored: dict[str, Any] = load_file(path)
        return stored
    if path.suffix not in (".pth", ".ckpt"):
        raise ValueError(f"{path.suffix or 'no suffix'} is none of .safetensors, .pth and .ckpt")
    loaded: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return loaded


@torch.no_grad()
def upscale(frames: Frames, upscaler: Upscaler, device: torch.device) -> Frames:
    """Enlarge each frame; the network is on the CPU again afterwards.

    Args:
        frames: uint8 [F, H, W, 3].
        upscaler: of ``load_upscaler``.
        device: where it runs, in half precision on a GPU if it can. Where the GPU's memory is full of other things it
            runs on the CPU, for which minutes of sampling would otherwise be lost.

    Returns:
        uint8 [F, scale * H, scale * W, 3].
    """
    try:
        return _upscaled(frames, upscaler, device)
    except Exception as error:
        if device.type == "cpu" or not is_out_of_memory(error):
            raise
        _log.warning("the GPU's memory does not hold the super-resolution network's work: it goes on on the CPU")
        return _upscaled(frames, upscaler, torch.device("cpu"))


def _upscaled(frames: Frames, upscaler: Upscaler, device: torch.device) -> Frames:
    network = upscaler.network
    half = device.type == "cuda" and network.supports_half
    network.to(device, torch.float16 if half else torch.float32)
    enlarged: list[Frames] = []
    try:
        for frame in Bar(frames, desc="enlarging"):
            picture = torch.from_numpy(frame).to(device, network.dtype).permute(2, 0, 1)[None] / 255
            large = _enlarged(upscaler, picture)[0].permute(1, 2, 0)
            enlarged.append((large.float() * 255).round().byte().cpu().numpy())
    finally:
        network.to("cpu")
    return np.stack(enlarged)


def _enlarged(upscaler: Upscaler, picture: Tensor) -> Tensor:
    """[1, 3, H, W] to [1, 3, scale * H, scale * W], both in 0..1."""
    height, width = picture.shape[2:]
    scale = upscaler.scale
    if not upscaler.tiles or max(height, width) <= TILE:
        return upscaler.network(picture).clamp(0, 1)  # type: ignore[no-any-return]
    result = picture.new_empty(1, 3, scale * height, scale * width)
    for top, bottom, first, last in _spans(height):
        for left, right, begin, end in _spans(width):
            part = upscaler.network(picture[:, :, first:last, begin:end]).clamp(0, 1)
            rows = slice(scale * (top - first), scale * (bottom - first))
            columns = slice(scale * (left - begin), scale * (right - begin))
            result[:, :, scale * top : scale * bottom, scale * left : scale * right] = part[:, :, rows, columns]
    return result


def _spans(length: int) -> Iterator[tuple[int, int, int, int]]:
    """(begin, end) of parts of about the same length that make up a side, and of what is looked at for each."""
    parts = math.ceil(length / TILE)
    edges = [round(at * length / parts) for at in range(parts + 1)]
    for begin, end in pairwise(edges):
        yield begin, end, max(0, begin - OVERLAP), min(length, end + OVERLAP)


# -------------------------------------------------------------------------------------------------------- interpolation


def interpolate(frames: Frames, fps: float, interpolation: Interpolation) -> Frames:
    """Put frames in between; those that are there stay at their times.

    Args:
        frames: uint8 [F, H, W, 3].
        fps: of ``frames``.
        interpolation: how.

    Returns:
        uint8 [(F - 1) * factor + 1, H, W, 3].
    """
    import av
    from av.filter import Graph

    if len(frames) == 1:
        return frames
    height, width = frames.shape[1:3]
    graph: Any = Graph()
    source = graph.add_buffer(width=width, height=height, format="rgb24", time_base=Fraction(1, _TICKS_PER_S))
    rate = Fraction(fps).limit_denominator(1001) * interpolation.factor
    smooth = graph.add("minterpolate", f"fps={rate}:mi_mode=mci:mc_mode=aobmc:me_mode=bidir:vsbmc=1")
    back, sink = graph.add("format", "rgb24"), graph.add("buffersink")
    source.link_to(smooth)
    smooth.link_to(back)
    back.link_to(sink)
    graph.configure()
    wanted = (len(frames) - 1) * interpolation.factor + 1
    result: list[Frames] = []
    pull = _puller(graph, result)
    # The filter looks two frames ahead, and drops the last ones that have none after them.
    for at in range(len(frames) + 3):
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frames[min(at, len(frames) - 1)]), format="rgb24")
        frame.pts, frame.time_base = round(at * _TICKS_PER_S / fps), Fraction(1, _TICKS_PER_S)
        graph.push(frame)
        pull()
    graph.push(None)
    pull()
    smoothed = np.stack(result[:wanted])
    smoothed[:: interpolation.factor] = frames  # which the filter has changed by a few levels
    return smoothed


def _puller(graph: Any, result: list[Frames]) -> Callable[[], None]:
    """What moves the frames that a filter graph has ready to ``result``."""
    import av

    def pull() -> None:
        while True:
            try:
                result.append(graph.pull().to_ndarray(format="rgb24"))
            except (av.error.BlockingIOError, av.error.EOFError):
                return

    return pull
