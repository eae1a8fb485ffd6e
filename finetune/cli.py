"""The ``finetune`` command: one thin sub-command per verb.

Nothing heavy is imported before a verb runs, so ``--help`` is instant. Exit codes: 0 done, 2 something the user can
mend (printed without a traceback), 1 a bug in this package (with one), 130 interrupted, 75 training was stopped by a
signal and saved, or a collection met a job that is only beginning: the same command continues.
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TextIO

from finetune.arguments import build_parser
from finetune.cards import grow_segments
from finetune.errors import ConfigError, FinetuneError, first_line, is_out_of_memory
from finetune.version import __version__

if TYPE_CHECKING:
    from finetune.types import Bucket

OK, BUG, USER_ERROR, INTERRUPTED = 0, 1, 2, 130
PREEMPTED = 75
"""EX_TEMPFAIL of sysexits.h: a failure that goes away by trying again."""
_WORK = ("precompute", "train", "replay", "export", "generate", "quickstart")
"""Verbs whose outcome is not what they print: that nobody can read it is no reason to stop."""


def main(argv: Sequence[str] | None = None, *, verb: str | None = None) -> int:
    """Run one command line and return its exit code.

    Args:
        argv: the words after the program's name; None takes the process's own.
        verb: the sub-command, where the program is named for one (``train.py``).

    Raises:
        SystemExit: from argparse, for ``--help`` (0) and for words it cannot parse (2).
    """
    args = build_parser(verb).parse_args(argv)
    _quiet_libraries()
    grow_segments()
    with _unheard() if args.verb in _WORK else nullcontext():
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    try:
        code = _VERBS[args.verb](args)
        sys.stdout.flush()
        return code or OK
    except FinetuneError as error:
        print(f"{_rank()}error: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print(f"{_rank()}interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if isinstance(error, BrokenPipeError) and args.verb not in _WORK:
            # The reader of `finetune ... | head` has seen enough. Without this the flush at exit would fail once more.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return OK
        if is_out_of_memory(error):
            print(f"{_rank()}error: out of memory: {first_line(error)}\n  fix:   {_OUT_OF_MEMORY}", file=sys.stderr)
            return USER_ERROR
        traceback.print_exc()
        print(f"\n{_rank()}{_bug_note()}", file=sys.stderr)
        return BUG


class _Lasting:
    """A stream that falls silent, with one warning, when it cannot be written to: a full disk, a closed pipe."""

    def __init__(self, stream: TextIO, warn: Callable[[str], object]) -> None:
        self._stream = stream
        self._warn = warn

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """As of any stream, but for the errors of the system."""
        return self._lasting(lambda: self._stream.write(text)) or len(text)

    def flush(self) -> None:
        """As ``write``."""
        self._lasting(self._stream.flush)

    def _lasting(self, action: Callable[[], int | None]) -> int | None:
        try:
            return action()
        except OSError as error:
            # What is still in the buffer goes the same way; otherwise it would fail again at every flush.
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
            self._warn(f"{self._stream.name} cannot be written to any more ({error.strerror}); the work goes on\n")
            return None


@contextmanager
def _unheard() -> Iterator[None]:
    """Inside, an output that fails ends nothing."""
    before = sys.stdout, sys.stderr
    sys.stderr = _Lasting(sys.stderr, lambda _: None)
    sys.stdout = _Lasting(sys.stdout, sys.stderr.write)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


_OUT_OF_MEMORY = (
    "free the GPU (is another program on it?), ask `finetune plan --budget` what fits, give `generate` a smaller"
    " --bucket or --offload, or set CUDA_VISIBLE_DEVICES= to compute on the CPU"
)


def _rank() -> str:
    """Which process speaks, where several do."""
    return f"[rank {os.environ.get('RANK', '0')}] " if os.environ.get("WORLD_SIZE", "1") != "1" else ""


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _quiet_libraries() -> None:
    """Errors only from the libraries below us: what of their advice matters to a run, this package checks itself."""
    for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def _bug_note() -> str:
    torch_version = getattr(sys.modules.get("torch"), "__version__", "not loaded")
    return (
        "This is a bug in finetune, not in your configuration. Please report it in the project's issue tracker, with\n"
        f"the lines above and: finetune {__version__}, Python {platform.python_version()}, torch {torch_version}, "
        f"{platform.system()} {platform.machine()}"
    )


# ---------------------------------------------------------------------------------------------------------- the verbs


def _init(args: argparse.Namespace) -> None:
    from finetune.starter import write_starter

    method = {"lora": "lora", "full": "full"}[args.method]
    notes = write_starter(
        model=args.model,
        method=method,  # type: ignore[arg-type]  # one of the two
        card_gib=args.card,
        clips=args.data,
        output=args.output,
        force=args.force,
    )
    print(f"wrote {args.output}")
    _print_notes(notes)
    print(f"next: finetune check --config {args.output}")


def _check(args: argparse.Namespace) -> None:
    from finetune.caching.overview import overview
    from finetune.caching.plan import identities
    from finetune.config import load_config, require_valid
    from finetune.facts import json_folder, read_facts
    from finetune.precompute import check_dataset

    config = load_config(args.config, args.set)
    facts = read_facts(str(json_folder(config.model.pretrained, config.model.revision)))
    warnings = require_valid(config, facts)
    report = check_dataset(config, facts)
    print(report)
    numbers, advice = overview(config, facts, report.clips, identities(config, report.clips, progress=True))
    for label, number in numbers:
        print(f"{label:>16}: {number}")
    _print_notes([*warnings, *advice])


def _plan(args: argparse.Namespace) -> int:
    from finetune.config import load_config
    from finetune.planning.command import plan

    planned = plan(
        load_config(args.config, args.set),
        card=args.card,
        ram=args.ram,
        budget=args.budget,
        device=args.device,
        processes=args.processes,
        quantize=args.allow_quantized,
        plot=args.plot,
        exact=args.exact,
        as_json=args.json,
    )
    print(planned.text)
    asked = args.card is not None or args.budget is not None
    return USER_ERROR if asked and planned.fits is False else OK


def _calibrate(args: argparse.Namespace) -> None:
    from finetune.planning.command import run_calibration

    print(run_calibration(args.seconds))


def _precompute(args: argparse.Namespace) -> None:
    from finetune.config import load_config, pin_model, require_valid
    from finetune.facts import read_facts
    from finetune.planning.auto import settled
    from finetune.precompute import precompute
    from finetune.ranks import Ranks

    ranks = Ranks.current()
    config = pin_model(load_config(args.config, args.set), ranks.first)
    facts = read_facts(config.model.pretrained, config.model.revision)
    _print_notes(require_valid(config, facts))
    config, _ = settled(config)  # it decides how T5 is held
    report = precompute(config, facts=facts, distributed=ranks)
    if _is_main():
        print(report)


def _train(args: argparse.Namespace) -> int:
    from finetune.config import load_config
    from finetune.trainers.loop import train

    report = train(load_config(args.config, args.set))
    if _is_main():
        print(report)
        if not report.stopped_by:
            print(f"next: {report.export_command}")
    return PREEMPTED if report.stopped_by else OK


def _replay(args: argparse.Namespace) -> None:
    from finetune.replay import replay

    print(replay(args.report, dtype=args.dtype, device=args.device, pretrained=args.model, cache=args.cache))


def _export(args: argparse.Namespace) -> None:
    from finetune.export import export

    print(
        export(
            args.source,
            args.output,
            checkpoint=args.checkpoint,
            full_pipeline=args.full_pipeline,
            weights=args.weights,
            pretrained=args.model,
            merged=args.merged,
            strength=args.strength,
        )
    )


def _generate(args: argparse.Namespace) -> None:
    from finetune.generate import generate
    from finetune.generate_inputs import GenerateRequest, parse_adapter, prompts_with_seeds, read_prompts

    prompts = () if args.prompts is None else read_prompts(args.prompts, seed=args.seed)
    prompts += prompts_with_seeds(args.prompt, args.image, seed=args.seed + len(prompts))
    request = GenerateRequest(
        base=args.model,
        revision=args.revision,
        transformer=args.transformer,
        adapters=tuple(parse_adapter(text) for text in args.adapter),
        prompts=prompts,
        out=args.output,
        bucket=None if args.bucket is None else _parse_bucket(args.bucket),
        fps=args.fps,
        negative_prompt=args.negative_prompt,
        num_inference_steps=args.steps,
        guidance_scale=args.guidance,
        dynamic_cfg=args.dynamic_cfg,
        dtype=args.dtype,
        offload=args.offload,
        device=args.device,
    )
    print(generate(request))


def _parse_bucket(text: str) -> Bucket:
    from finetune.geometry import parse_bucket

    try:
        return parse_bucket(text)
    except ValueError as error:
        raise ConfigError(str(error), where=f"--bucket {text}") from None


def _cache(args: argparse.Namespace) -> int:
    from finetune.datasets.cache import Cache

    if args.dir is None:
        from finetune.config import load_config

        cache = Cache(load_config(args.config, args.set).cache.dir)
    else:
        cache = Cache(args.dir.expanduser())
    if args.action == "verify":
        verified = cache.verify(delete=args.delete, progress=sys.stderr.isatty())
        print(verified)
        return OK if verified.ok else USER_ERROR
    if args.action == "gc":
        patience_s = {"settle_s": 0.0} if args.alone else {}
        collected = cache.gc(delete=args.delete, unused_days=args.unused_days, **patience_s)
        print(collected)
        return PREEMPTED if collected.held_back else OK
    print(cache.stats())
    return OK


def _quickstart(args: argparse.Namespace) -> None:
    from finetune.quickstart import main as quickstart

    quickstart(args.output)


def _print_notes(notes: Sequence[str]) -> None:
    for note in notes if _is_main() else ():
        print(f"note: {note}", file=sys.stderr)


_VERBS: dict[str, Callable[[argparse.Namespace], int | None]] = {
    "init": _init,
    "check": _check,
    "plan": _plan,
    "calibrate": _calibrate,
    "precompute": _precompute,
    "train": _train,
    "replay": _replay,
    "export": _export,
    "generate": _generate,
    "cache": _cache,
    "quickstart": _quickstart,
}
