"""Errors that tell a person what is wrong, where, and how to mend it.

A ``FinetuneError`` is the user's to mend: the command line prints it without a traceback and exits with 2.
Anything else that reaches the command line is a bug in this package: traceback, exit 1.
"""

from __future__ import annotations

import errno
import re
import signal
from collections.abc import Sequence
from typing import TypeGuard

from finetune.core.text import shown


class FinetuneError(Exception):
    """Something a user can mend: what is wrong, where it stands, and the fix.

    Args:
        what: the fault, as one sentence without a full stop.
        where: the file, line, field or step it was seen at; empty when the message says it already.
        fix: what to change; empty only when nothing better than ``what`` can be said.

    All three may quote file names and captions: characters that a terminal would obey are written out here, once for
    every message (``text.shown``).
    """

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        self.what = shown(what)
        self.where = shown(where)
        self.fix = shown(fix)
        super().__init__(self.what)

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.fix:
            lines.append(f"  fix:   {self.fix}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, ...]:  # keyword-only arguments do not survive the default pickling
        return (_rebuild, (type(self), self.what, self.where, self.fix))


def _rebuild(kind: type[FinetuneError], what: str, where: str, fix: str) -> FinetuneError:
    return kind(what, where=where, fix=fix)


class ConfigError(FinetuneError):
    """The run configuration does not say something this package can do."""


class DataError(FinetuneError):
    """A dataset row, a media file or a caption is unusable."""


class CacheError(FinetuneError):
    """The latent cache is missing, incomplete, stale or damaged."""


class CheckpointError(FinetuneError):
    """A checkpoint is missing, incomplete, damaged or belongs to another run."""


class ModelError(FinetuneError):
    """The base model's folder or its JSON is not a CogVideoX this package understands."""


class TrainingError(FinetuneError):
    """Training had to stop: a non-finite loss, or a guarantee that no longer holds."""


class NonFiniteError(TrainingError):
    """A loss, a gradient or a weight is not finite."""


class LaunchError(FinetuneError):
    """A process of the launch failed or is gone, or it cannot compute where it is."""


class ExportError(FinetuneError):
    """An export could not be written, or did not reproduce the trained model."""


class KilledError(FinetuneError):
    """The system, or a person, ended a helper process of ours; the file that it read is not to blame."""


_FROM_OUTSIDE = ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGPWR")
"""Signals that no file causes: a person sends them, a batch system, or the kernel when memory runs out."""


def raise_if_killed(code: int | None, who: str, *, where: str = "", when: str = "twice") -> None:
    """Raise KilledError if a helper process ended with a signal from outside.

    Args:
        code: what it ended with, the negative number of a signal; None if it did not end by itself.
        who: the process, in words.
        where: the file that it read.
        when: it was killed, in words.
    """
    name = signal.Signals(-code).name if code is not None and code < 0 else ""
    if name in _FROM_OUTSIDE:
        raise KilledError(
            f"{who} was killed {when} ({name}); no file is to blame, most likely memory ran out",
            where=where,
            fix="free memory, give the job more or lower cache.decode_workers, and run the same command again",
        )


def raise_all(kind: type[FinetuneError], errors: Sequence[FinetuneError], *, what: str, limit: int = 20) -> None:
    """Raise one error that lists many; return when there are none; raise a single one as it is.

    Args:
        kind: the class to raise.
        errors: what was collected.
        what: a headline such as ``"3 dataset rows cannot be used"``; ``{n}`` in it becomes the count.
        limit: how many are spelled out; the rest are counted. What is wrong in the same way at several places is one,
            with the first ``_PLACES`` of them.
    """
    if not errors:
        return
    if len(errors) == 1:
        raise errors[0]
    alike: dict[tuple[str, str], list[str]] = {}
    for error in errors:
        alike.setdefault((error.what, error.fix), []).append(error.where)
    listed = [FinetuneError(what, where=_places(where), fix=fix) for (what, fix), where in alike.items()]
    body = "\n".join("- " + str(error).replace("\n", "\n  ") for error in listed[:limit])
    rest = sum(len(where) for where in [*alike.values()][limit:])
    more = f"\n- and {rest} more" if rest > 0 else ""
    headline = what.replace("{n}", str(len(errors)))  # not format: it quotes names, which may hold braces
    raise kind(f"{headline}\n{body}{more}")


_PLACES = 5


def _places(where: Sequence[str]) -> str:
    named = ", ".join(place for place in where[:_PLACES] if place)
    return f"{named} and {len(where) - _PLACES} more" if len(where) > _PLACES else named


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its kind where there is none."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that it was raised from, says that the memory of a GPU or of the host ran out.

    A ``FinetuneError`` never does: it says already what to do. torch is not imported for this: its own class is known
    by its name, and what the libraries below it raise as RuntimeErrors by their words (``_NO_MEMORY``).
    """
    while error is not None and not isinstance(error, FinetuneError):
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
            return True
        if any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__):
            return True
        if isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)):
            return True
        error = error.__cause__
    return False


_NO_MEMORY = re.compile(
    r"\bout of memory\b"  # CUDA, HIP, pinned host memory, bitsandbytes, NCCL
    r"|(?:can't|cannot|failed to) allocate (?:host |device )?memory|not enough memory|\bbad_alloc\b"  # the host
    r"|_ALLOC(?:ATION)?_FAILED\b"  # cuBLAS, cuDNN, cuSOLVER, cuSPARSE
    r"|_NOT_INITIALIZED when calling `cublas(?:Lt)?Create"  # no room for a handle; see pytorch/serve#1993
    r"|failed to cuda (?:host )?[cm]alloc|ErrorMemoryAllocation\b|ERROR_OUT_OF_MEMORY"
    # cuDNN tried every kernel of a convolution; torch swallows that their workspaces did not fit.
    r"|unable to find an engine to execute this computation",
    re.IGNORECASE,
)

_REFUSALS = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG),
    *(errno.ELOOP, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE),
}


def is_refusal(error: BaseException) -> TypeGuard[OSError]:
    """Whether a file system or its owner refused something, which is no bug wherever it comes to light."""
    return isinstance(error, OSError) and error.errno in _REFUSALS
