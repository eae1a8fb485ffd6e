"""A rehearsal in words: a table for people, a document for programs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.cards import GIB, to_gib
from finetune.config import RunConfig
from finetune.planning.card import beside_tensors
from finetune.planning.curve import Phase, rank_of
from finetune.planning.rates import OTHER
from finetune.planning.rehearse import Rehearsal


@dataclass(frozen=True)
class Verdict:
    """Whether a run fits a machine."""

    card_bytes: int | None
    """Of the GPU; None where nothing is known of it."""
    ram_bytes: int | None
    """Of the host that the run may have."""
    spare_bytes: int | None
    """What is left of the card, or, negative, what is missing."""
    ram_spare_bytes: int | None
    """As ``spare_bytes``, of the host."""
    beside: Mapping[str, int]
    """Bytes of the card that no tensor gets, by what has them."""

    @property
    def fits(self) -> bool | None:
        """None where neither is known."""
        known = [spare for spare in (self.spare_bytes, self.ram_spare_bytes) if spare is not None]
        return all(spare >= 0 for spare in known) if known else None


def verdict(
    rehearsal: Rehearsal,
    card_bytes: int | None,
    ram_bytes: int | None = None,
    *,
    beside: Mapping[str, int] | None = None,
) -> Verdict:
    """Compare a prediction with a machine.

    Args:
        rehearsal: the prediction.
        card_bytes: memory of the GPU; None if it is not known.
        ram_bytes: host memory for what techniques keep there; None for any amount.
        beside: what of the card is not for tensors (``card.beside_tensors``); None for that of one process.
    """
    beside = beside_tensors(OTHER) if beside is None else beside
    spare = None if card_bytes is None else card_bytes - sum(beside.values()) - rehearsal.peak.peak.nbytes
    ram_spare = None if ram_bytes is None else ram_bytes - rehearsal.host_bytes
    return Verdict(card_bytes, ram_bytes, spare, ram_spare, beside)


def text(config: RunConfig, rehearsal: Rehearsal, judged: Verdict, *, processes: int = 1) -> str:
    """The whole table."""
    return "\n".join(_lines(config, rehearsal, judged, processes))


def _lines(config: RunConfig, rehearsal: Rehearsal, judged: Verdict, processes: int) -> Iterator[str]:
    each = f", in each of {processes} processes" if processes > 1 else ""
    yield (
        f"{config.model.pretrained}, {config.method.kind}, {rehearsal.bucket} ({rehearsal.tokens:,} tokens), "
        f"batch size {config.train.batch_size}{each}: predicted, not measured"
    )
    yield ""
    rows = [(phase.name, f"{phase.peak.nbytes / GIB:.2f}", _when(phase)) for phase in rehearsal.phases]
    yield from table(("phase", "GiB", "at its highest"), rows)
    yield ""
    yield f"the peak is in {rehearsal.peak.name}; what each phase is made of at its highest, in GiB"
    yield from _parts(rehearsal.phases)
    yield ""
    yield "beside the tensors, and in none of these figures"
    yield from table(("", "GiB"), [(name, f"{nbytes / GIB:.2f}") for name, nbytes in judged.beside.items()])
    yield ""
    yield sentence(rehearsal, judged)


def _parts(phases: Sequence[Phase]) -> Iterator[str]:
    names = sorted({part for phase in phases for part in phase.peak.parts}, key=rank_of)
    rows = [(part, *(_cell(phase.peak.parts.get(part, 0)) for phase in phases)) for part in names]
    rows = [row for row in rows if any(row[1:])]
    rows.append(("together", *(_cell(phase.peak.nbytes) for phase in phases)))
    for name, points in (("pinned", [p.pinned for p in phases]), ("pageable", [p.pageable for p in phases])):
        if any(point.nbytes for point in points):
            rows.append((f"host memory, {name}", *(_cell(point.nbytes) for point in points)))
    yield from table(("", *(phase.name for phase in phases)), rows)


def _cell(nbytes: int) -> str:
    return f"{nbytes / GIB:.2f}" if nbytes >= GIB / 200 else ""


def sentence(rehearsal: Rehearsal, judged: Verdict) -> str:
    """Peak and verdict in one line."""
    beside = sum(judged.beside.values())
    need = rehearsal.peak.peak.nbytes + beside
    said = f"with {beside / GIB:.1f} GiB beside the tensors: {to_gib(need)}"
    if judged.spare_bytes is not None and judged.card_bytes is not None:
        short = judged.spare_bytes < 0
        said += f"; a card of {judged.card_bytes / GIB:.1f} GiB " + (
            f"is {to_gib(-judged.spare_bytes)} too small" if short else f"has {to_gib(judged.spare_bytes)} to spare"
        )
        said += f" ({to_gib(judged.card_bytes - beside)} of it are for tensors)"
    if judged.ram_spare_bytes is not None and judged.ram_spare_bytes < 0:
        said += f"; {to_gib(-judged.ram_spare_bytes)} of host memory are missing"
    return said


def _when(phase: Phase) -> str:
    return f"{phase.where}; {phase.note}" if phase.note else phase.where


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Aligned columns: the first and those that hold words to the left, numbers to the right."""
    cells = [list(head), *(list(row) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    right = [all(_is_number(row[column]) for row in cells[1:]) for column in range(len(head))]
    for row in cells:
        aligned = (
            cell.rjust(width) if numbers else cell.ljust(width)
            for cell, width, numbers in zip(row, widths, right, strict=True)
        )
        yield ("  " + "  ".join(aligned)).rstrip()


def _is_number(text: str) -> bool:
    return not text or text.replace(".", "", 1).replace(",", "").replace("-", "", 1).isdigit()


def document(rehearsal: Rehearsal, judged: Verdict) -> dict[str, Any]:
    """For programs: bytes throughout, curves left out."""
    return {
        "bucket": rehearsal.bucket,
        "tokens": rehearsal.tokens,
        "phases": [
            {
                "name": phase.name,
                "peak_bytes": phase.peak.nbytes,
                "where": phase.where,
                "note": phase.note,
                "parts": dict(phase.peak.parts),
                "pinned_bytes": phase.pinned.nbytes,
                "pageable_bytes": phase.pageable.nbytes,
            }
            for phase in rehearsal.phases
        ],
        "peak_bytes": rehearsal.peak.peak.nbytes,
        "host_bytes": rehearsal.host_bytes,
        "overhead_bytes": sum(judged.beside.values()),
        "beside_bytes": dict(judged.beside),
        "card_bytes": judged.card_bytes,
        "ram_bytes": judged.ram_bytes,
        "spare_bytes": judged.spare_bytes,
        "ram_spare_bytes": judged.ram_spare_bytes,
        "fits": judged.fits,
        "measured": False,
    }
