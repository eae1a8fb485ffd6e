"""What identifies an encoder: the bytes of its files, and the form in which it computed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from finetune.errors import ModelError
from finetune.files import digest_file as digest_file_now
from finetune.files import digest_of

_COVERED = {"vae": ("vae",), "text_encoder": ("text_encoder", "tokenizer")}


def fingerprint(
    folder: Path,
    component: Literal["vae", "text_encoder"],
    *,
    digest_file: Callable[[Path], str] = digest_file_now,
    form: str = "",
) -> str:
    """A digest of everything that decides what an encoder computes: the bytes of its weights and of its configuration.

    Args:
        folder: the checkpoint's local folder (``resolve_pretrained``).
        component: ``vae``, or ``text_encoder``, which covers the tokenizer.
        digest_file: how a file is digested; a caller with a memo passes its own, since T5 is 10 GB.
        form: how its weights are held while it computes, such as ``int8``; empty for as they are stored.

    Raises:
        ModelError: if the component has no weights there.
    """
    parts = _COVERED[component]
    files = [path for part in parts for path in sorted((folder / part).glob("*")) if path.suffix in _DECIDING]
    if not any(path.suffix == ".safetensors" for path in files):
        raise ModelError(
            f"the {component} has no weights",
            where=str(folder / component),
            fix="fetch the checkpoint again; its weights have to be safetensors files",
        )
    stored = digest_of({path.relative_to(folder).as_posix(): digest_file(path) for path in files})
    return digest_of({"stored": stored, "form": form}) if form else stored


_DECIDING = (".json", ".safetensors", ".model", ".txt")
"""Suffixes of the files that loading reads: configuration, weights, sentencepiece models, vocabularies."""
