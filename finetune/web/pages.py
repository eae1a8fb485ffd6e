"""What the five parts of the page show: each a function of the folder and the address, which are all the state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from finetune.captioning.folder import Row
from finetune.checkpoint.folders import checkpoint_path
from finetune.cogvideox.model_files import HUB_IDS
from finetune.cogvideox.spec import spec_of
from finetune.config.schema import load_config
from finetune.core.errors import FinetuneError
from finetune.datasets.rows import MediaPlace
from finetune.diagnosis.proposal import Proposal, propose
from finetune.reports.report import REPORT, charts, settings, verdict
from finetune.reports.run_folder import read_run
from finetune.web.commands import CAPTION, GENERATE, INIT, SHIP
from finetune.web.commands import REPORT as REPORT_COMMAND
from finetune.web.form import form_of
from finetune.web.plan import DEVICES, Machine, Outlook, outlook
from finetune.web.workspace import ConfigFile, Workspace

Query = Mapping[str, str]

TABS = ("data", "plan", "run", "play", "ship")

_PER_PAGE = 12

_MOST_JOBS = 20

_MOST_VIDEOS = 24

_MOST_COMPARED = 8
"""Runs in one plot: as many as the page has colours."""


def show(workspace: Workspace, tab: str, query: Query, *, again: bool = False) -> dict[str, Any]:
    """The values of a tab's template.

    Args:
        workspace: the folder.
        tab: one of ``TABS``.
        query: of the address; what is missing in it is chosen here.
        again: whether an open page looks again. Only then is the planner started: not for each of several changes.

    Raises:
        FinetuneError: if what the address names cannot be shown.
    """
    shared: dict[str, Any] = {
        "tab": tab,
        "query": dict(query),
        "folder": workspace.roots.workspace,
        "configs": workspace.configs(),
        "config": query.get("config", ""),
        "job": None,
        "live": False,
    }
    if not shared["config"] and shared["configs"]:
        shared["config"] = shared["configs"][0]
    if name := query.get("job"):
        job = workspace.jobs.get(name)
        shared |= {"job": job, "live": job.is_alive}
    shared |= _VIEWS[tab](workspace, {**query, "config": shared["config"]})
    if tab == "plan" and shared["file"] is not None and shared["file"].config is not None:
        machine = Machine(shared["card"], shared["device"])
        found = outlook(workspace.plans, shared["file"].config, shared["config"], machine, start=again)
        shared |= {"outlook": found, "live": found.pending}
    return shared


# ----------------------------------------------------------------------------------------------------------------- data


def _data(workspace: Workspace, query: Query) -> dict[str, Any]:
    folders = workspace.datasets()
    folder = query.get("folder") or next(iter(folders), "")
    values: dict[str, Any] = {"folders": folders, "folder_name": folder, "clips": [], "caption_command": CAPTION}
    values |= {"excluded": [], "pages": 1, "page": 1, "proposal": None, "doctor": "", "fault": ""}
    doctor = workspace.state / "doctor" / f"{Path(query['config']).stem}.html"
    if query["config"] and doctor.is_file():
        values |= {"doctor": workspace.roots.shown(doctor), "doctor_at": doctor.stat().st_mtime_ns}
    if not folder:
        return values
    try:
        rows = workspace.rows(folder).rows
    except FinetuneError as error:
        return values | {"fault": str(error)}
    pages = max(1, -(-len(rows) // _PER_PAGE))
    page = min(pages, max(1, int(number) if (number := query.get("page", "1")).isdecimal() else 1))
    base = workspace.roots.inside(folder, "the folder")
    shown = [_clip(workspace, base, row) for row in rows[(page - 1) * _PER_PAGE : page * _PER_PAGE]]
    values |= {"clips": shown, "count": len(rows), "pages": pages, "page": page}
    values["missing"] = sum(not row.texts[0].strip() for row in rows)
    values["excluded"] = workspace.excluded(folder)
    if query.get("propose") and query["config"]:
        values["proposal"] = _proposal(workspace, folder, query["config"])
    return values


def _clip(workspace: Workspace, base: Path, row: Row) -> dict[str, Any]:
    return {"name": row.file_name, "path": workspace.roots.shown(row.video), "caption": row.texts[0]}


def _proposal(workspace: Workspace, folder: str, config: str) -> Proposal:
    run = workspace.usable(config).config
    assert run is not None
    spec = spec_of(run.model, shipped=True)
    return propose(workspace.roots.inside(folder, "the folder"), spec, 2, MediaPlace.of(run.cache.dir))


# ----------------------------------------------------------------------------------------------------------------- plan


def _plan(workspace: Workspace, query: Query) -> dict[str, Any]:
    values: dict[str, Any] = {"init": INIT, "models": [*HUB_IDS], "devices": DEVICES, "datasets": workspace.datasets()}
    values |= {
        "card": query.get("card", ""),
        "device": query.get("device", ""),
        "file": None,
        "file_fault": "",
        "sections": [],
    }
    values["outlook"] = Outlook()
    if not query["config"]:
        return values
    try:
        file = workspace.config(query["config"])
    except FinetuneError as error:
        return values | {"file_fault": str(error)}
    values |= {"file": file, "sections": [] if file.document is None else form_of(file.document)}
    return values


# ------------------------------------------------------------------------------------------------------------------ run


def _run(workspace: Workspace, query: Query) -> dict[str, Any]:
    jobs = workspace.jobs.all()[:_MOST_JOBS]
    runs = workspace.runs()
    run = query.get("run") or _run_of(workspace, query["config"], runs)
    values: dict[str, Any] = {
        "jobs": jobs,
        "runs": runs,
        "run": run,
        "beside": [],
        "record": None,
        "run_fault": "",
        "report_command": REPORT_COMMAND,
    }
    values["live"] = any(job.is_alive for job in jobs)
    if not run:
        return values
    folder = workspace.roots.inside(run, "the run")
    try:
        record = read_run(folder, run)
    except FinetuneError as error:
        return values | {"run_fault": str(error)}
    records = {run: record}
    for name in filter(None, query.get("beside", "").split("\n")):
        place = workspace.roots.inside(name, "a run to compare")
        try:
            records |= {} if name in records else {name: read_run(place, name)}
        except FinetuneError as error:
            values["run_fault"] = str(error)
    if len(records) > _MOST_COMPARED:
        values["run_fault"] = f"{_MOST_COMPARED} runs at most are compared: the others are left out"
        records = dict([*records.items()][:_MOST_COMPARED])
    compared = [*records.values()]
    shown = sorted(record.samples, key=lambda sample: (-sample.step, sample.number))[:_MOST_VIDEOS]
    prompts = record.config.validation.samples
    values |= {
        "beside": [*records][1:],
        "record": record,
        "verdicts": [(name, verdict(other)) for name, other in records.items()],
        "charts": charts(compared),
        "settings": settings(compared) if len(compared) > 1 else [],
        "samples": [
            {
                "path": workspace.roots.shown(sample.path),
                "step": sample.step,
                "prompt": prompts[sample.number].prompt if sample.number < len(prompts) else "",
            }
            for sample in shown
        ],
        "checkpoints": [workspace.roots.shown(checkpoint_path(folder, step)) for step in record.checkpoints],
        "report": workspace.roots.shown(folder / REPORT) if (folder / REPORT).is_file() else "",
        "of_config": _config_of(workspace, folder),
    }
    return values


def _run_of(workspace: Workspace, config: str, runs: list[str]) -> str:
    """The run that a configuration writes, if it is there; else the newest."""
    if config:
        try:
            file: ConfigFile | None = workspace.config(config)
        except FinetuneError:
            file = None
        if file is not None and file.config is not None:
            name = workspace.roots.shown(file.config.output_dir)
            if name in runs:
                return name
    return next(iter(runs), "")


def _config_of(workspace: Workspace, run: Path) -> str:
    """The configuration in the workspace that writes a run, for going on with it."""
    for name in workspace.configs():
        try:
            if load_config(workspace.roots.inside(name, "")).output_dir.resolve() == run.resolve():
                return name
        except FinetuneError:
            continue
    return ""


# ------------------------------------------------------------------------------------------------------- play and ship


_WHOLE = "[!.]*"
"""Files but those that are being written, whose names begin with a dot."""


def _play(workspace: Workspace, query: Query) -> dict[str, Any]:
    folder = query.get("videos") or "videos"
    written: dict[Path, float] = {}
    for path in workspace.roots.inside(folder, "the folder").glob(_WHOLE):
        if path.suffix in (".mp4", ".gif", ".png"):
            with suppress(OSError):  # it may have gone since the folder was listed
                written[path] = path.stat().st_mtime
    files = sorted(written, key=lambda path: -written[path])
    uploads = workspace.roots.workspace / "uploads"
    return {
        "command": GENERATE,
        "adapters": workspace.adapters(),
        "videos": folder,
        "files": [workspace.roots.shown(path) for path in files[:_MOST_VIDEOS]],
        "uploads": [workspace.roots.shown(path) for path in sorted(uploads.glob(_WHOLE))],
    }


def _ship(workspace: Workspace, query: Query) -> dict[str, Any]:
    adapters = workspace.adapters()
    exports = [name for name in adapters if name.endswith("/export")]
    jobs = [job for job in workspace.jobs.all() if job.words[0] in {command.verb for command in SHIP}]
    return {"commands": SHIP, "adapters": adapters, "exports": exports, "jobs": jobs[:_MOST_JOBS]}


_VIEWS: Mapping[str, Callable[[Workspace, Query], dict[str, Any]]] = {
    "data": _data,
    "plan": _plan,
    "run": _run,
    "play": _play,
    "ship": _ship,
}
