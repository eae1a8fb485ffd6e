"""Where mutation starts: documents that are valid, or nearly so, and the pieces that formats are made of."""

from __future__ import annotations

import io
import json
from pathlib import Path

from finetune.cogvideox.components import CONFIG_FILES
from finetune.cogvideox.model_files import KNOWN_MODELS, known_model


def _pieces(*texts: str) -> tuple[bytes, ...]:
    return tuple(text.encode() for text in texts)


GOOD_CONFIG = b"""\
model: {pretrained: zai-org/CogVideoX-5b, dtype: bf16}
data:
  sources:
    - path: clips
    - {kind: metadata, path: more/metadata.jsonl, repeats: 2.5, split: holdout}
  buckets: [49x480x720]
  trigger: zkx
cache: {dir: cache, image_draws: 4}
method: &lora {kind: lora, rank: 16, alpha: 16}
optimizer: {kind: adamw, lr: 1e-4, betas: [0.9, 0.99]}
lr_schedule: {kind: cosine, warmup_steps: 10}
train: {steps: 100, seed: 1}
validation:
  samples:
    - prompt: "a \\"red\\" ring"
      seed: 3
output_dir: run
"""

YAML_TOKENS = _pieces(
    *("&a", "*a", "<<: ", "!!python/object/apply:os.system", "!!binary", "!!float", "!", "? ", ": ", "- ", "---"),
    *("...", "|", ">-", "[", "]", "{", "}", "'", '"', "\\x1b", "\\U00110000", "\\ud800", "\\0", "#", "%YAML 1.1"),
    *("null", "true", ".inf", ".nan", "1e999", "-0", "0x" + "f" * 400, "9" * 400, "2024-01-01", "no", "~", "\t"),
    *("\ufeff", "\u2028", "\x85", "\r", "\n", "kind: lora", "path: ", "data:", "  ", "\u202e", "train: {steps: 1}"),
    *("model.dtype=fp16", "data.sources.0.path=", "method.rank=", "x.1.y=", "data.buckets[0]=", "="),
)
JSON_TOKENS = _pieces(
    *('{"file_name": "a.mp4", "prompt": "x"}', '"../a.mp4"', '"/etc/passwd"', '"~/x.mp4"', '"C:\\\\a.mp4"'),
    *('"\\u0000"', '"\\ud800"', '"\\u001b[2J"', "[" * 300, "]" * 300, "9" * 400, "1e999", "NaN", "null", "true", "-1"),
    *('"prompt": ', '"id": 1', '"id": "1"', '"file_name": ', ",", ":", "{", "}", "\n", "\r\n", "\0", "\ufeff"),
    *("0", '""', "\u202e", "1000000000", '"num_layers": 1000000000', '"_class_name": '),
)
CSV_TOKENS = _pieces(
    *('"', '""', ",", "\n", "\r", "\0", "a.mp4", "../a.mp4", ";", "\t", "," * 200, "\ufeff", "x" * 500, "\x1b[0m")
)


def configs() -> list[bytes]:
    """The shipped examples, one that uses most of YAML, and the bombs that are known."""
    shipped = [path.read_bytes() for path in sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))[:3]]
    bomb = b"a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + b"".join(
        b"a%d: &a%d [%s]\n" % (n, n, b",".join([b"*a%d" % (n - 1)] * 9)) for n in range(1, 9)
    )
    chain = b"a0: &a0 {x: 1}\n" + b"".join(b"a%d: &a%d {x: *a%d}\n" % (n, n, n - 1) for n in range(1, 400))
    return [GOOD_CONFIG, *shipped, bomb, chain]


def overrides() -> list[bytes]:
    """Assignments that are fine."""
    return [b"train.steps=5", b"data.sources.0={path: x}", b"data.buckets=[9x64x64]", b"method={kind: full}"]


def _rows() -> list[dict[str, object]]:
    return [
        {"file_name": "a.mp4", "prompt": "a red ball", "image": "a.png"},
        {"file_name": "b.mp4", "prompt": "caf\u00e9 \u05d0\u05d1 \U0001f600", "image": None, "tags": [1, {"x": 2.5}]},
    ]


def jsonl() -> list[bytes]:
    """Two rows, written with and without escapes."""
    return [
        "".join(json.dumps(row, ensure_ascii=ascii_) + "\n" for row in _rows()).encode() for ascii_ in (True, False)
    ]


def csv() -> list[bytes]:
    """Quoted, unquoted and with line ends in a cell."""
    return [
        b'video,caption\na.mp4,"a red, ""round"" ball"\nb.mp4,two words\n',
        b'\xef\xbb\xbfvideo,caption,image\r\na.mp4,"two\r\nlines",a.png\r\n',
    ]


def parquet() -> list[bytes]:
    """The same rows, plain and compressed, with a dictionary and without."""
    import pyarrow
    from pyarrow import parquet as pq

    table = pyarrow.table({key: [str(row[key]) for row in _rows()] for key in ("file_name", "prompt")})
    found = []
    for options in (
        {"compression": "none", "use_dictionary": False},
        {"compression": "zstd"},
        {"compression": "snappy"},
    ):
        buffer = io.BytesIO()
        pq.write_table(table, buffer, **options)
        found.append(buffer.getvalue())
    return found


def layouts() -> list[bytes]:
    """Two files in one: what stands before and after two NUL bytes."""
    return [
        b"a red ball\n\0\0a.mp4\n",
        b'{"id": 1, "prompt": "x"}\n\0\0{"id": 1, "file_name": "a.mp4"}\n',
        "caf\u00e9".encode("latin-1") + b"\n\0\0a.mp4\n",
    ]


def model_json() -> list[bytes]:
    """Every JSON file of two published models, after a byte that says which one it is."""
    files = ("model_index.json", *CONFIG_FILES.values())
    return [
        bytes([index]) + (known_model(name) / file).read_bytes()
        for name in (KNOWN_MODELS[0], KNOWN_MODELS[-1])
        for index, file in enumerate(files)
    ]
