"""Out of memory in a step: the same step once more, in a memory state that needs less.

The states are ``MemoryConfig.fallbacks``; this only moves along them. A state is kept to the end of the process, so
that a run does not meet the same wall at every step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext

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
        run: set up as ``config.memory`` says.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self.state, *self._fallbacks = run.config.memory.fallbacks(run.traits)
        self._moves = 0
        self._checked = False

    def run_passes(self, step: int, passes: Callable[[], None], forget: Callable[[], None]) -> None:
        """Run the forward and backward passes of a step, again for as long as they do not fit and a state is left.

        Nothing but gradients may come of ``passes``: the weights are the same at every attempt, and so is every random
        number.

        Args:
            step: which optimizer step, from 0.
            passes: what may run out of memory; it works in ``state``.
            forget: undoes a part of it.

        Raises:
            TrainingError: if memory ran out and no state is left, or if several processes train. One of them cannot go
                back alone: the others wait for it in a collective, with gradients it no longer has. Also if, in the
                first step in a state, gradient checkpointing does not recompute.
        """
        model = self._run.model
        while True:
            try:
                with nullcontext() if self._checked else assert_recompute(model.module, self.state):
                    passes()
                self._checked = True
                return
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                message = first_line(error)
                if not self._fallbacks or self._run.ranks.world > 1:
                    raise self._stuck(step, message) from error
            # Not in the handler: there, the error's traceback still holds the activations of the attempt.
            forget()
            model.strategy.drop_gradients()
            release_memory()
            self._fall_back(step, message)

    def _fall_back(self, step: int, message: str) -> None:
        run, before = self._run, self.state
        self.state = self._fallbacks.pop(0)
        self.state.apply(run.model.module, run.ranks.device)
        self._moves += 1
        self._checked = False
        run.tracker.log(step + 1, {"perf/oom_notches": self._moves})
        run.console.note(
            f"step {step}: out of GPU memory ({message}); doing the step again with {before.difference(self.state)}."
            f" To begin there: {run.config.memory.difference(self.state)}"
        )

    def _stuck(self, step: int, message: str) -> TrainingError:
        error = out_of_memory(self._run, self.state, message, f"in the passes of step {step}")
        if self._fallbacks:
            error.fix = (
                f"set {self.state.difference(self._fallbacks[0])}: with several processes a step cannot be done again,"
                " because the others wait in the middle of it; then the same command continues from the last checkpoint"
            )
        return error


def out_of_memory(run: Run, memory: MemoryConfig, message: str, when: str, *, videos: bool = False) -> TrainingError:
    """The error for memory that does not hold what must be in it.

    Args:
        run: with its configuration and traits.
        memory: the state it was in.
        message: torch's own words.
        when: what was being done.
        videos: whether videos may have been sampled then.
    """
    config = run.config
    advice = ", ".join(_advice(config, memory, run.traits, videos=videos and bool(config.validation.samples)))
    return TrainingError(
        f"out of GPU memory {when}: {message}",
        where=f"buckets {', '.join(map(str, config.data.trained_buckets))}, train.batch_size {config.train.batch_size},"
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
    context = 2 * config.parallel.context
    if traits.processes % context == 0:
        yield f"parallel.context: {context} and train.accumulation: {2 * config.train.accumulation}"
    if config.optimizer.kind == "adamw" and memory.optimizer_states == "device":
        yield "optimizer.kind: adamw8bit"
    if videos:
        yield "a smaller validation.bucket"
    yield "a smaller bucket"
    if isinstance(config.method, LoraMethod):
        yield "a smaller method.rank"
