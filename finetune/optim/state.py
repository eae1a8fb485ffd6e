"""What an optimizer's saved state has to be made of, before a library works on it without looking.

The expectation comes from the optimizer itself, which is asked for its state of parameters without content.
"""

from __future__ import annotations

import importlib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from finetune.core.errors import CheckpointError
from finetune.core.types import MOST_STEPS
from finetune.optim.low_precision import Fp32Masters, Kahan, NarrowWeights
from finetune.optim.optimizers import Weights

OptimizerState = tuple[Mapping[str, Tensor], Mapping[str, Any]]
"""Tensors by name, and the JSON-serialisable remainder."""

_KEPT = (Fp32Masters.label, Kahan.label)
"""What the names of tensors begin with that are kept of narrow parameters."""


def owner_of(key: str) -> str:
    """The parameter that a tensor of an optimizer's state belongs to."""
    label, _, rest = key.partition(".")
    if label in _KEPT:
        return rest
    return key.split("/")[0].removeprefix("state.").rpartition(".")[0]


class Packer:
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
                "context": [str(value) if isinstance(value, torch.dtype) else value for value in context],
            }
            for part in parts:
                self.put(f"{key}/{part}", getattr(tensor, part))
            return
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        first = self._first_at.setdefault(place, key) if tensor.numel() and not tensor.is_meta else key
        if first == key:
            self.tensors[key] = tensor.detach()
        else:
            self.shared[key] = first


def require_state(
    inner: torch.optim.Optimizer,
    saved: OptimizerState,
    parameters: Mapping[str, Tensor],
    *,
    weights: Weights | None,
    kept: Mapping[str, torch.dtype],
    forms: Mapping[str, Tensor],
) -> None:
    """Refuse a state that is not what this optimizer would have.

    Compared are names, shapes and dtypes of all tensors and the kinds of all numbers with what the optimizer makes of
    parameters of these shapes; of the content, only that counts of steps are counts.

    Args:
        inner: the library's optimizer.
        saved: as ``optimizer_state`` gave it.
        parameters: what it trains, by name; whole also where it works on shares of them.
        weights: how narrow parameters are kept; None where none is narrow, or a strategy keeps them.
        kept: dtype of what is kept of them, by the name it is saved under.
        forms: tensors of the saved ones' shapes and dtypes, with or without content.

    Raises:
        CheckpointError: naming the differences.
    """
    tensors, meta = saved
    _require_same_optimizer(type(inner).__qualname__, parameters, meta)
    _require_same_keeping(weights, kept, tensors, meta)
    found = _Forms(forms, meta)
    wanted = _Forms(
        {key: torch.empty(parameters[owner_of(key)].shape, dtype=dtype, device="meta") for key, dtype in kept.items()},
        {},
    )
    groups = {name: group for group in inner.param_groups for name in group.get("param_names", ())}
    fresh: dict[tuple[object, ...], dict[str, Any]] = {}
    for name, parameter in parameters.items():
        if not found.has_state(name) and name in meta.get("stateless", meta["parameters"]):
            continue  # it never had a gradient
        group = groups.get(name, inner.param_groups[0])
        alike = (id(group), tuple(parameter.shape))
        if alike not in fresh:
            fresh[alike] = _fresh_state(inner, group, parameter.shape)
        wanted.add(name, fresh[alike])
    problems = wanted.differences(found) + _odd_counts(tensors, meta)
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise CheckpointError(
            f"the optimizer's state is not one of {type(inner).__name__} over these weights: "
            + "; ".join(problems[:4])
            + more,
            fix="continue with the versions of this package and of the optimizer's library that wrote it, name an"
            " earlier checkpoint in checkpoint.resume, or begin a new run with method.init_from",
        )


class _Forms:
    """What a state is made of, by name: the dtype and shape of tensors, how they are composed, the kind of numbers."""

    def __init__(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        self._forms: dict[str, str] = {key: _form(tensor) for key, tensor in tensors.items()}
        for key, first in meta.get("shared", {}).items():
            self._forms[key] = _form(tensors[first]) if first in tensors else f"that of {first}, which is missing"
        self._forms |= {key: json.dumps(form, sort_keys=True) for key, form in meta.get("composed", {}).items()}
        for name, values in meta.get("scalars", {}).items():
            self._forms |= {f"state.{name}.{key}": type(value).__name__ for key, value in values.items()}
        self._owners = {owner_of(key) for key in self._forms if key.startswith("state.")}

    def has_state(self, name: str) -> bool:
        return name in self._owners

    def add(self, name: str, state: Mapping[str, Any]) -> None:
        """Take in what an optimizer holds of one parameter."""
        packer = Packer()
        for key, value in state.items():
            if isinstance(value, Tensor):
                packer.put(f"state.{name}.{key}", value)
        scalars = {key: value for key, value in state.items() if not isinstance(value, Tensor)}
        self._forms |= _Forms(packer.tensors, {"composed": packer.composed, "scalars": {name: scalars}})._forms

    def differences(self, found: _Forms) -> list[str]:
        mine, theirs = self._forms, found._forms
        return [
            f"{key} is {theirs.get(key, 'missing')}"
            + (f", not {mine[key]}" if key in mine else ", which nothing reads")
            for key in sorted(mine.keys() | theirs.keys())
            if mine.get(key) != theirs.get(key)
        ]


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


@torch.no_grad()
def _fresh_state(inner: Any, group: Mapping[str, Any], shape: torch.Size) -> dict[str, Any]:
    """What an optimizer holds of a float32 parameter after a step: from itself, on tensors without content."""
    stand_in = nn.Parameter(torch.empty(shape, device="meta"))
    stand_in.grad = torch.empty(shape, device="meta")
    probe: Any = object.__new__(type(inner))
    probe.__dict__ = inner.__dict__ | {"state": defaultdict(dict), "param_groups": [{**group, "params": [stand_in]}]}
    if hasattr(inner, "init_state"):
        # bitsandbytes; its tables are made on the device of the first parameter, and pages exist on GPUs alone.
        probe.__dict__ |= {"name2qmap": {}, "is_paged": False}
        probe.init_state(probe.param_groups[0], stand_in, 0, 0)
    else:
        probe.param_groups[0] |= {key: False for key in ("fused", "foreach") if key in group}
        # State is made before anything is computed with it, and some updates want to look at numbers.
        with torch.compiler.set_stance("force_eager"), suppress(RuntimeError, NotImplementedError):
            probe.step()
    state: dict[str, Any] = probe.state[stand_in]
    return state


def _odd_counts(tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> list[str]:
    """Counts of steps that are none."""
    counts = {key: tensors[key] for key in tensors if key.startswith("state.") and key.endswith(".step")}
    numbers = {key: count.item() for key, count in counts.items() if count.numel() == 1}
    numbers |= {f"state.{name}.step": values["step"] for name, values in meta["scalars"].items() if "step" in values}
    return [
        f"{key} is {number}"
        for key, number in numbers.items()
        if isinstance(number, int | float) and not (0 <= number <= MOST_STEPS and number == int(number))
    ]


def _require_same_optimizer(here: str, trained: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Refuse the state of another optimizer, or of other parameters."""
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
    weights: Weights | None, kept: Iterable[str], tensors: Mapping[str, Tensor], meta: Mapping[str, Any]
) -> None:
    """Refuse a state in which narrow weights were kept in another way, or were not narrow."""
    there = meta.get("weights", "master")  # what versions before there was a choice did
    if weights is not None and weights != there:
        raise CheckpointError(
            f"this run keeps narrow weights by {weights}, the checkpoint by {there}",
            where=f"optimizer.weights: {weights}",
            fix=f"set optimizer.weights: {there}, or begin a new run with method.init_from",
        )
    expected, found = set(kept), {key for key in tensors if key.partition(".")[0] in _KEPT}
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
    odd += [key for key in ("scalars", "composed") if key not in odd and not _all(dict, meta[key].values())]
    odd += [key for key in ("parameters",) if key not in odd and not _all(str, meta[key])]
    odd += [key for key in ("shared",) if key not in odd and not _all(str, meta[key].values())]
    odd += [] if isinstance(meta.get("stateless", []), list) else ["stateless"]
    if odd:
        raise CheckpointError(
            f"the optimizer's state was written by another version of this package: {', '.join(odd)}",
            fix="continue with the version that wrote it, or begin a new run with method.init_from",
        )


def _all(kind: type, values: Iterable[object]) -> bool:
    return all(isinstance(value, kind) for value in values)


# -------- The state of an optimizer as named tensors and JSON: no pickle, bit-exact, keyed by parameter names.
#
# Tensors are named ``state.<parameter>.<key>``, and ``master.<parameter>`` or ``compensation.<parameter>``. Numbers,
# and
# what puts composed tensors together again, stand in the JSON part. Hyperparameters are not state: they are those of
# the
# running configuration.

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
        kept: as for ``require_state``, where a strategy keeps masters in the optimizer's place.
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
