"""Where an export goes: what may be replaced there, and what killed exports have left beside it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from finetune import leases
from finetune.errors import ExportError
from finetune.files import PARTIAL, clear_leftovers, is_complete
from finetune.generate_inputs import TRAINING_RECORD


def require_replaceable(folder: Path) -> Path:
    """``folder`` with its links followed, so that a link keeps pointing to the export.

    Raises:
        ExportError: if it holds something that is not an earlier export, or is the folder that the process stands in:
            replaced, it would be gone under the feet of whoever called.
    """
    real = folder.resolve()
    if real == Path.cwd():
        raise ExportError(
            "the place for the export is the folder that this command runs in",
            where=str(folder),
            fix="name a folder inside it with --output, or run the command elsewhere",
        )
    if not real.exists() or (real.is_dir() and not any(real.iterdir())):
        return real
    if not (real.is_dir() and is_complete(real) and (real / TRAINING_RECORD).is_file()):
        raise ExportError(
            "the place for the export holds something that is not an earlier export",
            where=str(folder),
            fix="name a new or empty folder with --output",
        )
    return real


@contextmanager
def arriving(folder: Path) -> Iterator[None]:
    """Undo and remove what killed exports to ``folder`` have left, unless another one is under way there.

    Raises:
        OSError: if the place cannot be written to.
    """
    users = folder.with_name(f".{folder.name}.exporting")
    try:
        with leases.hold(users, {}) as own:
            # Listed before looking: whoever made one of these and lives has said so already.
            left = [path for path in folder.parent.glob(f"*{PARTIAL}") if _is_of(path, folder)]
            if all(holder.path == own.path for holder in leases.live(users)):
                clear_leftovers(folder, left)
                leases.clear_dead(users)
            yield
    finally:
        with suppress(OSError):  # another one is there still
            users.rmdir()


def _is_of(path: Path, folder: Path) -> bool:
    unique = r"\.(\d+-[0-9a-f]{8}|[0-9a-f]{8}\.old)" + re.escape(PARTIAL)  # as files.publish_dir names them
    return re.fullmatch(re.escape(folder.name) + unique, path.name) is not None
