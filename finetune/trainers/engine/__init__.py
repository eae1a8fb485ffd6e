"""How a model is spread over processes, and what a training step asks of that: see ``base.Engine``."""

from __future__ import annotations

from finetune.trainers.engine.agreement import require_agreement
from finetune.trainers.engine.base import Engine
from finetune.trainers.engine.launch import FullShard, Launch, Replicate, Zero, read_launch
from finetune.trainers.engine.released import Released, whole_engine
from finetune.trainers.engine.replicated import Replicated
from finetune.trainers.engine.sharded import Sharded
from finetune.trainers.engine.zero import ZeroSharded, import_deepspeed

__all__ = [
    "Engine",
    "FullShard",
    "Launch",
    "Released",
    "Replicate",
    "Replicated",
    "Sharded",
    "Zero",
    "ZeroSharded",
    "import_deepspeed",
    "read_launch",
    "require_agreement",
    "whole_engine",
]
