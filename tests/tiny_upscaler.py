"""Super-resolution weights of a few thousand numbers, for spandrel to find out what they are."""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path

import pytest


def save_upscaler(path: Path, scale: int = 2) -> Path:
    """A tiny ESRGAN's random weights; the test skips where spandrel is not installed."""
    _import_spandrel()
    import torch
    from safetensors.torch import save_file
    from spandrel.architectures.ESRGAN import ESRGAN

    torch.manual_seed(0)
    weights = ESRGAN(num_filters=8, num_blocks=1, scale=scale).state_dict()
    if path.suffix == ".safetensors":
        save_file(weights, path)
    else:
        torch.save({"params_ema": weights}, path)
    return path


def _import_spandrel() -> None:
    """Two of its thirty architectures want torchvision, which beside a torch of another build cannot be imported.

    ESRGAN is none of them, so that empty names stand in for it while spandrel is imported, and no longer.
    """
    try:
        importlib.import_module("spandrel")
        return
    except (ImportError, RuntimeError):
        if importlib.util.find_spec("spandrel") is None:
            pytest.skip("spandrel is not installed (the extra upscale)")
    for name in [name for name in sys.modules if name.split(".")[0] == "spandrel"]:
        del sys.modules[name]
    functions = types.ModuleType("torchvision.transforms.functional")
    functions.InterpolationMode = functions.rotate = functions.normalize = object
    stand_ins = {functions.__name__: functions}
    stand_ins |= {name: types.ModuleType(name) for name in ("torchvision", "torchvision.transforms")}
    with pytest.MonkeyPatch.context() as patch:
        for name, module in stand_ins.items():
            patch.setitem(sys.modules, name, module)
        importlib.import_module("spandrel")
