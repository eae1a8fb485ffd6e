"""diffusers' own block as a part of ``blocks.Blocks``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from finetune.memory.attention import AttentionTape
from finetune.memory.parts import BlockGradients, BlockInputs, Wanted


class StockMath:
    """The ``BlockMath`` of diffusers' own block, differentiated by autograd."""

    seeded = False

    def forward(self, block: nn.Module, inputs: BlockInputs, attention: AttentionTape) -> tuple[Tensor, Tensor]:
        """See ``BlockMath``."""
        with attention.recording():
            return _stock(block, inputs.hidden, inputs.encoder, inputs.temb, inputs.rotary)

    def backward(
        self,
        block: nn.Module,
        inputs: BlockInputs,
        grads: tuple[Tensor, Tensor],
        parameters: Sequence[nn.Parameter],
        *,
        wanted: Wanted,
        attention: AttentionTape,
    ) -> BlockGradients:
        """See ``BlockMath``."""
        hidden = inputs.hidden.detach().requires_grad_(wanted.hidden)
        encoder = inputs.encoder.detach().requires_grad_(wanted.encoder)
        temb = inputs.temb.detach().requires_grad_(wanted.temb)
        with torch.enable_grad(), attention.replaying():
            outputs = _stock(block, hidden, encoder, temb, inputs.rotary)
        leaves = [tensor for tensor in (hidden, encoder, temb) if tensor.requires_grad]
        # The edges and not the outputs, whose values nobody needs.
        roots = [torch.autograd.graph.get_gradient_edge(out) for out in outputs if out.requires_grad]
        seeds = [grad for out, grad in zip(outputs, grads, strict=True) if out.requires_grad]
        del outputs
        found = torch.autograd.grad(roots, [*leaves, *parameters], seeds, allow_unused=True)
        of_inputs = iter(found[: len(leaves)])
        return BlockGradients(
            hidden=next(of_inputs) if wanted.hidden else None,
            encoder=next(of_inputs) if wanted.encoder else None,
            temb=next(of_inputs) if wanted.temb else None,
            parameters=list(found[len(leaves) :]),
        )


def _stock(
    block: nn.Module, hidden: Tensor, encoder: Tensor, temb: Tensor, rotary: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    # The class's forward: the instance's is ours.
    outputs: tuple[Tensor, Tensor] = type(block).forward(
        block, hidden_states=hidden, encoder_hidden_states=encoder, temb=temb, image_rotary_emb=rotary
    )
    return outputs
