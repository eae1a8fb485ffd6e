"""Captions as the text encoder reads them: the checkpoint's tokenizer, its tokens of a text, and where they are cut.

Only the library ``tokenizers`` is needed, so a dataset is checked without torch or transformers. That library panics or
aborts over damaged files, past what Python can catch. So this file is also a program, ``python captions.py FILE``: it
builds the tokenizer within limits and puts every character there is through it, before that is done in this process. Of
this package it imports nothing at its top, so that it starts at once; it prints what is wrong with the file, as JSON.
"""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from finetune.cogvideox.config import ModelConfig
    from finetune.cogvideox.spec import ModelSpec

TOKENIZER_FILES = ("tokenizer.json", "spiece.model")
"""Where the pieces are; like transformers, the first is preferred."""

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""In the order in which transformers gives them numbers."""

_PATIENCE_S = 120.0

_MEMORY_BYTES = 4 << 30

_CHARACTERS = 4096
"""In one text."""


@dataclass(frozen=True)
class TokenizedCaption:
    """What the text encoder gets of a caption."""

    ids: tuple[int, ...]
    """Its tokens, as many as the model reads, without padding."""
    unknown: int
    """Characters, white space not counted, that became no token of their own: unknown ones, and such as spell a special
    token (``</s>``)."""
    lost: tuple[str, ...]
    """What those characters are, each run of them once."""
    length: int
    """Tokens of all of it, the closing one included; over ``max_text_seq_length``, the rest is cut off."""
    read: int
    """Characters up to where it is cut; all of them if it is not."""


def tokenize(tokenizer: Tokenizer, captions: Sequence[str], spec: ModelSpec) -> list[TokenizedCaption]:
    """The tokens of each caption, those over ``max_text_seq_length`` cut off before the closing one."""
    special = {number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    most, tokenized = spec.max_text_seq_length, []
    for caption, encoding in zip(captions, tokenizer.encode_batch(list(captions)), strict=True):
        ids = encoding.ids[: sum(encoding.attention_mask)]
        # The closing token spans nothing. A run of unknown characters is one token, so characters are counted.
        lost = [caption[slice(*span)] for token, span in zip(ids, encoding.offsets, strict=False) if token in special]
        unknown = sum(not character.isspace() for text in lost for character in text)
        length, read = len(ids), len(caption)
        if length > most:  # what is cut keeps its closing token
            read = encoding.offsets[most - 2][1]
            ids = [*ids[: most - 1], ids[-1]]
        tokenized.append(TokenizedCaption(tuple(ids), unknown, tuple(dict.fromkeys(filter(None, lost))), length, read))
    return tokenized


def load_tokenizer(model: ModelConfig) -> Tokenizer:
    """The checkpoint's tokenizer, which gives the tokens of ``transformers.T5Tokenizer``; its padding is set.

    A process of its own reads the file first, which takes a third of a second for T5's 32 000 pieces; a file that has
    not changed is read once.

    Raises:
        ModelError: if it names files elsewhere, asks for too much, cannot be read, or states what would give other
            tokens than ours.
    """
    from finetune.cogvideox.components import TokenizerSettings, read_json, read_json_as, require_own_files
    from finetune.cogvideox.model_files import COMPLETE_CHECKPOINT, resolve_pretrained
    from finetune.core.errors import ModelError

    folder = resolve_pretrained(model.pretrained, model.revision, components=["tokenizer"]) / "tokenizer"
    require_own_files(folder)
    stated = folder / "tokenizer_config.json"
    settings = read_json_as(TokenizerSettings, stated) if stated.exists() else TokenizerSettings()
    path = next((folder / name for name in TOKENIZER_FILES if (folder / name).is_file()), None)
    if path is None:
        what = f"the tokenizer has neither {' nor '.join(TOKENIZER_FILES)}"
        raise ModelError(what, where=str(folder), fix=COMPLETE_CHECKPOINT)
    values, status = settings.model_dump_json(), path.stat()
    fault = _fault_in_a_process(path, values, status.st_size, status.st_mtime_ns)
    if fault:
        raise ModelError(f"the tokenizer cannot be read: {fault}", where=str(path), fix=COMPLETE_CHECKPOINT)
    tokenizer, listed = _build(path, json.loads(values)), folder / "added_tokens.json"
    # transformers reads this list where the settings hold none.
    added = read_json(listed) if settings.added_tokens_decoder is None and listed.exists() else {}
    if missing := [token for token in added if tokenizer.token_to_id(token) is None]:
        what = f"it adds {missing[0]!r:.60}, which {stated.name} does not list in added_tokens_decoder"
        fix = "save the tokenizer again with transformers: T5Tokenizer.from_pretrained(...).save_pretrained(...)"
        raise ModelError(what, where=str(listed), fix=fix)
    return tokenizer


@lru_cache(maxsize=8)
def _fault_in_a_process(path: Path, settings: str, size: int, mtime_ns: int) -> str:
    """What is wrong with the file, empty for nothing, by its size and time."""
    # -P: the working folder must not be where modules are looked for.
    command = [sys.executable, "-P", __file__, str(path)]
    try:
        result = subprocess.run(command, input=settings.encode(), capture_output=True, timeout=_PATIENCE_S, check=False)
    except subprocess.TimeoutExpired:
        return f"it was not read within {_PATIENCE_S:g} s"
    if result.returncode == 0:
        return str(json.loads(result.stdout))
    return f"the reader ended with {'signal' if result.returncode < 0 else 'code'} {abs(result.returncode)}"


def _build(path: Path, settings: dict[str, Any]) -> Tokenizer:
    """The tokenizer that transformers builds of these files, which of a ``tokenizer.json`` does not take everything.

    Args:
        path: one of ``TOKENIZER_FILES``.
        settings: fields of ``components.TokenizerSettings``.
    """
    from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors

    extra_ids = [f"<extra_id_{number}>" for number in range(settings["extra_ids"])]
    added: list[Any] = []
    if path.suffix == ".json":
        stored = Tokenizer.from_file(str(path))
        content = json.loads(path.read_text(encoding="utf-8"))
        if (kind := content["model"].get("type", "Unigram")) != "Unigram":
            raise ValueError(f"it is a {kind}; T5's is a Unigram")
        pieces = [(piece, score) for piece, score in content["model"]["vocab"]]
        steps = content.get("normalizer") or {}
        charsmap = next(
            (base64.b64decode(step["precompiled_charsmap"]) for step in steps.get("normalizers", [steps])
             if step.get("type") == "Precompiled"), None,
        )  # fmt: skip
        closing = stored.post_processor
        added = [token for _, token in sorted(stored.get_added_tokens_decoder().items())]
    else:
        from sentencepiece import sentencepiece_model_pb2

        model = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
        pieces = [(piece.piece, piece.score) for piece in model.pieces]
        pieces += [(token, 0.0) for token in reversed(extra_ids)]
        charsmap, closing = model.normalizer_spec.precompiled_charsmap, None
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    if charsmap:
        tokenizer.normalizer = normalizers.Precompiled(charsmap)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    if (decoder := settings["added_tokens_decoder"]) is not None:
        added = [decoder[number] for number in sorted(decoder, key=int)]
    more = settings["extra_special_tokens"] or settings["additional_special_tokens"] or extra_ids

    def as_added(token: Any) -> AddedToken:
        if isinstance(token, dict):
            return AddedToken(**{name: value for name, value in token.items() if value is not None})
        return AddedToken(token, special=True) if isinstance(token, str) else token

    named = {name: as_added(settings[name]) for name in _NAMED_TOKENS if settings[name] is not None}
    tokens: dict[str, AddedToken] = {}
    for token in (*added, *named.values(), *(more.values() if isinstance(more, dict) else more)):
        tokens.setdefault(as_added(token).content, as_added(token))
    tokenizer.add_tokens(list(tokens.values()))
    eos, pad = named["eos_token"], named["pad_token"]
    tokenizer.post_processor = closing or processors.TemplateProcessing(
        single=["$A", "</s>"], special_tokens=[("</s>", tokenizer.token_to_id(eos.content))]
    )
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id(pad.content), pad_token=pad.content)
    return tokenizer


# ------------------------------------------------------------------------------------------------------- the program


def _main() -> None:
    with suppress(ImportError, ValueError, OSError):  # not on Windows; a lower limit stands already
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY_BYTES, resource.getrlimit(resource.RLIMIT_DATA)[1]))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    fault = ""
    try:
        tokenizer = _build(Path(sys.argv[1]), json.load(sys.stdin))
        for first in range(0, sys.maxunicode, _CHARACTERS):
            text = "".join(map(chr, range(first, first + _CHARACTERS)))
            text = text.encode("utf-8", "ignore").decode("utf-8")  # without the halves of surrogate pairs
            # Past the normalizer, text that it leaves alone meets nothing of the file that other such text does not.
            if not first or (tokenizer.normalizer and tokenizer.normalizer.normalize_str(text) != text):
                tokenizer.encode(text)
    except BaseException as error:  # a panic of Rust is no Exception
        fault = f"{type(error).__name__}: {error}"[:300]
    print(json.dumps(fault))


if __name__ == "__main__":
    _main()
