"""Datasets on the Hugging Face hub: what is fetched, and what is said where it cannot be."""

from __future__ import annotations

from pathlib import Path

from finetune.core.errors import DataError, first_line


def fetch_dataset(repo: str, revision: str | None) -> Path:
    """Download a dataset's files, those that are there already left out; without a network, what is there is taken.

    Args:
        repo: ``owner/name``.
        revision: branch, tag or commit; None for the main branch.

    Returns:
        The folder of the snapshot. Its files are links into ``blobs``, two folders up.

    Raises:
        DataError: if it cannot be had.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, repo_type="dataset", revision=revision))
    except Exception as error:  # the client's HTTP library changes from one version to the next, and its errors with it
        raise hub_fault(error, repo, revision) from None


def hub_fault(error: Exception, repo: str, revision: str | None) -> DataError:
    """Why a dataset cannot be had, in words."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        what, fix = "the dataset asks for its terms to be accepted", "accept them on its page, then run `hf auth login`"
    elif isinstance(error, errors.RepositoryNotFoundError | errors.RevisionNotFoundError):
        what, fix = "there is no such dataset or revision", "check them; for a private one run `hf auth login` first"
    elif isinstance(error, errors.HFValidationError):
        what, fix = f"this is no dataset's id: {error}", "write it as owner/name"
    else:
        what = f"it cannot be downloaded: {first_line(error):.200}"
        fix = f"download it where there is a network: `hf download --repo-type dataset {repo}`"
    where = f"{repo} on the Hugging Face hub" + (f", revision {revision}" if revision else "")
    return DataError(what, where=where, fix=fix)
