"""Captions as the text encoder reads them: the checkpoint's tokenizer, and what it makes of a text. Without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune.cogvideox.components import loading
from finetune.cogvideox.config import ModelConfig
from finetune.cogvideox.model_files import resolve_pretrained
from finetune.cogvideox.spec import ModelSpec
from finetune.cogvideox.tokenizer import require_tokenizer

if TYPE_CHECKING:
    from transformers import T5Tokenizer


def load_tokenizer(model: ModelConfig) -> T5Tokenizer:
    """The tokenizer alone. Raises ModelError as ``load_transformer`` does."""
    from transformers import T5Tokenizer

    folder = resolve_pretrained(model.pretrained, model.revision, components=["tokenizer"])
    require_tokenizer(folder)
    with loading("tokenizer", folder):
        tokenizer = T5Tokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        tokenizer("a caption", padding="max_length", max_length=8, truncation=True)  # as every caption will be
    return tokenizer


@dataclass(frozen=True)
class TokenizedCaption:
    """What the text encoder gets of a caption."""

    ids: tuple[int, ...]
    """Its tokens, without padding, as many as the model reads."""
    unknown: int
    """Characters, white space not counted, that became no token of their own: unknown ones, and such as spell a special
    token (``</s>``)."""
    lost: tuple[str, ...]
    """What those characters are, each run of them once."""
    length: int
    """Tokens of all of it, the closing one included; over ``max_text_seq_length``, the rest is cut off."""
    read: int
    """Characters up to where it is cut; all of them if it is not."""


def tokenize(tokenizer: T5Tokenizer, captions: Sequence[str], spec: ModelSpec) -> list[TokenizedCaption]:
    """Each caption as ``encode_prompts`` hands it to the encoder."""
    encoded: Any = tokenizer(list(captions), add_special_tokens=True, return_offsets_mapping=True, verbose=False)
    special = set(tokenizer.all_special_ids)
    found = []
    for caption, ids, spans in zip(captions, encoded.input_ids, encoded.offset_mapping, strict=True):
        # The closing token spans nothing. A run of unknown characters is one token, so characters are counted.
        lost = [caption[begin:end] for token, (begin, end) in zip(ids, spans, strict=True) if token in special]
        unknown = sum(not character.isspace() for text in lost for character in text)
        length, read = len(ids), len(caption)
        if length > spec.max_text_seq_length:  # what is cut keeps its closing token
            read = spans[spec.max_text_seq_length - 2][1]
            ids = [*ids[: spec.max_text_seq_length - 1], ids[-1]]
        found.append(TokenizedCaption(tuple(ids), unknown, tuple(dict.fromkeys(filter(None, lost))), length, read))
    return found


def count_tokens(tokenizer: T5Tokenizer, captions: Sequence[str]) -> list[int]:
    """How many tokens each caption has, the closing one included; over ``max_text_seq_length``, the rest is cut off."""
    # Not verbose, because the tokenizer would warn of its own maximum and not of CogVideoX's.
    encoded: Any = tokenizer(list(captions), add_special_tokens=True, verbose=False)
    return [len(ids) for ids in encoded.input_ids]
