"""One video on several processes: the transformer's tokens, or the two passes of guidance, divided among them.

diffusers has the machinery and no CogVideoX in it: its attention processor here does not go through the dispatch, and
no plan says which tensors are split where. Those two are here. Weights, latents, scheduler and VAE are whole in every
process, and each arrives at the same video.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, distributed
from torch.nn import functional

from finetune.cogvideox.spec import ModelSpec
from finetune.core.distributed import ProcessGroup
from finetune.core.errors import ConfigError
from finetune.core.types import Bucket

Division = Literal["cfg", "context"]
"""What is divided: the batch of the conditional and the unconditional pass, or every pass's tokens."""


def division_faults(
    division: Division, spec: ModelSpec, bucket: Bucket, processes: int, *, guided: bool, ring: bool
) -> Iterator[ConfigError]:
    """Why a video cannot be divided.

    Args:
        division: what would be.
        spec: of the model.
        bucket: size of the video.
        processes: how many would share it.
        guided: whether there is guidance.
        ring: whether there is a kernel for attention that goes round; see ``divide``.
    """
    where = f"--parallel {division}, {processes} processes"
    if division == "cfg":
        if processes != 2:
            yield ConfigError(
                "guidance makes two passes, for two processes", where=where, fix="start two, or give --parallel context"
            )
        if not guided:
            yield ConfigError(
                "without guidance there is one pass, and nothing to divide",
                where=f"{where}, --guidance 1",
                fix="give --parallel context",
            )
        return
    text, video = spec.max_text_seq_length, spec.tokens(bucket) - spec.max_text_seq_length
    if processes > min(text, video):
        what = f"{text} tokens of text and {video} of video cannot be divided among {processes} processes"
        yield ConfigError(what, where=where, fix=f"start at most {min(text, video)}")
    if not ring and (heads := spec.num_attention_heads) % processes:
        yield ConfigError(
            f"{heads} heads cannot be divided among {processes} processes, and attention in float32 does not go round",
            where=where,
            fix=f"start {max(n for n in range(1, processes) if heads % n == 0)}, or give --dtype bf16",
        )


def divide(transformer: Any, division: Division, ranks: ProcessGroup) -> None:
    """Have every call of a transformer be computed by all processes, which must all make it, with equal arguments.

    Tokens need not divide evenly. Attention exchanges heads (Ulysses) where their number can be divided; else keys and
    values go round (ring), which costs more, and needs a kernel that gives its logsumexp.

    Args:
        transformer: unwrapped, with or without adapters, alike in all processes.
        division: without ``division_faults``.
        ranks: the processes, at least two.
    """
    shares = _Shares(ranks, 0 if division == "cfg" else 1)
    first, last = transformer, transformer
    if division == "context":
        first, last = transformer.transformer_blocks[0], transformer.proj_out
        for block in transformer.transformer_blocks:
            block.register_forward_pre_hook(shares.split_positions, with_kwargs=True)
        heads = transformer.config.num_attention_heads
        even, uneven = (_set_up(heads, ranks, uneven=uneven) for uneven in (False, True))
        transformer.set_attn_processor(ContextParallelAttention(shares, even, uneven))
    first.register_forward_pre_hook(shares.split, with_kwargs=True)
    last.register_forward_hook(shares.gather)


def _set_up(heads: int, ranks: ProcessGroup, *, uneven: bool) -> Any:
    """Diffusers' configuration of attention over shares of a sequence, even or uneven ones."""
    from diffusers.models._modeling_parallel import ContextParallelConfig, ParallelConfig
    from torch.distributed.device_mesh import init_device_mesh

    if heads % ranks.world == 0:
        config = ContextParallelConfig(ulysses_degree=ranks.world, ulysses_anything=uneven)
    else:
        config = ContextParallelConfig(ring_degree=ranks.world, ring_anything=uneven)
    # What `enable_parallelism` does, but for its look at an accelerator, whose number is 0 on a CPU.
    mesh = init_device_mesh(ranks.device.type, config.mesh_shape, mesh_dim_names=config.mesh_dim_names)
    config.setup(ranks.rank, ranks.world, ranks.device, mesh)
    return ParallelConfig(context_parallel_config=config)


class _Shares:
    """Hooks that give each process its share of a call's tensors, and put the shares of the output together.

    diffusers' own hooks for this cannot gather uneven shares over gloo.

    Args:
        ranks: the processes.
        dim: along which tensors are divided: 0 the batch, 1 the tokens.
    """

    def __init__(self, ranks: ProcessGroup, dim: int) -> None:
        self._ranks, self._dim, self._length = ranks, dim, 0
        self.uneven = False
        """Whether some process has a token more than another."""

    def _share(self, tensor: Tensor, dim: int) -> Tensor:
        return tensor.tensor_split(self._ranks.world, dim)[self._ranks.rank]

    def split(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Text and video are split apart, so that every process has some of each: [text | video].

        For all but attention a token is alone, and attention does not mind the order of its keys.
        """
        self._length = kwargs["hidden_states"].shape[self._dim]
        self.uneven = bool(
            self._length % self._ranks.world or kwargs["encoder_hidden_states"].shape[1] % self._ranks.world
        )
        divided = ("hidden_states", "encoder_hidden_states", *(["timestep"] if self._dim == 0 else []))
        return args, kwargs | {name: self._share(kwargs[name], self._dim) for name in divided}

    def split_positions(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Every block gets whole tables, cosines and sines of the video tokens, each [S, 64]; None in some models."""
        tables = kwargs["image_rotary_emb"]
        return args, kwargs | {"image_rotary_emb": tables and tuple(self._share(table, 0) for table in tables)}

    def gather(self, _: Any, args: tuple[Any, ...], output: Any) -> Any:
        """Everybody's shares of the output in their order, which alone is padded for the way."""
        if isinstance(output, tuple):
            return (self.gather(_, args, output[0]),)
        sizes = [len(part) for part in torch.arange(self._length).tensor_split(self._ranks.world)]
        padding = (*(0, 0) * (output.ndim - 1 - self._dim), 0, sizes[0] - output.shape[self._dim])
        padded = functional.pad(output, padding).contiguous()
        shares = [torch.empty_like(padded) for _ in sizes]
        distributed.all_gather(shares, padded)
        return torch.cat([part.narrow(self._dim, 0, size) for part, size in zip(shares, sizes, strict=True)], self._dim)


class ContextParallelAttention:
    """CogVideoX's joint attention over tokens of which every process has a share, through diffusers' dispatch.

    Computes what ``CogVideoXAttnProcessor2_0`` does over all of them.

    Args:
        shares: who knows whether they are even.
        even: diffusers' ``ParallelConfig`` for shares of one size.
        uneven: the same for any, where every exchange is preceded by one of sizes.
    """

    def __init__(self, shares: _Shares, even: Any, uneven: Any) -> None:
        self._shares, self._even, self._uneven = shares, even, uneven

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """This process's share of attention's output, video [B, S, D] and text [B, L, D].

        Args:
            attn: the layer.
            hidden_states: this process's video tokens [B, S, D].
            encoder_hidden_states: its text tokens [B, L, D].
            attention_mask: there is none in CogVideoX.
            image_rotary_emb: cosines and sines of its video tokens, each [S, 64]; None for models without.
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
        output = self._attend(query, key, value).flatten(2).to(query.dtype)
        text, video = attn.to_out[0](output).split([length, hidden_states.shape[1]], dim=1)
        return video, text

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of this process's queries to everybody's keys, all [B, S, H, 64]."""
        from diffusers.models import attention_dispatch as dispatch

        parallel = self._uneven if self._shares.uneven else self._even
        ring = parallel.context_parallel_config.ring_degree > 1
        output: Tensor
        if not ring or query.device.type == "cuda":
            # torch's own choice of kernel gives no logsumexp.
            backend = "_native_flash" if ring else "native"
            output = dispatch.dispatch_attention_fn(query, key, value, backend=backend, parallel_config=parallel)
            return output
        # The dispatch has no kernel of the CPU that gives it; torch has one.
        uneven = parallel.context_parallel_config.ring_anything
        rounds = dispatch.TemplatedRingAnythingAttention if uneven else dispatch.TemplatedRingAttention
        output = rounds.apply(
            query, key, value, None, 0.0, False, None, False, False, _attention_on_cpu, None, parallel
        )
        return output


def _attention_on_cpu(_: Any, query: Tensor, key: Tensor, value: Tensor, *__: Any, **___: Any) -> tuple[Tensor, Tensor]:
    """Output [B, S, H, 64] and logsumexp [B, S, H] of whole heads: a ``forward_op`` of diffusers' dispatch."""
    heads_first = (tensor.transpose(1, 2) for tensor in (query, key, value))
    output, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads_first)
    return output.transpose(1, 2), logsumexp.transpose(1, 2)
