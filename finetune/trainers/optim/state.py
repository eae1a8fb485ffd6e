"""The state of an optimizer as named tensors and JSON: no pickle, bit-exact, keyed by parameter names.

Tensors are named ``state.<parameter>.<key>`` and ``master.<parameter>``. Numbers, and what puts composed tensors
together again, stand in the JSON part. Hyperparameters are not state: they are those of the running configuration.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from finetune.errors import CheckpointError
from finetune.trainers.optim.masters import MasterWeights

OptimizerState = tuple[Mapping[str, Tensor], Mapping[str, Any]]
"""Tensors by name, and the JSON-serialisable remainder."""
Parameters = Mapping[str, nn.Parameter]
"""Everything that trains, by name: ``method.trainable()``."""


def owner_of(key: str) -> str:
    """The parameter that a tensor of an optimizer's state belongs to."""
    if key.startswith("master."):
        return key.removeprefix("master.")
    return key.split("/")[0].removeprefix("state.").rpartition(".")[0]


def precise_weights(optimizer: torch.optim.Optimizer, parameters: Parameters) -> dict[str, nn.Parameter]:
    """The tensor the optimizer really updates behind each parameter: its float32 master, or the parameter itself."""
    bare = _bare(optimizer)
    masters: dict[int, nn.Parameter] = {}
    if isinstance(bare, MasterWeights):
        masters = {id(parameter): master for _, parameter, master in bare.members()}
    return {name: masters.get(id(parameter), parameter) for name, parameter in parameters.items()}


def optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: Parameters
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Everything an optimizer has accumulated, fp32 masters included.

    Args:
        optimizer: what ``build`` made, also inside accelerate's wrapper.
        parameters: what it trains, by name.

    Returns:
        The live tensors, not copies, and the JSON part. A tensor that several parameters share (a quantisation table)
        stands once.
    """
    inner, trained = _inner(optimizer), precise_weights(optimizer, parameters)
    packer = _Packer()
    for name, master in trained.items():
        if master is not parameters[name]:
            packer.put(f"master.{name}", master)
    scalars: dict[str, dict[str, Any]] = {}
    for name, parameter in trained.items():
        for key, value in inner.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                packer.put(f"state.{name}.{key}", value)
            elif value is None or isinstance(value, (bool, int, float)):
                scalars.setdefault(name, {})[key] = value
            else:
                raise TypeError(
                    f"{type(inner).__name__} keeps a {type(value).__name__} as {key!r}: no form to save it in"
                )
    meta = {
        "class": type(inner).__qualname__,
        "parameters": list(trained),
        "scalars": scalars,
        "shared": packer.shared,
        "composed": packer.composed,
    }
    return packer.tensors, meta


class _Packer:
    """Collects plain tensors: takes composed ones apart, and keeps one of those that share memory."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.shared: dict[str, str] = {}
        self.composed: dict[str, dict[str, Any]] = {}
        self._first_at: dict[tuple[object, ...], str] = {}

    def put(self, key: str, tensor: Tensor) -> None:
        if hasattr(tensor, "__tensor_flatten__"):  # torchao's quantised states are tensors made of tensors
            parts, context = tensor.__tensor_flatten__()
            self.composed[key] = {
                "class": f"{type(tensor).__module__}.{type(tensor).__qualname__}",
                "parts": list(parts),
                "context": [_to_json(value) for value in context],
            }
            for part in parts:
                self.put(f"{key}/{part}", getattr(tensor, part))
            return
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        first = self._first_at.setdefault(place, key) if tensor.numel() else key
        if first == key:
            self.tensors[key] = tensor.detach()
        else:
            self.shared[key] = first


def load_optimizer_state(optimizer: torch.optim.Optimizer, saved: OptimizerState, parameters: Parameters) -> None:
    """Restore what ``optimizer_state`` gave, bit for bit, into an optimizer built from the same configuration.

    The saved tensors are copied, so they may belong to another live optimizer.

    Raises:
        CheckpointError: if the state is that of another optimizer or of other parameters.
    """
    tensors, meta = saved
    inner, trained = _inner(optimizer), precise_weights(optimizer, parameters)
    require_same_optimizer(type(inner).__qualname__, trained, meta)
    masters = {name: master for name, master in trained.items() if master is not parameters[name]}
    expected, found = {f"master.{name}" for name in masters}, {key for key in tensors if key.startswith("master.")}
    if expected != found:
        raise CheckpointError(
            f"the checkpoint holds {len(found)} fp32 master weights, this run has {len(expected)}",
            fix="resume with the model.dtype and method the checkpoint was made with",
        )
    with torch.no_grad():
        for name, master in masters.items():
            master.copy_(tensors[f"master.{name}"])
    state: dict[str, dict[str, Any]] = {name: dict(values) for name, values in meta["scalars"].items()}
    keys = [key for key in tensors if key.startswith("state.") and "/" not in key]
    for key in (*keys, *(key for key in meta["shared"] if "/" not in key), *meta["composed"]):
        name, entry = key.removeprefix("state.").rsplit(".", 1)
        state.setdefault(name, {})[entry] = _unpack(key, tensors, meta)
    if hasattr(inner, "init_state"):
        _fill_bitsandbytes(inner, trained, state)
    else:
        _fill_torch(inner, trained, state)


def require_same_optimizer(here: str, trained: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Refuse the state of another optimizer, or of other parameters.

    Args:
        here: the class of this run's optimizer.
        trained: what it trains, by name.
        meta: the JSON part of ``optimizer_state``.

    Raises:
        CheckpointError: naming the difference.
    """
    _require_form(meta)
    there = meta["class"]
    if here != there:
        raise CheckpointError(
            f"the optimizer is {here}, the checkpoint's is {there}",
            where="optimizer.kind",
            fix="resume with the checkpoint's optimizer, or begin a new run with method.init_from",
        )
    if trained.keys() != set(meta["parameters"]):
        examples = ", ".join(sorted(trained.keys() ^ set(meta["parameters"]))[:4])
        raise CheckpointError(
            f"the optimizer trains {len(trained)} tensors, the checkpoint's {len(meta['parameters'])}; "
            f"on one side only: {examples}",
            fix="resume with the model and method the checkpoint was made with",
        )


def _require_form(meta: Mapping[str, Any]) -> None:
    """Say in words that the JSON part is not what ``optimizer_state`` of this version gives."""
    form = {"class": str, "parameters": list, "scalars": dict, "shared": dict, "composed": dict}
    odd = [key for key, kind in form.items() if not isinstance(meta.get(key), kind)]
    odd += [key for key in ("scalars", "composed") if key not in odd and not _all_objects(meta[key])]
    if odd:
        raise CheckpointError(
            f"the optimizer's state was written by another version of this package: {', '.join(odd)}",
            fix="continue with the version that wrote it, or begin a new run with method.init_from",
        )


def _all_objects(values: Mapping[str, Any]) -> bool:
    return all(isinstance(value, dict) for value in values.values())


def _unpack(key: str, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Tensor:
    if key not in meta["composed"]:
        return tensors[meta["shared"].get(key, key)]
    form = meta["composed"][key]
    module, _, name = form["class"].rpartition(".")
    if not module.startswith("torchao."):  # the name comes out of a file: it may pick among torchao's classes, no more
        raise CheckpointError(f"the optimizer state names a tensor class {form['class']}, which is not torchao's")
    parts = {part: _unpack(f"{key}/{part}", tensors, meta).clone() for part in form["parts"]}
    composed: Any = getattr(importlib.import_module(module), name)
    tensor: Tensor = composed.__tensor_unflatten__(parts, [_from_json(value) for value in form["context"]])
    return tensor


def _to_json(value: Any) -> Any:
    return str(value) if isinstance(value, torch.dtype) else value


def _from_json(value: Any) -> Any:
    is_dtype = isinstance(value, str) and value.startswith("torch.")
    return getattr(torch, value.removeprefix("torch.")) if is_dtype else value


def _fill_torch(inner: torch.optim.Optimizer, trained: Parameters, state: Mapping[str, Mapping[str, Any]]) -> None:
    """Through the library's own door, which knows on what device each entry belongs."""
    names = {id(parameter): name for name, parameter in trained.items()}
    members = [parameter for group in inner.param_groups for parameter in group["params"]]
    copies = {
        index: {key: _copied(value) for key, value in state[names[id(parameter)]].items()}
        for index, parameter in enumerate(members)
        if names[id(parameter)] in state
    }
    inner.load_state_dict({"state": copies, "param_groups": inner.state_dict()["param_groups"]})


def _copied(value: Any) -> Any:
    # Composed tensors were put together from copies, and need not be able to copy themselves.
    return value.clone() if type(value) is Tensor else value


def _fill_bitsandbytes(inner: Any, trained: Parameters, state: Mapping[str, Mapping[str, Any]]) -> None:
    """Into buffers that bitsandbytes makes itself: only so do paged ones stay paged, and shared tables shared."""
    names = {id(parameter): name for name, parameter in trained.items()}
    for group_index, group in enumerate(inner.param_groups):
        for index, parameter in enumerate(group["params"]):
            name = names[id(parameter)]
            if name not in state:
                continue
            inner.init_state(group, parameter, group_index, index)
            buffers, saved = inner.state[parameter], state[name]
            if buffers.keys() != saved.keys():
                raise CheckpointError(
                    f"bitsandbytes keeps {sorted(buffers)} for {name}, the checkpoint has {sorted(saved)}",
                    fix="resume with the version of bitsandbytes the checkpoint was made with",
                )
            for key, value in saved.items():
                if isinstance(value, Tensor):
                    buffers[key].copy_(value)
                else:
                    buffers[key] = value


def _inner(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    bare = _bare(optimizer)
    return bare.inner if isinstance(bare, MasterWeights) else bare


def _bare(optimizer: Any) -> torch.optim.Optimizer:
    """What is under accelerate's wrapper."""
    while isinstance(wrapped := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = wrapped
    bare: torch.optim.Optimizer = optimizer
    return bare
