"""What a GPU's products and convolutions are computed in, where torch's default is narrower than what was asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any


@contextmanager
def without_reduced_precision() -> Iterator[None]:
    """Inside, a GPU sums products of bfloat16 and float16 in float32 to the end, and convolves float32 as such.

    A weight's gradient is a sum over all tokens, which cuBLAS cuts into parts; by torch's default it may round each of
    them to the product's dtype before it adds them up. And by its default cuDNN's convolutions multiply float32 in
    TF32: the VAE's of a float32 run, and the patch embedding of the first generation. Who has set torch's newer
    ``fp32_precision``, beside which it refuses to read the older switch, keeps it.
    """
    import torch

    matmul = torch.backends.cuda.matmul
    before: list[tuple[Any, str, bool]] = []
    for holder, name in (
        (matmul, "allow_bf16_reduced_precision_reduction"),
        (matmul, "allow_fp16_reduced_precision_reduction"),
        (torch.backends.cudnn, "allow_tf32"),
    ):
        with suppress(RuntimeError):
            before.append((holder, name, getattr(holder, name)))
            setattr(holder, name, False)
    try:
        yield
    finally:
        for holder, name, value in before:
            setattr(holder, name, value)
