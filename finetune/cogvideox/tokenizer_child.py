"""The process that reads a tokenizer's file: ``python tokenizer_child.py FILE``, started by ``cogvideox.tokenizer``.

It does what transformers will do with the file, and then puts every character there is through it. It imports none of
this package, so that it starts at once. It answers with one JSON object on standard output.
"""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from pathlib import Path

_MEMORY_BYTES = 4 << 30

_CHARACTERS = 4096
"""In one text."""


def read(path: str) -> int:
    """The highest number of a piece. Whatever the libraries raise is raised."""
    from tokenizers import Tokenizer, models, normalizers

    if path.endswith(".json"):
        tokenizer = Tokenizer.from_file(path)
    else:
        from sentencepiece import sentencepiece_model_pb2

        model = sentencepiece_model_pb2.ModelProto.FromString(Path(path).read_bytes())
        pieces = [(piece.piece, piece.score) for piece in model.pieces]
        tokenizer = Tokenizer(models.Unigram(pieces, unk_id=model.trainer_spec.unk_id))
        if charsmap := model.normalizer_spec.precompiled_charsmap:
            tokenizer.normalizer = normalizers.Precompiled(charsmap)
    kind = type(tokenizer.model).__name__
    if kind != "Unigram":
        raise ValueError(f"it is a {kind}; T5's is a Unigram")
    for first in range(0, sys.maxunicode, _CHARACTERS):
        text = "".join(map(chr, range(first, first + _CHARACTERS)))
        text = text.encode("utf-8", "ignore").decode("utf-8")  # without the halves of surrogate pairs
        tokenizer.encode(text)
        if tokenizer.normalizer is not None:
            tokenizer.normalizer.normalize_str(text)
    return max(tokenizer.get_vocab().values())


def main() -> None:
    """Answer on standard output."""
    with suppress(ImportError, ValueError, OSError):  # not on Windows; a lower limit stands already
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY_BYTES, resource.getrlimit(resource.RLIMIT_DATA)[1]))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        highest, fault = read(sys.argv[1]), ""
    except BaseException as error:  # a panic of Rust is no Exception
        highest, fault = 0, f"{type(error).__name__}: {error}"[:300]
    print(json.dumps({"fault": fault, "highest": highest}))


if __name__ == "__main__":
    main()
