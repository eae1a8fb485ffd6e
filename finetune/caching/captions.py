"""Captions as the text encoder gets them: what it does not know of them, and which of them it cannot tell apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from finetune.caching.request import local_folder
from finetune.cogvideox import TokenizedCaption, load_tokenizer, tokenize
from finetune.config import RunConfig
from finetune.datasets.manifest import WARNING
from finetune.errors import DataError
from finetune.facts import Facts

MOST_UNKNOWN = 0.5
"""Part of a caption's own characters; above it, what is left is no description of a clip."""

_AT_A_TIME = 1_000
_NOT_COMPARED = (
    "captions were not compared with what the model can read: its tokenizer is not on this machine (precompute does it,"
    " before it encodes anything)"
)


@dataclass(frozen=True)
class CaptionFindings:
    """What is wrong with the captions of a dataset."""

    notes: tuple[str, ...] = ()
    errors: tuple[DataError, ...] = ()
    """Only with ``data.unreadable_captions: error``."""


def check_captions(config: RunConfig, facts: Facts, captions: Mapping[str, str]) -> CaptionFindings:
    """Read captions with the model's own tokenizer, where it is on this machine; nothing is fetched.

    T5 was made for English and knows the letters of a few more languages. Each run of characters that it does not know
    becomes one and the same unknown mark, so that whole captions become equal.

    Args:
        config: the run's configuration.
        facts: of its model.
        captions: each caption as it is trained on, and where it is written.

    Raises:
        ModelError: if the tokenizer is there and cannot be loaded.
    """
    folder = local_folder(config.model)
    if folder is None or not any(
        (folder / "tokenizer" / name).is_file() for name in ("spiece.model", "tokenizer.json")
    ):
        return CaptionFindings((_NOT_COMPARED,))
    tokenizer = load_tokenizer(config.model)
    added = _letters(config.data.apply(""))
    texts = list(captions)
    unknown: dict[str, float] = {}
    by_tokens: dict[tuple[int, ...], list[str]] = {}
    for first in range(0, len(texts), _AT_A_TIME):
        batch = texts[first : first + _AT_A_TIME]
        for text, tokens in zip(batch, tokenize(tokenizer, batch, facts), strict=True):
            if tokens.unknown:
                unknown[text] = _part(text, tokens, added)
            by_tokens.setdefault(tokens.ids, []).append(text)
    alike = [group for group in by_tokens.values() if len(group) > 1]
    return CaptionFindings(
        tuple(f"{WARNING}{warning}" for warning in _warnings(unknown, alike, len(texts), facts.max_text_seq_length)),
        tuple(_errors(unknown, alike, captions)) if config.data.unreadable_captions == "error" else (),
    )


def _letters(text: str) -> int:
    return sum(not character.isspace() for character in text)


def _part(text: str, tokens: TokenizedCaption, added: int) -> float:
    """How much of what was written for this clip is unknown; prefix, suffix and trigger word are not counted."""
    return min(1.0, tokens.unknown / max(1, _letters(text) - added))


def _warnings(unknown: Mapping[str, float], alike: list[list[str]], count: int, most_tokens: int) -> list[str]:
    warnings = []
    if unknown:
        worst = max(unknown, key=unknown.__getitem__)
        mostly = sum(part > MOST_UNKNOWN for part in unknown.values())
        warnings.append(
            f"{len(unknown)} of {count} captions hold characters that the model's text encoder does not know, and reads"
            f" as one unknown mark ({mostly} of them for the most part): such as {_quoted(worst)}, {unknown[worst]:.0%}"
            " unknown"
        )
    if alike:
        first, second = alike[0][:2]
        warnings.append(
            f"{sum(map(len, alike))} different captions are not different to the model, which reads the same tokens (at"
            f" most {most_tokens}) for {_quoted(first)} and {_quoted(second)}"
        )
    return warnings


def _errors(unknown: Mapping[str, float], alike: list[list[str]], captions: Mapping[str, str]) -> list[DataError]:
    lost = {text: f"{part:.0%} of the caption is unknown" for text, part in unknown.items() if part > MOST_UNKNOWN}
    for group in alike:
        for text in group:
            if text in unknown:
                lost.setdefault(text, "the caption is another's, but for characters that are unknown")
    fix = "write it in English, or set data.unreadable_captions: warn"
    return [
        DataError(f"{what} to the model's text encoder: {_quoted(text)}", where=captions[text], fix=fix)
        for text, what in lost.items()
    ]


def _quoted(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
