"""Scorers that a user brings: aesthetics, safety, anything that looks at a clip and says a number.

None comes with this package, and none is downloaded unasked: a scorer is a Python object that is named by its import
path, and loads what it needs itself.
"""

from __future__ import annotations

import importlib
import math
import re
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from finetune.core.errors import ConfigError

FRAMES = 8
"""Of a clip that a scorer sees, spread evenly over it."""

SHORT_SIDE = 384
"""Pixels of their shorter side, at most."""


@runtime_checkable
class Scorer(Protocol):
    """Gives a clip a number. A function of that signature does, too."""

    def __call__(self, frames: NDArray[np.uint8]) -> float:
        """Score one clip: frames, RGB uint8 [F, H, W, 3], upright, without bars, in order."""


@dataclass(frozen=True)
class ScorerRule:
    """A scorer, and what its score has to be."""

    path: str
    """``package.module:name``."""
    scorer: Scorer
    sign: int
    """1: at least the limit; -1: at most."""
    limit: float | None
    """None: the score is written down, and nothing dropped for it."""

    @property
    def name(self) -> str:
        """Of the score in the dataset's rows."""
        return self.path.partition(":")[2]

    def drops(self, value: float) -> bool:
        """Whether a clip of this score is dropped."""
        return self.limit is not None and not self.sign * value >= self.sign * self.limit


_RULE = re.compile(r"(?P<path>[\w.]+:\w+)\s*(?:(?P<sign>>=|<=)\s*(?P<limit>\S+))?")


def load_scorer(text: str) -> ScorerRule:
    """A scorer from ``package.module:name``, with ``>=NUMBER`` or ``<=NUMBER`` where clips are dropped by it.

    ``name`` is a function of a clip, or a class that is made without arguments and then called.

    Raises:
        ConfigError: if it is written otherwise, cannot be imported or is nothing of that kind.
    """
    where = f"--scorer {text}"
    match = _RULE.fullmatch(text.strip())
    try:
        limit = None if match is None or match["limit"] is None else float(match["limit"])
    except ValueError:
        match = None
    if match is None or (limit is not None and not math.isfinite(limit)):
        fix = "write package.module:name, package.module:name>=NUMBER or package.module:name<=NUMBER"
        raise ConfigError("not the import path of a scorer", where=where, fix=fix)
    module, _, name = match["path"].partition(":")
    try:
        scorer = getattr(importlib.import_module(module), name)
        if isinstance(scorer, type):
            scorer = scorer()
    except Exception as error:  # other people's code: whatever it raises is why it cannot be used
        what = f"the scorer cannot be loaded: {type(error).__name__}: {error}"
        fix = "check its import path; its folder has to be on PYTHONPATH"
        raise ConfigError(what, where=where, fix=fix) from error
    if not callable(scorer):
        raise ConfigError("the scorer is no function, and no class of a callable", where=where)
    return ScorerRule(match["path"], scorer, -1 if match["sign"] == "<=" else 1, limit)


def score(rule: ScorerRule, frames: NDArray[np.uint8], clip: str) -> float:
    """What a scorer says of a clip.

    Raises:
        ConfigError: if it fails, or says no finite number.
    """
    where = f"--scorer {rule.path}, {clip}"
    try:
        value = rule.scorer(frames)
    except Exception as error:  # other people's code, as above
        fix = "mend it and run the same command again, which goes on"
        raise ConfigError(f"the scorer failed: {type(error).__name__}: {error}", where=where, fix=fix) from error
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(f"the scorer said {value!r:.60}, which is no number", where=where)
    return number
