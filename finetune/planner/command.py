"""What ``finetune plan`` and ``finetune calibrate`` do, as functions of plain arguments."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetune.config.rules import memory_errors, memory_traits, require_valid
from finetune.config.schema import RunConfig
from finetune.core.errors import ConfigError, first_line, raise_all
from finetune.core.files import require_writable
from finetune.core.gpu import amount, parse_bytes, to_gib, usable
from finetune.core.rng import DETERMINISTIC_WORKSPACE
from finetune.core.types import GIB
from finetune.memory.config import MemoryConfig
from finetune.planner.cost_model import (
    OF_ANOTHER,
    OTHER,
    WORKSPACES,
    Rates,
    beside_tensors,
    calibrate,
    calibration_file,
    card_here,
    device_here,
    held_note,
    keep,
    known_devices,
    rates_of,
    step_cost,
)
from finetune.planner.helper_process import child_environment
from finetune.planner.phases import OF_THE_RUN, PHASES
from finetune.planner.predict import predict, spec_of
from finetune.planner.report import document, draw, table, text, verdict
from finetune.planner.search import Found, Plan, resolve


@dataclass(frozen=True)
class Planned:
    """What a plan says, and whether the run fits what was asked for (None where nothing was)."""

    text: str
    fits: bool | None
    chosen: bool = False
    """Whether it chose a memory section that the file does not have."""

    def __str__(self) -> str:
        return self.text


def plan(
    config: RunConfig,
    *,
    card: str | None = None,
    ram: str | None = None,
    budget: str | None = None,
    device: str | None = None,
    processes: int = 1,
    quantize: bool = False,
    plot: Path | None = None,
    exact: bool = False,
    as_json: bool = False,
) -> Planned:
    """Predict a run's memory; with ``budget``, choose its memory section first.

    Args:
        config: of the run.
        card: memory of the GPU, such as ``24GB``; None for the one that is here, if any.
        ram: host memory that the run may take.
        budget: search for the fastest memory section within this much GPU memory.
        device: name of the GPU to reckon seconds for; None for the one that is here, or an A100.
        processes: how many train a whole model each (DDP); the figures are of one of them.
        quantize: whether the search may quantise the base to be faster.
        plot: a PNG to draw the training step's curve into.
        exact: rehearse every block.
        as_json: a JSON document in place of tables.

    Raises:
        ConfigError: if an amount is none, the configuration does not fit the model, or nothing fits the budget.
        ModelError: if the model's JSON cannot be found or used.
    """
    spec = spec_of(config)
    require_valid(config, spec)
    if plot is not None:
        _require_drawable(plot)
    if processes < 1:
        raise ConfigError("a run has at least one process", where=f"--processes {processes}")
    automatic = config.memory.kind == "auto"
    if automatic:  # what the file asks for, where the command does not
        budget, ram = budget or config.memory.budget or card, ram or config.memory.ram
        quantize = quantize or config.memory.quantize
        if budget is None and card_here() is None:
            where = config.where("memory")
            raise ConfigError("there is no GPU here to plan for", where=where, fix="give --budget 24GB")
    asked_bytes = amount("--budget", budget) or amount("--card", card)
    card_bytes = asked_bytes or card_here()
    ram_bytes = amount("--ram", ram)
    rates = rates_of(device or device_here())
    held = held_note() if asked_bytes is None else ""
    lines = [f"{held}: planned for the rest", ""] if held else []
    found: Found | None = None
    if card_bytes is not None and (budget is not None or automatic):
        config, found = resolve(
            config, rates, card_bytes=card_bytes, ram_bytes=ram_bytes, quantize=quantize, processes=processes
        )
        lines += [*search_lines(config.memory, found, rates, card_bytes, ram_bytes, processes), ""]
    else:
        refused = memory_errors(config, memory_traits(config, spec, processes=processes))
        raise_all(ConfigError, refused, what="{n} settings of memory do not go with several processes")
    room = None if card_bytes is None else usable(card_bytes, processes)
    rehearsal = predict(config, card_bytes=room, processes=processes, exact=exact or plot is not None)
    workspace = DETERMINISTIC_WORKSPACE if config.train.deterministic else None
    beside = beside_tensors(rates.device, processes=processes, workspace=workspace)
    judged = verdict(rehearsal, card_bytes, ram_bytes, beside=beside)
    if plot is not None:
        draw(rehearsal.phase("train"), _title(config, rehearsal.bucket), plot, card_bytes=card_bytes)
    step_s = None if rates.source == OF_ANOTHER else step_cost(config, spec, config.memory, rates).step_s
    if as_json:
        content: dict[str, Any] = document(rehearsal, judged) | {
            "processes": processes,
            "memory": config.memory.model_dump(mode="json"),
            "s_per_step": step_s,
            "rates": rates.model_dump(mode="json"),
            "search": None if found is None else _searched(found, rates),
        }
        return Planned(json.dumps(content, indent=1), judged.fits)
    lines.append(text(config, rehearsal, judged, processes=processes))
    if step_s is None:
        known = ", ".join(known_devices())
        lines.append(f"time: nothing is known of {rates.device}, only of {known} (finetune calibrate measures a GPU)")
    else:
        lines.append(f"time: about {step_s:.2f} s/step on {_rates_in_words(rates)}")
    if plot is not None:
        lines.append(f"drawn: {plot}")
    return Planned("\n".join(lines), judged.fits, chosen=found is not None and not automatic)


def _require_drawable(plot: Path) -> None:
    """A plan takes up to a minute: that its picture cannot be written is found before."""
    folder = plot.resolve().parent
    if not folder.is_dir() or plot.is_dir():
        what = "this is a folder" if plot.is_dir() else "there is no such folder to draw into"
        raise ConfigError(
            what, where=f"--plot {plot}", fix="make it, or name another" if not plot.is_dir() else "name a PNG in it"
        )
    require_writable(folder, kind=ConfigError, what="the picture", where=f"--plot {plot}")


def search_lines(
    memory: MemoryConfig, found: Found, rates: Rates, card_bytes: int, ram_bytes: int | None, processes: int = 1
) -> list[str]:
    """A search's outcome: the section to write, slower plans that fit, and the fastest of those that do not."""
    if found.best is None:
        return []
    lines = ["the fastest memory section that fits:", "", "memory:"]
    chosen = {**_differences(memory)}
    lines += [f"  {name}: {value}" for name, value in (chosen or {"checkpointing": memory.checkpointing}).items()]
    if found.quantised_unasked:
        lines += ["", f"the base is held in {memory.base} because nothing else fits: this changes the model a little"]
    lines += ["", *found.notes] if found.notes else []
    fitting = [plan for plan in found.others if plan.fits(card_bytes, ram_bytes, processes)]
    larger = [plan for plan in found.others if plan not in fitting]
    known = rates.source != OF_ANOTHER
    unit_s = 1.0 if known else found.best.step_s  # how two plans compare is much the same on every card
    judged = [(found.best, "<- chosen"), *((plan, "fits, too") for plan in fitting[:3])]
    judged += [(plan, _lacks(plan, usable(card_bytes, processes), ram_bytes)) for plan in larger[:3]]
    lines += ["", f"beside it, with {'seconds for' if known else 'times compared on'} {_rates_in_words(rates)}:"]
    head = ("s/step" if known else "time", "GiB", "host GiB", "", "memory section")
    return lines + list(table(head, (_row(plan, words, unit_s) for plan, words in judged)))


def _row(plan: Plan, judged: str, unit_s: float) -> tuple[str, str, str, str, str]:
    said = ", ".join(f"{name}: {value}" for name, value in _differences(plan.memory).items()) or "defaults"
    return f"{plan.step_s / unit_s:.2f}", f"{plan.peak_bytes / GIB:.2f}", f"{plan.host_bytes / GIB:.1f}", judged, said


def _lacks(plan: Plan, room: int, ram_bytes: int | None) -> str:
    over = plan.peak_bytes - room
    if over > 0:
        return f"{to_gib(over)} too large"
    return f"{to_gib(plan.host_bytes - (ram_bytes or 0))} of host memory short"


def _searched(found: Found, rates: Rates) -> dict[str, Any]:
    def told(plan: Plan) -> dict[str, Any]:
        memory = plan.memory.model_dump(mode="json")
        step_s = None if rates.source == OF_ANOTHER else plan.step_s
        return {"memory": memory, "s_per_step": step_s, "peaks": dict(plan.peaks), "host_bytes": plan.host_bytes}

    others = [told(plan) for plan in found.others]
    return {"others": others, "quantised_unasked": found.quantised_unasked, "notes": list(found.notes)}


def _differences(memory: MemoryConfig) -> dict[str, Any]:
    default = MemoryConfig().model_dump(mode="json")
    return {name: value for name, value in memory.model_dump(mode="json").items() if value != default.get(name)}


def run_calibration(seconds: float) -> str:
    """Measure the GPU that is here and keep its rates; returns a table.

    Raises:
        ConfigError: if there is no GPU.
    """
    if not torch.cuda.is_available():
        raise ConfigError(
            "there is no CUDA device to calibrate",
            fix="run it on the machine that trains; without it plans reckon with published rates",
        )
    kept = calibration_file(device_here()).parent
    require_writable(kept, kind=ConfigError, what="what is measured", where=str(kept))
    rates = calibrate(torch.device("cuda"), seconds=seconds)
    path = keep(rates)
    rows = [
        ("matrix products", f"{rates.gemm / 1e12:.0f}", "TFLOP/s"),
        ("attention, forward", f"{rates.attention_forward / 1e12:.0f}", "TFLOP/s"),
        ("attention, backward", f"{rates.attention_backward / 1e12:.0f}", "TFLOP/s"),
        ("device memory", f"{rates.memory / 1e9:.0f}", "GB/s"),
        ("host to device, pinned", f"{rates.host_to_device / 1e9:.1f}", "GB/s"),
        ("device to host, pinned", f"{rates.device_to_host / 1e9:.1f}", "GB/s"),
        ("host to device, pageable", f"{rates.pageable / 1e9:.1f}", "GB/s"),
        ("host memory", f"{rates.host_memory / 1e9:.1f}", "GB/s"),
    ]
    return "\n".join([f"{rates.device}, measured", *table(("", "", ""), rows), f"kept in {path}"])


def _rates_in_words(rates: Rates) -> str:
    if rates.source == "measured":
        return f"{rates.device}, from rates measured on it"
    if rates.source == OF_ANOTHER:
        return f"an {OTHER}, because nothing is known of {rates.device} (finetune calibrate measures it)"
    return f"{rates.device}, from published or assumed rates (finetune calibrate measures them)"


def _title(config: RunConfig, bucket: str) -> str:
    name = config.model.pretrained.rstrip("/").rsplit("/", 1)[-1]
    method = config.method
    how = f"LoRA of rank {method.rank}" if method.kind == "lora" else "full fine-tuning"
    return f"{name}, {how}, {bucket}, batch size {config.train.batch_size}: one training step"


# -------- ``memory: {kind: auto}``: the planner's choice in place of a person's.


def settled(config: RunConfig) -> tuple[RunConfig, tuple[str, ...]]:
    """The run with a memory section that says what is done, and lines about how it was chosen (none for ``manual``).

    Where a run goes on, the search may come to another choice than before. That changes no number that is trained,
    unless only a quantised base fits where a native one did, or the other way round: such a run is not continued.

    Args:
        config: of the run, valid for its model.

    Raises:
        ConfigError: if nothing fits, or there is no card to plan for.
    """
    asked = config.memory
    if asked.kind == "manual":
        return config, ()
    card_bytes = card_here() if asked.budget is None else parse_bytes(asked.budget)
    if card_bytes is None:
        raise ConfigError(
            "there is no GPU here to plan for",
            where=config.where("memory"),
            fix="say for how much memory, such as memory.budget: 24GiB, or set memory.kind: manual",
        )
    rates = rates_of(device_here())
    ram_bytes = None if asked.ram is None else parse_bytes(asked.ram)
    chosen, found = resolve(config, rates, card_bytes=card_bytes, ram_bytes=ram_bytes, quantize=asked.quantize)
    held = held_note() if asked.budget is None else ""
    return chosen, (*([held] if held else []), *search_lines(chosen.memory, found, rates, card_bytes, ram_bytes))


# -------- A training's own prediction: made when it starts, compared with what was measured when it ends.
#
# It is made in a process of its own that sees no GPU. Under fake tensors the package's code must not find a device,
# and a
# training must not depend on whether a prediction could be made.

_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Prediction:
    """What a run was predicted to allocate while it trains, validation sampling included."""

    nbytes: int | None
    """None where it could not be predicted."""
    said: str
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


class Forecaster:
    """Predicts a run in a process beside this one, from now until ``prediction`` is asked for.

    Args:
        config: of the run, its memory section resolved.
        card_bytes: memory of the GPU, less what other programs hold; None where there is none.
        device: name of the GPU; empty for one of which nothing is known.
        processes: how many train a whole model each (DDP).
    """

    def __init__(self, config: RunConfig, card_bytes: int | None, *, device: str = "", processes: int = 1) -> None:
        self._card_bytes = card_bytes
        self._folder = tempfile.TemporaryDirectory()
        self._child: subprocess.Popen[str] | None = None
        self._failed = ""
        file = Path(self._folder.name) / "run.yaml"
        command = [
            sys.executable,
            "-m",
            "finetune",
            "plan",
            "--json",
            "--config",
            str(file),
            "--processes",
            str(processes),
            *(["--device", device] if device else []),
        ]
        try:
            file.write_text(config.to_yaml(), encoding="utf-8")
            self._child = subprocess.Popen(
                command, env=child_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        except OSError as error:
            self._failed = first_line(error)

    def prediction(self) -> Prediction:
        """Wait for it; nothing is raised, because a run is worth more than its prediction."""
        try:
            if self._child is None:
                return Prediction(None, f"could not be made: {self._failed}")
            output, errors = self._child.communicate(timeout=_TIMEOUT_S)
            if not output.strip():
                last = errors.strip().splitlines()[-1:]
                return Prediction(None, f"could not be made: {' '.join(last)}")
            return _read(json.loads(output), self._card_bytes)
        except (OSError, ValueError, KeyError, subprocess.SubprocessError) as error:
            return Prediction(None, f"could not be made: {first_line(error)}")
        finally:
            self.close()

    def close(self) -> None:
        """End the process, if it still runs, and forget its files."""
        if self._child is not None and self._child.poll() is None:
            self._child.kill()
            self._child.communicate()
        self._folder.cleanup()


def _read(found: Mapping[str, Any], card_bytes: int | None) -> Prediction:
    run = [phase for phase in found["phases"] if phase["name"] in {PHASES[name] for name in OF_THE_RUN}]
    top = max(run, key=lambda phase: int(phase["peak_bytes"]))
    nbytes = int(top["peak_bytes"])
    processes, workspaces = int(found["processes"]), int(found["beside_bytes"][WORKSPACES])
    each = " in each process" if processes > 1 else ""
    said = f"{to_gib(nbytes)} predicted{each}, in {top['name']}: {top['where']}"
    if card_bytes is not None and (over := nbytes - usable(card_bytes, processes)) > 0:
        said += (
            f"; with {to_gib(card_bytes - usable(card_bytes, processes))} for the CUDA context, libraries and"
            f" fragmentation that is {to_gib(over)} more than this GPU has (finetune plan --budget finds what fits)"
        )
    return Prediction(nbytes, said, workspaces)
