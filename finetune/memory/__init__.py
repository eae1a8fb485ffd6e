"""Memory techniques: one file each, each proven to leave loss and gradients unchanged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager

from pydantic import Field
from torch import nn

from finetune.memory import checkpointing as _checkpointing
from finetune.memory import splitting as _splitting
from finetune.section import Strict
from finetune.types import Batch


class MemoryConfig(Strict):
    """What is done to fit the run into memory. Nothing here changes what is computed, but for the last digits. Where a
    single process trains, a step that runs out of GPU memory is done again with the next of these measures.
    """

    checkpointing: _checkpointing.Checkpointing = "full"
    """Gradient checkpointing: ``full`` keeps only the blocks' inputs and runs each block again in the backward pass;
    ``none`` keeps all activations, for small models and large cards."""
    clips_at_once: int | None = Field(None, ge=1)
    """Most clips of a micro-batch that go through the model together; null for all of them. The step's gradient is the
    same sum over the same clips; its last digits, and LoRA's dropout masks, are others."""

    def apply(self, transformer: nn.Module) -> None:
        """Set up ``transformer`` in place; may be called again in another state."""
        _checkpointing.apply(transformer, self.checkpointing)

    def parts(self, batch: Batch) -> Iterator[Batch]:
        """What of a micro-batch goes through the model at a time; see ``splitting.parts``."""
        return _splitting.parts(batch, self.clips_at_once)

    def notches(self, batch_size: int) -> tuple[MemoryConfig, ...]:
        """States that need less and less memory, this one first, in the order in which they cost more time.

        Each is a section as it could stand in a configuration: ``difference`` says what to write.

        Args:
            batch_size: most clips in a micro-batch.
        """
        states = [self]
        if self.checkpointing == "none":
            states.append(states[-1].model_copy(update={"checkpointing": "full"}))
        clips = min(batch_size, self.clips_at_once or batch_size)
        while clips > 1:
            clips = (clips + 1) // 2
            states.append(states[-1].model_copy(update={"clips_at_once": clips}))
        return tuple(states)

    def difference(self, other: MemoryConfig) -> str:
        """What must be written to come from this state to ``other``, such as ``memory.checkpointing: full``."""
        ours, theirs = self.model_dump(mode="json"), other.model_dump(mode="json")
        return ", ".join(f"memory.{name}: {theirs[name]}" for name in theirs if theirs[name] != ours[name])


def assert_recompute(transformer: nn.Module, config: MemoryConfig) -> AbstractContextManager[None]:
    """A guard around one training step; see ``checkpointing.assert_recompute`` for what it raises."""
    return _checkpointing.assert_recompute(transformer, config.checkpointing)
