"""What identifies a model's parts: an encoder by the bytes of its files, the transformer by its tensors."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from torch import nn

from finetune.errors import DataError, FinetuneError, ModelError
from finetune.facts import hub_sha256
from finetune.files import COMPLETE, digest_of
from finetune.files import digest_file as digest_file_now
from finetune.seals import DamageError, Sealed

Component = Literal["transformer", "vae", "text_encoder"]
_COVERED: Mapping[Component, tuple[str, ...]] = {
    "transformer": ("transformer",),
    "vae": ("vae",),
    "text_encoder": ("text_encoder", "tokenizer"),
}


def fingerprint(
    folder: Path,
    component: Component,
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
        ModelError: if the component has no weights there, or ``digest_file`` finds a file damaged.
    """
    files = _files(folder, component)
    if not any(path.suffix == ".safetensors" for path in files):
        raise ModelError(
            f"the {component} has no weights",
            where=str(folder / component),
            fix="fetch the checkpoint again; its weights have to be safetensors files",
        )
    stored = digest_of({path.relative_to(folder).as_posix(): _of_model(digest_file, path) for path in files})
    return digest_of({"stored": stored, "form": form}) if form else stored


def require_as_sent(folder: Path, component: Component, digest_file: Callable[[Path], str]) -> None:
    """Have ``digest_file`` look at those files of a component that the hub gave a hash for; others are not read.

    Raises:
        ModelError: if it finds one damaged.
    """
    for path in _files(folder, component):
        if hub_sha256(path) is not None:
            _of_model(digest_file, path)


def require_as_published(folder: Path, component: Component) -> None:
    """Verify a component of an export against the export's marker; what no marker names is not read.

    Raises:
        ModelError: if a file is not as it was written.
    """
    marker = folder / COMPLETE
    if not marker.is_file() or not marker.stat().st_size:  # a model that was built here has an empty one
        return
    try:
        sealed = Sealed.open(folder)
        for name in sealed.checksums:
            if name.startswith(f"{component}/"):
                sealed.verify(name)
    except (DamageError, OSError) as damage:
        raise ModelError(
            f"the {component} is damaged: {damage}",
            where=str(folder),
            fix=f"export or copy it again; whoever changed the file on purpose removes {COMPLETE} beside it",
        ) from None


def _files(folder: Path, component: Component) -> list[Path]:
    parts = _COVERED[component]
    return [path for part in parts for path in sorted((folder / part).glob("*")) if path.suffix in _DECIDING]


def _of_model(digest_file: Callable[[Path], str], path: Path) -> str:
    try:
        return digest_file(path)
    except DataError as error:
        raise ModelError(error.what, where=error.where, fix=error.fix) from None


_DECIDING = (".json", ".safetensors", ".model", ".txt")
"""Suffixes of the files that loading reads: configuration, weights, sentencepiece models, vocabularies."""


# ----------------------------------------------------------------------------------------------------- the transformer


def note_base(transformer: nn.Module, checksums: Mapping[str, str]) -> None:
    """Let ``base_digest`` know what a transformer was filled with.

    Args:
        transformer: as diffusers built it.
        checksums: of every stored tensor, by name.
    """
    noted: Any = transformer
    arguments = inspect.signature(type(transformer).__init__).parameters
    # What equals a default is as good as not written down: which of them are, differs between versions of diffusers.
    settings = {
        name: value for name, value in noted.config.items() if name in arguments and value != arguments[name].default
    }
    noted.base_digest = digest_of({"tensors": dict(checksums), "settings": settings})


def base_digest(transformer: nn.Module) -> str:
    """The identity of the stored weights that ``load_transformer`` filled a transformer with.

    It covers name, dtype, shape and content of every tensor, as stored, and the settings in ``config.json`` that are
    not diffusers' defaults. How the tensors are shared out over files does not count, nor does the form they are held
    in, nor what is trained later.
    """
    digest: str = transformer.base_digest  # type: ignore[assignment]  # a module's attributes are modules to the checker
    return digest


def require_base(
    transformer: nn.Module, recorded: str, kind: type[FinetuneError], *, by: str, where: str, fix: str
) -> None:
    """Refuse another base transformer than the recorded one; none was recorded by earlier versions, and all are taken.

    Args:
        transformer: as loaded.
        recorded: its digest in a checkpoint or an adapter's record; empty if there is none.
        kind: of the error.
        by: what recorded it, such as ``the checkpoint``.
        where: the files of both.
        fix: what to do, besides bringing the old weights back.

    Raises:
        FinetuneError: of ``kind``.
    """
    if recorded and (found := base_digest(transformer)) != recorded:
        raise kind(
            f"this is not the base transformer that {by} was trained on: its weights have the digest {found},"
            f" recorded is {recorded}",
            where=where,
            fix=f"bring the old files back, or fetch them again if these are damaged; {fix}",
        )
