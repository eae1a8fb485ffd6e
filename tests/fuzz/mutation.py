"""Mutation of documents: small damage, pieces of the format in the wrong place, and far too much of something."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

MAX_CASE = 1 << 16
"""Bytes of an ordinary case. One in a few hundred is blown up to ``HUGE_CASE``."""
HUGE_CASE = 1 << 21


def mutate(source: random.Random, pool: Sequence[bytes], tokens: Sequence[bytes]) -> bytes:
    """A new case made from one or two of ``pool``: one to eight changes of it."""
    case = bytearray(source.choice(pool))
    for _ in range(source.choice((1, 1, 2, 2, 3, 5, 8))):
        source.choice(_CHANGES)(source, case, pool, tokens)
    if source.random() < 0.003 and case:
        case *= source.randrange(1, max(2, HUGE_CASE // len(case)))
        return bytes(case[:HUGE_CASE])
    return bytes(case[:MAX_CASE])


Change = Callable[[random.Random, bytearray, Sequence[bytes], Sequence[bytes]], None]


def _span(source: random.Random, case: bytearray, longest: int = 64) -> slice:
    start = source.randrange(len(case) + 1)
    return slice(start, min(len(case), start + source.randrange(1, longest)))


def _flip(source: random.Random, case: bytearray, pool: Sequence[bytes], tokens: Sequence[bytes]) -> None:
    if case:
        case[source.randrange(len(case))] ^= 1 << source.randrange(8)


def _random_byte(source: random.Random, case: bytearray, pool: Sequence[bytes], tokens: Sequence[bytes]) -> None:
    case[_span(source, case, 2)] = bytes([source.randrange(256)])


def _delete(source: random.Random, case: bytearray, pool: Sequence[bytes], tokens: Sequence[bytes]) -> None:
    del case[_span(source, case)]


def _truncate(source: random.Random, case: bytearray, pool: Sequence[bytes], tokens: Sequence[bytes]) -> None:
    del case[source.randrange(len(case) + 1) :]


def _repeat(source: random.Random, case: bytearray, pool: Sequence[bytes], tokens: Sequence[bytes]) -> None:
    span = _span(source, case)
    case[span] = bytes(case[span]) * source.choice((2, 3, 10, 100, 1000))
    del case[MAX_CASE:]


def _splice(source: random.Random, case: bytearray, pool: Sequence[bytes], tokens: Sequence[bytes]) -> None:
    other = source.choice(pool)
    start = source.randrange(len(other) + 1)
    case[_span(source, case)] = other[start : start + source.randrange(1, 200)]


def _insert_token(source: random.Random, case: bytearray, pool: Sequence[bytes], tokens: Sequence[bytes]) -> None:
    if tokens:
        place = source.randrange(len(case) + 1)
        case[place:place] = source.choice(tokens)


def _replace_value(source: random.Random, case: bytearray, pool: Sequence[bytes], tokens: Sequence[bytes]) -> None:
    """Put a token in the place of what stands between two delimiters."""
    places = [index for index, byte in enumerate(case) if byte in b' :,\n"[]{}']
    if tokens and len(places) > 1:
        first = source.randrange(len(places) - 1)
        case[places[first] + 1 : places[first + 1]] = source.choice(tokens)


def _swap_lines(source: random.Random, case: bytearray, pool: Sequence[bytes], tokens: Sequence[bytes]) -> None:
    lines = bytes(case).split(b"\n")
    first, second = source.randrange(len(lines)), source.randrange(len(lines))
    lines[first], lines[second] = lines[second], lines[first]
    case[:] = b"\n".join(lines)


_CHANGES: tuple[Change, ...] = (
    *(_flip, _random_byte, _delete, _truncate, _repeat, _splice, _swap_lines),
    *(_insert_token, _insert_token, _replace_value, _replace_value),
)
