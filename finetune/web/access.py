"""Who may ask the page, and which files it touches.

A browser runs everybody's scripts, and sends requests to this machine for any of them. So a request has to name this
machine (against DNS rebinding), anything that acts has to come from the page itself (against cross-site requests),
and where other machines can connect, a token is asked for. The page's own policy lets it run no script but its own,
frame nothing that acts, and reach no other host.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from urllib.parse import parse_qs, urlencode, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from finetune.config.schema import RunConfig
from finetune.core.errors import ConfigError, raise_all
from finetune.core.text import text_fault

COOKIE = "finetune-token"

MOST_FORM_BYTES = 4 << 20
"""Of a request that is no upload: a configuration has at most 1 MiB, which a form may write as three."""

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; media-src 'self';"
    " connect-src 'self'; frame-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'self'"
)

SANDBOX = (
    "sandbox allow-scripts; default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
)
"""For a page out of a folder (a report, the doctor's): it may run, as nobody, and reach nothing."""

_MOST_PATH = 1000
"""Characters."""

_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",  # a token stands in the first address
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


# ------------------------------------------------------------------------------------------------------------- requests


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to ``host``."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


@dataclass(frozen=True)
class AccessPolicy:
    """Who is let in."""

    host: str
    """What the server listens on."""
    token: str = ""
    """What has to be known; empty for nothing."""
    most_upload_bytes: int = 0

    def names_us(self, host: str) -> bool:
        """Whether a request's ``Host`` means this machine: a name that a stranger may have pointed here does not."""
        try:
            name = (urlsplit(f"//{host}").hostname or "").lower()
        except ValueError:
            return False
        if is_loopback(self.host):
            return is_loopback(name)
        try:
            ipaddress.ip_address(name)  # an address is nobody's name, and cannot be pointed elsewhere
            return True
        except ValueError:
            ours = {"localhost", self.host, socket.gethostname(), socket.getfqdn()}
            return name in {name.lower() for name in ours}

    def refusal(self, method: str, headers: Headers) -> str:
        """Why a request is refused, or nothing."""
        host = headers.get("host", "")
        if len(headers.getlist("host")) != 1 or not self.names_us(host):
            return "this is not the name of the machine that the page runs on: use localhost, or its address"
        site, mode = headers.get("sec-fetch-site", "none"), headers.get("sec-fetch-mode", "navigate")
        if method not in ("GET", "HEAD"):
            origin = urlsplit(headers.get("origin", ""))
            if origin.scheme not in ("http", "https") or origin.netloc != host or site not in ("none", "same-origin"):
                return "only the page itself may ask for this"
        elif site in ("cross-site", "same-site") and (
            mode != "navigate" or headers.get("sec-fetch-dest") != "document"
        ):
            return "another site may lead here, and not look inside"
        return ""

    def knows(self, word: str) -> bool:
        """Whether a word is the token; takes as long for a near miss as for any other word."""
        ours, theirs = (hashlib.sha256(text.encode("utf-8", "replace")).digest() for text in (self.token, word))
        return not self.token or hmac.compare_digest(ours, theirs)


class AccessMiddleware:
    """The policy as ASGI middleware; adds the headers to every answer."""

    def __init__(self, app: ASGIApp, policy: AccessPolicy) -> None:
        self._app, self._policy = app, policy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return  # there are no web sockets here

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                answer = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    answer.setdefault(name, value)
            await send(message)

        response = self._answer(scope)
        if response is not None:
            await response(scope, receive, send_with_headers)
            return
        limit = self._policy.most_upload_bytes if scope["path"] == "/upload" else MOST_FORM_BYTES
        await self._app(scope, _bounded(receive, limit), send_with_headers)

    def _answer(self, scope: Scope) -> Response | None:
        """What a request is answered with here; None if it may pass."""
        headers = Headers(scope=scope)
        if refused := self._policy.refusal(scope["method"], headers):
            return PlainTextResponse(f"refused: {refused}", 403)
        limit = self._policy.most_upload_bytes if scope["path"] == "/upload" else MOST_FORM_BYTES
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > limit:
            return PlainTextResponse(f"refused: more than {limit:,} bytes", 413)
        query = parse_qs(scope["query_string"].decode("latin-1"))
        if self._policy.token and "token" in query:
            if not self._policy.knows(query["token"][0]):
                return PlainTextResponse("refused: this is not the token", 403)
            rest = urlencode({name: values for name, values in query.items() if name != "token"}, doseq=True)
            response = RedirectResponse(f"/{scope['path'].lstrip('/')}" + (f"?{rest}" if rest else ""), 303)
            response.set_cookie(COOKIE, query["token"][0], httponly=True, samesite="strict")
            return response
        if not self._policy.knows(_cookie(headers)):
            return PlainTextResponse("refused: open the address with the token, which `finetune ui` printed", 401)
        return None


def _cookie(headers: Headers) -> str:
    try:
        morsel = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return ""
    return "" if morsel is None else morsel.value


class TooLargeError(Exception):
    """A request's body is beyond what its address takes."""


def _bounded(receive: Receive, limit: int) -> Receive:
    """``receive`` for bodies that do not say how long they are."""
    count = 0

    async def counted() -> Message:
        nonlocal count
        message = await receive()
        count += len(message.get("body", b""))
        if count > limit:
            raise TooLargeError(f"more than {limit:,} bytes")
        return message

    return counted


# ---------------------------------------------------------------------------------------------------------------- files


class Roots:
    """The folders that the page reads and writes: the one it was started for, and those that were named beside it.

    Args:
        workspace: where relative paths start.
        others: further folders.
    """

    def __init__(self, workspace: Path, others: Sequence[Path] = ()) -> None:
        self.workspace = workspace.resolve()
        self._real = [self.workspace, *(other.expanduser().resolve() for other in others)]

    def holds(self, path: Path) -> bool:
        """Whether a path lies in one of the folders with every link followed."""
        return any(path.resolve().is_relative_to(root) for root in self._real)

    def inside(self, path: str | Path, field: str) -> Path:
        """A path as it was given, absolute, if it lies in one of the folders with every link followed.

        Args:
            path: relative to the workspace, or absolute.
            field: what it was given as, for the message.

        Raises:
            ConfigError: if it leads out, or is no path.
        """
        text = str(path).strip()
        if not text or len(text) > _MOST_PATH or text_fault(text, one_line=True):
            raise ConfigError("this is no path", where=field, fix="name a file or folder")
        try:
            joined = self.workspace / Path(text).expanduser()
            real = joined.resolve()
        except (OSError, RuntimeError, ValueError):
            raise ConfigError(f"{text:.200} is no path that can be followed", where=field) from None
        if not self.holds(real):
            raise ConfigError(
                f"{text:.200} lies outside of the folders that the page may use",
                where=field,
                fix="start `finetune ui` in a folder that holds it, or with --allow and that folder",
            )
        return Path(os.path.normpath(joined)) if Path(os.path.normpath(joined)).resolve() == real else joined

    def require_config(self, config: RunConfig) -> None:
        """Refuse a configuration that would have a run read or write outside of the folders.

        Raises:
            ConfigError: for all its paths that do.
        """
        faults = []
        for name, path in _paths(config.model_dump(mode="python"), ""):
            try:
                self.inside(path, config.where(name))
            except ConfigError as fault:
                faults.append(fault)
        for index, source in enumerate(config.data.sources):
            if source.allow_outside:
                where = config.where(f"data.sources.{index}.allow_outside")
                fix = "take it out, or train from the command line"
                faults.append(
                    ConfigError("a list may not name files outside of the folders here", where=where, fix=fix)
                )
        raise_all(ConfigError, faults, what="{n} paths of the configuration cannot be used here")

    def shown(self, path: Path) -> str:
        """A path as the page writes it: relative where it lies in the workspace, and no command reads it otherwise."""
        try:
            text = str(path.relative_to(self.workspace))
        except ValueError:
            return str(path)
        return str(path) if text.startswith("~") else text  # a command would take it for somebody's home


def _paths(value: object, name: str) -> Iterable[tuple[str, Path]]:
    """Every path in a configuration's values, and the base model where it is a folder."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _paths(item, f"{name}.{key}".lstrip("."))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _paths(item, f"{name}.{index}")
    elif isinstance(value, Path) or (name == "model.pretrained" and Path(str(value)).is_absolute()):
        yield name, Path(str(value))
