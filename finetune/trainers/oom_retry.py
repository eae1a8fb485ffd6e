"""Out of memory in a step: the same step once more, in a memory state that needs less.

The states are ``MemoryConfig.fallbacks``; this only moves along them. A state is kept to the end of the process, so
that a run does not meet the same wall at every step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from finetune.caching.encode import release_memory
from finetune.config.schema import RunConfig
from finetune.core.errors import TrainingError, first_line, is_out_of_memory
from finetune.memory.config import MemoryConfig, Traits
from finetune.memory.runner import assert_recompute
from finetune.methods.lora import LoraMethod
from finetune.trainers.run import Run


class OomRetry:
    """The memory state in which a run trains.

    Args:
        run: the assembled run, set up as ``config.memory`` says.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self.state, *self._below = run.config.memory.fallbacks(run.traits)
        self.moved = 0
        """Notches moved so far."""
        self._unchecked = True

    def replayed(self, step: int, passes: Callable[[], None], forget: Callable[[], None]) -> None:
        """Run the forward and backward passes of a step, again for as long as they do not fit and a notch is left.

        Nothing but gradients may come of ``passes``: the weights are the same at every attempt, and so is every random
        number.

        Args:
            step: which optimizer step, from 0.
            passes: what may run out of memory; it works in ``state``.
            forget: undoes a part of it.

        Raises:
            TrainingError: if memory ran out and no notch is left, or if several processes train. One of them cannot go
                back alone: the others wait for it in a collective, with gradients it no longer has.
        """
        while True:
            try:
                with self._checked():
                    passes()
                return
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                said = first_line(error)
                if not self._below or self._run.ranks.world > 1:
                    raise self._stuck(step, said) from error
            # Not in the handler: there, the error's traceback still holds the activations of the attempt.
            forget()
            self._run.strategy.drop_gradients()
            release_memory()
            self._move(step, said)

    @contextmanager
    def _checked(self) -> Iterator[None]:
        """Around the first step in each state: raises unless gradient checkpointing does recompute."""
        if self._unchecked:
            with assert_recompute(self._run.module, self.state):
                yield
            self._unchecked = False
        else:
            yield

    def _move(self, step: int, said: str) -> None:
        before, self.state = self.state, self._below.pop(0)
        self.state.apply(self._run.module, self._run.device)
        self.moved += 1
        self._unchecked = True
        self._run.tracker.log(step + 1, {"perf/oom_notches": self.moved})
        self._run.console.note(
            f"step {step}: out of GPU memory ({said}); doing the step again with {before.difference(self.state)}."
            f" To begin there: {self._run.config.memory.difference(self.state)}"
        )

    def _stuck(self, step: int, said: str) -> TrainingError:
        error = out_of_memory(self._run, self.state, said, f"in the passes of step {step}", in_step=True)
        if not self._below:
            return error
        return TrainingError(
            error.what,
            where=error.where,
            fix=f"set {self.state.difference(self._below[0])}: with several processes a step cannot be done again,"
            " because the others wait in the middle of it; then the same command continues from the last checkpoint",
        )


def out_of_memory(run: Run, memory: MemoryConfig, said: str, when: str, *, in_step: bool) -> TrainingError:
    """The error for memory that does not hold what must be in it.

    Args:
        run: the assembled run.
        memory: the state it was in.
        said: torch's own words.
        when: what was being done.
        in_step: whether that was a step's passes, and nothing beside them.
    """
    config = run.config
    advice = ", ".join(_advice(config, memory, run.traits, videos=not in_step and bool(config.validation.samples)))
    return TrainingError(
        f"out of GPU memory {when}: {said}",
        where=f"buckets {', '.join(map(str, config.data.buckets))}, train.batch_size {config.train.batch_size},"
        f" memory.checkpointing {memory.checkpointing}, method {config.method.kind}, optimizer {config.optimizer.kind}",
        fix=f"ask `finetune plan --budget` what fits; or, in this order: {advice}; the last checkpoint is intact",
    )


def _advice(config: RunConfig, memory: MemoryConfig, traits: Traits, *, videos: bool) -> Iterator[str]:
    """What this run has not tried yet, the cheapest first."""
    state = memory
    for following in (*memory.fallbacks(traits)[1:], *memory.restart_fallbacks(traits)):
        yield state.difference(following)
        state = following
    if config.train.batch_size > 1:
        yield "train.batch_size: 1 and more accumulation"
    if config.optimizer.kind == "adamw" and memory.optimizer_states == "device":
        yield "optimizer.kind: adamw8bit"
    if videos:
        yield "a smaller validation.bucket"
    yield "a smaller bucket"
    if isinstance(config.method, LoraMethod):
        yield "a smaller method.rank"
