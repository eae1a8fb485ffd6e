"""An export on the Hugging Face hub: which of its files go there, its card as it reads there, and the upload."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.checkpoint.folders import EMA, FOLDER, OPTIMIZER, OPTIMIZER_META, STATE
from finetune.cogvideox.model_files import is_hub_id
from finetune.core.checksums import ChecksummedFolder, DamageError
from finetune.core.errors import ExportError
from finetune.core.files import COMPLETE, TRAINABLE, human_size, is_complete
from finetune.core.text import shown
from finetune.inference.adapters import TRAINING_RECORD, read_record
from finetune.methods.adapter import some

_CARD = "README.md"

_PUBLIC_ENDINGS = (".safetensors", ".json", ".md", ".txt", ".model", ".mp4", ".gif", ".png", ".jpg", ".jpeg", ".webp")
"""What an export holds, and pictures that were put beside it."""

_OF_A_RUN = (OPTIMIZER, OPTIMIZER_META, STATE, TRAINABLE, EMA)

_TOKEN = re.compile(r"\b(hf|api_org|hf_oauth)_[A-Za-z0-9._-]{8,}")


@dataclass(frozen=True)
class PushReport:
    """What was uploaded, or would be."""

    repo: str
    files: tuple[tuple[str, int], ...]
    """Name in the repository, and bytes."""
    public: bool
    url: str | None
    """Of the commit; None if nothing was sent."""
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        width = max(len(name) for name, _ in self.files)
        lines = [f"{name:<{width}}  {human_size(size)}" for name, size in self.files]
        visible = "public" if self.public else "private"
        total = f"{len(self.files)} files, {human_size(sum(size for _, size in self.files))}"
        lines += [f"note: {note}" for note in self.notes]
        if self.url is None:
            lines.append(f"nothing was sent: with --yes, {total} go to the {visible} repository {self.repo}")
        else:
            lines.append(f"uploaded {total} to the {visible} repository {self.repo}: {self.url}")
        return "\n".join(lines)


def push(folder: Path, repo: str, *, public: bool, send: bool) -> PushReport:
    """Upload an export, or say what would be; arguments and errors stand at ``finetune.push``."""
    _require_export(folder)
    _require_id(repo)
    names = _files_of(folder)
    card = card_on_hub((folder / _CARD).read_text(encoding="utf-8"), folder, repo).encode("utf-8")
    files = tuple((name, len(card) if name == _CARD else (folder / name).stat().st_size) for name in names)
    notes = tuple(_notes(folder, names))
    if not send:
        return PushReport(repo, files, public, None, notes)
    repo, url = _upload(folder, names, card, repo, public=public)
    return PushReport(repo, files, public, url, notes)


# ---------------------------------------------------------------------------------------------------------- what goes


def _require_export(folder: Path) -> None:
    where = str(folder)
    if not is_complete(folder) or not (folder / TRAINING_RECORD).is_file():
        is_run = (folder / FOLDER).is_dir() or (folder / STATE).is_file()
        raise ExportError(
            "this is a run or a checkpoint, and those stay here" if is_run else "this is no export of a run",
            where=where,
            fix=f"run `finetune export {folder}` first, and push that folder" if is_run else "name an export's folder",
        )
    if not (folder / _CARD).is_file():
        raise ExportError(f"the export has no {_CARD}", where=where, fix="export again: nobody can use it without")
    try:
        published = ChecksummedFolder.open(folder)
        for name in published.checksums:
            if name != _CARD:  # which people write on
                published.verify(name)
    except DamageError as damage:
        raise ExportError(f"the export is not as it was written: {damage}", where=where, fix="export again") from None


def _files_of(folder: Path) -> list[str]:
    """What is uploaded, the card first.

    Raises:
        ExportError: if anything lies there that an export does not hold; it would be passed over without a word.
    """
    names: list[str] = []
    strange: list[str] = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():  # it could publish any file
            strange.append(f"{name} (a link)")
        elif path.is_file() and name != COMPLETE:
            is_foreign = path.name in _OF_A_RUN or path.suffix.lower() not in _PUBLIC_ENDINGS
            is_hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
            (strange if is_foreign or is_hidden else names).append(name)
    if strange:
        raise ExportError(
            f"the folder holds what is not for others: {some(strange)}",
            where=str(folder),
            fix="move it elsewhere; an export holds weights, a card, its record and sampled videos",
        )
    return sorted(names, key=lambda name: (name != _CARD, name))


def _notes(folder: Path, names: list[str]) -> Iterator[str]:
    record = read_record(folder)
    if record is not None and not is_hub_id(record.base_model):
        yield f"the card names a folder of this machine as its base ({record.base_model}): write where others find it"
    if not any(name.endswith(".mp4") for name in names):
        yield "there is no sampled video: put one into its folder, or set validation.samples in the next run"


def card_on_hub(card: str, folder: Path, repo: str) -> str:
    """The card with the repository's name where it has the export's folder, in its code and its command."""
    name = repo.rpartition("/")[2]

    def is_folder(text: str) -> bool:
        parts = Path(text).parts
        return bool(parts) and folder.resolve().parts[-len(parts) :] == parts

    def renamed(match: re.Match[str], new: str) -> str:
        return match[1] + new + match[3] if is_folder(match[2]) else match[0]

    code = re.compile(r"(from_pretrained\(|load_lora_weights\(|transformer, )'([^'\n]+)'()")
    card = code.sub(lambda match: renamed(match, repr(repo)), card)
    command = re.compile(r"^(finetune generate .*--(?:adapter|transformer) )(\S+)(.*)$", re.M)
    return command.sub(
        lambda m: f"hf download {repo} --local-dir {name}\n{renamed(m, name)}" if is_folder(m[2]) else m[0], card
    )


# ---------------------------------------------------------------------------------------------------------- the upload


def _require_id(repo: str) -> None:
    from huggingface_hub import utils
    from huggingface_hub.errors import HFValidationError

    library: Any = utils  # which does not say that the function is for others, and documents it
    try:
        library.validate_repo_id(repo)
    except HFValidationError as error:
        raise ExportError(f"this names no repository: {error}", where=f"--repo {repo}", fix="write user/name") from None


def _upload(folder: Path, names: list[str], card: bytes, repo: str, *, public: bool) -> tuple[str, str]:
    """Create the repository if need be and commit all files at once; its whole name, and the commit's URL."""
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    where = f"--repo {repo}"
    api = HfApi()
    # The client's HTTP library changes with its major versions; its errors are the bases of the client's own.
    bases = (base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception))
    connection: tuple[type[Exception], ...] = (OSError, ValueError, *bases)
    try:
        repo = api.create_repo(repo, private=not public, exist_ok=True).repo_id
        if not public and not api.repo_info(repo).private:
            raise ExportError(
                "the repository exists and is public", where=where, fix="add --public if it shall be, or name another"
            )
        operations = [CommitOperationAdd(name, card if name == _CARD else str(folder / name)) for name in names]
        commit = api.create_commit(repo, operations, commit_message="An export of cogvideox-finetune")
    except OfflineModeIsEnabled:
        fix = "unset HF_HUB_OFFLINE, or upload it from another machine"
        raise ExportError("this process may not use the network: HF_HUB_OFFLINE is set", where=where, fix=fix) from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        fix = {
            401: "run `hf auth login` with a token that may write",
            403: "use a token that may write to that repository: `hf auth login`",
        }.get(status, "look at the message, and try again: what arrived is not sent twice")
        raise ExportError(f"the hub refused: {_safe(error)}", where=where, fix=fix) from None
    except connection as error:
        raise ExportError(f"the hub did not take it: {_safe(error)}", where=where, fix="try again") from None
    return repo, str(commit.commit_url)


def _safe(error: Exception) -> str:
    """A message of the hub's client without any token in it."""
    from huggingface_hub import get_token

    text, token = " ".join(str(error).split()), get_token()
    return shown(_TOKEN.sub("<token>", text.replace(token, "<token>") if token else text)[:500])
