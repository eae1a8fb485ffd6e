"""What the planner is asked: ``finetune plan`` and ``calibrate``, ``memory: {kind: auto}``, a training's prediction."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from finetune.cogvideox.spec import spec_of
from finetune.config.rules import memory_errors, memory_traits, require_valid
from finetune.config.schema import RunConfig
from finetune.core.errors import ConfigError, raise_all
from finetune.core.files import require_writable
from finetune.core.gpu import amount, card_size, parse_bytes, to_gib, usable
from finetune.core.rng import DETERMINISTIC_WORKSPACE
from finetune.core.types import GIB
from finetune.planner.cost_model import (
    OF_ANOTHER,
    WORKSPACES,
    calibrate,
    calibration_file,
    card_here,
    device_here,
    held_note,
    known_devices,
    overhead,
    rates_of,
    save_rates,
)
from finetune.planner.estimate import predict
from finetune.planner.memory_tracker import PHASES, RUN_PHASES
from finetune.planner.report import (
    Verdict,
    document,
    draw,
    rates_in_words,
    search_document,
    search_lines,
    seconds_table,
    table,
    text,
)
from finetune.planner.search import Machine, SearchResult, fit_memory
from finetune.planner.step_time import step_cost


@dataclass(frozen=True)
class Planned:
    """What a plan says, and whether the run fits what was asked for (None where nothing was)."""

    text: str
    fits: bool | None
    chosen: bool = False
    """Whether it chose a memory section that the file does not have."""

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class PlanOptions:
    """What is planned for; ``finetune.plan`` says what each word means."""

    card: str | None = None
    ram: str | None = None
    budget: str | None = None
    device: str | None = None
    processes: int = 1
    quantize: bool = False
    plot: Path | None = None
    exact: bool = False
    as_json: bool = False


def plan(config: RunConfig, options: PlanOptions) -> Planned:
    """The work of ``finetune.plan``, where the errors stand, for a configuration that is loaded."""
    budget, ram, quantize = options.budget, options.ram, options.quantize
    card = card_size(options.card)
    processes, plot = options.processes, options.plot
    spec = spec_of(config.model, shipped=True)
    require_valid(config, spec)
    if plot is not None:
        _require_drawable(plot)
    if processes < 1:
        raise ConfigError("a run has at least one process", where=f"--processes {processes}")
    if processes % (context := config.parallel.context):
        what = f"parallel.context: {context} processes compute a clip together, and the run is to have {processes}"
        raise ConfigError(what, where=f"--processes {processes}", fix=f"give a multiple of {context}")
    automatic = config.memory.kind == "auto"
    if automatic:  # what the file asks for, where the command does not
        budget, ram = budget or config.memory.budget or options.card, ram or config.memory.ram
        quantize = quantize or config.memory.quantize
        if budget is None and card_here() is None:
            where = config.where("memory")
            raise ConfigError("there is no GPU here to plan for", where=where, fix="give --budget 24GB")
    asked_bytes = amount("--budget", budget) or card
    card_bytes = asked_bytes or card_here()
    ram_bytes, rates = amount("--ram", ram), rates_of(options.device or device_here())
    others = held_note() if asked_bytes is None else ""
    lines = [f"{others}: planned for the rest", ""] if others else []
    result: SearchResult | None = None
    if card_bytes is not None and (budget is not None or automatic):
        machine = Machine(rates, card_bytes, ram_bytes, processes)
        config, result = fit_memory(config, machine, quantize=quantize)
        lines += [*search_lines(config.memory, result, machine), ""]
    else:
        refused = memory_errors(config, memory_traits(config, spec, processes=processes))
        raise_all(ConfigError, refused, what="{n} settings of memory do not go with several processes")
    room = None if card_bytes is None else usable(card_bytes, processes)
    estimate = predict(config, card_bytes=room, processes=processes, exact=options.exact or plot is not None)
    workspace = DETERMINISTIC_WORKSPACE if config.train.deterministic else None
    beside = overhead(rates.device, processes=processes, workspace=workspace)
    verdict = Verdict(estimate, card_bytes, ram_bytes, beside)
    if plot is not None:
        draw(estimate.phase("train"), _title(config, estimate.bucket), plot, card_bytes=card_bytes)
    step = None if rates.source == OF_ANOTHER else step_cost(config, spec, config.memory, rates)
    if options.as_json:
        content: dict[str, Any] = document(verdict) | {
            "processes": processes,
            "memory": config.memory.model_dump(mode="json"),
            "s_per_step": None if step is None else step.step_s,
            "seconds": None if step is None else [asdict(each) | {"seconds": each.seconds} for each in step.passes],
            "rates": rates.model_dump(mode="json"),
            "search": None if result is None else search_document(result, rates),
        }
        return Planned(json.dumps(content, indent=1), verdict.fits)
    lines.append(text(config, verdict, processes=processes))
    if step is None:
        known = ", ".join(known_devices())
        lines.append(f"time: nothing is known of {rates.device}, only of {known} (finetune calibrate measures a GPU)")
    else:
        which = ", where all of its clips are for prior preservation" if step.base else ""
        lines += [f"time: about {step.step_s:.2f} s/step on {rates_in_words(rates)}{which}", "", *seconds_table(step)]
    if plot is not None:
        lines.append(f"drawn: {plot}")
    return Planned("\n".join(lines), verdict.fits, chosen=result is not None and not automatic)


def _require_drawable(plot: Path) -> None:
    """A plan takes up to a minute: that its picture cannot be drawn is found before."""
    where, folder = f"--plot {plot}", plot.resolve().parent
    if find_spec("matplotlib") is None:
        fix = "pip install 'cogvideox-finetune[plot]', or leave --plot out"
        raise ConfigError("a picture needs matplotlib, which is not installed", where=where, fix=fix)
    if plot.is_dir():
        raise ConfigError("this is a folder", where=where, fix="name a PNG in it")
    if not folder.is_dir():
        raise ConfigError("there is no such folder to draw into", where=where, fix="make it, or name another")
    require_writable(folder, kind=ConfigError, what="the picture", where=where)


def _title(config: RunConfig, bucket: str) -> str:
    name = config.model.pretrained.rstrip("/").rsplit("/", 1)[-1]
    return f"{name}, {config.method.summary}, {bucket}, batch size {config.train.batch_size}: one training step"


def run_calibration(seconds: float) -> str:
    """Measure the GPU that is here and keep its rates; returns a table.

    Raises:
        ConfigError: if there is no GPU, or what is measured could not be kept.
    """
    if not torch.cuda.is_available():
        raise ConfigError(
            "there is no CUDA device to calibrate",
            fix="run it on the machine that trains; without it plans reckon with published rates",
        )
    folder = calibration_file(device_here()).parent
    require_writable(folder, kind=ConfigError, what="what is measured", where=str(folder))
    rates = calibrate(torch.device("cuda"), seconds=seconds)
    path = save_rates(rates)
    rows = [
        ("matrix products", f"{rates.gemm / 1e12:.0f}", "TFLOP/s"),
        ("matrix products in float32", f"{rates.gemm_float32 / 1e12:.0f}", "TFLOP/s"),
        ("attention, forward", f"{rates.attention_forward / 1e12:.0f}", "TFLOP/s"),
        ("attention, backward", f"{rates.attention_backward / 1e12:.0f}", "TFLOP/s"),
        ("device memory", f"{rates.memory / 1e9:.0f}", "GB/s"),
        ("host to device, pinned", f"{rates.host_to_device / 1e9:.1f}", "GB/s"),
        ("device to host, pinned", f"{rates.device_to_host / 1e9:.1f}", "GB/s"),
        ("host to device, pageable", f"{rates.pageable / 1e9:.1f}", "GB/s"),
        ("host memory", f"{rates.host_memory / 1e9:.1f}", "GB/s"),
        ("queueing a kernel", f"{rates.launch * 1e6:.1f}", "microseconds"),
    ]
    return "\n".join([f"{rates.device}, measured", *table(("", "", ""), rows), f"kept in {path}"])


def choose_memory(config: RunConfig) -> tuple[RunConfig, tuple[str, ...]]:
    """The run with a memory section that says what is done, and lines about how it was chosen (none for ``manual``).

    Where a run goes on, the search may come to another choice than before. That changes no number that is trained,
    unless only a quantised base fits where a native one did, or the other way round: such a run is not continued.

    Args:
        config: of the run, valid for its model.

    Raises:
        ConfigError: if nothing fits, or there is no card to plan for.
    """
    memory = config.memory
    if memory.kind == "manual":
        return config, ()
    card_bytes = card_here() if memory.budget is None else parse_bytes(memory.budget)
    if card_bytes is None:
        raise ConfigError(
            "there is no GPU here to plan for",
            where=config.where("memory"),
            fix="say for how much memory, such as memory.budget: 24GiB, or set memory.kind: manual",
        )
    machine = Machine(rates_of(device_here()), card_bytes, None if memory.ram is None else parse_bytes(memory.ram))
    chosen, result = fit_memory(config, machine, quantize=memory.quantize)
    others = held_note() if memory.budget is None else ""
    return chosen, (*([others] if others else []), *search_lines(chosen.memory, result, machine))


# ------------------------------------------------------------------------------------------ a training's own prediction


@dataclass(frozen=True)
class Prediction:
    """What a run was predicted to allocate while it trains, validation sampling included."""

    nbytes: int | None
    """None where it could not be predicted."""
    message: str
    """In words, or why there is no figure."""
    workspaces: int = 0
    """Bytes that cuBLAS holds beside the tensors, which are allocated, and so measured, with them."""

    def compared(self, measured_gib: float) -> str:
        """Predicted beside measured, for a log; empty where nothing was predicted."""
        if self.nbytes is None:
            return ""
        predicted = (self.nbytes + self.workspaces) / GIB
        off = 100 * (measured_gib / predicted - 1)
        return f"peak memory: predicted {predicted:.2f} GiB, measured {measured_gib:.2f} GiB ({off:+.1f} %)"


_LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What a launcher tells its processes."""


class BackgroundPrediction:
    """A prediction that ``finetune plan`` is making in a process of its own; see ``predict_async``."""

    def __init__(self, child: subprocess.Popen[bytes] | None, folder: Path | None, card_bytes: int | None) -> None:
        self._child, self._folder, self._card_bytes = child, folder, card_bytes
        self._result: Prediction | None = None
        self._is_told = False

    def result(self, timeout_s: float = 0.0) -> Prediction | None:
        """The prediction, or None while it is being made. It raises nothing: a run is worth more than a prediction.

        Args:
            timeout_s: how long to wait for it.
        """
        if self._result is None:
            with suppress(subprocess.TimeoutExpired):
                if self._child is not None:
                    self._child.wait(timeout_s)
                self._result = _read(self._folder, self._card_bytes)
        return self._result

    def news(self) -> str:
        """What there is to say, once: the prediction's message when it has come, and nothing before and after."""
        if self._is_told or (prediction := self.result()) is None:
            return ""
        self._is_told = True
        return prediction.message

    def close(self) -> None:
        """End the process, if it still runs, and forget its files."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()
        self.result()  # before its files are gone
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def predict_async(
    config: RunConfig, card_bytes: int | None, *, device: str = "", processes: int = 1
) -> BackgroundPrediction:
    """Begin to predict a run, in a process beside this one; to be closed in the end.

    Under fake tensors the package's code must not find a device, and a training must not depend on whether a
    prediction could be made, nor wait for it.

    Args:
        config: of the run, its memory section chosen.
        card_bytes: memory of the GPU, less what other programs hold; None where there is none.
        device: name of the GPU; empty for one of which nothing is known.
        processes: how many train a whole model each (DDP).
    """
    # No part of the launch, sees no GPU, and asks nobody.
    environment = {name: value for name, value in os.environ.items() if name not in _LAUNCH_VARIABLES}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "finetune", "plan", "--json", "--processes", str(processes)]
    if nice := shutil.which("nice"):  # what runs beside it is in more of a hurry
        command = [nice, *command]
    command += ["--device", device] if device else []
    folder = child = None
    with suppress(OSError):
        folder = Path(tempfile.mkdtemp(prefix="finetune-plan-"))
        (folder / "run.yaml").write_text(config.to_yaml(), encoding="utf-8")
        command += ["--config", str(folder / "run.yaml")]
        with (folder / "plan.json").open("w") as output, (folder / "errors").open("w") as errors:
            child = subprocess.Popen(command, env=environment, stdout=output, stderr=errors)
    return BackgroundPrediction(child, folder, card_bytes)


def _read(folder: Path | None, card_bytes: int | None) -> Prediction:
    if folder is None:
        return Prediction(None, "could not be made: there is no room for its files")
    try:
        return _prediction_of(json.loads((folder / "plan.json").read_text()), card_bytes)
    except (OSError, ValueError, KeyError, TypeError):  # no document, or half of one, or another version's
        with suppress(OSError):
            last = (folder / "errors").read_text(errors="replace").strip().splitlines()[-1:]
            return Prediction(None, f"could not be made: {' '.join(last)}")
        return Prediction(None, "could not be made: there is no room for its files")


def _prediction_of(document: Mapping[str, Any], card_bytes: int | None) -> Prediction:
    run = [phase for phase in document["phases"] if phase["name"] in {PHASES[name] for name in RUN_PHASES}]
    top = max(run, key=lambda phase: int(phase["peak_bytes"]))
    nbytes, processes = int(top["peak_bytes"]), int(document["processes"])
    each = " in each process" if processes > 1 else ""
    message = f"{to_gib(nbytes)} predicted{each}, in {top['name']}: {top['where']}"
    if card_bytes is not None and (over := nbytes - usable(card_bytes, processes)) > 0:
        message += (
            f"; with {to_gib(card_bytes - usable(card_bytes, processes))} for the CUDA context, libraries and"
            f" fragmentation that is {to_gib(over)} more than this GPU has (finetune plan --budget finds what fits)"
        )
    return Prediction(nbytes, message, int(document["beside_bytes"][WORKSPACES]))
