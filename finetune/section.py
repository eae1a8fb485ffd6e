"""The base of every configuration section: strict, frozen, and with one place per default.

A section is declared in the module that reads it; ``finetune.config`` only composes sections.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

MOST_STEPS = 100_000_000
"""Bound of every count of optimizer steps: three years at one a second."""


class Strict(BaseModel):
    """A configuration section: unknown keys are errors, values cannot be changed after validation."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
