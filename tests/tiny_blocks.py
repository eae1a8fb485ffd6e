"""What the tests of memory techniques share: a tiny transformer of four blocks, a loss, and the blocks' runner."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from itertools import combinations, product
from typing import Any

import torch
from torch import Tensor, nn

from finetune.memory.config import MemoryConfig, Traits
from finetune.memory.runner import ActivationStore, BlockRunner, WeightPlacement
from finetune.methods.full import FullMethod
from finetune.methods.lora import LoraMethod
from finetune.testing.tiny import tiny_transformer

CPU = torch.device("cpu")
LORA = LoraMethod(rank=4, dropout=0.2)
LAYERS = 4
State = dict[str, Any]
"""Of a memory section, what is not at its default."""


def computed_once(compute: Callable[..., Any]) -> Callable[..., Any]:
    """As ``functools.cache``, for arguments that are told apart by what they print: a method has no hash."""
    results: dict[str, Any] = {}

    @wraps(compute)
    def remembered(*arguments: Any) -> Any:
        key = repr(arguments)
        if key not in results:
            results[key] = compute(*arguments)
        return results[key]

    return remembered


def covering(choices: Sequence[Sequence[State]], traits: Traits) -> list[State]:
    """Some states, each with one of every list of choices, in which any two choices that go together meet."""
    states: dict[frozenset[Any], State] = {}
    for row in product(*map(enumerate, choices)):
        state = {option: value for _, choice in row for option, value in choice.items()}
        if not MemoryConfig(**state).faults(traits):
            states[frozenset(combinations(enumerate(number for number, _ in row), 2))] = state
    missing, chosen = set().union(*states), []
    while missing:
        meetings = max(states, key=lambda each: len(each & missing))
        missing -= meetings
        chosen.append(states[meetings])
    return chosen


def build(
    variant: str = "5b",
    method: LoraMethod | FullMethod = LORA,
    dtype: torch.dtype = torch.float32,
    *,
    heads: int = 2,
    dropout: bool = True,
) -> nn.Module:
    transformer = tiny_transformer(variant, num_layers=LAYERS, num_attention_heads=heads).to(dtype)
    method.apply(transformer, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # LoRA's B is zero at first, and its A would get no gradient
        for parameter in method.trainable(transformer).values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return transformer.train(dropout)


def forward(transformer: nn.Module, seed: int = 5, size: int = 4) -> Tensor:
    config = transformer.config
    generator = torch.Generator().manual_seed(seed)
    frames = 4 if config.patch_size_t else 3
    latents = torch.randn(2, frames, config.in_channels, size, size, generator=generator).to(transformer.dtype)
    # Only learned or computed positions fix the number of text tokens, and their 226 are most of the work.
    tokens = 8 if config.use_rotary_positional_embeddings else config.max_text_seq_length
    text = torch.randn(2, tokens, config.text_embed_dim, generator=generator).to(transformer.dtype)
    ofs = {"ofs": torch.full((1,), 2.0)} if config.ofs_embed_dim else {}
    given = (tensor.to(transformer.device) for tensor in (latents, text, torch.tensor([500, seed])))
    prediction = transformer(*given, return_dict=False, **ofs)[0]
    return prediction.float().square().mean()


def run_blocks(
    transformer: nn.Module, weights: WeightPlacement | None = None, activations: ActivationStore | None = None
) -> BlockRunner:
    runner = BlockRunner(transformer, weights=weights, activations=activations)
    runner.install()
    return runner


def modules(transformer: nn.Module) -> list[nn.Module]:
    return list(transformer.transformer_blocks)


def values(transformer: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in transformer.state_dict().items()}
