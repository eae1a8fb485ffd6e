"""Answers that CogVideoX reads in full: cleaned, counted by its tokenizer, asked for again where they are too long."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from finetune.captioning.captioners import Answer, Captioner, Chat
from finetune.cogvideox.captions import load_tokenizer, tokenize
from finetune.cogvideox.config import ModelConfig
from finetune.cogvideox.model_files import json_folder
from finetune.cogvideox.spec import read_spec
from finetune.core.errors import DataError, FinetuneError, ModelError
from finetune.datasets.rows import check_caption

SHORTER = (
    "That is too long: at most {words} words can be read. Write it again in at most {words} words, as one paragraph,"
    " with what matters most to how it looks and moves. Write only the description."
)

WORDS_PER_TOKEN = 0.66
"""Of English prose under T5's tokenizer, on the safe side."""

_ATTEMPTS = 3
"""To make a caption short enough."""

_THOUGHTS = re.compile(r"<think>.*?</think>", re.DOTALL)


@dataclass(frozen=True)
class TokenLimit:
    """What CogVideoX's text encoder reads of a caption."""

    most: int
    count: Callable[[Sequence[str]], list[int]]
    """Tokens of each text."""

    @property
    def words(self) -> int:
        """About as many English words."""
        return int(self.most * WORDS_PER_TOKEN)


def token_limit(target: str) -> TokenLimit:
    """What a CogVideoX reads of a caption, counted by its own tokenizer.

    Args:
        target: a folder, a hub id, or a published model's name such as ``5b``.

    Raises:
        ModelError: if its JSON or its tokenizer cannot be found or read.
    """
    try:
        spec = read_spec(str(json_folder(target)))
        tokenizer = load_tokenizer(ModelConfig(pretrained=target))
    except ModelError as error:
        what = f"captions are counted by CogVideoX's tokenizer, which cannot be had: {error.what}"
        raise ModelError(what, where=error.where, fix=f"{error.fix}; --for names another model or its folder") from None
    return TokenLimit(
        spec.max_text_seq_length, lambda texts: [tokens.length for tokens in tokenize(tokenizer, texts, spec)]
    )


class Text(NamedTuple):
    """What a model wrote, and how many tokens CogVideoX's text encoder makes of it."""

    text: str
    tokens: int


def answers_within(
    limit: TokenLimit, chats: Sequence[Chat], captioner: Captioner, variant: int
) -> list[Text | FinetuneError]:
    """A text for each chat; one that is too long is asked for again, never cut, and the shortest taken.

    Args:
        limit: of the model that will read the texts.
        chats: each with one turn.
        captioner: who is asked.
        variant: as ``Captioner.answer`` takes it.

    Returns:
        For each chat its text, which may still be too long, or why there is none.

    Raises:
        FinetuneError: for what no chat is to blame for.
    """
    texts = _counted(limit, chats, captioner.answer(chats, variant))
    for attempt in range(1, _ATTEMPTS):
        long = {at: text for at, text in enumerate(texts) if isinstance(text, Text) and text.tokens > limit.most}
        if not long:
            break
        request = SHORTER.format(words=int(limit.words * 0.85**attempt))
        again = [replace(chats[at], turns=(chats[at].turns[0], text.text, request)) for at, text in long.items()]
        for at, answer in zip(long, _counted(limit, again, captioner.answer(again, variant)), strict=True):
            if isinstance(answer, Text) and answer.tokens < long[at].tokens:
                texts[at] = answer
    return texts


def _counted(limit: TokenLimit, chats: Sequence[Chat], answers: Sequence[Answer]) -> list[Text | FinetuneError]:
    counted: list[Text | FinetuneError] = []
    for chat, answer in zip(chats, answers, strict=True):
        if isinstance(answer, FinetuneError):
            counted.append(answer)
            continue
        text = " ".join(_THOUGHTS.sub(" ", answer).split()).strip('"\u201c\u201d ')
        try:
            check_caption(text, chat.about)
        except DataError as error:
            what = f"the answer is no caption: {error.what}"
            counted.append(DataError(what, where=chat.about, fix="repeat the command, or write it by hand"))
            continue
        counted.append(Text(text, limit.count([text])[0]))
    return counted
