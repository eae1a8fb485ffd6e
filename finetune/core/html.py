"""Pages that are whole in themselves: a template whose style and script are its own, and a policy that allows no more.

Pictures and videos are data URLs. The page's Content-Security-Policy names the style and the script by their digests
and forbids everything else, so that text from a dataset or a run can neither act nor fetch.
"""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.core.text import shown

if TYPE_CHECKING:
    from jinja2 import Template


def render(template: Path, filters: Mapping[str, Callable[..., Any]], **values: Any) -> str:
    """A template with its values, every one escaped.

    Args:
        template: a Jinja file with one ``style`` and one ``script`` element, in whose policy ``style_digest`` and
            ``script_digest`` stand.
        filters: further filters; ``shown`` is ``core.text.shown``.
        values: what the template names.
    """
    return _compiled(template, tuple(filters.items())).render(**values)


@functools.cache
def _compiled(template: Path, filters: tuple[tuple[str, Callable[..., Any]], ...]) -> Template:
    """The template with its digests; compiling takes several times as long as filling it in."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"shown": lambda value: shown(str(value)), **dict(filters)}
    source = template.read_text(encoding="utf-8")
    style, script = (_between(source, f"<{tag}>", f"</{tag}>") for tag in ("style", "script"))
    return environment.from_string(source, globals={"style_digest": _digest(style), "script_digest": _digest(script)})


def data_url(content: bytes, kind: str) -> str:
    """Bytes as an address that holds them; ``kind`` such as ``image/webp``."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _between(text: str, begin: str, end: str) -> str:
    return text.partition(begin)[2].partition(end)[0]


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
