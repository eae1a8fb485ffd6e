"""Datasets on the Hugging Face hub, as files in the hub's own cache."""

from __future__ import annotations

from pathlib import Path

from finetune.core.errors import DataError


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
    from huggingface_hub import errors, snapshot_download

    where = f"{repo} on the Hugging Face hub" + (f", revision {revision}" if revision else "")
    try:
        return Path(snapshot_download(repo, repo_type="dataset", revision=revision))
    except errors.GatedRepoError:
        what, fix = "the dataset asks for its terms to be accepted", "accept them on its page, then run `hf auth login`"
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
        what, fix = "there is no such dataset or revision", "check them; for a private one run `hf auth login` first"
    except errors.HFValidationError as error:
        what, fix = f"this is no dataset's id: {error}", "write it as owner/name"
    except Exception as error:  # the client's HTTP library changes from one version to the next, and its errors with it
        what = f"it cannot be downloaded: {str(error).splitlines()[0] if str(error) else type(error).__name__:.200}"
        fix = f"download it where there is a network: `hf download --repo-type dataset {repo}`"
    raise DataError(what, where=where, fix=fix)
