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

from finetune.trainers.optim.expected import OptimizerState, Packer, require_state
from finetune.trainers.optim.narrow import NarrowWeights

Parameters = Mapping[str, nn.Parameter]
"""Everything that trains, by name: ``method.trainable()``."""


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
    packer = Packer()
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
        "stateless": [name for name, parameter in trained.items() if not inner.state.get(parameter)],
    }
    if isinstance(bare := _bare(optimizer), NarrowWeights):
        meta["weights"] = bare.keeping.kind
    return packer.tensors, meta


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Every tensor that an optimizer holds at the moment, besides what it was given."""
    entries = [value for state in _inner(optimizer).state.values() for value in state.values()]
    return [value for value in (*entries, *_kept(optimizer).values()) if isinstance(value, Tensor)]


def load_optimizer_state(optimizer: torch.optim.Optimizer, saved: OptimizerState, parameters: Parameters) -> None:
    """Restore what ``optimizer_state`` gave, bit for bit, into an optimizer built from the same configuration.

    The saved tensors are copied, so they may belong to another live optimizer.

    Raises:
        CheckpointError: if the state is that of another optimizer or of other parameters.
    """
    require_same_state(optimizer, saved, parameters)
    tensors, meta = saved
    inner, trained = _inner(optimizer), _trained(optimizer, parameters)
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


def require_same_state(
    optimizer: torch.optim.Optimizer,
    saved: OptimizerState,
    parameters: Mapping[str, Tensor],
    *,
    kept: Mapping[str, torch.dtype] | None = None,
    forms: Mapping[str, Tensor] | None = None,
) -> None:
    """``expected.require_state`` of what ``build`` made.

    Args:
        optimizer: as for ``optimizer_state``.
        saved: as it gave it.
        parameters: what trains, by name; whole also where the optimizer works on shares of it.
        kept: as for ``require_state``, where an engine keeps masters in the optimizer's place.
        forms: as for ``require_state``, where looking at the tensors themselves would read them.

    Raises:
        CheckpointError: naming the differences.
    """
    bare = _bare(optimizer)
    require_state(
        _inner(optimizer),
        saved,
        parameters,
        weights=bare.keeping.kind if isinstance(bare, NarrowWeights) else None,
        kept={key: tensor.dtype for key, tensor in _kept(optimizer).items()} if kept is None else kept,
        forms=saved[0] if forms is None else forms,
    )


def _unpack(key: str, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Tensor:
    if key not in meta["composed"]:
        return tensors[meta["shared"].get(key, key)]
    form = meta["composed"][key]
    module, _, name = form["class"].rpartition(".")  # one that the optimizer uses itself (``require_same_state``)
    parts = {part: _unpack(f"{key}/{part}", tensors, meta).clone() for part in form["parts"]}
    composed: Any = getattr(importlib.import_module(module), name)
    tensor: Tensor = composed.__tensor_unflatten__(parts, [_from_json(value) for value in form["context"]])
    return tensor


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
