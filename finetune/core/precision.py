"""Sums inside a matrix product of a narrow dtype."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def sums_in_float32() -> Iterator[None]:
    """Inside, a GPU's products of bfloat16 and float16 are summed in float32 to the end.

    A weight's gradient is a sum over all tokens, which cuBLAS cuts into parts; by torch's default it may round each of
    them to the product's dtype before it adds them up.
    """
    import torch

    matmul = torch.backends.cuda.matmul
    names = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
    before = [getattr(matmul, name) for name in names]
    for name in names:
        setattr(matmul, name, False)
    try:
        yield
    finally:
        for name, value in zip(names, before, strict=True):
            setattr(matmul, name, value)
