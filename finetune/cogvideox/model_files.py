"""Where a checkpoint's files are: a folder, the hub's cache, or the JSON that ships with this package."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from finetune.core.errors import ModelError
from finetune.core.terminal import Bar

MODEL_INDEX = "model_index.json"
"""The file that makes a folder a diffusers pipeline."""

COMPLETE_CHECKPOINT = "name a complete CogVideoX checkpoint in diffusers format"

KNOWN_MODELS = ("2b", "5b", "5b-i2v", "1.5-5b", "1.5-5b-i2v")
"""Published checkpoints whose JSON ships with this package (``known_model``)."""

_HOME, _FORMER_HOME = "zai-org/", "THUDM/"

HUB_IDS: Mapping[str, str] = {
    "2b": f"{_HOME}CogVideoX-2b",
    "5b": f"{_HOME}CogVideoX-5b",
    "5b-i2v": f"{_HOME}CogVideoX-5b-I2V",
    "1.5-5b": f"{_HOME}CogVideoX1.5-5B",
    "1.5-5b-i2v": f"{_HOME}CogVideoX1.5-5B-I2V",
}
"""Where the published checkpoints are; the keys are ``KNOWN_MODELS``."""

_VARIANTS: Mapping[str, str] = {
    name.lower(): variant
    for variant, hub_id in HUB_IDS.items()
    for name in (variant, hub_id, hub_id.removeprefix(_HOME), hub_id.replace(_HOME, _FORMER_HOME))
}
"""Every name of a published checkpoint, in lower case -> its variant: ``5b``, ``cogvideox-5b``, both homes' ids."""

_COMPONENT_FILES = ("*.json", "*.safetensors", "*.model", "*.txt")


def published_variant(pretrained: str) -> str | None:
    """Which of ``KNOWN_MODELS`` a name stands for, however it is written; None for any other model, or a folder."""
    return _VARIANTS.get(pretrained.lower())


def canonical_name(pretrained: str) -> str:
    """The one name of a published model, the id at its home of today; any other name or path as it is.

    It looks at no disk: where a folder may be meant by a relative name, look for that first.
    """
    variant = published_variant(pretrained)
    return pretrained if variant is None else HUB_IDS[variant]


def resolve_pretrained(pretrained: str, revision: str | None = None, *, components: Sequence[str]) -> Path:
    """The local folder that holds these components of a checkpoint, downloaded from the hub if it lives there.

    Args:
        pretrained: as for ``read_spec``.
        revision: as for ``read_spec``.
        components: sub-folders that are needed, such as ``["vae"]``; nothing else is downloaded.

    Raises:
        ModelError: if the checkpoint or one of the components cannot be found.
    """
    patterns = [MODEL_INDEX, *(f"{component}/{pattern}" for component in components for pattern in _COMPONENT_FILES)]
    folder = locate(pretrained, revision, patterns=patterns)
    for component in components:
        if not (folder / component).is_dir():
            raise ModelError(
                f"the checkpoint has no {component}", where=str(folder / component), fix=COMPLETE_CHECKPOINT
            )
    return folder


def local_folder(pretrained: str, revision: str | None = None) -> Path | None:
    """Where a checkpoint's files are on this machine, so far as they are; None if none of them is."""
    folder = Path(pretrained)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(id_in_cache(canonical_name(pretrained)), revision=revision, local_files_only=True)
        )
    except LocalEntryNotFoundError:
        return None


def pin_revision(pretrained: str, revision: str | None = None) -> str | None:
    """The commit that a revision of a checkpoint on the hub stands for now; None for a folder.

    A branch can be moved between two downloads of one run. Asked once and used for all of them, the commit makes sure
    that a run never mixes two versions of a model. Without a network it is the commit that the local cache has.

    Args:
        pretrained: as for ``read_spec``.
        revision: branch, tag or commit; None for the main branch. A whole commit is returned as it is: nobody is asked.

    Raises:
        ModelError: if there is no such folder or model, or no such revision.
    """
    is_folder = _as_folder(pretrained).is_dir()
    if is_commit(revision) and not is_folder:
        return revision
    folder = locate(pretrained, revision, patterns=[MODEL_INDEX])
    if is_folder:
        return None
    # The hub's client keeps a repository's files in `snapshots/<commit>`.
    if not is_commit(folder.name):
        raise ModelError(
            f"it cannot be told which commit was downloaded: {folder.name!r} is none",
            where=f"{pretrained} on the Hugging Face hub",
            fix="name a commit as the revision, or a local folder as the model",
        )
    return folder.name


def is_hub_id(name: str) -> bool:
    """Whether a name can be that of a model on the hub, and is no folder."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).exists()


def is_commit(revision: str | None) -> bool:
    """Whether this is the whole name of a commit, which never stands for anything else: 40 hexadecimal digits."""
    return revision is not None and re.fullmatch(r"[0-9a-f]{40}", revision) is not None


def locate(pretrained: str, revision: str | None, *, patterns: list[str]) -> Path:
    """The local folder of a checkpoint: itself, or the hub's snapshot after the files of ``patterns`` are fetched.

    Raises:
        ModelError: if there is no such folder and no such model on the hub.
    """
    folder = _as_folder(pretrained)
    if folder.is_dir():
        if revision is not None:
            raise ModelError(
                f"revision {revision!r} is given for a folder; only the hub has revisions",
                where=str(folder),
                fix="leave the revision out",
            )
        return folder
    pretrained = canonical_name(pretrained)
    if pretrained.startswith((".", "~", os.sep)) or pretrained.count("/") != 1:  # a path
        raise ModelError(
            "there is no such model folder",
            where=pretrained,
            fix="name a folder that exists (model.pretrained, or --model), a hub id such as"
            f" {HUB_IDS['5b']}, or one of {', '.join(KNOWN_MODELS)}",
        )
    return _from_hub(id_in_cache(pretrained), revision, patterns)


def hub_sha256(path: Path) -> str | None:
    """The SHA-256 that the hub gave for a large file, as its client left it here; None for a file from elsewhere."""
    blob = path.resolve()
    if blob.parent.name == "blobs":  # the cache: a snapshot's files are links to blobs of that name
        return blob.name if re.fullmatch(r"[0-9a-f]{64}", blob.name) else None
    for root in path.absolute().parents:  # `hf download --local-dir`: commit, hash and time in a file of three lines
        note = root / ".cache" / "huggingface" / "download" / f"{path.absolute().relative_to(root)}.metadata"
        if note.is_file():
            with note.open("rb") as source:
                lines = source.read(1000).decode(errors="replace").splitlines()
            return lines[1] if len(lines) > 1 and re.fullmatch(r"[0-9a-f]{64}", lines[1]) else None
    return None


def _as_folder(pretrained: str) -> Path:
    try:
        folder = Path(pretrained).expanduser()
        folder.is_dir()  # fails for a name that no file system takes
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"this names no model: {error}"[:300], where=pretrained[:200]) from None
    return folder


def id_in_cache(repo: str) -> str:
    """The id under which the hub's cache has a model: what came from its former home is not downloaded again."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    if repo not in HUB_IDS.values():
        return repo
    for name in (repo, repo.replace(_HOME, _FORMER_HOME)):
        if Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type="model"), "snapshots").is_dir():
            return name
    return repo


def _from_hub(repo: str, revision: str | None, patterns: list[str]) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    where = f"{repo} on the Hugging Face hub" + (f", revision {revision}" if revision else "")
    # The hub's client changes its HTTP library from one major version to the next; the bases of its own error are what
    # every version's connection errors are made of.
    bases = errors.HfHubHTTPError.__bases__
    connection: tuple[type[Exception], ...] = (OSError, *(base for base in bases if issubclass(base, Exception)))
    try:
        return Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=patterns, tqdm_class=Bar))
    except errors.GatedRepoError:
        what, fix = "the model asks for its licence to be accepted", "accept it on its page, then run `hf auth login`"
    except errors.RepositoryNotFoundError:
        what, fix = "there is no such model", "check the id; for a private model run `hf auth login` first"
    except errors.RevisionNotFoundError:
        what, fix = "the model has no such revision", "check the revision, or leave it out"
    except (errors.HFValidationError, errors.BadRequestError) as error:
        what, fix = f"this is not a hub id: {error}", "write it as organisation/name"
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        what = "there is no such folder; as a hub id it is not in the local cache, and the hub cannot be reached"
        fix = "download it where there is a network (`hf download`), or name a local folder"
    except connection as error:
        what, fix = f"the hub did not answer: {error}", "try again, or name a local folder"
    raise ModelError(what, where=where, fix=fix) from None


def known_model(variant: str) -> Path:
    """The folder with a published checkpoint's JSON, without weights: for examples, tests and memory planning.

    Raises:
        ModelError: if ``variant`` is not one of ``KNOWN_MODELS``.
    """
    if variant not in KNOWN_MODELS:
        raise ModelError(f"no shipped model is called {variant!r}", fix=f"choose one of {', '.join(KNOWN_MODELS)}")
    return Path(__file__).parents[1] / "assets" / "models" / variant


def json_folder(pretrained: str, revision: str | None = None) -> Path:
    """A folder with a checkpoint's JSON, to check and plan with: a published model's is that of this package.

    Nothing is asked of a network for a folder or a published model, under any of its names.

    Args:
        pretrained: as for ``read_spec``.
        revision: as for ``read_spec``; of no consequence for a published model, whose shapes are the same in all.

    Raises:
        ModelError: if it cannot be found.
    """
    if not _as_folder(pretrained).is_dir() and (variant := published_variant(pretrained)):
        return known_model(variant)
    return locate(pretrained, revision, patterns=[MODEL_INDEX, "*/config.json", "*/scheduler_config.json"])
