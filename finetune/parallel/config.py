"""``ParallelConfig``: what processes divide among them beside the clips of a step. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from pydantic import Field

from finetune.cogvideox.spec import ModelSpec
from finetune.core.types import Bucket, Strict


class ParallelConfig(Strict):
    """What several processes divide among them beside the clips of a step."""

    context: int = Field(1, ge=1, le=1_024)
    """Neighbouring processes that compute each clip together: every one has a share of its tokens, and attention
    exchanges heads among them. What a clip takes of a GPU's memory, and its time, is divided by this number. It must
    divide the number of processes; a group of them counts as one process for ``train.accumulation``."""


def context_faults(spec: ModelSpec, buckets: Iterable[Bucket], processes: int) -> Iterator[tuple[str, int]]:
    """Why a clip's tokens cannot be divided, each with the most processes that could divide them.

    Neither tokens nor heads need come out even, but every process has some of each.

    Args:
        spec: of the model.
        buckets: sizes of the clips.
        processes: how many would share one.
    """
    if processes > (heads := spec.num_attention_heads):
        yield f"{heads} heads cannot be divided among {processes} processes", heads
    text = spec.max_text_seq_length
    for bucket in buckets:
        video = spec.tokens(bucket) - text
        if processes > min(text, video):
            tokens = f"{text} tokens of text and {video} of video ({bucket})"
            yield f"{tokens} cannot be divided among {processes} processes", min(text, video)
