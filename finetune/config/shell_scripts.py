"""What a shell script hands to the Python program that it starts, without running it.

Assignments, arrays and ``for`` loops over constants are followed, which is what training scripts use.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.core.errors import ConfigError

_MOST_BYTES = 1 << 20
"""Of a script, and of what its variables become."""


@dataclass(frozen=True)
class Setting:
    """One of their settings."""

    name: str
    """Without dashes."""
    words: tuple[str, ...]
    """Its values; none for a bare flag."""
    line: int | None = None
    """Where it stands; None for a default of theirs, which the file leaves as it is."""

    def __str__(self) -> str:
        text = " ".join([self.name, *(" ".join(word.split()) for word in self.words)])
        return text if len(text) <= 48 else f"{text[:45]}..."


_QUOTED = r"""\\.|'[^']*'|"(?:[^"\\]|\\.)*\""""

_TOKEN = re.compile(
    rf"""(?P<word>(?:[^\s'"\\#]|{_QUOTED})(?:[^\s'"\\]|{_QUOTED})*)|\#[^\n]*|(?P<end>\n)|(?P<lone>['"])""", re.S
)
"""One word of a shell's line with its quotes, a comment, the end of a line, or a quote that never ends."""

_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=(.*)", re.S)

_ARRAY = re.compile(r'"?\$\{(\w+)\[[@*]\]\}"?')

_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")

_ENDS = {"\n", "|", "&&", "||", ";", ">", ">>", "2>&1", "&"}


class ShellScript:
    """The settings of the program that a script starts, variables replaced.

    Args:
        path: the script.

    Raises:
        ConfigError: if it cannot be read, is too large, or a quote in it never ends.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.text = path, _text(path)
        self.program = ""
        self.notes: list[str] = []
        self._variables: dict[str, list[str]] = {}

    def settings(self) -> list[Setting]:
        """Every flag of the program; of one that is given twice the last."""
        flags: dict[str, list[str]] = {}
        name = ""
        for word in self._run(self._words(self.text)):
            if word in _ENDS:
                name = ""
            elif word.endswith(".py") and not name:
                self.program = word
            elif word.startswith("--") and self.program:
                name, equals, value = word[2:].partition("=")
                flags[name] = [value] if equals else []
            elif name:
                flags[name].append(word)
        return [Setting(name, tuple(words), self._line(name)) for name, words in flags.items()]

    def _line(self, name: str) -> int:
        flag = re.compile(rf"^(?!\s*#).*(?<![\w-])--{re.escape(name)}(?![\w-])", re.M)
        match = flag.search(self.text)
        return 0 if match is None else self.text.count("\n", 0, match.start()) + 1

    def _words(self, text: str) -> list[str]:
        text = re.sub(r"\\\r?\n", " ", text)
        tokens = list(_TOKEN.finditer(text))
        for token in tokens:
            if token["lone"]:
                raise ConfigError(
                    f"a quote that begins with {text[token.start() :][:40]!r} never ends", where=str(self.path)
                )
        return [token[0] for token in tokens if token["word"] or token["end"]]

    def _run(self, words: Sequence[str]) -> Iterator[str]:
        """The words of every command, expanded; assignments and loops are carried out."""
        rest = iter(words)
        for word in rest:
            if match := _ASSIGNMENT.fullmatch(word):
                name, value = match[1], match[2]
                if value.startswith("("):
                    items = [value[1:]]
                    while not items[-1].endswith(")"):
                        items.append(next(rest, ")"))
                    items[-1] = items[-1].removesuffix(")")
                    self._variables[name] = [w for item in items if item.strip() for w in self._expand(item)]
                else:
                    self._variables[name] = [self._text(value)]
            elif word == "for":
                name, values = next(rest, ""), []
                for item in rest:
                    if item in ("do", "\n", ";"):
                        break
                    values += [] if item == "in" else self._expand(item.removesuffix(";"))
                    if item.endswith(";"):
                        break
                self._variables[name] = values[:1]
                if len(values) > 1:
                    self.notes.append(f"the script tries {name} = {', '.join(values)}: {values[0]} is taken")
            else:
                yield from self._expand(word)

    def _expand(self, word: str, depth: int = 0) -> list[str]:
        if match := _ARRAY.fullmatch(word):
            return self._variables.get(match[1], [])
        text = self._text(word)
        if word[0] not in "'\"" and _VARIABLE.search(word) and re.search(r"\s", text) and depth < 5:
            return [part for inner in self._words(text) if inner.strip() for part in self._expand(inner, depth + 1)]
        return [text]

    def _text(self, word: str) -> str:
        """A word without its quotes, variables replaced where nothing forbids it."""
        parts = re.findall(r"""'[^']*'|"(?:[^"\\]|\\.)*"|\\.|[^'"\\]+""", word, re.S)
        return "".join(part[1:-1] if part[0] == "'" else self._replaced(_unquoted(part)) for part in parts)

    def _replaced(self, text: str) -> str:
        values = {name: " ".join(self._variables[name]) for name in self._variables.keys() & _names(text)}
        if len(text) + sum(len(_VARIABLE.findall(text)) * len(value) for value in values.values()) > _MOST_BYTES:
            raise ConfigError("its variables grow beyond any command line", where=str(self.path))
        return _VARIABLE.sub(lambda match: values.get(match[1] or match[2], match[0]), text)


def _names(text: str) -> set[str]:
    return {match[1] or match[2] for match in _VARIABLE.finditer(text)}


def _unquoted(part: str) -> str:
    inner = part[1:-1] if part[0] == '"' else part
    return re.sub(r'\\(["\\$`])' if part[0] == '"' else r"\\(.)", r"\1", inner)


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ConfigError("the file is too large for a script", where=str(path))
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text in UTF-8"
        raise ConfigError(f"the file cannot be read: {reason}", where=str(path), fix="give another") from None
