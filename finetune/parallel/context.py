"""Context parallelism: the tokens of each clip divided among processes, for training and for sampling.

For all of CogVideoX but attention a token is alone, and attention does not mind the order of its keys. So each process
has a share of the text and one of the video, [text | video], and for attention it exchanges them for all tokens of a
share of the heads (Ulysses, arXiv:2309.14509). Neither tokens nor heads need come out even. Embeddings are computed
whole in every process, and the output is put together in every one, so that each has the same loss of the whole clip.

Gradients: each process differentiates its own share of the output, so a parameter's gradient is the sum over the
processes that share a clip. The exchange's gradient is the exchange back, and nothing else communicates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from finetune.core.distributed import TIMEOUT, ProcessGroup


@dataclass(frozen=True)
class ContextGroup:
    """The processes that share each clip's tokens, and this one's place among them."""

    rank: int
    size: int
    group: Any = None
    """torch's; None for all processes of the launch."""

    @classmethod
    def of(cls, ranks: ProcessGroup, size: int) -> ContextGroup:
        """This process's group: neighbours, whose links are the fastest. All processes must call this at once.

        Args:
            ranks: the launch.
            size: of a group; it divides the number of processes.
        """
        group = None
        if size < ranks.world:
            group, _ = distributed.new_subgroups(group_size=size, timeout=TIMEOUT)  # type: ignore[no-untyped-call]
        return cls(ranks.rank % size, size, group)

    def all_to_all(self, received: Tensor, sent: Tensor, received_sizes: list[int], sent_sizes: list[int]) -> None:
        """Send a part of a flat tensor to each process and receive one from each, cut as the sizes say."""
        distributed.all_to_all_single(received, sent, received_sizes, sent_sizes, group=self.group)

    def all_gather(self, parts: list[Tensor], own: Tensor) -> None:
        """Fill ``parts`` with everybody's ``own``, all of one shape."""
        distributed.all_gather(parts, own, group=self.group)


def divide(transformer: nn.Module, group: ContextGroup) -> None:
    """Have every call of a transformer be computed by a whole group, whose processes must all make it, with equal
    arguments and equal random state.

    Dropout masks are those of one process: each draws the whole mask and takes its share.

    Args:
        transformer: a diffusers CogVideoX transformer, unwrapped, with or without adapters; alike in all processes.
        group: at least two processes, for whose number there are no ``context_faults``.
    """
    model: Any = transformer
    shares = TokenShares(group)
    model.register_forward_pre_hook(shares.enter, with_kwargs=True)
    model.patch_embed.register_forward_pre_hook(shares.embed_whole)
    model.patch_embed.register_forward_hook(shares.take)
    model.proj_out.register_forward_hook(shares.put_together)
    model.set_attn_processor(ContextAttention(shares))
    for module in model.modules():
        if isinstance(module, nn.Dropout) and module.p > 0:
            module.forward = partial(_drop, shares, module)  # type: ignore[method-assign]


class TokenShares:
    """Which tokens of the call that runs are this process's; hooks that take them and put the output together.

    A backward pass belongs to the call before it: a block that is run again finds the same shares.

    Args:
        group: the processes that share them.
    """

    def __init__(self, group: ContextGroup) -> None:
        self.group = group
        self.text: list[int] = []
        """Text tokens of each process."""
        self.video: list[int] = []
        """Its video tokens."""
        self._prompt_embeds: Tensor | None = None
        """Whole, while tokens are embedded."""

    @property
    def embedding(self) -> bool:
        """Whether tokens are being embedded, which all processes do with all of them."""
        return self._prompt_embeds is not None

    def enter(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Before the transformer: it is to see a share of the text, and of the positions [S, head dim] in tables."""
        embeds, tables = kwargs["encoder_hidden_states"], kwargs.get("image_rotary_emb")
        self._prompt_embeds = embeds
        rotary = None if tables is None else tuple(self._own(table, 0) for table in tables)
        return args, kwargs | {"encoder_hidden_states": self._own(embeds, 1), "image_rotary_emb": rotary}

    def embed_whole(self, _: nn.Module, args: tuple[Tensor, Tensor]) -> tuple[Tensor | None, Tensor]:
        """Before tokens are embedded: of all the text, because positions are stored for text and video together."""
        return self._prompt_embeds, args[1]

    def take(self, _: nn.Module, args: tuple[Tensor, Tensor], tokens: Tensor) -> Tensor:
        """Behind it: this process's [text | video] of all tokens [B, T + S, D]."""
        text, video = tokens.tensor_split([args[0].shape[1]], dim=1)
        self._prompt_embeds = None
        self.text, self.video = (shares_of(part.shape[1], self.group.size) for part in (text, video))
        return torch.cat([self._own(text, 1), self._own(video, 1)], dim=1)

    def put_together(self, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Behind the last layer: everybody's video tokens in their order."""
        whole: Tensor = _PutTogether.apply(output, self.group, self.video)  # type: ignore[no-untyped-call]
        return whole

    def own_rows(self, whole: Tensor, length: int) -> Tensor:
        """Of a tensor that is drawn for all tokens, the rows of this process's ``length`` tokens [B, length, D]."""
        *text, video = whole.tensor_split([sum(self.text)] if self._is_joint(length) else [], dim=1)
        return torch.cat([self._own(part, 1) for part in (*text, video)], dim=1)

    def whole_length(self, length: int) -> int:
        """Tokens of all processes where this one has ``length``: of the video, or of text and video."""
        return sum(self.video) + (sum(self.text) if self._is_joint(length) else 0)

    def _is_joint(self, length: int) -> bool:
        return length != self.video[self.group.rank]

    def _own(self, tensor: Tensor, dim: int) -> Tensor:
        return tensor.tensor_split(self.group.size, dim)[self.group.rank]


def shares_of(count: int, processes: int) -> list[int]:
    """How many of ``count`` each process has, as ``torch.tensor_split`` cuts: the first ones have one more."""
    return [count // processes + (rank < count % processes) for rank in range(processes)]


class _PutTogether(torch.autograd.Function):
    """Shares [B, s, D] of all processes in their order, [B, S, D]; a process differentiates its own."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, group: ContextGroup, sizes: list[int]) -> Tensor:
        ctx.begin, ctx.length = sum(sizes[: group.rank]), sizes[group.rank]
        # A collective needs equal shapes; the first share is the longest.
        padded = functional.pad(own, (0, 0, 0, sizes[0] - own.shape[1])).contiguous()
        parts = [torch.empty_like(padded) for _ in sizes]
        group.all_gather(parts, padded)
        return torch.cat([part[:, :size] for part, size in zip(parts, sizes, strict=True)], dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.narrow(1, ctx.begin, ctx.length), None, None


def _drop(shares: TokenShares, dropout: nn.Dropout, features: Tensor) -> Tensor:
    """A dropout layer's ``forward`` where tokens are divided: the mask of one process, [B, n, D] of it."""
    if not dropout.training or features.ndim != 3 or shares.embedding:
        return functional.dropout(features, dropout.p, dropout.training)
    batch, length, width = features.shape
    ones = features.new_ones(batch, shares.whole_length(length), width)
    return features * shares.own_rows(functional.dropout(ones, dropout.p), length)


# ------------------------------------------------------------------------------------------------------------ attention


class ContextAttention:
    """CogVideoX's joint attention over tokens of which every process has a share: a processor of diffusers' blocks.

    Computes what ``CogVideoXAttnProcessor2_0`` does over all of them. ``memory.lean_block`` has no use but for
    ``attend``.

    Args:
        shares: of the call that runs.
    """

    def __init__(self, shares: TokenShares) -> None:
        self._shares = shares

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """This process's share of attention's output, video [B, S, D] and text [B, T, D].

        Args:
            attn: the layer.
            hidden_states: this process's video tokens [B, S, D].
            encoder_hidden_states: its text tokens [B, T, D].
            attention_mask: there is none in CogVideoX.
            image_rotary_emb: cosines and sines of its video tokens, each [S, head dim]; None for models without.
        """
        from diffusers.models.embeddings import apply_rotary_emb

        length = encoder_hidden_states.shape[1]
        tokens = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        query, key, value = (
            projection(tokens).unflatten(2, (attn.heads, -1)) for projection in (attn.to_q, attn.to_k, attn.to_v)
        )
        query, key = attn.norm_q(query), attn.norm_k(key)
        if image_rotary_emb is not None:
            for rotated in (query, key):
                rotated[:, length:] = apply_rotary_emb(rotated[:, length:], image_rotary_emb, sequence_dim=1)
        output = self.attend(query, key, value).flatten(2)
        for module in attn.to_out:
            output = module(output)
        text, video = output.tensor_split([length], dim=1)
        return video, text

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of this process's queries to everybody's keys, all [B, n, H, head dim].

        torch's own operation is in the middle of it, which selective checkpointing knows: what is kept is the output
        and logsumexp of this process's heads.
        """
        tokens = [sum(pair) for pair in zip(self._shares.text, self._shares.video, strict=True)]
        exchange = _Exchange(self._shares.group, tokens, shares_of(query.shape[2], self._shares.group.size))
        heads = (_ToHeads.apply(tensor, exchange).transpose(1, 2) for tensor in (query, key, value))  # type: ignore[no-untyped-call]
        output = functional.scaled_dot_product_attention(*heads).transpose(1, 2)
        attended: Tensor = _ToTokens.apply(output, exchange)  # type: ignore[no-untyped-call]
        return attended


@dataclass(frozen=True)
class _Exchange:
    """Between this process's tokens with all heads [B, n, H, d] and all tokens with its heads [B, N, h, d].

    On the way tokens come first, so that what arrives from several processes lies as it is wanted.
    """

    group: ContextGroup
    tokens: Sequence[int]
    """Of each process."""
    heads: Sequence[int]
    """Of each process."""

    def to_heads(self, own: Tensor) -> Tensor:
        """[B, n, H, d] to [B, N, h, d], the tokens in the order of the processes."""
        batch, length, _, width = own.shape
        heads = self.heads[self.group.rank]
        received = own.new_empty(sum(self.tokens), batch, heads, width)
        arriving = [tokens * batch * heads * width for tokens in self.tokens]
        leaving = [length * batch * theirs * width for theirs in self.heads]
        sent = own.new_empty(sum(leaving))
        for part, theirs in zip(torch.split(sent, leaving), torch.split(own, list(self.heads), dim=2), strict=True):
            part.view(length, batch, -1, width).copy_(theirs.transpose(0, 1))
        self.group.all_to_all(received.view(-1), sent, arriving, leaving)
        return received.transpose(0, 1)

    def to_tokens(self, own: Tensor) -> Tensor:
        """[B, N, h, d] back to [B, n, H, d]."""
        batch, _, heads, width = own.shape
        length = self.tokens[self.group.rank]
        sent = own.transpose(0, 1).flatten()
        received = own.new_empty(length * batch * sum(self.heads) * width)
        arriving = [length * batch * theirs * width for theirs in self.heads]
        leaving = [tokens * batch * heads * width for tokens in self.tokens]
        self.group.all_to_all(received, sent, arriving, leaving)
        parts = zip(torch.split(received, arriving), self.heads, strict=True)
        return torch.cat([part.view(length, batch, theirs, width) for part, theirs in parts], dim=2).transpose(0, 1)


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, exchange: _Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.to_heads(own)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.to_tokens(grad), None


class _ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, exchange: _Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.to_tokens(own)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.to_heads(grad), None
