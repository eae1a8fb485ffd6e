"""Everything a run is made of, put together in the order in which mistakes are cheapest to find.

Configuration against the model's JSON, then the cache, then the checkpoint to continue from; only then are weights loaded.
"""

from __future__ import annotations

import platform
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune.bands import loss_by_band
from finetune.cogvideox import alpha_bar, load_transformer
from finetune.config import RunConfig, check_against, require
from finetune.datasets.cache import Cache, Manifest
from finetune.datasets.loader import BatchMaker, Loader
from finetune.errors import CheckpointError, DataError
from finetune.facts import Facts, read_facts
from finetune.files import atomic_write_text
from finetune.memory import assert_recompute
from finetune.precompute import ensure_cache
from finetune.schedule import Item, StepPlan
from finetune.trainers.checkpoint import LoadedCheckpoint, compare_configs, find_checkpoint, load_checkpoint, save_checkpoint
from finetune.trainers.ema import Ema
from finetune.trainers.meter import StepRecord
from finetune.trainers.optim import load_optimizer_state, optimizer_state
from finetune.trainers.tracking import Console, Tracker
from finetune.types import RunState
