"""A frozen linear layer whose weight is held in eight or four bits, and made whole for as long as one product takes.

What is lost is lost once, when the weight is rounded: forward and backward pass then compute exactly what a plain
linear layer with the rounded weight computes, in the dtype of its input, so an adapter trains around it as around any.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from finetune.core.errors import ModelError
from finetune.memory.config import Base, QuantisedFormat

_SLAB = 1 << 20
"""Numbers that are rounded at a time: what rounding holds in float32 is a few times 4 MiB, however large the weight."""

_GROUP = 64
"""Every width of every CogVideoX divides by it."""

_TINY = torch.finfo(torch.float32).tiny

Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Buffers of a layer: name -> (shape, dtype). All that is floating point is float32."""


@dataclass(frozen=True)
class _Scaled:
    """Codes times a float32 scale, absmax / ``limit``, per row or per group of a row."""

    code: torch.dtype
    limit: float
    group: int | None = None

    def layout(self, outputs: int, inputs: int) -> Layout:
        """What a weight [outputs, inputs] is held in."""
        if self.group and inputs % self.group:
            raise ModelError(
                f"a layer with {inputs} inputs has no whole groups of {self.group}",
                fix="quantise with one scale per output",
            )
        # Bytes, not float8: DDP broadcasts buffers and gloo knows no float8, and nothing may cast them as numbers.
        held = torch.int8 if self.code == torch.int8 else torch.uint8
        groups = inputs // self.group if self.group else 1
        return {"codes": ((outputs, inputs), held), "scale": ((outputs, groups), torch.float32)}

    def encode(self, weight: Tensor, into: Mapping[str, Tensor]) -> None:
        """Round ``weight``, on any device and of any floating dtype, into the buffers of ``layout``."""
        codes, scale = into["codes"], into["scale"]
        for rows in _slabs(len(weight), max(1, _SLAB // weight.shape[1])):
            exact = _moved(weight[rows], codes.device)
            exact = exact.view(len(exact), scale.shape[1], -1)
            # A row of zeros has no scale; any other smallest number does.
            scale[rows] = (exact.abs().amax(-1) / self.limit).clamp_min(_TINY)
            exact /= scale[rows][..., None]
            if self.code == torch.int8:
                codes[rows] = exact.round_().flatten(1).to(torch.int8)
            else:
                codes[rows] = exact.flatten(1).to(self.code).view(torch.uint8)

    def decode(self, stored: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """The weight as it was rounded, in a tensor of its own."""
        # Exact in either 16-bit dtype; the product with the float32 scale then rounds once, in place.
        weight = stored["codes"].view(self.code).to(dtype)
        scale = stored["scale"]
        weight.view(*scale.shape, -1).mul_(scale[..., None])
        return weight


class _Nf4:
    """bitsandbytes' NormalFloat4 in blocks of 64, its absmax in eight bits, in blocks of 256 (QLoRA, Dettmers 2023).

    Methods as ``_Scaled`` has them.
    """

    BLOCK, OUTER = 64, 256

    def layout(self, outputs: int, inputs: int) -> Layout:
        numbers = outputs * inputs
        blocks = -(-numbers // self.BLOCK)
        return {
            "codes": ((-(-numbers // 2), 1), torch.uint8),
            "absmax": ((blocks,), torch.uint8),
            "absmax_scale": ((-(-blocks // self.OUTER),), torch.float32),
            "absmax_map": ((256,), torch.float32),
            "absmax_mean": ((), torch.float32),
        }

    def encode(self, weight: Tensor, into: Mapping[str, Tensor]) -> None:
        from bitsandbytes import functional as bnb

        codes, flat = into["codes"], weight.reshape(-1)
        absmax = torch.empty(into["absmax"].shape, dtype=torch.float32, device=codes.device)
        for part in _slabs(len(flat), _SLAB):  # whole blocks, so the parts are what the whole would be
            packed, state = bnb.quantize_4bit(
                _moved(flat[part], codes.device), blocksize=self.BLOCK, quant_type="nf4", compress_statistics=False
            )
            codes[part.start // 2 : -(-part.stop // 2)] = packed
            absmax[part.start // self.BLOCK : -(-part.stop // self.BLOCK)] = state.absmax
        mean = absmax.mean()
        rounded, outer = bnb.quantize_blockwise(absmax - mean, blocksize=self.OUTER)
        into["absmax"].copy_(rounded)
        into["absmax_scale"].copy_(outer.absmax)
        into["absmax_map"].copy_(outer.code)
        into["absmax_mean"].copy_(mean)

    def decode(self, stored: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        from bitsandbytes import functional as bnb

        outer = bnb.QuantState(
            stored["absmax_scale"], code=stored["absmax_map"], blocksize=self.OUTER, dtype=torch.float32
        )
        state = bnb.QuantState(
            stored["absmax"],
            shape=torch.Size(shape),
            dtype=dtype,
            blocksize=self.BLOCK,
            quant_type="nf4",
            offset=stored["absmax_mean"],
            state2=outer,
        )
        weight: Tensor = bnb.dequantize_4bit(stored["codes"], state)
        return weight


# int8 is bitsandbytes' row-wise form, `round(127 w / absmax)`, in torch's own arithmetic: its CUDA kernel takes float16
# alone, which bfloat16 weights overflow, and one arithmetic for every device is one result for every device.
_FORMATS: Mapping[QuantisedFormat, _Scaled | _Nf4] = {
    "fp8": _Scaled(torch.float8_e4m3fn, 448.0),
    "fp8_64": _Scaled(torch.float8_e4m3fn, 448.0, _GROUP),
    "int8": _Scaled(torch.int8, 127.0),
    "nf4": _Nf4(),
}


def _slabs(size: int, step: int) -> Iterator[slice]:
    for first in range(0, size, step):
        yield slice(first, min(first + step, size))


def _moved(weight: Tensor, device: torch.device) -> Tensor:
    """A float32 copy of a slab on ``device``; it travels in its own dtype."""
    here = torch.empty(weight.shape, dtype=weight.dtype, device=device).copy_(weight)
    return here.float()


@dataclass(frozen=True)
class AbsentWeight:
    """What ``QuantisedLinear.weight`` is: enough for peft to place an adapter, and nothing to compute with."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool = False

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"the weight of a quantised layer is not in memory and has no {name!r}; use dequantised()")


class QuantisedLinear(nn.Linear):
    """``nn.Linear`` with a frozen weight in a quantised format.

    Codes and scales are buffers, so moving, streaming and state dicts treat them like any tensors; casting the module
    casts the bias and what ``weight.dtype`` reports, and leaves them as they are. ``weight`` itself is an
    ``AbsentWeight``.

    Args:
        in_features: of the layer.
        out_features: of the layer.
        kind: the format.
        bias: whether there is one.
        dtype: of the bias, and what the layer passes for.
        device: of everything.

    Raises:
        ModelError: if the format cannot hold a weight of this shape.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kind: QuantisedFormat,
        *,
        bias: bool = True,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would make a weight
        self.in_features, self.out_features, self.kind, self.dtype = in_features, out_features, kind, dtype
        self._format = _FORMATS[kind]
        layout = self._format.layout(out_features, in_features)
        for name, (shape, held) in layout.items():
            self.register_buffer(name, torch.empty(shape, dtype=held, device=device))
        self._names = tuple(layout)
        offset = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device)) if bias else None
        self.register_parameter("bias", offset)

    @classmethod
    def like(cls, linear: nn.Linear, kind: QuantisedFormat) -> QuantisedLinear:
        """An empty layer in the place of ``linear``: its sizes, dtype, device, and bias of its own."""
        made = cls(
            linear.in_features,
            linear.out_features,
            kind,
            bias=linear.bias is not None,
            dtype=linear.weight.dtype,
            device=linear.weight.device,
        )
        return made.train(linear.training)

    @property
    def weight(self) -> AbsentWeight:  # type: ignore[override]
        """Shape, dtype and device of a weight that is not there."""
        return AbsentWeight(torch.Size((self.out_features, self.in_features)), self.dtype, self.stored["codes"].device)

    @property
    def stored(self) -> dict[str, Tensor]:
        """The buffers that the weight is held in."""
        return {name: self.get_buffer(name) for name in self._names}

    @torch.no_grad()
    def quantise(self, weight: Tensor, device: torch.device | str | None = None) -> None:
        """Take a weight, a slab at a time: no copy of it exists whole.

        Args:
            weight: [out, in], of any floating dtype, on any device.
            device: where codes and scales go; None for where they are.

        Raises:
            ValueError: if it has another shape.
        """
        if weight.shape != (self.out_features, self.in_features):
            raise ValueError(f"a weight {tuple(weight.shape)} for a layer {tuple(self.weight.shape)}")
        if device is not None and torch.device(device) != self.weight.device:
            for name, buffer in self.stored.items():
                setattr(self, name, torch.empty_like(buffer, device=device))
        self._format.encode(weight, self.stored)

    @torch.no_grad()
    def dequantised(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight as it was rounded: a new tensor [out, in] in ``dtype``, or in the layer's."""
        return self._format.decode(self.stored, (self.out_features, self.in_features), dtype or self.dtype)

    def forward(self, input: Tensor) -> Tensor:
        """``input`` [..., in] to [..., out], in its own dtype."""
        output: Tensor = _Product.apply(input, self.bias, self)  # type: ignore[no-untyped-call]
        return output

    def extra_repr(self) -> str:
        """What printing the model shows."""
        return f"{super().extra_repr()}, kind={self.kind}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantisedLinear:
        # Everything that moves or casts a module comes through here. A cast is meant for the model's numbers: applied
        # to scales it would round every weight once more. They stay the objects they are, unless they move: streaming
        # binds these very tensors to the device.
        scales = {id(buffer) for buffer in self.stored.values() if buffer.is_floating_point()}
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.weight.device)).dtype

        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return tensor.to(result.device) if id(tensor) in scales and result.dtype != tensor.dtype else result

        super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        return self


class _Product(torch.autograd.Function):
    """``functional.linear`` that saves neither input nor weight: the weight is made again for the input's gradient.

    From the layer's buffers as they are then, not as they were: a streamed block has its weights elsewhere in the
    backward pass.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, bias: Tensor | None, layer: QuantisedLinear) -> Tensor:
        ctx.layer = layer
        return functional.linear(input, layer.dequantised(input.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        of_input, of_bias = ctx.needs_input_grad[:2]
        return (
            grad.matmul(ctx.layer.dequantised(grad.dtype)) if of_input else None,
            grad.flatten(0, -2).sum(0) if of_bias else None,
            None,
        )


# ----------------------------------------------------------- which layers are quantised, while a checkpoint is loaded
#
# The base of an adapter only has to compute; nobody updates it. In the blocks, the attention and feed-forward layers
# are quantised. Embeddings, norms, the adaLN layers and the output head stay as they are: what they compute scales or
# shifts whole rows, so their rounding would not average out.

_TRANSFORMER = r"transformer_blocks\.\d+\.(attn1\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.(0\.proj|2))"


@dataclass(frozen=True)
class QuantisedPlacement:
    """Has the linear layers of a model quantised as their weights are read; a ``cogvideox.Placement``."""

    kind: QuantisedFormat
    pattern: str
    """Of whole module names."""

    def prepare(self, module: nn.Module) -> None:
        """Put empty quantised layers in the places of those that ``pattern`` names; ``module`` is on the meta device.

        Raises:
            ModelError: if it names none, or a layer cannot be held in this format.
        """
        chosen = [
            (name, layer)
            for name, layer in module.named_modules()
            if isinstance(layer, nn.Linear) and re.fullmatch(self.pattern, name)
        ]
        if not chosen:
            raise ModelError(f"a {type(module).__name__} has no layer to quantise", fix="hold its weights natively")
        for name, layer in chosen:
            try:
                module.set_submodule(name, QuantisedLinear.like(layer, self.kind))
            except ModelError as error:
                raise ModelError(error.what, where=f"{name}, as {self.kind}", fix=error.fix) from None

    def put(self, module: nn.Module, name: str, tensor: Tensor, device: torch.device) -> bool:
        """Quantise the weight ``name`` into its layer on ``device``; False if it belongs to no quantised layer."""
        owner, _, leaf = name.rpartition(".")
        layer = module.get_submodule(owner)
        if not isinstance(layer, QuantisedLinear) or leaf != "weight":
            return False
        layer.quantise(tensor, device)
        return True


def placement(base: Base) -> QuantisedPlacement | None:
    """How ``load_transformer`` places a transformer's weights for ``base``; None for as they are."""
    return None if base == "native" else QuantisedPlacement(base, _TRANSFORMER)
