"""Model cards: what they tell, code that runs as it stands, and words from outside that are only read."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from test_export import FULL, LORA, make_run

from finetune import export
from finetune.checkpoint.folders import HISTORY
from finetune.cli import main
from finetune.cogvideox.config import FirstAndLastFrames, FirstFrame
from finetune.cogvideox.model_files import known_model
from finetune.cogvideox.spec import read_spec
from finetune.config.schema import RunConfig
from finetune.conversion import model_card as cards
from finetune.conversion.model_card import ExportedModel, copy_samples, model_card, training_record
from finetune.conversion.source import DataSummary, ExportSource
from finetune.conversion.verify import Verification
from finetune.core.types import Bucket, RunState, SamplePrompt
from finetune.datasets.cache import Cache
from finetune.datasets.manifests import Manifest, ManifestItem
from finetune.inference.adapters import TRAINING_RECORD

COMMIT = "a" * 40
HOSTILE = [
    "a `red`` ring | <img src=x onerror=alert(1)> [x](javascript:alert(1))\n# heading",
    "```\n</code></pre><script>alert(1)</script>",
    "--- \n...\nlicense: mit",
    "![x](http://evil/x.png) https://evil.example www.evil.example",
    "\\` \\| \\\\| | a | b |",
    "<!-- --> <b>&lt;script&gt;</b> &#60;",
    "\x1b[31m \u202e",
]


def parts_of(card: str) -> tuple[dict[str, Any], str]:
    _, front, body = card.split("---\n", 2)
    return yaml.safe_load(front), body


# ---------------------------------------------------------------------------------------------------- the card of a run


def write_history(run: Path, losses: dict[int, float]) -> None:
    rows = [{"step": step, "heldout": loss, "trainsubset": 0.1, "by_band": {}} for step, loss in losses.items()]
    (run / HISTORY).write_text("".join(json.dumps(row) + "\n" for row in rows))


def run_with_history(tmp_path: Path, model: Path, **changes) -> Path:
    """A run that measured, sampled, and whose cache is at hand."""
    items = tuple(
        ManifestItem(name, "metadata.jsonl:1", caption, Bucket(9, 64, 64), 1.0, name == "c", "k" + name, "p", "m")
        for name, caption in (("a", "a red ring"), ("b", HOSTILE[0]), ("c", "a blue ring"))
    )
    manifest = Manifest(items=items, empty_prompt_key="e", request={"x": 1}, inputs={})
    Cache(tmp_path / "cache").save_manifest(manifest, tmp_path)
    run = make_run(
        tmp_path,
        model,
        LORA,
        cache_digest=manifest.digest,
        cache={"dir": str(tmp_path / "cache")},
        validation={"samples": [{"prompt": "a red ring", "seed": 4}], "num_inference_steps": 1},
        data={"trigger": "r1ng"},
        **changes,
    )
    write_history(run, {0: 0.5, 3: 0.25, 4: 9.0})
    for step, content in ((0, b"old"), (3, b"new"), (4, b"later")):
        folder = run / "samples" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "00-seed4.mp4").write_bytes(content)
    return run


def test_the_model_card_tells_what_was_done(tiny_model, tmp_path):
    folder = export(run_with_history(tmp_path, tiny_model("5b"))).folder
    values, body = parts_of((folder / "README.md").read_text(encoding="utf-8"))
    assert values["library_name"] == "diffusers" and values["pipeline_tag"] == "text-to-video"
    assert "lora" in values["tags"] and values["instance_prompt"] == "r1ng"
    assert "base_model" not in values  # a folder on this machine is no id on the hub
    data = "2 clips (frames x height x width: 2 of 9x64x64), and 1 held out"
    for words in (data, "- `a red ring`\n", "rank 4, alpha 2", "0.5000, at step 3 0.2500"):
        assert words in body, words
    assert "- ```a `red`` ring | <img src=x onerror=alert(1)> [x](javascript:alert(1)) # heading```\n" in body
    assert (folder / "samples/00-seed4.mp4").read_bytes() == b"new"
    assert "[00-seed4.mp4](samples/00-seed4.mp4): `a red ring`" in body
    assert str(tmp_path) not in (folder / TRAINING_RECORD).read_text()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "Sampled at step 3, with the averaged weights of this export."),
        ({"layout": "merged"}, "Sampled at step 3, with the averaged weights that were then merged."),
        ({"layout": "merged", "strength": 0.5}, None),
        ({"weights": "raw"}, None),
        ({"checkpoint": "best"}, None),
    ],
    ids=["as trained", "merged", "half strength", "not the average", "a step without samples"],
)
def test_what_the_card_shows_was_sampled_with_the_exported_weights(tiny_model, tmp_path, options, sentence):
    """The rounds of steps 0, 3 and 4 stand there in every case: a card of another step once showed one of them."""
    samples = {"samples": [{"prompt": "a red ring", "seed": 4}]}
    make_run(tmp_path, tiny_model("5b"), LORA, step=2, ema=True, validation=samples)
    run = run_with_history(tmp_path, tiny_model("5b"), ema=True, best_step=2)
    report = export(str(run), str(tmp_path / "out"), **options)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    videos = [path.read_bytes() for path in (tmp_path / "out").rglob("*.mp4")]
    assert (videos == [b"new"] and sentence in card) if sentence else (videos == [] and "## Samples" not in card)
    assert ("the card shows no video" in str(report)) == (sentence is None)
    foreign = "Measured with the averaged weights at strength 1, not with this export's." in card
    assert foreign == (options.get("weights") == "raw" or options.get("strength") == 0.5)


def test_an_export_names_a_better_checkpoint_that_stands(tiny_model, tmp_path):
    make_run(tmp_path, tiny_model("5b"), LORA, step=2)
    run = run_with_history(tmp_path, tiny_model("5b"), best_step=2)
    write_history(run, {2: 0.2, 3: 0.25})
    better = "step 2 has a lower held-out loss, 0.2000; step 3 has 0.2500: add --checkpoint best"
    assert f"note: {better}" in str(export(run))
    assert "lower held-out" not in str(export(run, checkpoint="best"))
    write_history(run, {2: 0.3, 3: 0.25})
    assert "lower held-out" not in str(export(run))
    write_history(run, {2: 0.2, 3: 0.25})
    shutil.rmtree(run / "checkpoints" / "step-00000002")
    assert "lower held-out" not in str(export(run))


@pytest.mark.parametrize(
    ("variant", "method", "options"),
    [
        ("5b", LORA, {}),
        ("1.5-5b-i2v", FULL, {}),
        ("1.5-5b", FULL, {"full_pipeline": True}),
        ("5b", LORA, {"layout": "peft"}),
        ("5b", {"kind": "lokr"}, {}),
    ],
)
def test_the_card_s_code_runs_as_it_stands(tiny_model, tmp_path, monkeypatch, variant, method, options):
    """Where ``finetune export`` was typed, with the folder named as it was there; and its command is one."""
    trigger = {"trigger": "r1ng's"}
    run = make_run(tmp_path, tiny_model(variant), method, validation={"num_inference_steps": 1}, data=trigger)
    monkeypatch.chdir(tmp_path)
    report = export(run.relative_to(tmp_path), **options)
    card = (report.folder / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    assert f"'{run.name}/{report.folder.name}'" in code
    Image.new("RGB", (64, 64), (200, 0, 0)).save("first_frame.png")
    exec(code, {})
    assert Path("video.mp4").stat().st_size > 0
    if "layout" in options:  # `generate` reads diffusers' layout
        assert "```bash" not in card
        return
    line = card.split("```bash\n")[1].split("\n")[0]
    program, *words = shlex.split(line)
    weights, calls = Path("run/export"), []
    monkeypatch.setattr("finetune.generate", lambda prompts, out, **options: calls.append((prompts, options)))
    assert (program, words[0], main.main(words)) == ("finetune", "generate", 0)
    (((prompt,), options),) = calls
    assert prompt.prompt == "r1ng's" and options["transformer"] == (weights if method == FULL else None)
    assert [*(options["adapters"] or ())] == ([] if method == FULL else [str(weights)])
    assert report.command == line
    assert "Not measured." in card and "was not at hand" in card
    assert f"pipeline_tag: {'image' if 'i2v' in variant else 'text'}-to-video" in card


# ----------------------------------------------------------------------------------------------- words from outside


@pytest.fixture
def exported(tmp_path: Path) -> Callable[..., ExportedModel]:
    def make(trigger: str = "zkx", captions: tuple[str, ...] = ("a ring",), name: str = "export") -> ExportedModel:
        config = RunConfig.from_dict(
            {
                "model": {"pretrained": "zai-org/CogVideoX-5b", "revision": COMMIT, "dtype": "bf16"},
                "data": {"sources": [{"path": "x"}], "buckets": ["49x480x720"], "trigger": trigger},
                "method": {"kind": "lora", "rank": 4, "alpha": 4, "targets": ["to_q|<b>x</b>"]},
                "train": {"steps": 1},
                "output_dir": str(tmp_path / "run [x](y) <img> www.evil.example"),
            }
        )
        source = ExportSource(tmp_path, config, config.model.pretrained, COMMIT, RunState(3, "x"), {}, "raw")
        source.__dict__["data"] = DataSummary(len(captions), 0, {"49x480x720": 1}, captions)
        return ExportedModel(source, read_spec(str(known_model("5b"))), None, name)

    return make


def tokens_of(body: str) -> list[Any]:
    from markdown_it import MarkdownIt

    flat: list[Any] = []
    for token in MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(body):
        flat += [token, *(token.children or [])]
    return flat


def structure(body: str) -> list[str]:
    """What a Markdown reader makes of a card, without the words."""
    return [token.type for token in tokens_of(body) if token.type not in ("text", "text_special", "softbreak")]


def test_the_card_and_the_record_say_which_frames_it_was_trained_with(exported):
    model = replace(exported(), spec=read_spec(str(known_model("5b-i2v"))))
    config = model.source.config
    for kind, frames in (("first", FirstFrame()), ("first_last", FirstAndLastFrames())):
        data = config.data.model_copy(update={"condition_frames": frames})
        of_kind = replace(model, source=replace(model.source, config=config.model_copy(update={"data": data})))
        _, body = parts_of(model_card(of_kind, {}))
        assert ("--image first_frame.png --last-image last_frame.png" in body) == (kind == "first_last")
        assert ("the stock pipeline has no argument" in body) == (kind == "first_last")
        assert json.loads(training_record(of_kind, Verification(0, 1)))["condition_frames"] == kind


@pytest.mark.parametrize("text", HOSTILE)
def test_a_card_has_the_same_structure_whatever_the_words(exported, text):
    trigger = " ".join(text.split()) if text.isprintable() or "\n" in text else "zkx"  # others are refused as settings
    usual, plain = parts_of(model_card(exported(captions=("a ring", "second")), {}))
    values, body = parts_of(model_card(exported(trigger, (text, "second"), trigger.replace("/", "_")), {}))
    assert structure(body) == structure(plain)
    assert not {"html_block", "html_inline", "link_open", "image"} & set(structure(body))
    assert values == {**usual, "instance_prompt": trigger}
    assert not set(body) & set("\x1b\u202e")
    for line in body.splitlines():
        if line.startswith(("# ", "|")):  # GitHub and the hub make links of bare addresses in what is no code
            assert "www." not in line and "://" not in line
    rendered = "".join(token.content for token in tokens_of(body) if token.type in ("text", "text_special"))
    assert trigger in rendered, "what is escaped is still read as it was written"


def test_the_structure_can_break(exported, monkeypatch):
    """Canary: without the escapes the same words are markup."""
    for name in ("code", "text"):
        monkeypatch.setitem(cards._TEMPLATES.filters, name, str)
    cards._TEMPLATES.cache.clear()
    _, body = parts_of(model_card(exported(HOSTILE[3], (HOSTILE[0], HOSTILE[5])), {}))
    cards._TEMPLATES.cache.clear()
    assert {"html_inline", "image"} <= set(structure(body))


def test_a_caption_cannot_end_the_code_it_stands_in(exported):
    _, body = parts_of(model_card(exported(captions=("x\n```\n<script>alert(1)</script>\n```", "````", "x" * 999)), {}))
    assert "html_block" not in structure(body) and structure(body).count("fence") == 2
    assert "- ````` ```` `````\n" in body and max(map(len, body.splitlines())) < 400


@pytest.mark.parametrize(
    "trigger",
    ["1e-4", "no", "null", "2024-01-01", "0x1F", "~", "- x", "a: b", "&x", "*x", "!!str", "\u6f22"],
)
def test_words_that_look_like_numbers_or_truth_stay_words(exported, trigger):
    card = model_card(exported(trigger), {})
    assert parts_of(card)[0]["instance_prompt"] == trigger
    assert f'instance_prompt: "{trigger}"\n' in card, "1e-4 is a number to YAML 1.2, which the hub reads"


def test_the_card_and_the_record_name_the_commit(exported):
    model = exported()
    values, body = parts_of(model_card(model, {}))
    assert values["base_model"] == "zai-org/CogVideoX-5b" and values["base_model_relation"] == "adapter"
    assert f"from_pretrained('zai-org/CogVideoX-5b', revision='{COMMIT}'" in body and f"--revision {COMMIT}" in body
    assert json.loads(training_record(model, Verification(0, 1)))["revision"] == COMMIT
    _, body = parts_of(model_card(replace(model, source=replace(model.source, revision=None)), {}))
    assert "revision" not in body


def test_only_what_a_run_writes_is_published(exported, tmp_path):
    folder = tmp_path / "samples" / "step-00000003"
    folder.mkdir(parents=True)
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "out").mkdir()
    for name in ("00-seed4.mp4", "x](javascript:alert(1)).mp4", "<b>.mp4", "a b.mp4", "\u05d0.mp4"):
        (folder / name).write_bytes(b"x")
    (folder / "01-seed5.mp4").symlink_to(tmp_path / "secret")
    model = exported()
    prompts = tuple(SamplePrompt(prompt="a ring", seed=seed) for seed in (4, 5))
    validation = model.source.config.validation.model_copy(update={"samples": prompts})
    config = model.source.config.model_copy(update={"validation": validation})
    source = replace(model.source, config=config, checkpoint=tmp_path / "checkpoints" / "step-00000003")
    assert copy_samples(replace(model, source=source), tmp_path / "out") == {"00-seed4.mp4": "a ring"}


@pytest.mark.parametrize(("layout", "place"), [("comfyui", "models/loras"), ("kohya", "models/CogVideo/loras")])
def test_the_card_of_another_layout_says_where_its_file_goes(tiny_model, tmp_path, layout, place):
    report = export(make_run(tmp_path, tiny_model("5b"), LORA), layout=layout)
    front, body = parts_of((report.folder / "README.md").read_text())
    assert "`run.safetensors`" in body and f"`ComfyUI/{place}`" in body and "load_lora_weights" not in body
    assert front["tags"][-1] == "lora" and "next:" not in str(report)
