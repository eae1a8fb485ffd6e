"""The command line's words: one parser per verb, with examples that tests parse. No import of ours but the version."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from finetune.version import __version__


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
