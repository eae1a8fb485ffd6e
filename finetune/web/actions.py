"""What the page's buttons do: a change of a file, or a command that is started; and where the page goes next."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from finetune.core.errors import ConfigError
from finetune.web.commands import COMMANDS
from finetune.web.workspace import STATE, Workspace

Values = Mapping[str, str]

Next = dict[str, str]
"""What changes in the address."""


def _start_command(workspace: Workspace, query: Values, form: Values) -> Next:
    verb = form.get("verb", "")
    if verb not in COMMANDS:
        raise ConfigError("there is no such command", where=f"{verb:.40}")
    command = COMMANDS[verb]
    words = command.words(form, workspace.roots)
    job = workspace.jobs.start(words, label=form.get("output", "")[:200], in_line=command.in_line)
    return {"job": job.name, **({"videos": form.get("output") or "videos"} if verb == "generate" else {})}


def _init(workspace: Workspace, query: Values, form: Values) -> Next:
    words = COMMANDS["init"].words(form, workspace.roots)
    job = workspace.jobs.run(words, label=form.get("output", "")[:200])
    if job.state != "done":
        raise ConfigError(job.log.strip().removeprefix("error: ") or "the file was not written")
    return {"config": form.get("output", ""), "card": form.get("card", ""), "note": job.log.strip()[:2000]}


def _set_field(workspace: Workspace, query: Values, form: Values) -> Next:
    workspace.put(_config(query), form.get("field", ""), form.get("value", ""), form.get("before", ""))
    return {}


def _set_text(workspace: Workspace, query: Values, form: Values) -> Next:
    workspace.write(_config(query), form.get("text", ""), form.get("digest", ""))
    return {"note": "saved"}


def _set_memory(workspace: Workspace, query: Values, form: Values) -> Next:
    workspace.put_section(_config(query), "memory", form.get("value", ""))
    return {"note": "the memory section is written"}


def _set_buckets(workspace: Workspace, query: Values, form: Values) -> Next:
    workspace.put_section(_config(query), "data.buckets", form.get("value", ""))
    return {"note": f"data.buckets is written into {_config(query)}", "propose": ""}


def _add_sample(workspace: Workspace, query: Values, form: Values) -> Next:
    file = workspace.config(_config(query))
    samples = file.document.value(("validation", "samples")) if file.document else None
    count = len(samples) if isinstance(samples, list) else 0
    field = f"validation.samples.{count}" if count else "validation.samples"
    row = f"{{prompt: a short description of what is to be seen, seed: {count}}}"
    workspace.put_section(_config(query), field, row if count else f"[{row}]")
    return {}


def _start_run(workspace: Workspace, query: Values, form: Values) -> Next:
    verb = form.get("verb", "")
    if verb not in ("precompute", "train"):
        raise ConfigError("there is no such command", where=f"{verb:.40}")
    name = form.get("config", "")
    config = workspace.usable(name).config
    assert config is not None
    for plan in workspace.plans.all():  # what a run needs now is not for predictions
        plan.stop()
    words = [verb, f"--config={workspace.roots.shown(workspace.roots.inside(name, 'the configuration'))}"]
    label = workspace.roots.shown(config.output_dir)
    job = workspace.jobs.start(words, label=label, in_line=not form.get("beside"))
    return {"job": job.name, "config": name, "run": "", "beside": ""}


def _stop(workspace: Workspace, query: Values, form: Values) -> Next:
    workspace.jobs.get(form.get("stop", "")).stop()
    return {}


def _doctor(workspace: Workspace, query: Values, form: Values) -> Next:
    name = form.get("config", "")
    workspace.usable(name)
    file = workspace.roots.shown(workspace.roots.inside(name, "the configuration"))
    page = Path(STATE) / "doctor" / f"{Path(name).stem}.html"
    (workspace.roots.workspace / page.parent).mkdir(parents=True, exist_ok=True)
    words = ["doctor", f"--config={file}", f"--output={page}"]
    job = workspace.jobs.start(words, label=name, in_line=False)
    return {"job": job.name, "config": name}


def _caption(workspace: Workspace, query: Values, form: Values) -> Next:
    workspace.caption(_folder(query), form.get("clip", ""), form.get("caption", ""), form.get("before", ""))
    return {"note": f"saved: {form.get('clip', '')}"}


def _exclude(workspace: Workspace, query: Values, form: Values) -> Next:
    workspace.exclude(_folder(query), form.get("clip", ""))
    return {"note": f"taken out: {form.get('clip', '')}; it stands below, and can come back"}


def _take_back(workspace: Workspace, query: Values, form: Values) -> Next:
    workspace.take_back(_folder(query), form.get("clip", ""))
    return {"note": f"back: {form.get('clip', '')}"}


def _config(query: Values) -> str:
    if name := query.get("config"):
        return name
    raise ConfigError("no configuration is chosen", fix="choose one above")


def _folder(query: Values) -> str:
    if name := query.get("folder"):
        return name
    raise ConfigError("no folder is chosen", fix="choose one above")


ACTIONS: Mapping[tuple[str, str], Callable[[Workspace, Values, Values], Next]] = {
    ("data", "caption"): _caption,
    ("data", "exclude"): _exclude,
    ("data", "take-back"): _take_back,
    ("data", "doctor"): _doctor,
    ("data", "buckets"): _set_buckets,
    ("data", "command"): _start_command,
    ("plan", "init"): _init,
    ("plan", "field"): _set_field,
    ("plan", "text"): _set_text,
    ("plan", "memory"): _set_memory,
    ("plan", "sample"): _add_sample,
    ("run", "start"): _start_run,
    ("run", "stop"): _stop,
    ("run", "command"): _start_command,
    ("play", "command"): _start_command,
    ("play", "stop"): _stop,
    ("ship", "command"): _start_command,
    ("ship", "stop"): _stop,
    ("data", "stop"): _stop,
}
