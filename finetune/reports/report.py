"""``report.html``: what a run, or several, came to: a verdict, curves, samples, clips and settings."""

from __future__ import annotations

import io
import json
import logging
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from finetune.checkpoint.compare import flat
from finetune.checkpoint.folders import Measurement, best_of, checkpoint_path, outcome
from finetune.config.schema import RunConfig
from finetune.core import html
from finetune.core.errors import FinetuneError, first_line
from finetune.core.files import atomic_write_bytes, atomic_write_text, from_here
from finetune.core.types import RunState
from finetune.reports.charts import Chart, Line, smoothed
from finetune.reports.run_folder import RunRecord, SampledVideo, read_runs

_log = logging.getLogger(__name__)

REPORT = "report.html"

TEMPLATE = Path(__file__).parent.parent / "templates" / "report.html"

_KEPT = "report"
"""Folder beside the report for the small pictures that it is made of: each is made once."""

_MOST_COLUMNS = 6
"""Steps that samples are shown of."""

_MOST_CLIPS = 24

_MOST_ROWS = 2000
"""Rows of a dataset whose headers are read for its pictures."""

_SIDE = 256
"""Longest side of a picture that moves."""


# ------------------------------------------------------------------------------------------------------------ in words


@dataclass(frozen=True)
class Verdict:
    """What the measurements come to."""

    kind: str
    """What ``outcome`` gives, or ``unmeasured``: the page colours by it."""
    text: str
    advice: str
    command: str
    """Exports what is best; empty where nothing is worth it."""


def verdict(run: RunRecord) -> Verdict:
    """What the held-out loss says of a run, and what to do."""
    export = ["finetune", "export", from_here(run.folder)]
    history = run.history
    best = best_of(history, RunState(run.step, ""))
    if best is None:
        return Verdict(
            "unmeasured",
            "Nothing measured whether the last step is the best one.",
            "Hold clips out (data.holdout: 0.1, and validation.every); until then, compare the samples.",
            shlex.join(export),
        )
    step, loss = best
    if history[-1].step != step:
        kept = checkpoint_path(run.folder, step).is_dir()
        export = [*export[:2], from_here(checkpoint_path(run.folder, step)) if kept else export[2]]
    kind, last = outcome(history, best), history[-1]
    text, advice = {
        "learning": (
            f"Still learning: the held-out loss is lowest at the last step measured, {last.step}, with {loss:.4f}.",
            "Go on: raise train.steps and give the same command, which continues the run.",
        ),
        "still": (
            f"Not moving: after {last.step} steps neither loss has moved by a thousandth.",
            "Raise optimizer.lr (2e-4, then 5e-4 for a LoRA); see whether the captions name what is new.",
        ),
        "diverged": (
            f"Diverged: the held-out loss was {history[0].heldout:.4f} at step 0 and {loss:.4f} at best since; training"
            f" clips went from {history[0].trainsubset:.4f} to {last.trainsubset:.4f} as well.",
            "Begin anew with a tenth of optimizer.lr; nothing here is worth an export.",
        ),
        "level": (
            f"No longer improving: step {step} has {loss:.4f}, and step {last.step}, the last one measured, as much.",
            "Enough steps. For more, add clips, or try another learning rate or rank.",
        ),
        "memorising": (
            f"Memorising since step {step}: the held-out loss rose from {loss:.4f} to {last.heldout:.4f}, while"
            " training clips went on improving.",
            f"Take step {step}. For more, add clips, lower the rank, or stop earlier.",
        ),
        "worse": (
            f"Getting worse since step {step}, on training clips as well: from {loss:.4f} to {last.heldout:.4f}.",
            f"Take step {step}, or begin again with half the learning rate.",
        ),
    }[kind]
    if history[0].step == 0 and history[0].heldout <= loss and kind not in ("still", "diverged"):
        text += f" No step was better than the base model, with {history[0].heldout:.4f}."
    return Verdict(kind, text, advice, "" if kind == "diverged" else shlex.join(export))


# -------------------------------------------------------------------------------------------------------------- curves


def charts(runs: Sequence[RunRecord]) -> list[Chart]:
    """The curves of one run, or of several in one plot each."""
    several = len(runs) > 1
    plots = [_losses(runs)]
    raw = Chart(
        "training loss",
        [line for number, run in enumerate(runs) for line in _smooth(run, "train/loss", number)],
        note="Smoothed. Its scatter is the luck of the timesteps: it shows that nothing exploded, not that it learns.",
    )
    plots.append(raw)
    if not several:
        (run,) = runs
        names = sorted(name for name in run.metrics if name.startswith("train/loss/"))
        bands = [Line(name.rpartition("/")[2], smoothed(run.metrics[name]), color) for color, name in enumerate(names)]
        plots.append(Chart("loss by timestep", bands, note="Low t is fine detail, high t is layout and motion."))
    for title, name, unit, note in (
        (
            "gradient norm",
            "train/grad_norm",
            "",
            "Before clipping. Flat is good; a steady climb is too high a rate.",
        ),
        ("learning rate", "train/lr", "", ""),
        ("seconds per step", "perf/s_per_step", "s", ""),
    ):
        lines = [line for number, run in enumerate(runs) for line in _smooth(run, name, number)]
        plots.append(Chart(title, lines, unit, note))
    plots.append(_memory(runs))
    return [chart for chart in plots if any(line.points for line in chart.lines)]


def _smooth(run: RunRecord, name: str, color: int) -> Iterator[Line]:
    points = run.metrics.get(name, [])
    noisy = len(points) > 20 and name != "train/lr"
    if noisy:
        yield Line(run.name, points, color, faint=True)
    yield Line(run.name, smoothed(points) if noisy else points, color)


def _losses(runs: Sequence[RunRecord]) -> Chart:
    lines = []
    for number, run in enumerate(runs):
        label = f"{run.name}: " if len(runs) > 1 else ""
        lines.append(Line(f"{label}held out", [(row.step, row.heldout) for row in run.history], number))
        subset = [(row.step, row.trainsubset) for row in run.history]
        lines.append(Line(f"{label}training clips", subset, number, dashed=True))
    best = best_of(runs[0].history, RunState(runs[0].step, "")) if len(runs) == 1 else None
    note = "The same clips, timesteps and noise each time. Between the two lines is the gap: growing, it is memorising."
    return Chart("held-out loss", lines, note=note, mark=None if best is None else (best[0], f"best, {best[0]}"))


def _memory(runs: Sequence[RunRecord]) -> Chart:
    lines = []
    for number, run in enumerate(runs):
        points = run.metrics.get("perf/peak_gib", [])
        lines.append(Line(run.name if len(runs) > 1 else "most so far", points, number))
        predicted = run.latest("perf/predicted_peak_gib")
        if predicted and points:
            ends = [(points[0][0], predicted), (points[-1][0], predicted)]
            lines.append(Line(f"{run.name}: predicted" if len(runs) > 1 else "predicted", ends, number, dashed=True))
    return Chart("peak memory", lines, "GiB", "Allocated on the GPU, or resident where there is none.")


# ------------------------------------------------------------------------------------------------------------- pictures


@dataclass(frozen=True)
class Moving:
    """A small picture that moves while the pointer is on it."""

    poster: str
    """Data URL of its first frame."""
    clip: str
    """Data URL of the whole, empty where it has one frame."""
    label: str


def columns(run: RunRecord, most: int = _MOST_COLUMNS) -> list[tuple[int, str]]:
    """Steps whose samples are shown, and what each is: the base, the best measured one, the last, others between."""
    steps = sorted({sample.step for sample in run.samples})
    if not steps:
        return []
    best = best_of(run.history, RunState(run.step, ""))
    nearest = None if best is None else min(steps, key=lambda step: (abs(step - best[0]), step))
    chosen = {steps[0], steps[-1], *([] if nearest is None else [nearest])}
    between = [step for step in steps if step not in chosen]
    spread = np.linspace(0, len(between) - 1, max(0, min(most - len(chosen), len(between)))).round().astype(int)
    chosen |= {between[index] for index in spread}
    words = {"base": 0, "best": nearest, "now": steps[-1]}
    return [(step, ", ".join(word for word, at in words.items() if at == step)) for step in sorted(chosen)]


def sample_rows(run: RunRecord, most: int = _MOST_COLUMNS) -> list[dict[str, Any]]:
    """A row per prompt, a moving picture per column."""
    wanted = [step for step, _ in columns(run, most)]
    by_place = {(sample.number, sample.step): sample for sample in run.samples}
    rows = []
    for number in sorted({sample.number for sample in run.samples}):
        prompts = run.config.validation.samples
        text = prompts[number].prompt if number < len(prompts) else f"prompt {number}"
        cells = [by_place.get((number, step)) for step in wanted]
        rows.append({"prompt": text, "cells": [None if cell is None else _moving(run, cell) for cell in cells]})
    return rows


def _moving(run: RunRecord, sample: SampledVideo) -> Moving | None:
    kept = run.folder / _KEPT / f"{sample.step:08d}-{sample.path.stem}.webp"
    try:
        if not kept.exists() or kept.stat().st_mtime_ns < sample.path.stat().st_mtime_ns:
            kept.parent.mkdir(exist_ok=True)
            atomic_write_bytes(kept, _animated(sample.path))
        content = kept.read_bytes()
        return Moving(html.data_url(_first_frame(content), "image/webp"), html.data_url(content, "image/webp"), "")
    except (OSError, ValueError, FinetuneError) as error:
        _log.warning("%s is not shown in the report: %s", sample.path, first_line(error))
        return None


def _animated(path: Path) -> bytes:
    """A video as a small animated WebP: at most 24 frames, ``_SIDE`` pixels wide or high."""
    import av
    from PIL import Image

    with av.open(str(path)) as container:
        if not container.streams.video:
            raise ValueError("it holds no video")
        rate = float(container.streams.video[0].average_rate or 8)
        frames = [frame.to_image() for frame in container.decode(video=0)]
    if not frames:
        raise ValueError("it holds no frame")
    picked = np.linspace(0, len(frames) - 1, min(24, len(frames))).round().astype(int)
    scale = _SIDE / max(frames[0].size)
    size = tuple(max(1, round(side * scale)) for side in frames[0].size)
    kind = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    small = [frames[index].resize(size, kind) for index in picked]
    buffer = io.BytesIO()
    milliseconds = round(1000 * len(frames) / rate / len(small))
    small[0].save(
        buffer, "WEBP", save_all=True, append_images=small[1:], duration=milliseconds, loop=0, quality=60, method=3
    )
    return buffer.getvalue()


def _first_frame(content: bytes) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    with Image.open(io.BytesIO(content)) as image:
        image.convert("RGB").save(buffer, "WEBP", quality=60)
    return buffer.getvalue()


# ---------------------------------------------------------------------------------------------------------------- clips


@dataclass(frozen=True)
class ClipStrip:
    """Some frames of a training clip as training sees them."""

    name: str
    caption: str
    bucket: str
    pictures: list[str]
    """Data URLs."""


def clip_strips(run: RunRecord, *, read: bool) -> tuple[list[ClipStrip], str]:
    """Frames of up to ``_MOST_CLIPS`` clips, spread over the dataset; and why there are none.

    Args:
        run: the run.
        read: read the dataset where an earlier report has not; else only show what that kept.
    """
    kept = run.folder / _KEPT / "clips.json"
    try:
        return [ClipStrip(**strip) for strip in json.loads(kept.read_text(encoding="utf-8"))], ""
    except (OSError, ValueError, TypeError):
        if not read:
            return [], f"`finetune report {shlex.quote(from_here(run.folder))}` shows clips of the dataset."
    try:
        strips = _read_strips(run.config)
    except (FinetuneError, OSError) as error:
        return [], f"The clips cannot be shown: {first_line(error)}"
    kept.parent.mkdir(exist_ok=True)
    atomic_write_text(kept, json.dumps([asdict(strip) for strip in strips]))
    return strips, ""


def _read_strips(config: RunConfig) -> list[ClipStrip]:
    from finetune.caching.check import check_dataset, workers_for
    from finetune.cogvideox.spec import spec_of
    from finetune.core.errors import DataError
    from finetune.datasets.samples import read_samples
    from finetune.diagnosis.frames import ClipRequest, InspectedClip, inspect_clips

    spec = spec_of(config.model, shipped=True)
    data = config.data
    rows = read_samples(data.sources, data, row_files=spec.row_files, base=config.base, skip=True)
    if len(rows.train) + len(rows.holdout) > _MOST_ROWS:
        raise DataError(f"more than {_MOST_ROWS} rows: `finetune doctor` shows them", where="data.sources")
    clips = check_dataset(config, spec).clips
    picked = np.linspace(0, len(clips) - 1, min(_MOST_CLIPS, len(clips))).round().astype(int)
    chosen = [clips[index] for index in picked]
    requests = [ClipRequest(clip.sample.video, clip.probe, clip.plan, clip.sample.image, 0) for clip in chosen]
    workers = min(2, workers_for(config, len(requests)))
    strips = []
    for clip, inspected in zip(chosen, inspect_clips(requests, workers), strict=True):
        if isinstance(inspected, InspectedClip):
            pictures = [html.data_url(frame.content, "image/webp") for frame in inspected.frames]
            name = "/".join(Path(clip.name).parts[-2:])
            strips.append(ClipStrip(name, clip.sample.caption, str(clip.plan.bucket), pictures))
    return strips


# ------------------------------------------------------------------------------------------------------------- the page


def settings(runs: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """Of one run what is not a default; of several what they do not have in common."""
    if len(runs) == 1:
        return [(name, [_written(value)]) for name, value in runs[0].changed.items() if value != {}]
    everything = [flat(run.config.to_dict()) for run in runs]
    names = dict.fromkeys(name for values in everything for name in values)
    rows = [(name, [_written(values.get(name)) for values in everything]) for name in names]
    return [row for row in rows if len(set(row[1])) > 1]


def _written(value: Any) -> str:
    return "–" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def write_report(folders: Sequence[Path], output: Path, *, read_clips: bool = True) -> Path:
    """Write a report.

    Args:
        folders: of one run, or of several to compare.
        output: the page.
        read_clips: read the dataset for pictures of its clips where no earlier report has.

    Raises:
        ConfigError: if a folder is no run's.
        OSError: if the page cannot be written.
    """
    runs = read_runs(folders)
    drawn = charts(runs)
    strips, why = clip_strips(runs[0], read=read_clips) if len(runs) == 1 else ([], "")
    page = html.render(
        TEMPLATE,
        {},
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs",
        runs=[_summary(run) for run in runs],
        charts=drawn,
        values=[chart.values for chart in drawn],
        samples=[
            {"name": run.name, "columns": columns(run, most), "rows": sample_rows(run, most)}
            for run, most in ((run, _MOST_COLUMNS if len(runs) == 1 else 3) for run in runs)
            if run.samples
        ],
        strips=strips,
        why_no_strips=why,
        settings=settings(runs),
        several=len(runs) > 1,
    )
    atomic_write_text(output, page)
    return output


def _summary(run: RunRecord) -> dict[str, Any]:
    judged = verdict(run)
    last = run.history[-1] if run.history else None
    facts = [
        ("model", run.config.model.pretrained),
        ("method", _method(run)),
        ("steps", f"{run.step}"),
        ("s/step", _number(run.latest("perf/s_per_step"), "{:.2f}")),
        ("peak", _number(run.latest("perf/peak_gib"), "{:.2f} GiB")),
        ("held out", _pair(run.history, last)),
    ]
    return {"name": run.name, "verdict": judged, "facts": [(name, value) for name, value in facts if value]}


def _method(run: RunRecord) -> str:
    method = run.config.method
    return method.summary


def _number(value: float | None, layout: str) -> str:
    return "" if value is None else layout.format(value)


def _pair(history: Sequence[Measurement], last: Measurement | None) -> str:
    if last is None:
        return ""
    return f"{history[0].heldout:.4f} at step {history[0].step}, {last.heldout:.4f} at {last.step}"
