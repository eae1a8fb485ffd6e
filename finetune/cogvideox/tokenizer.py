"""A checkpoint's tokenizer, read by a process of its own before a library reads it in this one.

The library that reads a tokenizer's pieces panics or aborts over damaged files, past what Python can catch. So this
file is also a program, ``python tokenizer.py FILE``: it does what transformers will do with the file, and then puts
every character there is through it. It imports none of this package but where a checkpoint is looked at, so that it
starts at once; it answers with one JSON object on standard output.
"""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import suppress
from functools import lru_cache
from pathlib import Path, PurePosixPath

_FILES = ("tokenizer.json", "spiece.model")
"""Where the pieces are; transformers prefers the first."""

_MOST_EXTRA_IDS = 1_000

_PATIENCE_S = 120.0

_MEMORY_BYTES = 4 << 30

_CHARACTERS = 4096
"""In one text."""


def require_tokenizer(folder: Path) -> int:
    """Look at a tokenizer's settings, and have its pieces read by a process of its own.

    The process takes a tenth of a second; a file that has not changed is read once.

    Args:
        folder: of the checkpoint.

    Returns:
        The highest number of a piece.

    Raises:
        ModelError: if it names files elsewhere, asks for too much, or cannot be read.
    """
    from finetune.cogvideox.components import read_json, require_own_files
    from finetune.cogvideox.model_files import COMPLETE_CHECKPOINT
    from finetune.core.errors import ModelError, raise_all

    own = folder / "tokenizer"
    require_own_files(own)
    settings = own / "tokenizer_config.json"
    content = read_json(settings) if settings.exists() else {}
    faults = []
    for key in ("vocab_file", "tokenizer_file", "spm_file"):
        name = content.get(key)
        if name is not None and (not isinstance(name, str) or name != PurePosixPath(name).name):
            faults.append(f"{key} names {name!r:.100}, not a file beside it")
    extra = content.get("extra_ids", 0)
    if type(extra) is not int or not 0 <= extra <= _MOST_EXTRA_IDS:
        faults.append(f"extra_ids is {extra!r:.100}, not a number from 0 to {_MOST_EXTRA_IDS:,}")
    problems = [ModelError(fault, where=str(settings), fix=COMPLETE_CHECKPOINT) for fault in faults]
    raise_all(ModelError, problems, what=f"{{n}} things in {settings.name} are refused")
    path = next((own / name for name in _FILES if (own / name).is_file()), None)
    if path is None:
        raise ModelError(f"the tokenizer has neither {' nor '.join(_FILES)}", where=str(own), fix=COMPLETE_CHECKPOINT)
    status = path.stat()
    fault, highest = _read_in_a_process(path, status.st_size, status.st_mtime_ns)
    if fault:
        raise ModelError(f"the tokenizer cannot be read: {fault}", where=str(path), fix=COMPLETE_CHECKPOINT)
    return highest


@lru_cache(maxsize=8)
def _read_in_a_process(path: Path, size: int, mtime_ns: int) -> tuple[str, int]:
    """What is wrong with the file ("" for nothing) and its highest number, by size and time of the file."""
    # -P: the working folder must not be where modules are looked for.
    command = [sys.executable, "-P", __file__, str(path)]
    try:
        result = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_PATIENCE_S, check=False
        )
    except subprocess.TimeoutExpired:
        return f"it was not read within {_PATIENCE_S:g} s", 0
    if result.returncode == 0:
        answer = json.loads(result.stdout)
        return answer["fault"], answer["highest"]
    return f"the reader ended with {'signal' if result.returncode < 0 else 'code'} {abs(result.returncode)}", 0


# ------------------------------------------------------------------------------------------------------- the program


def _highest_piece(path: str) -> int:
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


def _main() -> None:
    with suppress(ImportError, ValueError, OSError):  # not on Windows; a lower limit stands already
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY_BYTES, resource.getrlimit(resource.RLIMIT_DATA)[1]))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        highest, fault = _highest_piece(sys.argv[1]), ""
    except BaseException as error:  # a panic of Rust is no Exception
        highest, fault = 0, f"{type(error).__name__}: {error}"[:300]
    print(json.dumps({"fault": fault, "highest": highest}))


if __name__ == "__main__":
    _main()
