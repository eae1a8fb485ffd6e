"""A prediction in words, as JSON, and as a picture."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.config.schema import RunConfig
from finetune.core.gpu import OVERHEAD_GIB, to_gib
from finetune.core.types import GIB
from finetune.memory.config import MemoryConfig
from finetune.planner.cost_model import OF_ANOTHER, OTHER, Rates, overhead
from finetune.planner.estimate import Estimate
from finetune.planner.memory_tracker import Phase, rank_of
from finetune.planner.search import Machine, MemoryPlan, SearchResult
from finetune.planner.step_time import StepTime


@dataclass(frozen=True)
class Verdict:
    """A prediction against a machine."""

    estimate: Estimate
    card_bytes: int | None
    """Of the GPU; None where nothing is known of it."""
    ram_bytes: int | None = None
    """Of the host that the run may have for what techniques keep there; None for any amount."""
    overhead: Mapping[str, int] = field(default_factory=lambda: overhead(OTHER))
    """Bytes of the card that no tensor gets, by what has them."""

    @property
    def spare_bytes(self) -> int | None:
        """What is left of the card, or, negative, what is missing."""
        return None if self.card_bytes is None else self.card_bytes - self.needed_bytes

    @property
    def ram_spare_bytes(self) -> int | None:
        """As ``spare_bytes``, of the host."""
        return None if self.ram_bytes is None else self.ram_bytes - self.estimate.host_bytes

    @property
    def needed_bytes(self) -> int:
        """Of the card, by tensors and beside them."""
        return self.estimate.peak.peak.nbytes + sum(self.overhead.values())

    @property
    def fits(self) -> bool | None:
        """Whether the run fits; None where neither size is known."""
        known = [spare for spare in (self.spare_bytes, self.ram_spare_bytes) if spare is not None]
        return all(spare >= 0 for spare in known) if known else None


# ------------------------------------------------------------------------------------------------------------- in words


def text(config: RunConfig, verdict: Verdict, *, processes: int = 1) -> str:
    """The whole table."""
    estimate = verdict.estimate
    each = f", in each of {processes} processes" if processes > 1 else ""
    if (context := config.parallel.context) > 1:
        each += f", {context} to a clip"
    beside = [(name, f"{nbytes / GIB:.2f}") for name, nbytes in verdict.overhead.items()]
    rows = [
        (phase.name, f"{phase.peak.nbytes / GIB:.2f}", "; ".join(filter(None, (phase.where, phase.note))))
        for phase in estimate.phases
    ]
    lines = [
        f"{config.model.pretrained}, {config.method.kind}, {estimate.bucket} ({estimate.tokens:,} tokens), "
        f"batch size {config.train.batch_size}{each}: predicted, not measured",
        "",
        *table(("phase", "GiB", "at its highest"), rows),
        "",
        f"the peak is in {estimate.peak.name}; what each phase is made of at its highest, in GiB",
        *_parts(estimate.phases),
        "",
        "beside the tensors, and in none of these figures",
        *table(("", "GiB"), beside),
        "",
        _sentence(verdict),
    ]
    return "\n".join(lines)


def _parts(phases: Sequence[Phase]) -> Iterator[str]:
    def row(name: str, sizes: Iterable[int]) -> tuple[str, ...]:
        return (name, *(f"{nbytes / GIB:.2f}" if nbytes >= GIB / 200 else "" for nbytes in sizes))

    names = sorted({part for phase in phases for part in phase.peak.parts}, key=rank_of)
    rows = [row(part, (phase.peak.parts.get(part, 0) for phase in phases)) for part in names]
    rows = [cells for cells in rows if any(cells[1:])]
    rows.append(row("together", (phase.peak.nbytes for phase in phases)))
    for kind in ("pinned", "pageable"):
        if any(sizes := [getattr(phase, kind) for phase in phases]):
            rows.append(row(f"host memory, {kind}", sizes))
    yield from table(("", *(phase.name for phase in phases)), rows)


def _sentence(verdict: Verdict) -> str:
    """Peak and verdict in one line."""
    beside = sum(verdict.overhead.values())
    sentence = f"with {beside / GIB:.1f} GiB beside the tensors: {to_gib(verdict.needed_bytes)}"
    if (spare := verdict.spare_bytes) is not None and verdict.card_bytes is not None:
        fit = f"is {to_gib(-spare)} too small" if spare < 0 else f"has {to_gib(spare)} to spare"
        sentence += f"; a card of {verdict.card_bytes / GIB:.1f} GiB {fit}"
        sentence += f" ({to_gib(verdict.card_bytes - beside)} of it are for tensors)"
    if verdict.ram_spare_bytes is not None and verdict.ram_spare_bytes < 0:
        sentence += f"; {to_gib(-verdict.ram_spare_bytes)} of host memory are missing"
    return sentence


_PARTS = {
    "products": "products_s",
    "attention": "attention_s",
    "traffic": "traffic_s",
    "exchanges": "exchanges_s",
    "decoding": "decoding_s",
    "launches": "launches_s",
    "copies": "copies_s",
    "alone": "serial_s",
}


def seconds_table(step: StepTime) -> Iterator[str]:
    """A step's seconds as the sum that they are."""
    used = {head: name for head, name in _PARTS.items() if any(getattr(each, name) >= 0.005 for each in step.passes)}
    rows = [
        (each.name, f"{each.seconds:.2f}", *(f"{getattr(each, name):.2f}" for name in used.values()))
        for each in step.passes
    ]
    yield from table(("", "s", *used), rows)
    yield "  a pass lasts as long as products, attention, traffic and decoding together, or as its launches or copies"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Aligned columns: the first and those that hold words to the left, numbers to the right."""
    cells = [list(head), *(list(row) for row in rows)]
    columns = list(zip(*cells, strict=True))
    widths = [max(map(len, column)) for column in columns]
    numbers = [all(map(_is_number, column[1:])) for column in columns]
    for row in cells:
        aligned = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numbers, strict=True)
        )
        yield ("  " + "  ".join(aligned)).rstrip()


def _is_number(text: str) -> bool:
    return not text or text.replace(".", "", 1).replace(",", "").replace("-", "", 1).isdigit()


def search_lines(memory: MemoryConfig, result: SearchResult, machine: Machine) -> list[str]:
    """A search's outcome: the section to write, slower plans that fit, and the fastest of those that do not."""
    if (best := result.best) is None:
        return []
    section = memory.changed() or {"checkpointing": memory.checkpointing}
    lines = ["the fastest memory section that fits:", "", "memory:"]
    lines += [f"  {name}: {value}" for name, value in section.items()]
    if result.quantised_unasked:
        lines += ["", f"the base is held in {memory.base} because nothing else fits: this changes the model a little"]
    lines += ["", *result.notes] if result.notes else []
    fitting = [plan for plan in result.others if plan.fits(machine)]
    larger = [plan for plan in result.others if plan not in fitting]
    known = machine.rates.source != OF_ANOTHER
    unit_s = 1.0 if known else best.step_s  # how two plans compare is much the same on every card
    labelled = [(best, "<- chosen"), *((plan, "fits, too") for plan in fitting[:3])]
    labelled += [(plan, _lacks(plan, machine)) for plan in larger[:3]]
    rows = [
        (
            f"{plan.step_s / unit_s:.2f}",
            f"{plan.peak_bytes / GIB:.2f}",
            f"{plan.host_bytes / GIB:.1f}",
            words,
            str(plan.memory),
        )
        for plan, words in labelled
    ]
    lines += ["", f"beside it, with {'seconds for' if known else 'times compared on'} {rates_in_words(machine.rates)}:"]
    return [*lines, *table(("s/step" if known else "time", "GiB", "host GiB", "", "memory section"), rows)]


def _lacks(plan: MemoryPlan, machine: Machine) -> str:
    if (over := plan.peak_bytes - machine.room) > 0:
        return f"{to_gib(over)} too large"
    return f"{to_gib(plan.host_bytes - (machine.ram_bytes or 0))} of host memory short"


def rates_in_words(rates: Rates) -> str:
    """Of which device, and where they come from."""
    if rates.source == "measured":
        return f"{rates.device}, from rates measured on it"
    if rates.source == OF_ANOTHER:
        return f"an {OTHER}, because nothing is known of {rates.device} (finetune calibrate measures it)"
    return f"{rates.device}, from published or assumed rates (finetune calibrate measures them)"


# -------------------------------------------------------------------------------------------------------------- as JSON


def document(verdict: Verdict) -> dict[str, Any]:
    """For programs: bytes throughout, curves left out."""
    estimate = verdict.estimate
    return {
        "bucket": estimate.bucket,
        "tokens": estimate.tokens,
        "phases": [
            {
                "name": phase.name,
                "peak_bytes": phase.peak.nbytes,
                "where": phase.where,
                "note": phase.note,
                "parts": dict(phase.peak.parts),
                "pinned_bytes": phase.pinned,
                "pageable_bytes": phase.pageable,
            }
            for phase in estimate.phases
        ],
        "peak_bytes": estimate.peak.peak.nbytes,
        "host_bytes": estimate.host_bytes,
        "overhead_bytes": sum(verdict.overhead.values()),
        "beside_bytes": dict(verdict.overhead),
        "card_bytes": verdict.card_bytes,
        "ram_bytes": verdict.ram_bytes,
        "spare_bytes": verdict.spare_bytes,
        "ram_spare_bytes": verdict.ram_spare_bytes,
        "fits": verdict.fits,
        "measured": False,
    }


def search_document(result: SearchResult, rates: Rates) -> dict[str, Any]:
    """A search's outcome for programs."""
    others = [
        {
            "memory": plan.memory.model_dump(mode="json"),
            "s_per_step": None if rates.source == OF_ANOTHER else plan.step_s,
            "peaks": dict(plan.peaks),
            "host_bytes": plan.host_bytes,
        }
        for plan in result.others
    ]
    return {"others": others, "quantised_unasked": result.quantised_unasked, "notes": list(result.notes)}


# --------------------------------------------------------------------------------------------------------- as a picture

_RED = "#be2828"


def draw(phase: Phase, title: str, path: Path, *, card_bytes: int | None = None) -> None:
    """Draw a phase's memory into a PNG: what is held, part by part, from the first operation to the last.

    Args:
        phase: one that was estimated block by block, which has a curve.
        title: of the picture.
        path: of the PNG.
        card_bytes: memory of the GPU, for a line where it ends; None for no line.

    Raises:
        ImportError: where matplotlib is not installed.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.5, 7), dpi=120, layout="constrained")
    axes = figure.subplots()
    at, peak = [point.at for point in phase.curve], phase.peak
    parts = sorted({part for point in phase.curve for part in point.parts}, key=rank_of)
    gib = [[point.parts.get(part, 0) / GIB for point in phase.curve] for part in parts]
    labels = [f"{part}: {peak.parts.get(part, 0) / GIB:.2f}" for part in parts]
    colours = [colormaps["tab20"](number) for number in range(len(parts))]
    axes.stackplot(at, gib, labels=labels, colors=colours, step="post")  # level until the next moment
    if card_bytes is not None and card_bytes / GIB - OVERHEAD_GIB < 2.5 * peak.nbytes / GIB:
        words = f"card of {card_bytes / GIB:g} GiB, less {OVERHEAD_GIB} GiB overhead"
        axes.axhline(card_bytes / GIB - OVERHEAD_GIB, color=_RED, linestyle="--", label=words)
    axes.plot(peak.at, peak.nbytes / GIB, "o", color="black", fillstyle="none")
    axes.annotate(
        f"{peak.nbytes / GIB:.2f} GiB: {phase.where}",
        (peak.at, peak.nbytes / GIB),
        xytext=(8 if peak.at < 0.45 else -8, 8),
        textcoords="offset points",
        horizontalalignment="left" if peak.at < 0.45 else "right",
    )
    axes.set_xticks(list(phase.spans.values()), list(phase.spans), horizontalalignment="left")
    axes.set_xlim(0, 1)
    axes.margins(y=0.08)
    axes.set_ylim(bottom=0)
    axes.set_title(title, loc="left")
    axes.set_xlabel("allocations and releases, in the order in which the step makes them")
    axes.set_ylabel("GiB of device memory that tensors hold; predicted")
    axes.grid(axis="y", alpha=0.4)
    figure.legend(loc="outside right upper", title="at the peak, GiB", reverse=True, frameon=False)
    figure.savefig(path, format="png")
