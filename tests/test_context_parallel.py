"""One video on several processes: equal to one process's up to rounding, whatever divides and whatever does not."""

from __future__ import annotations

import itertools

import imageio.v3 as imageio
import pytest

from finetune.cli.main import main
from finetune.cogvideox.spec import read_spec
from finetune.core.types import Bucket
from finetune.inference.context_parallel import division_faults
from finetune.testing.tiny import VARIANTS

EVEN, UNEVEN = (9, 64, 96), (9, 48, 80)
"""Video tokens that two and three processes can share evenly, and that they cannot: 3 x 4 x 6 and 3 x 3 x 5 (at two
frames to a token 2 x 24 and 2 x 15); text is 16 or 14 tokens long."""


@pytest.mark.parametrize("ranks", [2, 3])
def test_divided_passes_equal_whole_ones(tiny_model, launcher, ranks):
    cases = [*itertools.product(VARIANTS, [6, 5], [UNEVEN]), ("5b", 6, EVEN), ("5b", 5, EVEN)]
    models, sizes = [], []
    for variant, heads, (frames, height, width) in cases:  # six heads are exchanged; with five, keys go round
        native = {"frames": frames, "height": height, "width": width}
        models.append(str(tiny_model(variant, num_attention_heads=heads, **native)))
        sizes.append(f"{frames}x{height}x{width}")
    divisions = ["context", "cfg"] if ranks == 2 else ["context"]
    ends = launcher.run("context_parallel_cases:compare", models, sizes, divisions, ranks=ranks)
    assert [end.code for end in ends] == [0] * ranks, "\n".join(end.log[-3000:] for end in ends)


@pytest.mark.parametrize(
    ("division", "processes", "options", "message"),
    [
        ("cfg", 3, {}, "two passes, for two processes"),
        ("cfg", 2, {"guided": False}, "without guidance"),
        ("context", 3, {"ring": False}, "4 heads cannot be divided among 3 processes"),
        ("context", 17, {}, "16 tokens of text and 48 of video"),
        ("cfg", 2, {}, None),
        ("context", 3, {}, None),
        ("context", 4, {"ring": False}, None),
    ],
)
def test_what_cannot_be_divided_is_known_before_anything_is_loaded(tiny_model, division, processes, options, message):
    spec = read_spec(str(tiny_model("5b")))
    faults = [
        *division_faults(division, spec, Bucket(9, 64, 64), processes, **{"guided": True, "ring": True, **options})
    ]
    assert [message in fault.what for fault in faults] == ([True] if message else [])


@pytest.mark.parametrize("parallel", ["prompts", "cfg", "context"])
def test_generate_on_two_processes_writes_what_one_writes(tiny_model, launcher, tmp_path, parallel):
    words = ["generate", "--model", str(tiny_model("5b")), "--bucket", "9x32x48", "--steps", "2", "--dtype", "fp32"]
    words += [word for prompt in ("a red circle", "a blue square", "a ring") for word in ("--prompt", prompt)]
    assert main([*words, "--output", str(tmp_path / "one")]) == 0
    ends = launcher.run("launcher_cases:command", *words, "--output", str(tmp_path / "two"), "--parallel", parallel)
    assert [end.code for end in ends] == [0, 0], "\n".join(end.log[-3000:] for end in ends)
    assert [end.log.count("sheet.png") for end in ends] == [1, 0]
    one, two = (sorted((tmp_path / name).iterdir()) for name in ("one", "two"))
    assert [path.name for path in one] == [path.name for path in two] and len(one) == 7
    sheets = [imageio.imread(files[-1]).astype(int) for files in (one, two)]  # of the frames before compression
    assert abs(sheets[0] - sheets[1]).max() <= (0 if parallel == "prompts" else 1)
