"""The batches of the next step: whether they could be made, and that no process trains on when one of them cannot.

A process without batches must not simply stop: the others would wait for it in the next collective. So each looks ahead
while the step before is still to be taken, tells the others in that step's exchange, and all of them save before they
end.
"""

from __future__ import annotations

from finetune.errors import TrainingError, is_out_of_memory
from finetune.trainers.run import Run


def fault_ahead(run: Run, step: int) -> Exception | None:
    """Why this process has no batches for ``step``; None if it has, or if the run ends before. Waits for the loader."""
    if step >= run.total_steps:
        return None
    fault = run.loader.fault(step)
    if is_out_of_memory(fault):
        return TrainingError(
            f"out of host memory while the batches of step {step} were made",
            where=f"train.batch_size {run.config.train.batch_size}, train.accumulation {run.config.train.accumulation}",
            fix="free memory on this machine: what else runs on it? Then the same command continues",
        )
    return fault


def require_batches(run: Run, fault: Exception | None) -> None:
    """Let all processes end where one of them cannot go on; all must call this at the same point.

    Args:
        run: the run.
        fault: of ``fault_ahead`` on this process.

    Raises:
        Exception: ``fault`` where it happened; a ``FinetuneError`` that quotes it on the others.
    """

    def give() -> None:
        if fault is not None:
            raise fault

    run.ranks.all(give)
