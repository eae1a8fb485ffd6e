"""A checkpoint's tokenizer, looked at before a library loads it."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import lru_cache
from pathlib import Path, PurePosixPath

from finetune.cogvideox.model_files import COMPLETE_CHECKPOINT, json_faults, read_json, require_own_files
from finetune.core.errors import ModelError, raise_all

_FILES = ("tokenizer.json", "spiece.model")
"""Where the pieces are; transformers prefers the first."""

_MOST_EXTRA_IDS = 1_000

_PATIENCE_S = 120.0

_CHILD = Path(__file__).with_name("tokenizer_child.py")


def require_tokenizer(folder: Path) -> int:
    """Look at a tokenizer's settings, and have its pieces read by a process of its own (``tokenizer_child``).

    The library that reads them panics or aborts over damaged files, past what Python can catch. The process imports
    nothing else and takes a tenth of a second; a file that has not changed is read once.

    Args:
        folder: of the checkpoint.

    Returns:
        The highest number of a piece.

    Raises:
        ModelError: if it names files elsewhere, asks for too much, or cannot be read.
    """
    place = folder / "tokenizer"
    require_own_files(place)
    settings = place / "tokenizer_config.json"
    content = read_json(settings) if settings.exists() else {}
    # transformers writes 10^30 where a tokenizer has no longest text.
    faults = [fault for fault in json_faults(content, ()) if not fault.startswith("model_max_length: ")]
    for key in ("vocab_file", "tokenizer_file", "spm_file"):
        name = content.get(key)
        if name is not None and (not isinstance(name, str) or name != PurePosixPath(name).name):
            faults.append(f"{key} names {name!r:.100}, not a file beside it")
    extra = content.get("extra_ids", 0)
    if type(extra) is not int or not 0 <= extra <= _MOST_EXTRA_IDS:
        faults.append(f"extra_ids is {extra!r:.100}, not a number from 0 to {_MOST_EXTRA_IDS:,}")
    problems = [ModelError(fault, where=str(settings), fix=COMPLETE_CHECKPOINT) for fault in faults]
    raise_all(ModelError, problems, what=f"{{n}} things in {settings.name} are refused")
    path = next((place / name for name in _FILES if (place / name).is_file()), None)
    if path is None:
        raise ModelError(f"the tokenizer has neither {' nor '.join(_FILES)}", where=str(place), fix=COMPLETE_CHECKPOINT)
    status = path.stat()
    fault, highest = _read_apart(path, status.st_size, status.st_mtime_ns)
    if fault:
        raise ModelError(f"the tokenizer cannot be read: {fault}", where=str(path), fix=COMPLETE_CHECKPOINT)
    return highest


@lru_cache(maxsize=8)
def _read_apart(path: Path, size: int, mtime_ns: int) -> tuple[str, int]:
    """What is wrong with the file ("" for nothing) and its highest number, by size and time of the file."""
    # -P: the working folder must not be where modules are looked for.
    words = [sys.executable, "-P", str(_CHILD), str(path)]
    try:
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, timeout=_PATIENCE_S, check=False)
    except subprocess.TimeoutExpired:
        return f"it was not read within {_PATIENCE_S:g} s", 0
    if done.returncode == 0:
        answer = json.loads(done.stdout)
        return answer["fault"], answer["highest"]
    return f"the reader ended with {'signal' if done.returncode < 0 else 'code'} {abs(done.returncode)}", 0
