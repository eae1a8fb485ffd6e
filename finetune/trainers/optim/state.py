"""The state of an optimizer as named tensors and JSON: no pickle, bit-exact, keyed by parameter names.

Tensors are named ``state.<parameter>.<key>``, and ``master.<parameter>`` or ``compensation.<parameter>``. Numbers, and
what puts composed tensors together again, stand in the JSON part. Hyperparameters are not state: they are those of the
running configuration.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from finetune.errors import CheckpointError
from finetune.trainers.optim.narrow import NarrowWeights
from finetune.trainers.optim.rounding import Kahan, Masters

OptimizerState = tuple[Mapping[str, Tensor], Mapping[str, Any]]
"""Tensors by name, and the JSON-serialisable remainder."""
Parameters = Mapping[str, nn.Parameter]
"""Everything that trains, by name: ``method.trainable()``."""
_KEPT = (Masters.label, Kahan.label)
"""What the names of tensors begin with that are kept of narrow parameters."""


def owner_of(key: str) -> str:
    """The parameter that a tensor of an optimizer's state belongs to."""
    label, _, rest = key.partition(".")
    if label in _KEPT:
        return rest
    return key.split("/")[0].removeprefix("state.").rpartition(".")[0]


def precise_weights(optimizer: torch.optim.Optimizer, parameters: Parameters) -> dict[str, nn.Parameter]:
    """The most precise tensor there is of each parameter, for averages: its fp32 master, or what the optimizer trains.

    By name: an optimizer may work on copies elsewhere.
    """
    bare = _bare(optimizer)
    trained = _by_name(bare, parameters)
    if isinstance(bare, NarrowWeights):
        trained |= {name: shell for name, _, shell in bare.members() if shell is bare.keeping.kept.get(name)}
    return trained


def optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: Parameters
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Everything an optimizer has accumulated, with what is kept of narrow parameters (fp32 masters, compensations).

    Args:
        optimizer: what ``build`` made, also inside accelerate's wrapper.
        parameters: what it trains, by name.

    Returns:
        The live tensors, not copies, and the JSON part. A tensor that several parameters share (a quantisation table)
        stands once.
    """
    inner, trained = _inner(optimizer), _trained(optimizer, parameters)
    packer = _Packer()
    for key, tensor in _kept(optimizer).items():
        packer.put(key, tensor)
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
    meta: dict[str, Any] = {
        "class": type(inner).__qualname__,
        "parameters": list(trained),
        "scalars": scalars,
        "shared": packer.shared,
        "composed": packer.composed,
    }
    if isinstance(bare := _bare(optimizer), NarrowWeights):
        meta["weights"] = bare.keeping.kind
    return packer.tensors, meta


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Every tensor that an optimizer holds at the moment, besides what it was given."""
    entries = [value for state in _inner(optimizer).state.values() for value in state.values()]
    return [value for value in (*entries, *_kept(optimizer).values()) if isinstance(value, Tensor)]


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
    inner, trained = _inner(optimizer), _trained(optimizer, parameters)
    require_same_optimizer(type(inner).__qualname__, trained, meta)
    _require_same_keeping(optimizer, tensors, meta)
    with torch.no_grad():
        for key, kept in _kept(optimizer).items():
            kept.copy_(tensors[key])
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


def _require_same_keeping(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]
) -> None:
    """Refuse a state in which narrow weights were kept in another way, or were not narrow."""
    bare = _bare(optimizer)
    there = meta.get("weights", "master")  # what versions before there was a choice did
    if isinstance(bare, NarrowWeights) and bare.keeping.kind != there:
        raise CheckpointError(
            f"this run keeps narrow weights by {bare.keeping.kind}, the checkpoint by {there}",
            where=f"optimizer.weights: {bare.keeping.kind}",
            fix=f"set optimizer.weights: {there}, or begin a new run with method.init_from",
        )
    expected, found = _kept(optimizer).keys(), {key for key in tensors if key.partition(".")[0] in _KEPT}
    if expected != found:
        what = "compensations" if there == Kahan.kind else "fp32 master weights"
        raise CheckpointError(
            f"the checkpoint holds {len(found)} {what}, this run has {len(expected)}",
            fix="resume with the model.dtype and method the checkpoint was made with",
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
    return bare.inner if isinstance(bare, NarrowWeights) else bare


def _trained(optimizer: torch.optim.Optimizer, parameters: Parameters) -> dict[str, nn.Parameter]:
    """What the inner optimizer keys its state to, by name, in the order of ``parameters``."""
    return _by_name(_inner(optimizer), parameters)


def _by_name(optimizer: torch.optim.Optimizer, parameters: Parameters) -> dict[str, nn.Parameter]:
    known = {
        name: parameter
        for group in optimizer.param_groups
        for name, parameter in zip(group.get("param_names", ()), group["params"], strict=False)
    }
    return {name: known.get(name, parameter) for name, parameter in parameters.items()}


def _kept(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What is kept of narrow parameters, by the name it is saved under; the live tensors."""
    bare = _bare(optimizer)
    if not isinstance(bare, NarrowWeights):
        return {}
    return {f"{bare.keeping.label}.{name}": tensor for name, tensor in bare.keeping.kept.items()}


def _bare(optimizer: Any) -> torch.optim.Optimizer:
    """What is under accelerate's wrapper."""
    while isinstance(wrapped := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = wrapped
    bare: torch.optim.Optimizer = optimizer
    return bare
