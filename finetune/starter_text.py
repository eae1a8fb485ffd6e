"""The text of a starting configuration: one template, filled by ``starter``."""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from types import MappingProxyType

_COMMENT_COLUMN = 25
_WIDTH = 100


def header(title: str, memory: str, notes: Sequence[str], command: str, file: str, export_from: str) -> str:
    """The comment at the top: what it is for, what it is predicted to need, and what to type."""
    quoted = shlex.quote(file)  # the commands are there to be copied
    commands = [
        (f"finetune check --config {quoted}", "what would be trained on; loads no weights"),
        (f"finetune precompute --config {quoted}", "encode clips and captions (training does it too)"),
        (f"finetune train --config {quoted}", "on several GPUs: accelerate launch -m finetune train --config ..."),
        (f"finetune export {shlex.quote(export_from)}", "an adapter or transformer that diffusers loads"),
    ]
    lines = [
        title,
        "",
        *textwrap.wrap(memory, _WIDTH),
        *(line for note in notes for line in textwrap.wrap(f"NOTE: {note}.", _WIDTH)),
        "",
        f"Written by {command}. Every field: docs/config.md. Relative paths start at this file's folder.",
        "To be typed in the folder where it was written:",
        "",
        *(line for words, meaning in commands for line in (f"  # {meaning}", f"  {words}")),
    ]
    return "".join(f"# {line}".rstrip() + "\n" for line in lines)


def body(
    *,
    pretrained: str,
    clips: str,
    bucket: str,
    fps: int,
    image_to_video: bool,
    cache_dir: str,
    lora: bool,
    output_dir: str,
    memory: Mapping[str, str] = MappingProxyType({}),
    optimizer: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """The sections, each line with what a person may want to know of it."""
    parts = [
        _MODEL.format(pretrained=_quoted(pretrained)),
        _DATA.format(clips=_quoted(clips), bucket=bucket, fps=fps),
        _IMAGE_DATA if image_to_video else "",
        _CACHE.format(cache_dir=_quoted(cache_dir)),
        _IMAGE_CACHE if image_to_video else "",
        _LORA if lora else _FULL,
        _OPTIMIZER.format(
            lr="1e-4" if lora else "1e-5",
            note="LoRA wants 1e-4 to 1e-3; 2e-5 hardly moves it" if lora else "a tenth of what LoRA wants",
            kind=optimizer.get("kind", "adamw8bit"),
            more="".join(
                f"  {name}: {value} # {_OPTIMIZER_NOTES[name]}\n" for name, value in optimizer.items() if name != "kind"
            ),
        ),
        _TRAIN.format(steps=1500 if lora else 3000),
        _section("memory", memory, _MEMORY_NOTES) if memory else _MEMORY,
        _VALIDATION,
        _IMAGE_SAMPLES if image_to_video else _SAMPLES,
        _REST.format(output_dir=_quoted(output_dir)),
    ]
    return "".join(_aligned(line) for part in parts for line in part.splitlines(keepends=True))


def _section(name: str, values: Mapping[str, str], notes: Mapping[str, str]) -> str:
    return f"\n{name}:\n" + "".join(f"  {key}: {value} # {notes[key]}\n" for key, value in values.items())


def _quoted(text: str) -> str:
    """A path as YAML: plain where it can only be read as itself, else in quotes."""
    plain = re.fullmatch(r"[A-Za-z./~][\w./~+-]*", text) and text not in ("true", "false", "null", "~")
    return text if plain else "'" + text.replace("'", "''") + "'"


def _aligned(line: str) -> str:
    found = re.fullmatch(r"( *[^#\s].*?) +# (.*\n)", line)
    return f"{found[1]:<{_COMMENT_COLUMN}} # {found[2]}" if found else line


_MODEL = """
model:
  pretrained: {pretrained}
  dtype: bf16 # what frozen weights are held and computed in
"""

_DATA = """
data:
  sources:
    # metadata.jsonl, csv or parquet; prompts.txt + videos.txt; or clips with a .txt of the same name beside each
    - path: {clips}
  buckets: [{bucket}] # frames x height x width; several sort the clips by shape
  fps: {fps} # the rate this model was made for
  span: head # head | center | uniform | all: which part of a longer video
  short_clips: error # error | skip | pad: what happens to a video with too few frames
  trigger: "" # a rare word put before every caption, to call what is learnt
  caption_dropout: 0.1 # how often a clip is trained on without its caption, for guidance
  holdout: 0.1 # part of the videos kept out of training, to see overfitting
"""

_IMAGE_DATA = """\
  # the image condition is a clip's own first frame, unless the dataset names an image
  image_dropout: 0.05 # how often it is withheld
"""

_CACHE = """
cache:
  dir: {cache_dir}
  mode: auto # auto | require: encode what is missing, or stop and say what
"""

_IMAGE_CACHE = """\
  image_draws: 4 # noise-augmented encodings of the image condition, per clip
"""

_LORA = """
method:
  kind: lora
  rank: 128
  alpha: 64 # the update counts alpha / rank; the exported file carries it
  targets: attention # attention | attention+ff | all-linear | a regular expression
"""

_FULL = """
method:
  kind: full
"""

_OPTIMIZER = """
optimizer:
  kind: {kind} # adamw | adamw8bit | paged_adamw8bit | torchao_adamw8bit | custom
  lr: {lr} # {note}
{more}
lr_schedule:
  kind: cosine # constant | linear | cosine
  warmup_steps: 50
"""

_TRAIN = """
train:
  steps: {steps} # or, in its place, epochs: 20
  batch_size: 1
  accumulation: 1 # micro-batches per optimizer step
  max_grad_norm: 1.0
  seed: 42
"""

_MEMORY = """
memory:
  checkpointing: full # full | selective | none: recompute blocks in the backward pass, or keep activations
"""

_MEMORY_NOTES: Mapping[str, str] = {
    "checkpointing": "full | selective: selective is faster, for 0.1 GiB a block",
    "block": "our own forward and backward pass of a block",
    "modulation": "adaLN weights stay on the host, and are applied ahead",
    "activations": "what waits for the backward pass waits on the host",
    "base": "frozen weights in 8 bits; native for model.dtype",
    "streamed_blocks": "weights are copied to the GPU block by block",
    "text_encoder": "T5 runs block by block while captions are encoded",
    "gradient_release": "one block's gradients at a time; the norm is still that of all",
    "optimizer_states": "weights are updated on the CPU",
}

_OPTIMIZER_NOTES: Mapping[str, str] = {
    "weights": "master | kahan | stochastic: fp32 copies of bf16 weights, their rounding errors, or neither",
}

_VALIDATION = """
validation:
  every: 100 # held-out loss, and the same on training clips
  sample_every: 500 # videos for these prompts, before the first step as well
"""

_SAMPLES = """\
  samples:
    - prompt: a sailing boat crosses a calm bay at sunset, seen from the shore
      seed: 0
"""

_IMAGE_SAMPLES = """\
  samples: [] # an image-to-video model samples from an image: give your own, such as
  #  - prompt: a sailing boat crosses a calm bay at sunset, seen from the shore
  #    image: boat.png
  #    seed: 0
"""

_REST = """
checkpoint:
  every: 250
  keep_last: 2
  keep_best: true # by held-out loss
  resume: latest # latest | none | a checkpoint's folder

tracking:
  kind: tensorboard

output_dir: {output_dir}
"""
