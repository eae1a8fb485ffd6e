"""The ``finetune`` command: one thin sub-command per verb.

Nothing heavy is imported before a verb runs, so ``--help`` is instant. Exit codes: 0 done, 2 something the user can
mend (printed without a traceback), 1 a bug in this package (with one), 130 interrupted, 75 training was stopped by a
signal and saved, or a collection met a job that is only beginning: the same command continues.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.arguments import build_parser
from finetune.cards import grow_segments
from finetune.console import lasting_streams, open_streams, own_log, quiet_libraries
from finetune.errors import CacheError, ConfigError, FinetuneError, first_line, is_out_of_memory, is_refusal
from finetune.text import shown
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
    open_streams()
    args = build_parser(verb).parse_args(argv)
    quiet_libraries()
    grow_segments()
    with lasting_streams() if args.verb in _WORK else nullcontext(), own_log():
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    try:
        _require_folder()
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
        if is_refusal(error):
            where = f"\n  where: {shown(str(error.filename))}" if error.filename else ""
            print(f"{_rank()}error: {error.strerror}{where}\n  fix:   {_SYSTEM_FIX}", file=sys.stderr)
            return USER_ERROR
        if is_out_of_memory(error):
            print(f"{_rank()}error: out of memory: {first_line(error)}\n  fix:   {_OUT_OF_MEMORY}", file=sys.stderr)
            return USER_ERROR
        traceback.print_exc()
        print(f"\n{_rank()}{_bug_note()}", file=sys.stderr)
        return BUG


def _require_folder() -> None:
    try:
        Path.cwd()
    except OSError:
        raise ConfigError(
            "the current folder is gone: somebody deleted or moved it", fix="cd to one that exists"
        ) from None


_SYSTEM_FIX = "name a folder that can be written and has room, or change its owner and rights"
_OUT_OF_MEMORY = (
    "free the GPU (is another program on it?), ask `finetune plan --budget` what fits, give `generate` a smaller"
    " --bucket or --offload, or set CUDA_VISIBLE_DEVICES= to compute on the CPU"
)


def _rank() -> str:
    """Which process speaks, where several do."""
    return f"[rank {os.environ.get('RANK', '0')}] " if os.environ.get("WORLD_SIZE", "1") != "1" else ""


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _bug_note() -> str:
    torch_version = getattr(sys.modules.get("torch"), "__version__", "not loaded")
    return (
        "This is a bug in finetune, not in your configuration. Please report it in the project's issue tracker, with\n"
        f"the lines above and: finetune {__version__}, Python {platform.python_version()}, torch {torch_version}, "
        f"{platform.system()} {platform.machine()}"
    )


# ---------------------------------------------------------------------------------------------------------- the verbs


def _init(args: argparse.Namespace) -> None:
    from finetune.cards import GIB, amount
    from finetune.starter import write_starter

    card_bytes = amount("--card", args.card)
    method = {"lora": "lora", "full": "full"}[args.method]
    notes = write_starter(
        model=args.model,
        method=method,  # type: ignore[arg-type]  # one of the two
        card_gib=None if card_bytes is None else card_bytes / GIB,
        clips=args.data,
        output=args.output,
        force=args.force,
    )
    print(f"wrote {args.output}")
    _print_notes(notes)
    _print_next("check", "--config", str(args.output))


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
    _print_notes([*warnings, *advice], "warning")
    _print_next("train", *_config_words(args))


def _plan(args: argparse.Namespace) -> int:
    print(f"planning {args.config}: its model in fake tensors, a minute or so", file=sys.stderr, flush=True)
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
    if not args.json and planned.fits is False:
        _print_next("plan", *_config_words(args), "--budget", args.budget or args.card or "24GB")
    elif not args.json:
        if planned.chosen:
            print(f"write that memory section into {args.config} first, or set memory.kind: auto there")
        _print_next("train", *_config_words(args))
    return USER_ERROR if asked and planned.fits is False else OK


def _calibrate(args: argparse.Namespace) -> None:
    from finetune.planning.command import run_calibration

    print(run_calibration(args.seconds))
    print("next: `finetune plan` reckons with these rates from now on")


def _precompute(args: argparse.Namespace) -> None:
    from finetune.config import load_config, pin_model, require_valid
    from finetune.facts import read_facts
    from finetune.planning.auto import settled
    from finetune.precompute import precompute
    from finetune.ranks import Ranks

    ranks = Ranks.current()
    config = pin_model(load_config(args.config, args.set), ranks.first)
    facts = read_facts(config.model.pretrained, config.model.revision)
    _print_notes(require_valid(config, facts), "warning")
    config, _ = settled(config)  # it decides how T5 is held
    report = precompute(config, facts=facts, distributed=ranks)
    if _is_main():
        print(report)
        _print_next("train", *_config_words(args))


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
    if not cache.root.is_dir():
        raise CacheError(
            "there is no cache", where=str(cache.root), fix="name another; `finetune precompute` makes one"
        )
    where = ("--dir", str(args.dir)) if args.config is None else _config_words(args)
    if args.action == "verify":
        verified = cache.verify(delete=args.delete, progress=sys.stderr.isatty())
        print(verified)
        if verified.damaged and not args.delete:
            _print_next("cache", "verify", *where, "--delete")
        elif verified.missing and args.config is not None:
            _print_next("precompute", *where)
        return OK if verified.ok else USER_ERROR
    if args.action == "gc":
        patience_s = {"settle_s": 0.0} if args.alone else {}
        collected = cache.gc(delete=args.delete, unused_days=args.unused_days, **patience_s)
        print(collected)
        if not args.delete and collected.bytes:
            _print_next(*("cache", "gc", *where, "--delete"), *(["--alone"] if args.alone else []))
        return PREEMPTED if collected.held_back else OK
    print(cache.stats())
    _print_next("cache", "verify", *where)
    return OK


def _quickstart(args: argparse.Namespace) -> int:
    from finetune.quickstart import main as quickstart

    return PREEMPTED if getattr(quickstart(args.output), "stopped_by", "") else OK


def _print_next(*words: str) -> None:
    """End with the command that follows, to be typed in this folder."""
    print(f"next: {shlex.join(['finetune', *words])}")


def _config_words(args: argparse.Namespace) -> list[str]:
    """How this call was told its configuration."""
    return ["--config", str(args.config), *(["--set", *args.set] if args.set else [])]


def _print_notes(notes: Sequence[str], kind: str = "note") -> None:
    for note in notes if _is_main() else ():
        print(f"{kind}: {note}", file=sys.stderr)


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
