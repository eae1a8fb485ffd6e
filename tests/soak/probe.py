"""Inside a process that will be killed: where it is, and a stop at the moment at which the kill is wanted.

Nothing in the package knows of this. Its functions are wrapped where they are named in ``PHASES``, and the calls by
which anything changes the disk in ``CALLS``. A wrapped call counts; the one that a ``Plan`` names tells the parent
through shared memory and waits, and the parent sends SIGKILL.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import mmap
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PHASES: dict[str, tuple[str, ...]] = {
    "planning": ("finetune.caching.precompute:plan_cache",),
    "asking the cache": ("finetune.caching.request:find_manifest",),
    "loading an encoder": ("finetune.cogvideox.load:load_vae", "finetune.cogvideox.load:load_text"),
    "reading headers": ("finetune.datasets.decode_pool:DecodePool.probe_many",),
    "decoding": ("finetune.datasets.decode_pool:DecodePool.decode_many",),
    "encoding": (
        "finetune.cogvideox.encode:encode_video",
        "finetune.cogvideox.encode:encode_image",
        "finetune.cogvideox.encode:encode_prompts",
    ),
    "writing an entry": ("finetune.datasets.cache:Cache._write",),
    "writing a manifest": ("finetune.datasets.cache:Cache.save_manifest",),
    "taking the run folder": (
        "finetune.trainers.setup:hold_run_folder",
        "finetune.checkpoint.folders:clear_interrupted",
    ),
    "loading the model": ("finetune.cogvideox.load:load_transformer",),
    "reading a checkpoint": ("finetune.checkpoint.load:load_checkpoint",),
    "training": ("finetune.trainers.loop:_Loop.train",),
    "forward": ("finetune.trainers.run:TrainedModel.losses",),
    "backward": (
        "finetune.parallel.strategy:DataParallel.backward",
        "finetune.parallel.fsdp:FullyShardedDataParallel.backward",
    ),
    "clipping": (
        "finetune.parallel.strategy:DataParallel.clip",
        "finetune.parallel.fsdp:FullyShardedDataParallel.clip",
    ),
    "exchanging losses": ("finetune.trainers.tracking:StepMetrics.exchange",),
    "updating weights": (
        "finetune.parallel.strategy:DataParallel.step",
        "finetune.parallel.fsdp:FullyShardedDataParallel.step",
    ),
    "measuring": ("finetune.trainers.validation:Validator.measure",),
    "writing a checkpoint": ("finetune.trainers.run:Run.save",),
    "pruning": ("finetune.checkpoint.folders:prune",),
}
"""Phase -> the functions it consists of. The innermost one that a process is in is its phase; before the first and
between others it is ``elsewhere``."""

THREADED = ("writing an entry",)
"""Phases that count in every thread; of others, and outside of all, only the main thread's calls do."""

ELSEWHERE = "elsewhere"
NAMES = (ELSEWHERE, *PHASES)

CALLS = ("create", "write", "fsync", "rename", "mkdir", "unlink", "rmdir")
"""Calls to the operating system that change the disk, or make a change last."""

_REACHED, _PHASE, _TEXT = 0, 1, 64


@dataclass(frozen=True)
class Plan:
    """When a process is to be killed."""

    at: str
    """``time`` (after its start), a name of ``PHASES`` (entered for the ``nth`` time) or of ``CALLS`` (made for the
    ``nth`` time)."""
    nth: int = 1
    seconds: float = 0.0
    """How long after that; where there is a ``side``, the process stands still instead."""
    side: str = ""
    """``before`` or ``after`` the phase or the call, or ``during`` a write, of which the first half is done."""
    within: str = ""
    """Only calls in this phase count."""

    def __str__(self) -> str:
        if self.at == "time":
            return f"{self.seconds:.3f} s after the start"
        if self.side:
            return f"{self.side} {self.at} {self.nth}" + (f" of {self.within}" if self.within else "")
        return f"{self.seconds * 1000:.1f} ms into {self.at} {self.nth}"


@dataclass
class Profile:
    """What an undisturbed process did: how often it entered each phase and how long it was there; its calls."""

    entered: Counter[str] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)


class SharedState:
    """A page of memory on which a child says where it is; inherited through ``fork``."""

    def __init__(self) -> None:
        self._page = mmap.mmap(-1, mmap.PAGESIZE)

    @property
    def phase(self) -> str:
        return NAMES[self._page[_PHASE]]

    @phase.setter
    def phase(self, name: str) -> None:
        self._page[_PHASE] = NAMES.index(name)

    @property
    def reached(self) -> bool:
        """Whether the child has come to the planned moment."""
        return self._page[_REACHED] == 1

    def reach(self, note: str) -> None:
        text = note.encode(errors="replace")[: len(self._page) - _TEXT]
        self._page[_TEXT : _TEXT + len(text)] = text
        self._page[_REACHED] = 1

    @property
    def note(self) -> str:
        return self._page[_TEXT:].rstrip(b"\0").decode(errors="replace")


class Probe:
    """Wraps phases and calls of this process; see the module.

    Args:
        state: where to tell.
        root: calls that concern files below this folder count, others do not.
        plan: the moment to stop at; None never stops.
    """

    def __init__(self, state: SharedState, root: Path, plan: Plan | None) -> None:
        self._state, self._root, self._plan = state, str(root.resolve()), plan
        self._main_stack = [ELSEWHERE]
        self._threads = threading.local()
        self._counting = threading.Lock()
        self._stands = False
        self.profile = Profile()

    @property
    def _stack(self) -> list[str]:
        """The phases that this thread is in, the innermost last; a thread beside the main one may be in none."""
        if threading.current_thread() is threading.main_thread():
            return self._main_stack
        return self._threads.__dict__.setdefault("stack", [])

    def _tell(self, phase: str) -> None:
        if not self._stands:  # other threads go on while one stands still to be killed
            self._state.phase = phase

    def install(self) -> None:
        """Wrap everything; only in a process that is thrown away afterwards."""
        for name, targets in PHASES.items():
            for target in targets:
                replace_everywhere(target, functools.partial(self._phase, name))
        for name, call in (("create", "open"), ("write", "write"), ("fsync", "fsync"), ("rename", "replace")):
            setattr(os, call, self._call(name, getattr(os, call)))
        for call in ("mkdir", "unlink", "rmdir"):
            setattr(os, call, self._call(call, getattr(os, call)))

    def _phase(self, name: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        if inspect.isgeneratorfunction(inner):  # what counts is the waiting for its next item

            @functools.wraps(inner)
            def generating(*args: Any, **kwargs: Any) -> Iterator[Any]:
                items = inner(*args, **kwargs)
                while True:
                    with self._inside(name):
                        try:
                            item = next(items)
                        except StopIteration:
                            return
                    yield item

            return generating

        @functools.wraps(inner)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if name not in THREADED and threading.current_thread() is not threading.main_thread():
                return inner(*args, **kwargs)
            with self._inside(name):
                return inner(*args, **kwargs)

        return wrapped

    @contextmanager
    def _inside(self, name: str) -> Iterator[None]:
        with self._counting:
            self.profile.entered[name] += 1
            number = self.profile.entered[name]
        self._stack.append(name)
        self._tell(name)
        self._stop(name, number, "before")
        begun = time.perf_counter()
        try:
            yield
        finally:
            took_s = time.perf_counter() - begun
            self._stop(name, number, "after")
            with self._counting:
                self.profile.seconds[self._stack.pop()] += took_s
            self._tell((self._stack or self._main_stack)[-1])

    def _stop(self, name: str, number: int, side: str) -> None:
        plan = self._plan
        if plan is None or plan.at != name or number != plan.nth:
            return
        if plan.side == side:
            self._wait(name)
        elif not plan.side and side == "before":
            self._state.reach(name)  # and go on: the parent's clock runs

    def _call(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(real)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not self._stack or not self._counts(name, args, kwargs):
                return real(*args, **kwargs)
            plan = self._plan
            if plan is not None and plan.within and plan.within not in self._stack:
                return real(*args, **kwargs)
            with self._counting:
                self.profile.calls[name] += 1
                number = self.profile.calls[name]
            if plan is None or plan.at != name or number != plan.nth:
                return real(*args, **kwargs)
            if plan.side == "after":
                real(*args, **kwargs)
            elif plan.side == "during":
                real(args[0], memoryview(args[1])[: len(args[1]) // 2])
            self._wait(f"{plan.side} {name} {_place(args[0])}")

        return call

    def _counts(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if name == "create" and not (len(args) > 1 and args[1] & os.O_CREAT):
            return False
        # A name beside a folder's descriptor comes from shutil.rmtree, which removes nothing but ours.
        return kwargs.get("dir_fd") is not None or _place(args[0]).startswith(self._root)

    def _wait(self, note: str) -> None:
        self._tell(self._stack[-1])
        self._stands = True
        self._state.reach(note)
        time.sleep(60)
        raise RuntimeError("nobody killed a process that stood still for it")


def _place(target: Any) -> str:
    """The path that a call's first argument means, a descriptor or a name."""
    try:
        if isinstance(target, int):
            return str(Path(f"/proc/self/fd/{target}").readlink())
        return str(Path(target).absolute())
    except OSError:
        return ""


def replace_everywhere(target: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Put ``wrap(function)`` in the place of a function, in every module of ours that has imported its name.

    Raises:
        AttributeError, ImportError: if there is no such function any more: PHASES then has to follow.
    """
    module_name, _, path = target.partition(":")
    module = importlib.import_module(module_name)
    if "." in path:
        owner, name = path.split(".")
        setattr(getattr(module, owner), name, wrap(getattr(getattr(module, owner), name)))
        return
    inner = getattr(module, path)
    outer = wrap(inner)
    for holder in [m for key, m in sys.modules.items() if key.partition(".")[0] == "finetune"]:
        for name in [name for name, value in vars(holder).items() if value is inner]:
            setattr(holder, name, outer)
