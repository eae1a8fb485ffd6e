"""The command line's words: one parser per verb, with examples that tests parse. No import of ours but the version."""

from __future__ import annotations

import argparse
import difflib
import os
import platform
import shlex
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.core.errors import CacheError, ConfigError, FinetuneError, first_line, is_out_of_memory, is_refusal
from finetune.core.gpu import grow_segments
from finetune.core.terminal import lasting_streams, open_streams, own_log, quiet_libraries
from finetune.core.text import shown
from finetune.core.version import __version__

if TYPE_CHECKING:
    from finetune.core.types import Bucket


class _Parser(argparse.ArgumentParser):
    """Knows what was meant by a word that is nearly right."""

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            nearest = _did_you_mean(str(value), action.choices)
            listed = ", ".join(map(str, action.choices))
            raise argparse.ArgumentError(action, f"invalid choice: {value!r:.60}{nearest} (choose from {listed})")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """As argparse has it, but that a verb itself refuses what it does not know, and names its options."""
        found, rest = super().parse_known_args(args, namespace)
        if rest:
            word = rest[0].split("=")[0]
            self.error(f"unrecognized arguments: {' '.join(rest)}{_did_you_mean(word, self._option_string_actions)}")
        return found, rest


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word[:60].lower(), list(known), n=1, cutoff=0.6)
    return f"; did you mean '{near[0]}'?" if near else ""


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Examples stay as they are written; defaults are shown where there is one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        shown = action.default not in (None, False, [], argparse.SUPPRESS)
        return super()._get_help_string(action) if shown else action.help


_OVERVIEW = """\
Fine-tune CogVideoX: LoRA or full, from clips and captions to an export that diffusers loads.

From one's own clips to a video, in five commands:
  finetune init --model 5b --method lora --card 24GB --data clips --output run.yaml
  finetune check --config run.yaml
  finetune train --config run.yaml
  finetune export runs/run
  finetune generate --model 5b --adapter runs/run/export --prompt "a red kite over the sea"
"""

_EXITS = """\
Exit codes: 0 done, 2 something to mend (the message says where), 1 a bug, 130 interrupted, 75 training was stopped by a
signal and saved, or a collection met a job that is only beginning (the same command continues).
"""


def build_parser(verb: str | None = None) -> argparse.ArgumentParser:
    """The parser of the ``finetune`` command, or of one verb alone."""
    if verb is not None:
        alone = _Parser(formatter_class=_Help, description=_VERBS[verb][1], epilog=_VERBS[verb][2])
        _VERBS[verb][0](alone)
        alone.set_defaults(verb=verb)
        return alone
    parser = _Parser(prog="finetune", description=_OVERVIEW, epilog=_EXITS, formatter_class=_Help)
    parser.add_argument("--version", action="version", version=f"finetune {__version__}")
    verbs = parser.add_subparsers(title="verbs", dest="verb", metavar="VERB", required=True)
    for name, (add_arguments, description, examples) in _VERBS.items():
        summary = description.split(". ")[0].split(":")[0].rstrip(".")
        add_arguments(
            verbs.add_parser(
                name,
                help=summary[0].lower() + summary[1:],
                description=description,
                epilog=examples,
                formatter_class=_Help,
            )
        )
    return parser


def _config_arguments(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    parser.add_argument("--config", type=Path, required=required, metavar="FILE", help="the run's YAML file")
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="FIELD=VALUE",
        help="override fields, such as optimizer.lr=2e-4 data.buckets=[49x480x720]; values are YAML",
    )


def _init_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        required=True,
        metavar="MODEL",
        help="2b, 5b, 5b-i2v, 1.5-5b or 1.5-5b-i2v; a hub id; or the folder of a CogVideoX in diffusers format",
    )
    parser.add_argument("--method", choices=["lora", "full"], default="lora", help="train an adapter, or every weight")
    parser.add_argument(
        "--card", metavar="SIZE", help="memory of the GPU, such as 24GB, to say whether the run should fit"
    )
    parser.add_argument("--data", type=Path, metavar="PATH", help="clips and captions: a folder, or a metadata file")
    parser.add_argument("--output", type=Path, default=Path("run.yaml"), metavar="FILE", help="the file to write")
    parser.add_argument("--force", action="store_true", help="replace the file if it exists")


def _check_arguments(parser: argparse.ArgumentParser) -> None:
    _config_arguments(parser)


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    _config_arguments(parser)
    parser.add_argument("--card", metavar="SIZE", help="memory of the GPU, such as 24GB; left out: of the one here")
    parser.add_argument("--ram", metavar="SIZE", help="host memory that the run may take, such as 32GB")
    parser.add_argument("--budget", metavar="SIZE", help="find the fastest memory section for a GPU of this size")
    parser.add_argument(
        "--processes",
        type=int,
        default=1,
        metavar="N",
        help="plan one of N processes with a whole model each (DDP)",
    )
    parser.add_argument(
        "--allow-quantized",
        action="store_true",
        help="with --budget: a base in 8 or 4 bits also where something else fits; it changes the model a little",
    )
    parser.add_argument(
        "--device", metavar="NAME", help="the GPU to reckon seconds for: H200, H100, A100, 4090, or a calibrated one"
    )
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the training step's memory curve")
    parser.add_argument("--exact", action="store_true", help="run every block, where two short models would do")
    parser.add_argument("--json", action="store_true", help="print a JSON document, in bytes")


def _calibrate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, default=20.0, help="how long to measure")


def _precompute_arguments(parser: argparse.ArgumentParser) -> None:
    _config_arguments(parser)


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    _config_arguments(parser)


def _replay_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("report", type=Path, metavar="REPORT", help="a folder reports/nonfinite-step-... of a run")
    parser.add_argument(
        "--dtype", choices=["bf16", "fp16", "fp32"], help="what to compute in; left out: as the step was"
    )
    parser.add_argument("--device", metavar="NAME", help="such as cuda:1 or cpu; left out: a GPU where there is one")
    parser.add_argument("--model", metavar="MODEL", help="where the base model is now, if not where the run had it")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="where the cache is now, if not where the run had it")


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="RUN_OR_CHECKPOINT", help="a run's folder, or one checkpoint's")
    parser.add_argument("--to", choices=["diffusers"], default="diffusers", help="layout of the export")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where to; left out: RUN/export, or RUN/merged")
    parser.add_argument(
        "--checkpoint", choices=["latest", "best"], default="latest", help="of a run's folder; best by held-out loss"
    )
    parser.add_argument(
        "--merged",
        action="store_true",
        help="put the adapter into the base's weights: a whole transformer, in RUN/merged where --output is left out",
    )
    parser.add_argument(
        "--strength", type=float, default=1.0, help="with --merged: how much of the adapter; 1 as trained, 0 none"
    )
    parser.add_argument(
        "--full-pipeline",
        action="store_true",
        help="after full fine-tuning, or with --merged: VAE, text encoder and scheduler beside the transformer",
    )
    parser.add_argument("--model", metavar="MODEL", help="where the base model is now, if not where the run had it")
    parser.add_argument(
        "--weights", choices=["auto", "ema", "raw"], default="auto", help="auto takes the average where one was kept"
    )


def _generate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", metavar="MODEL", help="the base model: a folder, a hub id or 5b...; left out: the adapter's own"
    )
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a hub id")
    parser.add_argument(
        "--transformer", type=Path, metavar="DIR", help="a fully fine-tuned transformer, from an export"
    )
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="PATH[:STRENGTH]",
        help="a LoRA: a file, an export, a checkpoint, or a run (its newest checkpoint)",
    )
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="give it again for more videos")
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="text file with a prompt per line, or .jsonl with prompt, image, seed",
    )
    parser.add_argument(
        "--image",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="first frame (image-to-video): one for all --prompt, or one for each",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the first video; each further one has the next")
    parser.add_argument(
        "--bucket", metavar="FxHxW", help="frames x height x width; left out: as the adapter was trained"
    )
    parser.add_argument("--fps", type=float, help="of the written files; left out: as the adapter was trained")
    parser.add_argument("--negative-prompt", default="", metavar="TEXT", help="what to steer away from")
    parser.add_argument("--steps", type=int, default=50, help="denoising steps")
    parser.add_argument("--guidance", type=float, default=6.0, help="classifier-free guidance; 1 for none")
    parser.add_argument("--dynamic-cfg", action="store_true", help="let the guidance grow with the steps")
    parser.add_argument("--dtype", choices=["auto", "bf16", "fp16", "fp32"], default="auto", help="what to compute in")
    parser.add_argument("--offload", action="store_true", help="keep on the GPU only what is in use; slower")
    parser.add_argument("--device", metavar="NAME", help="such as cuda:1 or cpu; left out: a GPU where there is one")
    parser.add_argument("--output", type=Path, default=Path("videos"), metavar="DIR", help="folder for the videos")


def _cache_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=["verify", "gc", "stats"], help="read every entry; collect garbage; count")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--dir", type=Path, metavar="DIR", help="the cache's folder")
    where.add_argument("--config", type=Path, metavar="FILE", help="a run's YAML file, for its cache.dir")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="FIELD=VALUE", help=argparse.SUPPRESS)
    parser.add_argument(
        "--delete", action="store_true", help="delete what verify or gc finds; without it they only say"
    )
    parser.add_argument("--unused-days", type=float, metavar="DAYS", help="gc: also what no run has used for so long")
    parser.add_argument(
        "--alone", action="store_true", help="gc: no other machine uses the cache, so do not wait a minute in between"
    )


def _quickstart_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, default=Path("quickstart"), metavar="DIR", help="where everything goes")


_Verb = tuple[Callable[[argparse.ArgumentParser], None], str, str]

_VERBS: dict[str, _Verb] = {
    "quickstart": (
        _quickstart_arguments,
        "Teach a tiny CogVideoX a new shape: everything the package does, in minutes, without a GPU or a download.",
        "Example:\n  finetune quickstart",
    ),
    "init": (
        _init_arguments,
        "Write a commented configuration for a model, a method and a card.",
        "Examples:\n  finetune init --model 5b --method lora --card 24GB --data clips --output run.yaml\n"
        "  finetune init --model ./my-cogvideox --data clips/metadata.jsonl",
    ),
    "check": (
        _check_arguments,
        "Check a configuration, the model's JSON and every clip's header, without loading a weight.",
        "Example:\n  finetune check --config run.yaml",
    ),
    "plan": (
        _plan_arguments,
        "Predict a run's peak memory, phase by phase, from the model's JSON alone; or find the memory section that\n"
        "fits a card. Exits with 2 where the run does not fit the --card or --budget.",
        "Examples:\n  finetune plan --config run.yaml --card 24GB\n"
        "  finetune plan --config run.yaml --plot memory.png\n"
        "  finetune plan --config run.yaml --budget 12GB --ram 32GB --device 4090",
    ),
    "calibrate": (
        _calibrate_arguments,
        "Measure this machine's GPU for the planner: matrix products, attention, copies. Kept per device name.",
        "Example:\n  finetune calibrate",
    ),
    "precompute": (
        _precompute_arguments,
        "Encode clips and captions into the cache: what is there already is kept. Training does the same where needed.",
        "Examples:\n  finetune precompute --config run.yaml\n"
        "  accelerate launch --num_processes 4 -m finetune precompute --config run.yaml",
    ),
    "train": (
        _train_arguments,
        "Train as a configuration says: fill the cache, continue or begin the run, validate, save. SIGTERM, SIGUSR1,\n"
        "SIGINT or SIGHUP finishes the step, saves a checkpoint and exits with 75; the same command continues.",
        "Examples:\n  finetune train --config run.yaml\n"
        "  finetune train --config run.yaml --set optimizer.lr=2e-4 train.steps=500\n"
        "  accelerate launch --num_processes 2 -m finetune train --config run.yaml",
    ),
    "replay": (
        _replay_arguments,
        "Run the samples of a step that was not finite one at a time, and say what went wrong: a clip, an overflow,\n"
        "the weights. Training writes the report and names it.",
        "Examples:\n  finetune replay runs/run/reports/nonfinite-step-00000123\n"
        "  finetune replay runs/run/reports/nonfinite-step-00000123 --dtype fp32 --device cpu",
    ),
    "export": (
        _export_arguments,
        "Write what was trained in diffusers' format: reloaded through the stock pipeline, compared, kept if equal.",
        "Examples:\n  finetune export runs/run\n  finetune export runs/run --checkpoint best --output my-lora\n"
        "  finetune export runs/run --merged --strength 0.8",
    ),
    "generate": (
        _generate_arguments,
        "Sample videos from a base model with any number of adapters.",
        "Examples:\n"
        '  finetune generate --model 5b --adapter runs/run/export --prompt "a red kite over the sea"\n'
        "  finetune generate --model 5b --adapter a:0.8 --adapter b:0.5 --prompts prompts.txt\n"
        '  finetune generate --model 5b-i2v --image boat.png --prompt "the boat sails away"',
    ),
    "cache": (
        _cache_arguments,
        "Look after a cache: verify its entries, collect what nothing refers to, or count what it holds.",
        "Examples:\n  finetune cache stats --config run.yaml\n  finetune cache verify --dir cache\n"
        "  finetune cache gc --dir cache --unused-days 30 --delete",
    ),
}


# -------- The ``finetune`` command: one thin sub-command per verb.
#
# Nothing heavy is imported before a verb runs, so ``--help`` is instant. Exit codes: 0 done, 2 something the user can
# mend (printed without a traceback), 1 a bug in this package (with one), 130 interrupted, 75 training was stopped by a
# signal and saved, or a collection met a job that is only beginning: the same command continues.

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
        code = _CLI_VERBS[args.verb](args)
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
    from finetune.cli.init import write_starter
    from finetune.core.gpu import amount
    from finetune.core.types import GIB

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
    from finetune.caching.check import check_dataset
    from finetune.caching.plan import identities, overview
    from finetune.cogvideox.model_files import json_folder
    from finetune.cogvideox.spec import read_spec as read_spec
    from finetune.config.loading import load_config
    from finetune.config.rules import require_valid

    config = load_config(args.config, args.set)
    spec = read_spec(str(json_folder(config.model.pretrained, config.model.revision)))
    warnings = require_valid(config, spec)
    report = check_dataset(config, spec)
    print(report)
    numbers, advice = overview(config, spec, report.clips, identities(config, report.clips, progress=True))
    for label, number in numbers:
        print(f"{label:>16}: {number}")
    _print_notes([*warnings, *advice], "warning")
    _print_next("train", *_config_words(args))


def _plan(args: argparse.Namespace) -> int:
    print(f"planning {args.config}: its model in fake tensors, a minute or so", file=sys.stderr, flush=True)
    from finetune.config.loading import load_config
    from finetune.planner.command import plan

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
    from finetune.planner.command import run_calibration

    print(run_calibration(args.seconds))
    print("next: `finetune plan` reckons with these rates from now on")


def _precompute(args: argparse.Namespace) -> None:
    from finetune.caching.precompute import precompute
    from finetune.cogvideox.spec import read_spec as read_spec
    from finetune.config.loading import load_config
    from finetune.config.rules import pin_model, require_valid
    from finetune.core.distributed import ProcessGroup
    from finetune.planner.command import settled

    ranks = ProcessGroup.current()
    config = pin_model(load_config(args.config, args.set), ranks.run_on_main)
    spec = read_spec(config.model.pretrained, config.model.revision)
    _print_notes(require_valid(config, spec), "warning")
    config, _ = settled(config)  # it decides how T5 is held
    report = precompute(config, spec=spec, distributed=ranks)
    if _is_main():
        print(report)
        _print_next("train", *_config_words(args))


def _train(args: argparse.Namespace) -> int:
    from finetune.config.loading import load_config
    from finetune.trainers.loop import train

    report = train(load_config(args.config, args.set))
    if _is_main():
        print(report)
        if not report.stopped_by:
            print(f"next: {report.export_command}")
    return PREEMPTED if report.stopped_by else OK


def _replay(args: argparse.Namespace) -> None:
    from finetune.trainers.replay import replay

    print(replay(args.report, dtype=args.dtype, device=args.device, pretrained=args.model, cache=args.cache))


def _export(args: argparse.Namespace) -> None:
    from finetune.convert.export import export

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
    from finetune.inference.generate import generate
    from finetune.inference.inputs import GenerateRequest, parse_adapter, prompts_with_seeds, read_prompts

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
    from finetune.datasets.geometry import parse_bucket

    try:
        return parse_bucket(text)
    except ValueError as error:
        raise ConfigError(str(error), where=f"--bucket {text}") from None


def _cache(args: argparse.Namespace) -> int:
    from finetune.datasets.cache import Cache

    if args.dir is None:
        from finetune.config.loading import load_config

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
    from finetune.testing.quickstart import main as quickstart

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


_CLI_VERBS: dict[str, Callable[[argparse.Namespace], int | None]] = {
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
