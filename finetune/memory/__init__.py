"""Memory techniques: one file each, each proven to leave loss and gradients unchanged.

``config`` says which a run uses and which go together, ``setup`` puts a transformer into that state, and in ``blocks``
they meet in a forward and backward pass.
"""

from __future__ import annotations

from finetune.memory.blocks import Blocks, memory_of, rewriting_weights
from finetune.memory.config import Fault, MemoryConfig, Traits
from finetune.memory.setup import assert_recompute, undo

__all__ = ["Blocks", "Fault", "MemoryConfig", "Traits", "assert_recompute", "memory_of", "rewriting_weights", "undo"]
