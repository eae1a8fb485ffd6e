"""The forms that become command lines: which options of which verb, and how each is asked for.

What an option does, and whether a value makes sense, is for the command to say; its message stands in the job's log.
Here paths are kept inside the page's folders, and text cannot become another option.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from finetune.core.errors import ConfigError, raise_all
from finetune.core.text import text_fault
from finetune.web.access import Roots

Kind = Literal["text", "lines", "number", "choice", "flag", "path", "paths", "adapters", "model", "strengths"]
"""``lines``: the option once for each line; ``paths``: likewise, of paths; ``adapters``: likewise, PATH:STRENGTH;
``model``: a path, or a name that is none; ``strengths``: numbers with commas between them, or a path."""

_MOST_TEXT = 20_000


@dataclass(frozen=True)
class Option:
    """An option of a verb as a field."""

    name: str
    """As it is typed; without dashes, an argument."""
    label: str
    help: str = ""
    kind: Kind = "text"
    choices: tuple[str, ...] = ()
    default: str = ""
    more: bool = False
    """Whether it waits behind "more options"."""
    needed: bool = False
    """Whether the command cannot do without it; an argument is needed in any case."""

    @property
    def key(self) -> str:
        """Of its field in the form."""
        return self.name.lstrip("-").replace("-", "_")


@dataclass(frozen=True)
class Command:
    """A verb as a form."""

    verb: str
    title: str
    help: str
    options: tuple[Option, ...]
    in_line: bool = True
    """Whether it takes its turn behind what computes."""

    def words(self, values: Mapping[str, str], roots: Roots) -> list[str]:
        """What follows ``finetune``.

        Args:
            values: of the form's fields, by ``Option.key``; empty ones are left out.
            roots: where paths may lead.

        Raises:
            ConfigError: for all fields that cannot be.
        """
        words, arguments = [self.verb], []
        faults: list[ConfigError] = []
        for option in self.options:
            try:
                given = list(_given(option, values.get(option.key, ""), roots))
            except ConfigError as fault:
                faults.append(fault)
                continue
            if not given and (option.needed or not option.name.startswith("-")):
                faults.append(ConfigError("this is needed", where=option.label))
            if not option.name.startswith("-"):
                arguments += given
            elif option.kind == "flag":
                words += [option.name] if given else []
            else:
                words += [f"{option.name}={value}" for value in given]  # so that no value is taken for an option
        raise_all(ConfigError, faults, what="{n} fields cannot be used")
        return [*words, *(["--", *arguments] if arguments else [])]


def _given(option: Option, text: str, roots: Roots) -> Iterator[str]:
    """The values of a field, checked."""
    text = text.replace("\r\n", "\n").strip()
    if len(text) > _MOST_TEXT:
        raise ConfigError(f"more than {_MOST_TEXT} characters", where=option.label)
    several = option.kind in ("lines", "paths", "adapters")
    for value in filter(None, map(str.strip, text.split("\n") if several else [text])):
        if fault := text_fault(value, one_line=True):
            raise ConfigError(f"the text is damaged: {fault}", where=option.label)
        if option.kind == "choice" and value not in option.choices:
            raise ConfigError(f"'{value:.60}' is none of {', '.join(option.choices)}", where=option.label)
        if option.kind == "number":
            try:
                float(value)
            except ValueError:
                raise ConfigError(f"'{value:.60}' is no number", where=option.label) from None
        yield _placed(option, value, roots)


def _placed(option: Option, value: str, roots: Roots) -> str:
    strengths = option.kind == "strengths" and all(map(_is_number, value.split(",")))
    if option.kind in ("path", "paths", "strengths") and not strengths:
        return roots.shown(roots.inside(value, option.label))
    if option.kind == "adapters":
        roots.inside(value, option.label)  # a file of the whole name is preferred by the command
        path, colon, strength = value.rpartition(":")
        path, tail = (path, f"{colon}{strength}") if colon and _is_number(strength) else (value, "")
        return roots.shown(roots.inside(path, option.label)) + tail
    if option.kind == "model" and (value.startswith((".", "~", "/", "$")) or (roots.workspace / value).exists()):
        return roots.shown(roots.inside(value, option.label))
    return value


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


# ----------------------------------------------------------------------------------------------------------- the forms

_SCHEMES = ("int8", "int8-dynamic", "fp8", "fp8-dynamic", "fp8-cast", "nf4", "bnb-int8")

_DTYPES = ("bf16", "fp16", "fp32")

INIT = Command(
    "init",
    "New configuration",
    "Reads the clips' headers, and proposes buckets, length, rank and prompts for the model and the card.",
    (
        Option("--model", "Model", "A published name, a hub id, or a folder.", "model", needed=True),
        Option("--method", "Method", "An adapter, or every weight.", "choice", ("lora", "full"), "lora"),
        Option("--card", "Card", "Memory of the GPU, such as 24GB."),
        Option("--data", "Clips", "A folder, or a metadata file.", "path"),
        Option("--output", "File to write", "", "path", (), "run.yaml"),
    ),
    in_line=False,
)

CAPTION = Command(
    "caption",
    "Write missing captions",
    "By a video-language model; what a person wrote is kept.",
    (
        Option("folder", "Folder", "", "path"),
        Option("--model", "Language model", "Of transformers, or its name at the endpoint.", "model", needed=True),
        Option("--endpoint", "Endpoint", "An OpenAI-compatible server, such as http://localhost:8000/v1."),
        Option("--for", "For", "The CogVideoX that reads the captions.", "model"),
        Option("--variants", "Captions per clip", "Training takes one at a time.", "number", more=True),
        Option("--instruction", "Instruction", "A file with what the model is asked.", "path", more=True),
        Option("--replace", "Write other models' captions anew", "", "flag", more=True),
        Option("--device", "Device", "", more=True),
    ),
)

GENERATE = Command(
    "generate",
    "Generate",
    "",
    (
        Option("--adapter", "Adapters", "One a line: a run, checkpoint, export or file, with :STRENGTH.", "adapters"),
        Option("--model", "Base model", "Left out: the adapter's own.", "model"),
        Option("--prompt", "Prompts", "One a line: a video each.", "lines"),
        Option(
            "--compare",
            "Compare",
            "Columns: factors of the strengths, such as 0,0.5,1; or a run's folder.",
            "strengths",
        ),
        Option("--seed", "Seed", "Of the first video; each further one has the next.", "number"),
        Option("--bucket", "Size", "Frames x height x width; left out: as trained."),
        Option("--steps", "Steps", "50 where left out.", "number"),
        Option("--guidance", "Guidance", "6 where left out; 1 for none.", "number"),
        Option("--budget", "Card", "GPU memory to keep within, such as 12GB: what waits on the host follows."),
        Option("--output", "Folder for the videos", "", "path", (), "videos"),
        Option("--gif", "GIF as well", "", "flag"),
        Option("--videos", "Videos of each prompt", "", "number", more=True),
        Option(
            "--image",
            "First frame",
            "One for all prompts, or one a line for each (image-to-video).",
            "paths",
            more=True,
        ),
        Option("--last-image", "Last frame", "Likewise.", "paths", more=True),
        Option("--video", "Video to start from", "Likewise (video-to-video).", "paths", more=True),
        Option("--control", "Control video to follow", "Likewise (model.control).", "paths", more=True),
        Option("--strength", "Strength of video-to-video", "0.8 where left out.", "number", more=True),
        Option("--extend", "Continue by", "So many parts more.", "number", more=True),
        Option("--negative-prompt", "Negative prompt", "", more=True),
        Option("--riflex", "Positions for longer videos", "Frames; 0 for the model's own.", "number", more=True),
        Option("--dynamic-cfg", "Guidance grows with the steps", "", "flag", more=True),
        Option("--scheduler", "Scheduler", "", "choice", ("ddim", "dpm"), more=True),
        Option(
            "--enhance", "Prompt enhancement", "A language model that makes prompts long first.", "model", more=True
        ),
        Option("--endpoint", "Its server", "OpenAI-compatible.", more=True),
        Option("--upscale", "Upscaling weights", "A super-resolution file.", "path", more=True),
        Option(
            "--interpolate",
            "Interpolation",
            "minterpolate: twice as many frames; minterpolate:4.",
            more=True,
        ),
        Option("--preview", "Preview weights", "taecvx: videos are shown while they are sampled.", "path", more=True),
        Option("--fps", "Frames per second", "", "number", more=True),
        Option("--transformer", "Transformer", "A fully fine-tuned one, or GGUF.", "path", more=True),
        Option("--dtype", "Compute in", "", "choice", ("auto", *_DTYPES), more=True),
        Option("--offload", "Offload", "", "choice", ("auto", "none", "model", "group", "sequential"), more=True),
        Option("--quantize", "Transformer in fewer bits", "", "choice", _SCHEMES, more=True),
        Option("--quantize-text", "T5 in fewer bits", "", "choice", _SCHEMES, more=True),
        Option("--compile", "Compile the transformer's blocks", "", "flag", more=True),
        Option("--device", "Device", "", more=True),
    ),
)

EXPORT = Command(
    "export",
    "Export",
    "Reloaded through the stock pipeline and compared before it is kept.",
    (
        Option("source", "Run or checkpoint", "", "path"),
        Option(
            "--to",
            "Layout",
            "Of an adapter; merged: into the base's weights.",
            "choice",
            ("diffusers", "comfyui", "kohya", "peft", "merged"),
            "diffusers",
        ),
        Option("--checkpoint", "Checkpoint", "Best by held-out loss.", "choice", ("latest", "best"), "latest"),
        Option("--output", "Folder", "Left out: in the run's.", "path"),
        Option("--strength", "Strength", "With merged: 1 as trained.", "number", more=True),
        Option("--full-pipeline", "Whole pipeline", "With merged, or after full fine-tuning.", "flag", more=True),
        Option("--model", "Base model", "Where it is now, if not where the run had it.", "model", more=True),
        Option("--weights", "Weights", "", "choice", ("auto", "ema", "raw"), more=True),
        Option("--dtype", "Dtype", "Of a whole transformer.", "choice", _DTYPES, more=True),
        Option("--max-shard-size", "Size of its files", "Such as 2GB.", more=True),
    ),
)

INSPECT = Command(
    "inspect",
    "Inspect",
    "What it is, and what each program will make of it.",
    (Option("source", "File or folder", "", "path"), Option("--norms", "Strength of each block", "", "flag")),
    in_line=False,
)

CONVERT = Command(
    "convert",
    "Convert",
    "Others' checkpoints and LoRAs to diffusers' format, or diffusers' to SAT's.",
    (
        Option("source", "File or folder", "", "path"),
        Option("--out", "New folder", "", "path", needed=True),
        Option("--to", "Becomes", "", "choice", ("diffusers", "sat"), "diffusers"),
        Option("--alpha", "Alpha", "Of a LoRA that does not state it.", "number", more=True),
        Option("--model", "Model of these shapes", "", "model", more=True),
        Option(
            "--extract-lora",
            "LoRA of the difference",
            "Of a full fine-tuning from that model: its rank, or a share to keep, such as 0.95.",
            "number",
            more=True,
        ),
        Option("--dtype", "Dtype", "", "choice", _DTYPES, more=True),
    ),
)

MERGE = Command(
    "merge",
    "Merge",
    "LoRAs as one, or one under another program's names.",
    (
        Option("sources", "Adapters", "One a line, with :WEIGHT.", "adapters"),
        Option("--out", "File", "", "path", needed=True),
        Option("--to", "Layout", "", "choice", ("diffusers", "comfyui", "kohya", "peft"), "diffusers"),
        Option("--rank", "Rank", "At most.", "number", more=True),
    ),
    in_line=False,
)

PUSH = Command(
    "push",
    "Push to the hub",
    "Without the tick it only says what would be uploaded.",
    (
        Option("folder", "Export", "", "path"),
        Option("--repo", "Repository", "user/name", needed=True),
        Option("--public", "Let everybody see it", "", "flag"),
        Option("--yes", "Upload", "", "flag"),
    ),
    in_line=False,
)

REPORT = Command(
    "report",
    "Report",
    "A run as one page, or several compared.",
    (
        Option("runs", "Runs", "One a line.", "paths"),
        Option("--output", "Page", "Left out: in the run's folder, of several report.html.", "path"),
    ),
    in_line=False,
)

COMMANDS: Mapping[str, Command] = {
    command.verb: command for command in (INIT, CAPTION, GENERATE, EXPORT, INSPECT, CONVERT, MERGE, PUSH, REPORT)
}

SHIP: Sequence[Command] = (EXPORT, INSPECT, CONVERT, MERGE, PUSH)
