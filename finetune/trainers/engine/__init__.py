"""How a model is spread over processes, and what a training step asks of that: see ``base.Engine``."""

from __future__ import annotations

from finetune.trainers.engine.base import Engine
from finetune.trainers.engine.replicated import Replicated

__all__ = ["Engine", "Replicated"]
