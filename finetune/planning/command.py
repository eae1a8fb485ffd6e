"""What ``finetune plan`` and ``finetune calibrate`` do, as functions of plain arguments."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetune.cards import GIB, amount, to_gib, usable
from finetune.config import RunConfig, memory_errors, memory_traits, require_valid
from finetune.errors import ConfigError, raise_all
from finetune.files import require_writable
from finetune.memory import MemoryConfig
from finetune.planning.calibrate import calibrate
from finetune.planning.card import beside_tensors, card_here, device_here, held_note
from finetune.planning.cost import step_cost
from finetune.planning.plot import draw
from finetune.planning.predict import facts_of, predict
from finetune.planning.rates import OF_ANOTHER, OTHER, Rates, calibration_file, keep, known_devices, rates_of
from finetune.planning.report import document, table, text, verdict
from finetune.planning.resolve import resolve
from finetune.planning.search import Found, Plan
from finetune.trainers.determinism import DETERMINISTIC_WORKSPACE


@dataclass(frozen=True)
class Planned:
    """What a plan says, and whether the run fits what was asked for (None where nothing was)."""

    text: str
    fits: bool | None
    chosen: bool = False
    """Whether it chose a memory section that the file does not have."""


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
    facts = facts_of(config)
    require_valid(config, facts)
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
        refused = memory_errors(config, memory_traits(config, facts, processes=processes))
        raise_all(ConfigError, refused, what="{n} settings of memory do not go with several processes")
    room = None if card_bytes is None else usable(card_bytes, processes)
    rehearsal = predict(config, card_bytes=room, processes=processes, exact=exact or plot is not None)
    workspace = DETERMINISTIC_WORKSPACE if config.train.deterministic else None
    beside = beside_tensors(rates.device, processes=processes, workspace=workspace)
    judged = verdict(rehearsal, card_bytes, ram_bytes, beside=beside)
    if plot is not None:
        draw(rehearsal.phase("train"), _title(config, rehearsal.bucket), plot, card_bytes=card_bytes)
    step_s = None if rates.source == OF_ANOTHER else step_cost(config, facts, config.memory, rates).step_s
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
