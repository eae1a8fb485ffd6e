"""From a short prompt to the long form that CogVideoX was trained on, written by a language model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
from PIL import Image

from finetune.captioning.answers import Text, TokenLimit, answers_within
from finetune.captioning.captioners import Captioner, Chat
from finetune.core.errors import ConfigError, DataError, FinetuneError, raise_all
from finetune.core.types import SamplePrompt
from finetune.datasets.pictures import read_image
from finetune.datasets.rows import MAX_CAPTION_BYTES
from finetune.datasets.tables import read_text

_SIDE = 768
"""Longest side of a first frame as the model is shown it, in pixels."""


@dataclass(frozen=True)
class Instructions:
    """What a model is asked; ``{prompt}`` becomes the short prompt, ``{words}`` how many words CogVideoX reads."""

    text: str
    """Where there is a prompt alone."""
    image: str
    """Where its first frame is shown as well."""


def read_instructions(path: Path | None = None) -> Instructions:
    """The instructions that ship, or a file's text in place of both.

    Raises:
        ConfigError: if ``{prompt}`` does not stand in the file.
        DataError: if it cannot be read.
    """
    if path is None:
        folder = resources.files("finetune") / "templates"
        names = ("enhance_prompt.txt", "enhance_image_prompt.txt")
        return Instructions(*((folder / name).read_text(encoding="utf-8") for name in names))
    text = read_text(path, most_bytes=MAX_CAPTION_BYTES)
    if "{prompt}" not in text:
        fix = "write {prompt} where the short prompt is to stand; `finetune enhance --print-instruction` shows one"
        raise ConfigError("the instruction never mentions the prompt", where=str(path), fix=fix)
    return Instructions(text, text)


@dataclass(frozen=True)
class EnhanceReport:
    """Long prompts for short ones; ``str()`` of it is one line for each."""

    prompts: tuple[SamplePrompt, ...]
    """As given, with the long text; image and seed are kept."""
    tokens: tuple[int, ...]
    """That the text encoder makes of each."""
    too_long: tuple[int, ...] = ()
    """Positions of those of which it will not read the end."""
    errors: tuple[FinetuneError, ...] = ()
    """Why some were not made long; those are not among ``prompts``."""

    def __str__(self) -> str:
        return "\n".join(prompt.prompt for prompt in self.prompts)


def enhance_prompts(
    prompts: Sequence[SamplePrompt], writer: Callable[[], Captioner], limit: TokenLimit, instructions: Instructions
) -> EnhanceReport:
    """Have a long prompt written for each short one; a first frame goes along.

    Args:
        prompts: the short ones.
        writer: makes the model that is asked.
        limit: of the CogVideoX that will read the long ones.
        instructions: what the model is asked.

    Raises:
        DataError: if an image cannot be read, or there is no answer to any prompt that could be used.
        ModelError: if the model or its endpoint cannot be had.
    """
    chats = [_chat(prompt, limit, instructions) for prompt in prompts]
    model = writer()
    texts: list[Text | FinetuneError] = []
    for chat in chats:  # one after the other: a batch of pictures and prompts is nothing that every model takes
        texts += answers_within(limit, [chat], model, 0)
    errors = [text for text in texts if isinstance(text, FinetuneError)]
    written = [(prompt, text) for prompt, text in zip(prompts, texts, strict=True) if isinstance(text, Text)]
    if not written:
        raise_all(DataError, errors, what="{n} prompts stay short")
    return EnhanceReport(
        tuple(prompt.model_copy(update={"prompt": text.text}) for prompt, text in written),
        tuple(text.tokens for _, text in written),
        tuple(at for at, (_, text) in enumerate(written) if text.tokens > limit.most),
        tuple(errors),
    )


def _chat(prompt: SamplePrompt, limit: TokenLimit, instructions: Instructions) -> Chat:
    instruction = instructions.text if prompt.image is None else instructions.image
    turn = instruction.strip().replace("{words}", str(limit.words)).replace("{prompt}", prompt.prompt)
    about = f"prompt {prompt.prompt[:60]!r}"
    if prompt.image is None:
        return Chat(about, (turn,))
    picture = Image.fromarray(read_image(prompt.image))
    picture.thumbnail((_SIDE, _SIDE))
    return Chat(about, (turn,), frames=np.asarray(picture)[None])
