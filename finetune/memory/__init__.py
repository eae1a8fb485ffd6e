"""Memory techniques: one file each, each proven to leave loss and gradients unchanged."""

from __future__ import annotations

from contextlib import AbstractContextManager

from torch import nn

from finetune.memory import checkpointing as _checkpointing
from finetune.section import Strict


class MemoryConfig(Strict):
    """What is done to fit the run into memory. Nothing here changes what is computed."""

    checkpointing: _checkpointing.Checkpointing = "full"
    """Gradient checkpointing: ``full`` keeps only the blocks' inputs and runs each block again in the backward pass;
    ``none`` keeps all activations, for small models and large cards."""

    def apply(self, transformer: nn.Module) -> None:
        """Set up ``transformer`` in place."""
        _checkpointing.apply(transformer, self.checkpointing)


def assert_recompute(transformer: nn.Module, config: MemoryConfig) -> AbstractContextManager[None]:
    """A guard around one training step; see ``checkpointing.assert_recompute`` for what it raises."""
    return _checkpointing.assert_recompute(transformer, config.checkpointing)
