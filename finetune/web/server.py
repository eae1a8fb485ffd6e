"""The page's server: addresses to tabs, buttons to actions, files to bytes. All it knows is on the disk."""

from __future__ import annotations

import secrets
import socket
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import uvicorn
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route

from finetune.core.errors import ConfigError, FinetuneError
from finetune.core.text import shown
from finetune.web.access import (
    MOST_FORM_BYTES,
    SANDBOX,
    AccessMiddleware,
    AccessPolicy,
    Roots,
    TooLargeError,
    is_loopback,
)
from finetune.web.actions import ACTIONS
from finetune.web.pages import TABS, show
from finetune.web.workspace import SHOWN, STATE, Workspace

_TEMPLATES = Path(__file__).parent.parent / "templates"

_ASSETS = {"ui.css": "text/css", "ui.js": "text/javascript"}

_MOST_FIELDS = 200


def application(workspace: Workspace, policy: AccessPolicy) -> AccessMiddleware:
    """The ASGI application."""
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"shown": lambda value: shown(str(value)), "query": urlencode}

    def page(
        tab: str, query: Mapping[str, str], fault: str = "", form: Mapping[str, str] | None = None, again: bool = False
    ) -> Response:
        """A tab; with what was wrong with a button, and what stood in its form; or looked at again."""
        query = {name: value for name, value in query.items() if value}
        note = query.pop("note", "")
        try:
            values = show(workspace, tab, query, again=again)
        except FinetuneError as error:
            fault = fault or str(error)
            try:
                values = show(workspace, tab, {})
            except FinetuneError:
                return PlainTextResponse(fault, 422)
        values |= {"tabs": TABS, "fault_text": fault, "note": note, "form": form or {}}
        values["address"] = urlencode({**query, "config": values["config"]})
        html = environment.get_template(f"ui_{tab}.html").render(**values)
        return HTMLResponse(html, 422 if fault else 200)

    async def root(request: Request) -> Response:
        return RedirectResponse("/data" if workspace.configs() or workspace.datasets() else "/plan", 303)

    async def tab(request: Request) -> Response:
        name = request.path_params["tab"]
        if name not in TABS:
            raise HTTPException(404)
        again = "x-finetune-again" in request.headers
        query = dict(request.query_params)
        if "beside" in query:  # of several ticks
            query["beside"] = "\n".join(request.query_params.getlist("beside"))
        return await run_in_threadpool(page, name, query, again=again)

    async def act(request: Request) -> Response:
        name, action = request.path_params["tab"], request.path_params["action"]
        if (name, action) not in ACTIONS:
            raise HTTPException(404)
        query = dict(request.query_params)
        query.pop("note", None)
        async with request.form(max_files=0, max_fields=_MOST_FIELDS, max_part_size=MOST_FORM_BYTES) as fields:
            form = {key: value for key, value in fields.items() if isinstance(value, str)}
        try:
            query |= await run_in_threadpool(ACTIONS[name, action], workspace, query, form)
        except FinetuneError as error:
            return await run_in_threadpool(page, name, query, str(error), form)
        return _to(name, query)

    async def upload(request: Request) -> Response:
        """Files of a form, to a folder."""
        name, query = request.query_params.get("tab", ""), dict(request.query_params)
        if name not in TABS:
            raise HTTPException(404)
        names = []
        async with request.form(max_files=50, max_fields=10) as form:
            folder = str(form.get("folder") or "uploads")
            try:
                place = workspace.roots.inside(folder, "the folder")
                if place == workspace.roots.workspace / "uploads":
                    place.mkdir(exist_ok=True)
                for file in form.getlist("file"):
                    if isinstance(file, UploadFile):
                        args = (folder, file.filename or "", file.file)
                        names.append(workspace.roots.shown(await run_in_threadpool(workspace.upload, *args)))
            except FinetuneError as error:
                return await run_in_threadpool(page, name, query, str(error))
        return _to(name, query | {"note": f"uploaded: {', '.join(names) or 'nothing'}"})

    async def file(request: Request) -> Response:
        """A video, a picture or a page out of the folders."""
        try:
            path = await run_in_threadpool(workspace.media, request.query_params.get("path", ""))
        except FinetuneError as error:
            return PlainTextResponse(str(error), 404)
        kind = SHOWN[path.suffix.lower()]
        return FileResponse(path, media_type=kind, headers={"Content-Security-Policy": SANDBOX})

    async def asset(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in _ASSETS:
            raise HTTPException(404)
        return FileResponse(_TEMPLATES / name, media_type=_ASSETS[name])

    routes = [
        Route("/", root),
        Route("/assets/{name}", asset),
        Route("/file", file),
        Route("/upload", upload, methods=["POST"]),
        Route("/{tab}", tab),
        Route("/{tab}/{action}", act, methods=["POST"]),
    ]
    handlers: Any = {HTTPException: _http_fault, TooLargeError: _too_large, Exception: _bug}
    return AccessMiddleware(Starlette(routes=routes, exception_handlers=handlers), policy)


def _to(tab: str, query: Mapping[str, str]) -> Response:
    rest = urlencode({name: value for name, value in query.items() if value and name != "tab"})
    return RedirectResponse(f"/{tab}" + (f"?{rest}" if rest else ""), 303)


async def _http_fault(request: Request, error: Exception) -> Response:
    code = error.status_code if isinstance(error, HTTPException) else 400
    return PlainTextResponse("there is no such page" if code == 404 else "the request cannot be read", code)


async def _too_large(request: Request, error: Exception) -> Response:
    return PlainTextResponse(f"refused: {error}", 413)


async def _bug(request: Request, error: Exception) -> Response:
    """What went wrong is for the terminal; the browser learns that it did."""
    traceback.print_exception(error, file=sys.stderr)
    return PlainTextResponse("Something failed in the page. What runs goes on; the terminal says more.", 500)


def serve(folder: Path, others: Sequence[Path], policy: AccessPolicy, port: int) -> None:
    """Serve the page until SIGINT or SIGTERM; commands that run go on.

    Args:
        folder: the workspace.
        others: further folders that may be read and written.
        policy: who is let in; a token is made where other machines can connect and there is none.
        port: 0 for a free one.

    Raises:
        ConfigError: if a folder is none, or the port is taken.
    """
    for place in (folder, *others):
        if not place.expanduser().is_dir():
            raise ConfigError("there is no such folder", where=str(place), fix="make it, or name another")
    if not policy.token and not is_loopback(policy.host):
        policy = AccessPolicy(policy.host, secrets.token_urlsafe(24), policy.most_upload_bytes)
    workspace = Workspace(Roots(folder.expanduser(), others), policy.most_upload_bytes)
    family = socket.AF_INET6 if ":" in policy.host else socket.AF_INET
    try:
        listener = socket.create_server((policy.host.strip("[]"), port), family=family)
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(
            f"cannot listen: {reason}", where=f"{policy.host}:{port}", fix="choose another --port"
        ) from None
    (workspace.state).mkdir(exist_ok=True)
    name = f"[{policy.host}]" if ":" in policy.host else policy.host
    name = socket.gethostname() if policy.host in ("0.0.0.0", "::") else name
    token = f"?token={policy.token}" if policy.token else ""
    print(f"http://{name}:{listener.getsockname()[1]}/{token}", flush=True)
    print(f"for {workspace.roots.workspace}; Ctrl-C ends the page, and not what runs ({STATE}/jobs)", flush=True)
    config = uvicorn.Config(
        application(workspace, policy),
        log_level="critical",
        server_header=False,
        proxy_headers=False,
        lifespan="off",
        timeout_graceful_shutdown=1,
    )
    uvicorn.Server(config).run(sockets=[listener])
