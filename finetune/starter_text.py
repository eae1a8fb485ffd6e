"""The text of a starting configuration: one template, filled by ``starter``."""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Sequence

_COMMENT_COLUMN = 25
_WIDTH = 100


def header(title: str, memory: str, notes: Sequence[str], command: str, file: str, export_from: str) -> str:
    """The comment at the top: what it is for, what it is predicted to need, and what to type."""
    quoted = shlex.quote(file)  # the commands are there to be copied
    commands = [
        (f"finetune check --config {quoted}", "what would be trained on; loads no weights"),
        (f"finetune precompute --config {quoted}", "encode clips and captions (training does it too)"),
        (f"accelerate launch train.py --config {quoted}", "or: finetune train --config ..."),
        (f"finetune export {shlex.quote(export_from)}", "an adapter or transformer that diffusers loads"),
    ]
    lines = [
        title,
        "",
        *textwrap.wrap(memory, _WIDTH),
        *(line for note in notes for line in textwrap.wrap(f"NOTE: {note}.", _WIDTH)),
        "",
        f"Written by {command}. Relative paths start at this file's folder. Every field: docs/config.md",
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
        ),
        _TRAIN.format(steps=1500 if lora else 3000),
        _IMAGE_SAMPLES if image_to_video else _SAMPLES,
        _REST.format(output_dir=_quoted(output_dir)),
    ]
    return "".join(_aligned(line) for part in parts for line in part.splitlines(keepends=True))


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
  kind: adamw8bit # adamw | adamw8bit | paged_adamw8bit | torchao_adamw8bit | custom
  lr: {lr} # {note}

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

memory:
  checkpointing: full # full | none: recompute each block in the backward pass, or keep activations

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
