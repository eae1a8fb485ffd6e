"""The state of an optimizer as named tensors and JSON: no pickle, bit-exact, keyed by parameter names.

Tensors are named ``state.<parameter>.<key>``, and ``master.<parameter>`` or ``compensation.<parameter>``. Numbers, and
what puts composed tensors together again, stand in the JSON part. Hyperparameters are not state: they are those of the
running configuration.

Before a library works on a saved state without looking, it is compared with what the optimizer itself makes of
parameters without content.
"""

from __future__ import annotations

import importlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from finetune.core.errors import CheckpointError, first_line
from finetune.core.tensor_files import form_of
from finetune.core.types import MOST_STEPS
from finetune.optim.low_precision import Fp32Masters, Kahan, LowPrecisionOptimizer, NamedParameters

OptimizerState = tuple[Mapping[str, Tensor], Mapping[str, Any]]
"""Tensors by name, and the JSON-serialisable remainder."""

Parameters = Mapping[str, nn.Parameter]
"""Everything that trains, by name: ``method.trainable()``."""

_SAVED_WEIGHTS = (Fp32Masters.label, Kahan.label)
"""What the names of tensors begin with that are kept of parameters of 16 bits."""


def owner_of(key: str) -> str:
    """The parameter that a tensor of an optimizer's state belongs to."""
    label, _, rest = key.partition(".")
    if label in _SAVED_WEIGHTS:
        return rest
    return key.split("/")[0].removeprefix("state.").rpartition(".")[0]


def precise_weights(optimizer: torch.optim.Optimizer, parameters: Parameters) -> dict[str, nn.Parameter]:
    """The most precise tensor there is of each parameter, for averages: its fp32 master, or what the optimizer trains.

    By name: an optimizer may work on copies elsewhere.
    """
    trained = _by_name(optimizer, parameters)
    if isinstance(optimizer, LowPrecisionOptimizer):
        trained |= {name: proxy for name, _, proxy in optimizer.members() if proxy is optimizer.policy.saved.get(name)}
    return trained


def optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: Parameters
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Everything an optimizer has accumulated, with what is kept of 16-bit parameters (fp32 masters, compensations).

    Args:
        optimizer: what ``build`` made.
        parameters: what it trains, by name.

    Returns:
        The live tensors, not copies, and the JSON part. A tensor that several parameters share (a quantisation table)
        stands once.
    """
    inner = _inner(optimizer)
    states = {name: inner.state.get(p, {}) for name, p in _by_name(inner, parameters).items()}
    tensors, packed = _pack(_saved_weights(optimizer), states)
    meta = {"class": type(inner).__qualname__, "parameters": list(states), **packed}
    if any(groups := [_group_state(inner, group) for group in inner.param_groups]):
        meta["groups"] = groups
    meta["stateless"] = [name for name, state in states.items() if not state]
    if isinstance(optimizer, LowPrecisionOptimizer):
        meta["weights"] = optimizer.policy.kind
    return tensors, meta


def _pack(
    own: Mapping[str, Tensor], states: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """States by parameter as plain tensors and JSON: composed tensors taken apart, one of those that share memory.

    Args:
        own: tensors that go as they are, by their names.
        states: what an optimizer holds of each parameter.
    """
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    shared: dict[str, str] = {}
    composed: dict[str, dict[str, Any]] = {}
    first_at: dict[tuple[object, ...], str] = {}

    def put(key: str, tensor: Tensor) -> None:
        if hasattr(tensor, "__tensor_flatten__"):  # torchao's quantised states are tensors made of tensors
            parts, context = tensor.__tensor_flatten__()
            composed[key] = {
                "class": f"{type(tensor).__module__}.{type(tensor).__qualname__}",
                "parts": list(parts),
                "context": [str(value) if isinstance(value, torch.dtype) else value for value in context],
            }
            for part in parts:
                put(f"{key}/{part}", getattr(tensor, part))
            return
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        first = first_at.setdefault(place, key) if tensor.numel() and not tensor.is_meta else key
        if first == key:
            tensors[key] = tensor.detach()
        else:
            shared[key] = first

    for key, tensor in own.items():
        put(key, tensor)
    for name, state in states.items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                put(f"state.{name}.{key}", value)
            elif value is None or isinstance(value, (bool, int, float)):
                scalars.setdefault(name, {})[key] = value
            else:
                raise TypeError(f"an optimizer keeps a {type(value).__name__} as {key!r}: no form to save it in")
    return tensors, {"scalars": scalars, "shared": shared, "composed": composed}


_NO_GROUP_STATE = ("params", "param_names", "lr", "initial_lr", "lr_scale", "weight_decay")


def _group_state(inner: torch.optim.Optimizer, group: Mapping[str, Any]) -> dict[str, Any]:
    """What an optimizer has noted of a whole group, such as Prodigy's estimate of the distance: the numbers that are
    not those it was built with. Tensors of few numbers stand as their dtype and values.
    """
    noted: dict[str, Any] = {}
    for key, value in group.items():
        if key in _NO_GROUP_STATE or (key in inner.defaults and _same(inner.defaults[key], value)):
            continue
        if isinstance(value, Tensor):
            noted[key] = {"dtype": str(value.dtype), "values": value.flatten().tolist()}
        elif value is None or isinstance(value, (bool, int, float)):
            noted[key] = value
        else:
            raise TypeError(f"an optimizer keeps a {type(value).__name__} as {key!r} of a group: no form to save it in")
    return noted


def _same(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and not isinstance(a, Tensor) and bool(a == b))


def why_not_resumable(build: Callable[[NamedParameters], torch.optim.Optimizer]) -> str:
    """Why an optimizer cannot be used for runs that continue bit for bit; empty where it can.

    Two small matrices take two steps, once straight on and once through a saved state.

    Args:
        build: makes the optimizer over named parameters.
    """
    ends = []
    try:
        for interrupted in (False, True):
            draw = torch.Generator().manual_seed(0)
            parameters = {name: nn.Parameter(torch.randn(4, 6, generator=draw)) for name in ("first", "second")}
            optimizer = build(list(parameters.items()))
            if callable(getattr(optimizer, "eval", None)):
                return "the weights that it trains are not those to be used; train.ema_decay averages weights as well"
            for step in range(2):
                if interrupted and step:
                    saved = optimizer_state(optimizer, parameters)
                    meta = json.loads(json.dumps(saved[1], allow_nan=False))
                    optimizer = build(list(parameters.items()))
                    load_optimizer_state(optimizer, ({k: t.clone() for k, t in saved[0].items()}, meta), parameters)
                for parameter in parameters.values():
                    parameter.grad = torch.randn(4, 6, generator=draw)
                optimizer.step()
            ends.append([parameter.detach() for parameter in parameters.values()])
    except Exception as error:  # of a library that nothing here knows; whatever it raises is the reason
        return first_line(error)
    same = all(torch.equal(straight, resumed) for straight, resumed in zip(*ends, strict=True))
    return "" if same else "continued from its saved state it does not do what it does uninterrupted"


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Every tensor that an optimizer holds at the moment, besides what it was given."""
    entries = [value for state in _inner(optimizer).state.values() for value in state.values()]
    return [value for value in (*entries, *_saved_weights(optimizer).values()) if isinstance(value, Tensor)]


# ------------------------------------------------------------------------------------------------------------- loading


def load_optimizer_state(optimizer: torch.optim.Optimizer, saved: OptimizerState, parameters: Parameters) -> None:
    """Restore what ``optimizer_state`` gave, bit for bit, into an optimizer built from the same configuration.

    The saved tensors are copied, so they may belong to another live optimizer.

    Raises:
        CheckpointError: if the state is that of another optimizer or of other parameters.
    """
    require_same_state(optimizer, saved, parameters)
    tensors, meta = saved
    inner = _inner(optimizer)
    with torch.no_grad():
        for key, tensor in _saved_weights(optimizer).items():
            tensor.copy_(tensors[key])
    states: dict[str, dict[str, Any]] = {name: dict(values) for name, values in meta["scalars"].items()}
    keys = [key for key in (*tensors, *meta["shared"]) if key.startswith("state.") and "/" not in key]
    for key in (*keys, *meta["composed"]):
        name, entry = key.removeprefix("state.").rsplit(".", 1)
        states.setdefault(name, {})[entry] = _unpack(key, tensors, meta)
    for group, noted in zip(inner.param_groups, meta.get("groups", ()), strict=False):
        group |= {key: _from_group(value, group["params"][0].device) for key, value in noted.items()}
    names = {id(parameter): name for name, parameter in _by_name(inner, parameters).items()}
    if hasattr(inner, "init_state"):
        _fill_bitsandbytes(inner, names, states)
    else:
        _fill_torch(inner, names, states)


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


def _from_group(value: Any, device: torch.device) -> Any:
    if not isinstance(value, dict):
        return value
    return torch.tensor(value["values"], dtype=_from_json(value["dtype"]), device=device)


def _fill_torch(
    inner: torch.optim.Optimizer, names: Mapping[int, str], states: Mapping[str, Mapping[str, Any]]
) -> None:
    """By the library itself, which knows on what device each entry belongs."""
    members = [names[id(parameter)] for group in inner.param_groups for parameter in group["params"]]
    # Composed tensors were put together from copies, and need not be able to copy themselves.
    copies = {
        index: {key: value.clone() if type(value) is Tensor else value for key, value in states[name].items()}
        for index, name in enumerate(members)
        if name in states
    }
    inner.load_state_dict({"state": copies, "param_groups": inner.state_dict()["param_groups"]})


def _fill_bitsandbytes(inner: Any, names: Mapping[int, str], states: Mapping[str, Mapping[str, Any]]) -> None:
    """Into buffers that bitsandbytes makes itself: only so do paged ones stay paged, and shared tables shared."""
    for group_index, group in enumerate(inner.param_groups):
        for index, parameter in enumerate(group["params"]):
            if names[id(parameter)] not in states:
                continue
            inner.init_state(group, parameter, group_index, index)
            buffers = inner.state[parameter]
            for key, value in states[names[id(parameter)]].items():
                if isinstance(value, Tensor):
                    buffers[key].copy_(value)
                else:
                    buffers[key] = value


# ---------------------------------------------------------------------------------------------------------- comparison


class _FewNumbers(BaseModel):
    """A tensor of a group."""

    model_config = ConfigDict(strict=True, extra="forbid")

    dtype: Literal["torch.float32", "torch.float64", "torch.int64", "torch.bfloat16"]
    values: list[float | int] = Field(max_length=16)


class _Meta(BaseModel):
    """The JSON part, of which no value is taken before its kind is known."""

    model_config = ConfigDict(strict=True)

    class_name: str = Field(alias="class")
    parameters: list[str]
    scalars: dict[str, dict[str, bool | int | float | None]]
    shared: dict[str, str]
    composed: dict[str, dict[str, Any]]
    stateless: list[str] | None = None
    groups: list[dict[str, bool | int | float | _FewNumbers | None]] = Field(default_factory=list, max_length=10_000)
    weights: str = Fp32Masters.kind
    """What versions did in which there was no choice."""


def require_same_state(
    optimizer: torch.optim.Optimizer,
    saved: OptimizerState,
    parameters: Mapping[str, Tensor],
    *,
    masters: Mapping[str, torch.dtype] | None = None,
    forms: Mapping[str, Tensor] | None = None,
) -> None:
    """Refuse a state that is not what this optimizer would have.

    Compared are names, shapes and dtypes of all tensors and the kinds of all numbers with what the optimizer makes of
    parameters of these shapes; of the content, only that counts of steps are counts.

    Args:
        optimizer: what ``build`` made.
        saved: as ``optimizer_state`` gave it.
        parameters: what trains, by name; whole also where the optimizer works on shares of it.
        masters: dtypes of master weights by their saved names, where a strategy keeps them in the optimizer's place.
        forms: tensors of the saved ones' shapes and dtypes, where looking at the tensors themselves would read them.

    Raises:
        CheckpointError: naming the differences.
    """
    inner = _inner(optimizer)
    weights = optimizer.policy.kind if isinstance(optimizer, LowPrecisionOptimizer) else None
    if masters is None:
        masters = {key: tensor.dtype for key, tensor in _saved_weights(optimizer).items()}
    try:
        meta = _Meta.model_validate(saved[1])
    except ValidationError as error:
        fields = ", ".join(dict.fromkeys(str(fault["loc"][0]) for fault in error.errors()))
        raise CheckpointError(
            f"the optimizer's state was written by another version of this package: {fields}",
            fix="continue with the version that wrote it, or begin a new run with method.init_from",
        ) from None
    _require_same_run(type(inner).__qualname__, weights, parameters, meta)
    expected = {key: form_of(dtype, parameters[owner_of(key)].shape) for key, dtype in masters.items()}
    saved_masters = [key for key in saved[0] if key.partition(".")[0] in _SAVED_WEIGHTS]
    if expected.keys() != set(saved_masters):
        what = "compensations" if meta.weights == Kahan.kind else "fp32 master weights"
        raise CheckpointError(
            f"the checkpoint holds {len(saved_masters)} {what}, this run has {len(expected)}",
            fix="resume with the model.dtype and method the checkpoint was made with",
        )
    actual = _forms(saved[0] if forms is None else forms, saved[1])
    owners = {owner_of(key) for key in actual if key.startswith("state.")}
    stateless = meta.parameters if meta.stateless is None else meta.stateless
    groups = {name: group for group in inner.param_groups for name in group.get("param_names", ())}
    fresh: dict[tuple[object, ...], dict[str, Any]] = {}
    for name, parameter in parameters.items():
        if name not in owners and name in stateless:
            continue  # it never had a gradient
        group = groups.get(name, inner.param_groups[0])
        alike = (id(group), tuple(parameter.shape))
        if alike not in fresh:
            fresh[alike] = _fresh_state(inner, group, parameter.shape)
        expected |= _forms(*_pack({}, {name: fresh[alike]}))
    problems = [
        f"{key} is {actual.get(key, 'missing')}"
        + (f", not {expected[key]}" if key in expected else ", which nothing reads")
        for key in sorted(expected.keys() | actual.keys())
        if expected.get(key) != actual.get(key)
    ]
    problems += _odd_counts(saved[0], meta)
    problems += _odd_groups(inner, meta)
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise CheckpointError(
            f"the optimizer's state is not one of {type(inner).__name__} over these weights: "
            + "; ".join(problems[:4])
            + more,
            fix="continue with the versions of this package and of the optimizer's library that wrote it, name an"
            " earlier checkpoint in checkpoint.resume, or begin a new run with method.init_from",
        )


def _require_same_run(kind: str, weights: str | None, trained: Iterable[str], meta: _Meta) -> None:
    """Refuse the state of another optimizer, of other parameters, or with another way of keeping 16-bit weights."""
    if kind != meta.class_name:
        raise CheckpointError(
            f"the optimizer is {kind}, the checkpoint's is {meta.class_name}",
            where="optimizer.kind",
            fix="resume with the checkpoint's optimizer, or begin a new run with method.init_from",
        )
    if differing := set(trained) ^ set(meta.parameters):
        raise CheckpointError(
            f"the optimizer trains {len(set(trained))} tensors, the checkpoint's {len(meta.parameters)}; "
            f"on one side only: {', '.join(sorted(differing)[:4])}",
            fix="resume with the model and method the checkpoint was made with",
        )
    if weights not in (None, meta.weights):
        raise CheckpointError(
            f"this run keeps narrow weights by {weights}, the checkpoint by {meta.weights}",
            where=f"optimizer.weights: {weights}",
            fix=f"set optimizer.weights: {meta.weights}, or begin a new run with method.init_from",
        )


def _forms(tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> dict[str, str]:
    """What a state is made of, by name: the dtype and shape of tensors, how they are composed, the kind of numbers."""
    forms = {key: form_of(tensor.dtype, tensor.shape) for key, tensor in tensors.items()}
    forms |= {key: forms.get(first, f"that of {first}, which is missing") for key, first in meta["shared"].items()}
    forms |= {key: json.dumps(form, sort_keys=True) for key, form in meta["composed"].items()}
    for name, values in meta["scalars"].items():
        forms |= {f"state.{name}.{key}": type(value).__name__ for key, value in values.items()}
    return forms


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


def _odd_counts(tensors: Mapping[str, Tensor], meta: _Meta) -> list[str]:
    """Counts of steps that are none."""
    counts = {key: tensors[key] for key in tensors if key.startswith("state.") and key.endswith(".step")}
    numbers: dict[str, Any] = {key: count.item() for key, count in counts.items() if count.numel() == 1}
    numbers |= {f"state.{name}.step": values["step"] for name, values in meta.scalars.items() if "step" in values}
    return [
        f"{key} is {number}"
        for key, number in numbers.items()
        if isinstance(number, int | float) and not (0 <= number <= MOST_STEPS and number == int(number))
    ]


def _odd_groups(inner: torch.optim.Optimizer, meta: _Meta) -> list[str]:
    """Numbers of groups that are no group's, or would take the place of what this run's configuration says."""
    if meta.groups and len(meta.groups) != len(inner.param_groups):
        return [f"it has numbers of {len(meta.groups)} groups of parameters, not of {len(inner.param_groups)}"]
    return [
        f"{key} is a number of a group that no optimizer notes"
        for noted, group in zip(meta.groups, inner.param_groups, strict=False)
        for key in noted
        if key in _NO_GROUP_STATE or not isinstance(group.get(key), int | float | Tensor | None)
    ]


# --------------------------------------------------------------------------------------- what an optimizer is made of


def _inner(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    return optimizer.inner if isinstance(optimizer, LowPrecisionOptimizer) else optimizer


def _by_name(optimizer: torch.optim.Optimizer, parameters: Parameters) -> dict[str, nn.Parameter]:
    """What an optimizer keys its state to, by name, in the order of ``parameters``."""
    known = {
        name: parameter
        for group in optimizer.param_groups
        for name, parameter in zip(group.get("param_names", ()), group["params"], strict=False)
    }
    return {name: known.get(name, parameter) for name, parameter in parameters.items()}


def _saved_weights(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What is kept of 16-bit parameters, by the name it is saved under; the live tensors."""
    if not isinstance(optimizer, LowPrecisionOptimizer):
        return {}
    return {f"{optimizer.policy.label}.{name}": tensor for name, tensor in optimizer.policy.saved.items()}
