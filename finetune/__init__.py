"""Fine-tune CogVideoX: LoRA and full, from clips and captions to a verified diffusers export.

    from finetune import export, load_config, precompute, train

    config = load_config("run.yaml", ["train.steps=500"])
    precompute(config)
    report = train(config)
    export(report.run_dir)

Names are loaded when they are first used: ``import finetune`` itself costs nothing.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from finetune.core.version import __version__ as __version__

if TYPE_CHECKING:
    from finetune.config.loading import load_config as load_config
    from finetune.export import export as export
    from finetune.precompute import precompute as precompute
    from finetune.trainers.loop import train as train

_HOMES = {
    "load_config": "finetune.config.loading",
    "precompute": "finetune.precompute",
    "train": "finetune.trainers.loop",
    "export": "finetune.export",
}
__all__ = ["__version__", "export", "load_config", "precompute", "train"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'finetune' has no attribute '{name}'")
    home = importlib.import_module(_HOMES[name])
    return home if _HOMES[name] == f"finetune.{name}" else getattr(home, name)


def __dir__() -> list[str]:
    return sorted(__all__)


class _NamedLikeItsFunction(ModuleType):
    """A sub-module that can be called: ``finetune.precompute`` is at once a module and its main function.

    Importing a sub-module binds it in the package under its own name, over whatever stood there. Without this, what
    ``from finetune import precompute`` gives would depend on what was imported before.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **kwargs)


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and _HOMES.get(name) == value.__name__:
            value.__class__ = _NamedLikeItsFunction
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
