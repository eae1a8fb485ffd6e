"""Arguments of the library's functions, checked as strictly as a configuration is."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ParamSpec, TypeVar, get_type_hints

P = ParamSpec("P")
R = TypeVar("R")


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Refuse arguments of a wrong type as one ``ConfigError``; a configuration is checked by whoever reads it."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        import inspect

        from pydantic import ConfigDict, create_model

        from finetune.config.document import Document
        from finetune.config.schema import validate
        from finetune.core import types

        bound = inspect.signature(function).bind(*args, **kwargs)  # TypeError for words that the function does not have
        given = {name: value for name, value in bound.arguments.items() if name != "config"}
        annotated = SimpleNamespace(__annotations__={name: function.__annotations__[name] for name in given})
        hints = get_type_hints(annotated, {**vars(types), **function.__globals__, "StepRecord": Any})
        fields: dict[str, Any] = {name: (hint, ...) for name, hint in hints.items()}
        model = create_model(function.__name__, __config__=ConfigDict(strict=True, allow_inf_nan=False), **fields)
        bound.arguments.update(dict(validate(model, Document(given, name=f"{function.__name__}()"))))
        return function(*bound.args, **bound.kwargs)

    return call
