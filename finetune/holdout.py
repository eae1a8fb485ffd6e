"""Which clips are kept out of training, to measure on."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field, model_validator

from finetune.section import Strict
from finetune.streams import address


class HoldoutConfig(Strict):
    """Which clips are kept out of training, to measure on."""

    holdout: float = Field(0, ge=0, le=1_000_000)
    """Videos to keep out of training for the held-out loss: a fraction below 1, or a whole number of videos. All
    clips of one video go to the same side. Sources marked ``split: holdout`` are held out in any case."""

    @model_validator(mode="after")
    def _fraction_or_count(self) -> HoldoutConfig:
        if self.holdout >= 1 and not float(self.holdout).is_integer():
            raise ValueError(f"data.holdout is {self.holdout}: give a fraction below 1 or a whole number of videos")
        return self


def choose_holdout(videos: Sequence[str], holdout: float) -> frozenset[str]:
    """Pick the held-out videos by the digest of their identity, so that adding a clip moves as few others as possible.

    Args:
        videos: one identity per video (its content digest); repeats count once.
        holdout: ``HoldoutConfig.holdout``.

    Returns:
        The identities held out; never all of them, because training needs one.
    """
    unique = sorted(set(videos), key=lambda video: address(0, "holdout", video))
    count = round(holdout * len(unique)) if holdout < 1 else int(holdout)
    if 0 < holdout < 1 and len(unique) > 1:
        count = max(1, count)
    return frozenset(unique[: min(count, max(len(unique) - 1, 0))])
