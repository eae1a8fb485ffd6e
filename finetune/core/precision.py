"""What a GPU's products and convolutions are computed in, where torch's default is narrower than what was asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def without_reduced_precision() -> Iterator[None]:
    """Inside, a GPU's products of bfloat16 and float16 are summed in float32 to the end, and float32 is no TF32.

    A weight's gradient is a sum over all tokens, which cuBLAS cuts into parts; by torch's default it may round each of
    them to the product's dtype before it adds them up. And by its default cuDNN's convolutions multiply float32 in
    TF32: the VAE's of a float32 run, and the patch embedding of the first generation.
    """
    import torch

    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    switches: tuple[tuple[Any, str], ...] = (
        (matmul, "allow_bf16_reduced_precision_reduction"),
        (matmul, "allow_fp16_reduced_precision_reduction"),
        (cudnn, "allow_tf32"),
    )
    before = [getattr(*switch) for switch in switches]
    for switch in switches:
        setattr(*switch, False)
    try:
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            setattr(*switch, value)
