"""Text from elsewhere: what in it is no text, and how to show it without obeying it.

Captions, file names and configurations come from strangers' datasets. What is trained on has to be what a person sees,
and a message about a bad row must not be able to move the cursor of the terminal that shows it.
"""

from __future__ import annotations

import re

_CONTROLS = "\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f"
"""Control characters except tab and line ends; ESC, which begins a terminal's escape sequences, is one."""

_REORDERING = "\u202a-\u202e\u2066-\u2069"
"""Embeddings, overrides and isolates: they make a terminal or an editor show another order than is stored."""

_BROKEN = "\ud800-\udfff\ufdd0-\ufdef" + "".join(
    chr(plane << 16 | 0xFFFE) + chr(plane << 16 | 0xFFFF) for plane in range(17)
)
"""Halves of surrogate pairs, and code points that are no characters."""

_LOST = "\ufffd"
"""The mark that a decoder leaves behind where it lost something."""

_TAGS = "\U000e0000-\U000e007f"
"""Invisible copies of ASCII: text that no reader sees and a tokenizer reads."""

_FLAG = "\U0001f3f4[\U000e0030-\U000e0039\U000e0061-\U000e007a]{2,6}\U000e007f"
"""The one use that tags still have: the flags of England, Scotland and Wales."""

_INVISIBLE = "\u00ad\u180e\u200b\u2060-\u2064\ufeff"
"""Without width and meaning: soft hyphen, zero-width space, word joiner, byte order mark. Not among them are the
joiners that emoji and Persian need, and the marks of direction, which reorder only punctuation."""

_FAULT = re.compile(f"(?:{_FLAG})|([{_CONTROLS}{_REORDERING}{_BROKEN}{_LOST}{_TAGS}])")

_LINE_END = re.compile("[\n\r\u2028\u2029]")

_UNSHOWN = re.compile(f"(?:{_FLAG})|([{_CONTROLS}\r\u2028\u2029{_REORDERING}{_BROKEN}{_TAGS}{_INVISIBLE}])")

_INVISIBLES = re.compile(f"[{_INVISIBLE}]")


def text_fault(text: str, *, one_line: bool = False) -> str | None:
    """What makes ``text`` unfit to be trained on or to name a file, in words; None if nothing.

    Args:
        text: any string, also one that cannot be encoded.
        one_line: whether line ends are faults too.
    """
    for found in _FAULT.finditer(text):
        if character := found.group(1):
            return f"it holds U+{ord(character):04X} at character {found.start() + 1}, which is no text"
    if one_line and (end := _LINE_END.search(text)):
        return f"it has a line end at character {end.start() + 1}"
    return None


def without_invisible(text: str) -> str:
    """``text`` without the characters that nobody sees and that mean nothing."""
    return _INVISIBLES.sub("", text)


def holds_word(text: str, word: str) -> bool:
    """Whether ``word`` stands in ``text`` as a word of its own, in the same case; an empty one stands in every text."""
    return not word or re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text) is not None


def stripped(text: str) -> str:
    """``text`` without white space of any kind, and without characters that nobody sees, at its ends."""
    text = text.strip()
    if not text or not _INVISIBLES.search(text[0] + text[-1]):  # nearly always, and much faster
        return text
    visible = [at for at, character in enumerate(text) if not character.isspace() and not _INVISIBLES.match(character)]
    return text[visible[0] : visible[-1] + 1] if visible else ""


def shown(text: str) -> str:
    """``text`` for a terminal or a log: what would act, hide or not encode there becomes ``\\x1b``, ``\\u202e`` or so.

    Line ends and tabs stay, letters of every script and emoji too. What is shown once is shown again unchanged.
    """
    if text.isprintable():  # nearly always, and much faster
        return text
    return _UNSHOWN.sub(lambda found: _escaped(found.group(1)) if found.group(1) else found.group(), text)


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
