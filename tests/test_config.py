"""The configuration: strict YAML, all faults at once with their lines, and rules against the spec of the model."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field, create_model
from pydantic.fields import FieldInfo

from finetune.cogvideox.model_files import KNOWN_MODELS, known_model
from finetune.cogvideox.spec import ModelSpec, read_spec
from finetune.config.document import Document, Dumper
from finetune.config.messages import did_you_mean, is_section
from finetune.config.rules import check_against, require_valid
from finetune.config.schema import RunConfig, json_schema, load_config, validate
from finetune.core.errors import ConfigError
from finetune.core.types import Bucket, Strict
from finetune.datasets.schedule import Item, StepPlan, lr_at
from finetune.methods.lora import LoraMethod

GOOD = """\
model: {pretrained: zai-org/CogVideoX-5b}
data:
  sources:
    - path: clips
    - {path: more, repeats: 2}
  buckets: [49x480x720]
  holdout: 0.1
train:
  steps: 100
output_dir: run
"""


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def _write(text: str = GOOD, name: str = "run.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return _write


def fault(path: Path, overrides: tuple[str, ...] = ()) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def spec_of(variant: str) -> ModelSpec:
    return read_spec(str(known_model(variant)))


# ------------------------------------------------------------------------------------------------------ what is read


def test_a_section_and_a_kind_that_are_left_out_take_their_defaults(write):
    config = load_config(write())
    assert (config.method.kind, config.optimizer.kind, config.lr_schedule.kind) == ("lora", "adamw8bit", "constant")
    assert [source.repeats for source in config.data.sources] == [1, 2]
    assert str(config.data.buckets[0]) == "49x480x720"
    config = load_config(write(GOOD + "optimizer: {lr: 3e-5}\nmethod: {rank: 8}\nlr_schedule: {warmup_steps: 5}\n"))
    assert (config.optimizer.kind, config.optimizer.lr) == ("adamw8bit", 3e-5)
    assert (config.method.kind, config.method.rank) == ("lora", 8)
    with pytest.raises(ValueError, match="frozen"):
        config.train.steps = 3


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("1E3", 1000.0), ("-2.5e+1", -25.0), (".5", 0.5), ("1.", 1.0), ("0x1F", 31), ("0o17", 15),
        ("010", 10), ("off", "off"), ("no", "no"), ("y", "y"), ("1:30", "1:30"), ("2024-05-01", "2024-05-01"),
        ("1_000", "1_000"), ("true", True), ("null", None), ("~", None), ("", None), ("+3", 3), ("1e", "1e"),
        ("49x480x720", "49x480x720"), (".inf", math.inf), ("'1e-4'", "1e-4"), ("=", "="),
    ],
)  # fmt: skip
def test_scalars_are_yaml_1_2(tmp_path, text, value):
    path = tmp_path / "a.yaml"
    path.write_text(f"x: {text}\n")
    read = Document.read(path).values["x"]
    assert (read, type(read)) == (value, type(value))


@settings(deadline=None, max_examples=30, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(allow_nan=False)
        | st.text(st.characters(codec="utf-8", exclude_categories=["C"]))
        | st.sampled_from(["1e-4", "0o7", "0x1", "off", "~", "<<", "=", "1_0", "1:30", "2024-05-01", ".inf", "#"]),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
        max_leaves=8,
    )
)  # fmt: skip
def test_what_is_dumped_is_read_back(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    path.write_text(yaml.dump({"x": value}, Dumper=Dumper, allow_unicode=True, width=120), encoding="utf-8")
    ours = Document.read(path).values["x"]
    theirs = yaml.safe_load(path.read_text(encoding="utf-8"))["x"]
    assert ours == value  # in our YAML 1.2 ...
    assert theirs == value  # ... and for PyYAML's 1.1


def test_the_largest_file_without_aliases_is_read(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("".join(f"k{n}: {'x' * 90}\n" for n in range(9_999)))
    assert len(Document.read(path).values) == 9_999


def test_anchors_and_merge_keys(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("base: &b {x: 1, y: 2}\nleft: {<<: *b, y: 3}\nright: {y: 4, <<: [{z: 5, x: 6}, *b]}\n")
    values = Document.read(path).values
    assert values["left"] == yaml.safe_load(path.read_text())["left"] == {"x": 1, "y": 3}
    assert values["right"] == yaml.safe_load(path.read_text())["right"] == {"x": 6, "y": 4, "z": 5}


# ------------------------------------------------------------------------------------------------- files that are none


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("", "the file is empty"),
        ("# only a comment\n", "the file is empty"),
        ("- a\n- b\n", "not a mapping"),
        ("just words\n", "not a mapping"),
        ("a: [1, 2\nb: 3\n", "not valid YAML"),
        ("a: 1\n---\nb: 2\n", "not valid YAML"),
        ("model: *nowhere\n", "undefined alias"),
        ("%YAML 3.0\n---\nmodel: x\n", "incompatible"),
        ("a: !!python/object/apply:os.system ['echo broken']\n", "os.system is not supported"),
        ("%TAG ! tag:yaml.org,2002:python/\n---\nmodel: !object/apply:os.getcwd []\n", "is not supported"),
        ("a: !!set {b}\n", "!!set is not supported"),
        ("<<: !!set {b}\n", "!!set is not supported"),
        ("model: !!binary aGVsbG8=\n", "!!binary is not supported"),
        ("a: !!int seven\n", "cannot read 'seven'"),
        ("? [1, 2]\n: 3\n", "a key must be a plain word"),
        ("a: &x [*x]\n", "refers to the value that it stands in"),
        ("<<: 3\n", "'<<' takes a mapping"),
        ("data: {sources: [clips]}\n", "should be a mapping of fields"),
        (GOOD.replace("output_dir: run", "output_dir: " + "x" * 5_000), "a path cannot be used"),
        (b"# fine\nmodel: caf\xe9\n", "run.yaml:2"),
        ("model: x\n".encode("utf-16"), "looks like UTF-16"),
        ("# x\nmodel: a\x1bb\n", "run.yaml:2"),
        ('model: "\\U00110000"\n', "not valid YAML"),
        ('model: "\\e[2J"\n', "the text is damaged: it holds U+001B"),
        ('"\\e[2J": 1\n', "a key is damaged"),
        ('model: "a\\u202eb"\n', "U+202E"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path, written, said):
    path = tmp_path / "run.yaml"
    path.write_bytes(written if isinstance(written, bytes) else written.encode())
    message = fault(path)
    assert said in message and str(path) in message and not set(message) & set("\x1b\0\u202e")


def test_what_is_no_file_is_said_before_it_is_read(tmp_path):
    (tmp_path / "large.yaml").touch()
    os.truncate(tmp_path / "large.yaml", 10**11)  # a hole: it takes no room
    os.mkfifo(tmp_path / "pipe.yaml")
    assert "more than 1,048,576 bytes" in fault(tmp_path / "large.yaml")
    assert "there is no configuration file" in fault(tmp_path / "none.yaml")
    for path in (tmp_path, tmp_path / "pipe.yaml", Path("/dev/zero")):
        assert "a folder, a pipe or a device" in fault(path)
    assert "cannot be read" in fault(Path("a\0b"))
    for what in (None, 7, b"run.yaml", ["run.yaml"]):
        assert "is no path" in fault(what)


BOMBS = {
    "aliases in aliases": "\n".join(
        ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
        + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 30)]
    ),
    "merges in merges": "a0: &a0 {x: 1}\n"
    + "\n".join(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}" for n in range(1, 60)),
    "a chain of aliases": "a0: &a0 {x: 1}\n" + "\n".join(f"a{n}: &a{n} {{x: *a{n - 1}}}" for n in range(1, 1_000)),
    "deep lists": "a: " + "[" * 100_000,
    "deep mappings": "".join(" " * n + "a:\n" for n in range(1_000)),
    "values": "".join(f"k{n}: 1\n" for n in range(20_000)),
    "a long number": "train: {steps: " + "9" * 100_000 + "}",
    "wrong fields": "".join(f"k{n}: 1\n" for n in range(1_000)),
    "one long text, a hundred times": "a: &a " + "x" * 100_000 + "\nb: [" + ", ".join(["*a"] * 100) + "]\n",
    "one long key, a thousand times": 'a: &a {"' + "x" * 1_000 + '": 1}\nb: [' + ", ".join(["*a"] * 4_900) + "]\n",
    "faults, thousands of times": "a: &a {" + "[1]: 1, " * 3_000 + "}\nb: [" + ", ".join(["*a"] * 3_000) + "]\n",
    "a long list of sources": "data: {sources: [" + "{pth: x}," * 1_500 + "]}",
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_in_bounded_time_and_words(write, name):
    path = write(BOMBS[name])
    begun = time.process_time()
    message = fault(path)
    assert time.process_time() - begun < 5
    assert len(message) < 200_000 and str(path) in message


@pytest.mark.parametrize(
    ("limit", "name"),
    [("MAX_WORK", "aliases in aliases"), ("MAX_WORK", "one long key, a thousand times"),
     ("MAX_DEPTH", "a chain of aliases"), ("MAX_DEPTH", "deep mappings")],
)  # fmt: skip
def test_the_bombs_are_live(write, monkeypatch, limit, name):
    """Canary: with one limit taken away the other, or Python's own, is what stops them."""
    monkeypatch.setattr(f"finetune.config.document.{limit}", 10**9)
    path = write("\n".join(BOMBS[name].splitlines()[:5]) if limit == "MAX_WORK" else BOMBS[name])
    if limit == "MAX_WORK":
        assert len(str(Document.read(path).values)) > 500_000
    else:
        with pytest.raises((RecursionError, ConfigError), match=r"recursion|more than (20000|32,768) values"):
            Document.read(path)


WRONG_NUMBERS = (math.nan, math.inf, -math.inf, -1, 0, 1e-320, 1e29, 1e300, 10**400)


def numeric_fields(kind: type[BaseModel], *path: str | int) -> Iterator[tuple[tuple[str | int, ...], list[Any]]]:
    """(path, bounds) of every number below a section; ``kind=lora`` in a path is no field but that section's kind."""
    for name, info in kind.model_fields.items():
        yield from _numbers(info.annotation, info.metadata, (*path, name))


def _numbers(annotation: Any, bounds: list[Any], path: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], list[Any]]]:
    if get_origin(annotation) is Annotated:
        annotation, *more = get_args(annotation)
        more = [inner for item in more for inner in (item.metadata if isinstance(item, FieldInfo) else [item])]
        yield from _numbers(annotation, [*bounds, *more], path)
    elif is_section(annotation):
        tag = annotation.model_fields.get("kind")
        yield from numeric_fields(annotation, *path, *([f"kind={get_args(tag.annotation)[0]}"] if tag else []))
    elif annotation in (int, float):
        yield path, bounds
    elif annotation is not Bucket and get_args(annotation) and get_origin(annotation) is not dict:
        for member in get_args(annotation):
            yield from _numbers(member, bounds, (*path, 0) if get_origin(annotation) is tuple else path)


def unbounded(kind: type[BaseModel]) -> list[tuple[str | int, ...]]:
    """The numbers below a section that have no lower or no upper bound."""
    return [
        path
        for path, bounds in numeric_fields(kind)
        if not (any(hasattr(item, "ge") or hasattr(item, "gt") for item in bounds))
        or not (any(hasattr(item, "le") or hasattr(item, "lt") for item in bounds))
    ]


def test_every_number_has_bounds():
    assert unbounded(RunConfig) == []
    paths = {".".join(map(str, path)) for path, _ in numeric_fields(RunConfig)}
    assert {"train.steps", "method.kind=lora.rank", "optimizer.kind=adamw.betas.0", "memory.kind=manual.ring"} <= paths
    assert len(paths) > 40

    class Open(Strict):
        inner: tuple[Annotated[int, Field(ge=0)], ...] = ()
        other: float | None = Field(None, le=1)

    assert unbounded(Open) == [("inner", 0), ("other",)]


def configured(path: tuple[str | int, ...], number: float) -> dict[str, Any]:
    """A whole configuration with ``number`` at a path of ``numeric_fields``."""
    values = yaml.safe_load(GOOD)
    values["validation"] = {"samples": [{"prompt": "x"}]}
    holder: Any = values
    for part, following in pairwise(path):
        if isinstance(part, str) and part.startswith("kind="):
            holder["kind"] = part.removeprefix("kind=")
            continue
        fresh: Any = {}
        if following == 0:
            entries = {"bands": [{"first": 0, "last": 1_000_000}], "adapters": [{"path": "a.safetensors"}]}
            fresh = entries.get(part, [0.5, 0.5])
        holder = holder.setdefault(part, fresh) if isinstance(holder, dict) else holder[part]
    holder[path[-1]] = number
    if path[-1] == "epochs":
        del values["train"]["steps"]
    if path == ("optimizer", "kind=custom", "lr"):
        holder["name"] = "torch.optim.SGD"
    return values


def derived(config: RunConfig) -> None:
    """What a run's numbers become before its first step."""
    check_against(config, spec_of("5b"))
    items = [Item(Bucket(49, 480, 720), source.repeats) for source in config.data.sources]
    plan = StepPlan(items=tuple(items), seed=config.train.seed, batch_size=config.train.batch_size, micro_batches=2)
    steps = config.train.steps or plan.steps_for_epochs(config.train.epochs or 1)
    assert plan.step(0) and plan.steps_per_epoch > 0
    rates = [lr_at(step, config.optimizer.lr, config.lr_schedule, steps) for step in (0, steps - 1)]
    assert all(map(math.isfinite, rates))
    assert RunConfig.from_dict(yaml.safe_load(config.to_yaml())) == config


@pytest.mark.timeout(120)
def test_no_number_without_sense_gets_past_a_named_error():
    """Every number of the schema is replaced by each of ``WRONG_NUMBERS``, and by its own bounds."""
    refused, counted = 0, 0
    for path, bounds in numeric_fields(RunConfig):
        extremes = [getattr(item, side) for item in bounds for side in ("ge", "le") if hasattr(item, side)]
        for number in (*WRONG_NUMBERS, *extremes):
            counted += 1
            try:
                config = RunConfig.from_dict(configured(path, number))
            except ConfigError as error:
                refused += 1
                assert str(path[-1]) in str(error) or "steps and train.epochs" in str(error), (path, number)
                assert len(str(error)) < 2_000
                assert number not in extremes, (path, number, str(error))
            else:
                assert number in extremes or number in (-1, 0, 1e-320), (path, number)
                derived(config)
    assert refused > counted / 2


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        ("(" * 900, "is not a regular expression"),
        ("x" * 1_001, "a target has 1,001 characters"),
        (["x"] * 101, "there are 101 targets"),
        ("(?:a{65535}){65535}", "repeats a part more than 1,000 times"),
        ("a{99999999999999999999}", "repeats a part more than 1,000 times"),
    ],
)
def test_targets_that_are_no_patterns(targets, said):
    values = yaml.safe_load(GOOD) | {"method": {"targets": targets}}
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_dict(values)
    assert said in str(caught.value) and "targets" in str(caught.value)


@pytest.mark.timeout(60)
def test_a_pattern_that_takes_for_ever_is_stopped():
    name = "transformer_blocks.0.attn1.to_q"
    # Python's own engine would take hours; the other one sees that no name ends so.
    assert not LoraMethod(targets=r"([\w.]+)+!").matches(name)
    hard = LoraMethod(targets=r"(.+)(.+)(.+)(.+)(.+)(.+)(.+)(.+)\8\7\6\5\4\3\2\1")
    with pytest.raises(ConfigError, match=r"takes more than 0\.5 s on the name transformer_blocks"):
        hard.matches(name)


@pytest.mark.parametrize("output", ["/", "~", "clips", "clips/run", "cache", "cache/run", "model", "list"])
def test_a_run_s_folder_is_its_own(tmp_path, monkeypatch, output):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for folder in ("clips", "home", "list"):
        (tmp_path / folder).mkdir()
    (tmp_path / "list" / "metadata.jsonl").touch()
    (tmp_path / "model").symlink_to(known_model("5b"))
    values = yaml.safe_load(GOOD) | {"output_dir": output, "model": {"pretrained": "model"}}
    values["data"]["sources"] = [{"kind": "folder", "path": "clips"}, {"path": "list/metadata.jsonl"}]
    findings = check_against(RunConfig.from_dict(values, base=tmp_path), spec_of("5b"))
    (error,) = [error for error in findings.errors if "output_dir" in error.where]
    assert "the run's folder is " in error.what and "runs/NAME" in error.fix
    for fine in ("runs/x", "list/runs/x"):
        findings = check_against(RunConfig.from_dict(values | {"output_dir": fine}, base=tmp_path), spec_of("5b"))
        assert not [error for error in findings.errors if "output_dir" in error.where], "canary"


def test_no_tag_runs_code(write, monkeypatch, tmp_path):
    bomb = f"model: !!python/object/apply:os.mkdir ['{tmp_path}/owned']\n"
    assert "is not supported" in fault(write(bomb))
    assert not (tmp_path / "owned").exists()
    yaml.unsafe_load(bomb)  # canary: it would have
    assert (tmp_path / "owned").exists()


def test_one_bucket_needs_no_brackets(write):
    path = write()
    expected = load_config(path, ["data.buckets=[9x64x64]"]).data.buckets
    assert load_config(path, ["data.buckets=9x64x64"]).data.buckets == expected
    assert "'buckets.0'" in fault(path, ["data.buckets=9x64"]) or "bucket" in fault(path, ["data.buckets=9x64"])


def test_the_length_of_a_run_is_changed_from_steps_to_epochs(write):
    train = load_config(write(), ["train.steps=null", "train.epochs=3"]).train
    assert (train.steps, train.epochs) == (None, 3)


def test_repeated_keys_are_all_reported(write):
    message = fault(write(GOOD.replace("steps: 100", "steps: 100\n  seed: 1\n  steps: 5") + "output_dir: other\n"))
    assert "2 faults" in message
    assert "'steps' stands twice" in message and "run.yaml:11:3 (train.steps)" in message
    assert "'output_dir' stands twice" in message and "run.yaml:13:1" in message


# -------------------------------------------------------------------------------------------- what does not validate

BAD = """\
model:
  pretrained: zai-org/CogVideoX-5b
  dtipe: bf16
data:
  sources:
    - path: clips
      kind: metdata
    - {path: b, kind: metadata, video_colum: x}
    - {path: c, kind: folder, video_column: x}
  buckets: [49x480x720, 49x480]
  lr: 3
method: {kind: full, rank: 3}
optimizer:
  kind: adam8bit
train:
  steps: ten
  seeed: 3
cache: {mode: rquire, decode_workers: -1}
memory: 3
validation:
  samples:
    - {prompt: 3}
    - {seed: 1}
checkpoint: {resume: [1]}
"""
EXPECTED = [
    ("unknown field 'dtipe'; did you mean 'dtype'?", "3:3 (model.dtipe)", "the fields here are pretrained"),
    ("unknown kind 'metdata'; did you mean 'metadata'?", "7:7 (data.sources.0.kind)", "use one of auto, metadata"),
    ("unknown field 'video_colum'; did you mean 'video_column'?", "8:33 (data.sources.1.video_colum)", ""),
    ("unknown field 'video_column'", "9:31 (data.sources.2.video_column)", "belongs to kind metadata"),
    ("a bucket is frames x height x width", "10:25 (data.buckets.1)", ""),
    ("unknown field 'lr'", "11:3 (data.lr)", "'lr' is written as optimizer.lr"),
    ("unknown field 'rank'", "12:22 (method.rank)", "'rank' belongs to kind lora"),
    ("unknown kind 'adam8bit'; did you mean 'adamw8bit'?", "14:3 (optimizer.kind)", "use one of adamw, adamw8bit"),
    ("'steps' is 'ten'", "16:3 (train.steps)", ""),
    ("unknown field 'seeed'; did you mean 'seed'?", "17:3 (train.seeed)", ""),
    ("'mode' is 'rquire', which is not possible; did you mean 'require'?", "18:9 (cache.mode)", "one of auto, require"),
    ("'decode_workers' is -1", "18:23 (cache.decode_workers)", ""),
    ("'memory' is 3: should be a mapping of fields", "19:1 (memory)", ""),
    ("text is wanted", "22:8 (validation.samples.0.prompt)", 'put it in quotes: prompt: "3"'),
    ("'prompt' is missing", "23:7 (validation.samples.1.prompt)", "add it"),
    ("checkpoint.resume is [1]", "24:14 (checkpoint.resume)", ""),
    ("'output_dir' is missing", "1:1 (output_dir)", "add it: The run's folder"),
]


def test_all_faults_are_reported_at_once_with_line_and_fix(write):
    path = write(BAD)
    message = fault(path)
    entries = message.split("\n- ")[1:]
    assert message.startswith(f"{len(EXPECTED)} faults in {path}")
    for what, where, fix in EXPECTED:
        matching = [entry for entry in entries if f"{path}:{where}" in entry]
        assert len(matching) == 1, f"{where}: {len(matching)} entries in\n{message}"
        assert what in matching[0] and fix in matching[0], matching[0]
    assert len(entries) == len(EXPECTED)
    lines = [int(part.split(":")[0]) for part in message.split("run.yaml:")[1:]]
    assert lines[:-1] == sorted(lines[:-1]), "in the order of the file; the last is the field that is not there"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("optimizer: {lr: .inf}", "finite number"),
        ("optimizer: {lr: .nan}", "optimizer.lr"),
        ("checkpoint: {keep_last: true}", "a number is wanted"),
        ("optimizer: {kind: custom, name: torch.optim.SGD, kwargs: {momentum: .inf}}", "finite number"),
        ("tracking: ", "'tracking' is empty: should be a mapping of fields"),
        ("optimizer: adamw", "optimizer"),
        ("method: {kind: 3}", "unknown kind '3'"),
        ("output_dir: 3", "output_dir"),
    ],
)
def test_values_that_nobody_means(write, line, said):
    text = GOOD.replace("output_dir: run\n", "") if line.startswith("output_dir") else GOOD
    message = fault(write(text + line + "\n"))
    assert said in message and "run.yaml:1" in message


def test_did_you_mean_offers_only_near_words():
    assert did_you_mean("seeed", ["seed", "steps"]) == "; did you mean 'seed'?"
    assert did_you_mean("banana", ["seed", "steps"]) == ""


def test_several_models_in_one_plain_union_are_one_fault():
    class Point(Strict):
        x: int

    class Holder(Strict):
        where: int | list[int] | None = None
        points: dict[str, Point] = Field(default_factory=dict)

    with pytest.raises(ConfigError) as caught:
        validate(Holder, Document({"where": "a", "points": {"p": {"x": "y", "z": 1}}}, name="file"))
    message = str(caught.value)
    assert message.startswith("3 faults")
    assert "where is 'a': should be a whole number" in message and "; or should be a list" in message
    assert "(points.p.x)" in message and "(points.p.z)" in message


def test_library_use_reports_dotted_paths():
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_dict({"model": {"pretrained": "x", "dtipe": 1}})
    message = str(caught.value)
    assert "model.dtipe" in message and "did you mean 'dtype'" in message and "'train' is missing" in message


# --------------------------------------------------------------------------------------------------------- overrides


def test_overrides_are_yaml_and_reach_anywhere(write):
    config = load_config(
        write(),
        [
            "optimizer.lr=1e-4", "train.steps=7", "data.buckets=[49x480x720, [25, 480, 720]]",
            "data.sources.1.path=else", "data.sources[0].repeats=0.5", "data.sources.2={path: x}", "data.trigger='on'",
            "validation.samples.0.prompt='a = b: c'", "cache.vae_tiling=off",
        ],
    )  # fmt: skip
    assert config.optimizer.lr == 1e-4 and config.train.steps == 7
    assert [bucket.frames for bucket in config.data.buckets] == [49, 25]
    assert [source.path.name for source in config.data.sources] == ["clips", "else", "x"]
    assert config.data.sources[0].repeats == 0.5
    assert config.data.trigger == "on" and config.cache.vae_tiling == "off"
    assert config.validation.samples[0].prompt == "a = b: c"
    assert config.where("train.steps") == "--set train.steps=7"


def test_the_later_override_wins(write):
    assert load_config(write(), ["train.steps=1", "train.steps=2"]).train.steps == 2
    assert load_config(write(), ["optimizer.betas=[0, 0]", "optimizer={lr: 1}"]).optimizer.betas != (0, 0)


@pytest.mark.parametrize(
    "overrides",
    [
        "train.steps=7",
        iter(["train.steps=7"]),
        {"train.steps": 7},
        {"train": {"steps": 7}, "data": {"sources": {1: {"path": Path("else")}}, "buckets": [(25, 480, 720)]}},
    ],
    ids=["one", "any-iterable", "dotted", "nested"],
)
def test_overrides_in_code_are_one_string_or_many_or_values(write, overrides):
    config = load_config(str(write()), overrides)
    assert config.train.steps == 7 and config.train.seed == load_config(write()).train.seed
    if isinstance(overrides, dict) and "data" in overrides:
        assert config.data.sources[1].path.name == "else" and config.data.buckets[0].frames == 25


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["train.stesp=5"], "unknown field 'stesp'; did you mean 'steps'?\n  where: --set train.stesp=5"),
        (["trian.steps=5"], "unknown field 'trian'; did you mean 'train'?"),
        (["optimizer.kind=adma"], "unknown kind 'adma'"),
        (["objective.noise_offset=0.1"], "there is nothing to make up for"),
        (["train.min_snr_gamma=5"], "write objective.weighting: {kind: min_snr, gamma: 5}"),
        (
            ["objective.timesteps={kind: bands, bands: [{first: 9, last: 5}]}"],
            "last timestep, 5, is below its first, 9",
        ),
        *(([words], "is not an assignment") for words in ("train.steps", "=5", "train..steps=5", "x" * 100_000)),
        (["train.steps.x=5"], "'train.steps' is 100 in the file and has no field 'x'"),
        (["data.sources.x=5"], "'x' is no index"),
        (["data.sources.5.path=a"], "'5' is no index into 'data.sources', which has 2 items"),
        (["train.steps=[1"], "not valid YAML"),
        (["optimizer.lr="], "'lr' is empty"),
        (["data.condition_frames={most: 2}"], "'condition_frames' has no kind"),
        (["data.condition_frames={most: 2}"], "add kind: one of first, first_last, any"),
        (["method.ranks={to_q:8}"], "write {to_q: 8}"),
        (["model.adapters=[{path:a}]"], "'path:a' has no space behind its colon"),
        (["method={rank: 1, rank: 2, [1]: 3}"], "2 faults in --set method={rank: 1"),
        (["data.sources=clips"], "'sources' is 'clips': should be a list, in brackets"),
        (["data.sources={path: clips}"], "'sources' is a mapping: should be a list"),
        (["validation.samples=[a]"], "'samples.0' is 'a': should be a mapping of fields"),
        (["optimizer.betas=0.9"], "'betas' is 0.9: should be a list"),
        (["train.steps=ten"], "'steps' is 'ten': should be a whole number"),
        (["train.steps=1.5"], "'steps' is 1.5: should be a whole number"),
        (["optimizer.lr=much"], "'lr' is 'much': should be a number"),
        (["memory.budget=[1]"], "'budget' is a list: should be text"),
        (["tracking.kind=excel"], "'kind' is 'excel', which is not possible\n  where: --set tracking.kind=excel"),
        (["data.buckets=9x64"], "a bucket is frames x height x width"),
        (["train.epochs=3"], "run.yaml:9:3 (train.steps), --set train.epochs=3 (train.epochs)"),
        (["train.steps=4", "train.epochs=3"], "--set train.steps=4 (train.steps), --set train.epochs=3"),
        (["a." * 5_000 + "b=1"], "a path of 5001 parts leads nowhere"),
        (["train.steps=" + "[" * 5_000], "more than 50 levels"),
        (["train.steps=" + "9" * 100_000], "cannot read '999"),
        (["model.pretrained=" + "x" * 100_000], "a path cannot be used"),
        (['output_dir="\\e[2J"'], "the text is damaged: it holds U+001B"),
        (["output_dir=\udcff"], "U+DCFF is no text"),
        (["train.steps=!!python/name:os.system"], "is not supported"),
        (5, "5 are no overrides"),
        ([("train.steps", 5)], "are no overrides"),
        ({"train.stesp": 5}, "unknown field 'stesp'; did you mean 'steps'?"),
        ({"train.steps": object()}, "train.steps"),
        ({"train.seed": 10**5_000}, "'seed' is a number of thousands of digits"),
        ({"": 1, "train..steps": 1}, "2 overrides"),
        ({"train.steps.x": 1}, "'train.steps' is 100 in the file"),
        ({"output_dir": "a\x1bb"}, "output_dir is damaged: it holds U+001B"),
    ],
    ids=lambda value: f"{value!r:.40}".split(" object at")[0] if value != {"train.seed": 10**5_000} else "digits",
)
def test_faulty_overrides_name_themselves_in_plain_words(write, overrides, said):
    message = fault(write(), overrides)
    assert said in message and len(message) < 5_000 and "tuple" not in message and "pydantic" not in message
    assert "--set" in message or isinstance(overrides, int) or "no overrides" in message or "a path cannot" in message
    message.encode("utf-8")


def test_all_faulty_overrides_are_reported(write):
    message = fault(write(), ("a", "b", "train.steps.x=1"))
    assert message.startswith("3 overrides")


# ------------------------------------------------------------------------------------------------------------- paths


def test_paths_start_at_the_file_and_expand_home(write, tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    config = load_config(
        write(),
        ["output_dir=../out", "cache.dir=~/cache", "validation.samples=[{prompt: a, image: b.png}]",
         "checkpoint.resume=old", "method.init_from=./x/y", "data.sources.1.path=/abs"],
    )  # fmt: skip
    assert config.output_dir == tmp_path.parent / "out"
    assert config.cache.dir == tmp_path / "home" / "cache"
    assert config.validation.samples[0].image == tmp_path / "b.png"
    assert config.checkpoint.resume == tmp_path / "old"
    assert config.method.init_from == tmp_path / "x" / "y"
    assert [source.path for source in config.data.sources] == [tmp_path / "clips", Path("/abs")]
    assert config.base == tmp_path
    assert load_config(tmp_path / "run.yaml", ["checkpoint.resume=none"]).checkpoint.resume == "none"


def test_paths_hold_environment_variables(write, tmp_path, monkeypatch):
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.delenv("NOT_SET", raising=False)
    there = tmp_path / "cost$NOT_SET"
    there.mkdir()
    config = load_config(
        write(), ["output_dir=$SCRATCH/run", "cache.dir=${SCRATCH}/c", f"data.sources.0.path={there}",
                  "model.pretrained=$SCRATCH/model"]
    )  # fmt: skip
    assert config.output_dir == tmp_path / "scratch" / "run" and config.cache.dir == tmp_path / "scratch" / "c"
    assert config.model.pretrained == str(tmp_path / "scratch" / "model")
    assert config.data.sources[0].path == there, "a folder of that very name"
    for name in ("$NOT_SET/run", "a/${NOT_SET}"):
        with pytest.raises(ConfigError, match=r"names the environment variable \$\{?NOT_SET\}?, which is not set"):
            load_config(tmp_path / "run.yaml", [f"output_dir={name}"])


def test_dots_behind_a_link_mean_what_the_system_means(write, tmp_path):
    (tmp_path / "real" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real" / "deep")
    config = load_config(write(), ["output_dir=link/../out", "cache.dir=real/../cache"])
    assert config.output_dir.resolve() == (tmp_path / "real" / "out").resolve()
    assert config.cache.dir == tmp_path / "cache"


def test_pretrained_is_a_folder_or_a_hub_id(write, tmp_path):
    (tmp_path / "models" / "mine").mkdir(parents=True)
    path = write()
    assert load_config(path).model.pretrained == "zai-org/CogVideoX-5b"
    assert load_config(path, ["model.pretrained=models/mine"]).model.pretrained == str(tmp_path / "models" / "mine")
    assert load_config(path, ["model.pretrained=./absent"]).model.pretrained == str(tmp_path / "absent")


def test_a_relative_file_name_gives_absolute_paths(write, tmp_path, monkeypatch):
    write()
    monkeypatch.chdir(tmp_path)
    config = load_config("run.yaml")
    assert config.output_dir == Path.cwd() / "run" and config.base.is_absolute()


# -------------------------------------------------------------------------------------------------- saved and compared


def test_the_resolved_configuration_is_read_back_equal(write, tmp_path):
    config = load_config(
        write(),
        ["method={kind: lora, targets: ['a.*b', \"it's\"]}", "optimizer={kind: custom, name: torch.optim.SGD, "
         "kwargs: {momentum: 9e-1}}", "data.trigger='1e-4'", "validation.samples=[{prompt: 'off', seed: 3}]",
         "validation.bucket=49x480x720", "train.max_grad_norm=null", "lr_schedule={kind: cosine}"],
    )  # fmt: skip
    saved = tmp_path / "elsewhere" / "config.yaml"
    saved.parent.mkdir()
    saved.write_text(config.to_yaml(), encoding="utf-8")
    again = load_config(saved)
    assert again == config and again.digest == config.digest
    assert again.base != config.base  # where it was written is no part of what it says
    assert RunConfig.from_dict(config.to_dict()) == config
    assert yaml.safe_load(config.to_yaml()) == json.loads(json.dumps(config.to_dict()))


def test_the_digest_moves_with_any_value(write):
    path = write()
    plain = load_config(path)
    digests = {load_config(path, [change]).digest for change in ("train.seed=43", "data.fps=8", "output_dir=x")}
    assert len(digests | {plain.digest}) == 4
    assert load_config(path, ["train.seed=42"]).digest == plain.digest


def test_the_schema_knows_every_section():
    schema = json_schema()
    assert set(schema["properties"]) == set(RunConfig.model_fields)
    assert set(schema["required"]) == {"model", "data", "train", "output_dir"}
    assert schema["additionalProperties"] is False


def test_every_field_says_what_it_means():
    """A field without a docstring is a hole in ``docs/config.md``."""
    schema = json_schema()
    fields = {
        f"{name}.{field}": spec for name, part in schema["$defs"].items() for field, spec in part["properties"].items()
    }
    assert len(fields) >= 60
    silent = [name for name, spec in fields.items() if "description" not in spec and not name.endswith(".kind")]
    assert not silent, silent
    assert "description" not in create_model("Silent", x=(int, 3)).model_json_schema()["properties"]["x"], "canary"


# ------------------------------------------------------------------------------------- rules against the model's spec


def run_of(variant: str, **changes: object) -> RunConfig:
    values: dict[str, object] = {
        "model": {"pretrained": "x"},
        "data": {"sources": [{"path": "a"}], "buckets": [str(spec_of(variant).training_bucket)], "holdout": 0.1},
        "train": {"steps": 100},
        "output_dir": "out",
    }
    for dotted, value in changes.items():
        section, _, name = dotted.partition("__")
        values[section] = {**values.get(section, {}), name: value} if name else value  # type: ignore[dict-item]
    return RunConfig.from_dict(values, base=Path("/nowhere"))


@pytest.mark.parametrize("variant", KNOWN_MODELS)
def test_a_plain_run_of_every_model_is_clean(variant):
    assert check_against(run_of(variant), spec_of(variant)) == ((), ())


@pytest.mark.parametrize(
    ("variant", "changes", "said", "path"),
    [
        ("5b", {"data__buckets": ["48x480x720"]}, "8N+1", "data.buckets.0"),
        ("5b", {"data__buckets": ["49x480x720", "49x488x720"]}, "multiple of 16", "data.buckets.1"),
        ("5b", {"validation__bucket": "57x480x720"}, "at most 49", "validation.bucket"),
        ("2b", {"data__buckets": ["13x480x720"]}, "8N+1", "data.buckets.0"),
        ("1.5-5b", {"data__buckets": ["80x768x1360"]}, "N+1", "data.buckets.0"),
        ("5b-i2v", {"data__buckets": ["49x480x736"]}, "learned positions fix it to 49x480x720", "data.buckets.0"),
        ("5b-i2v", {"data__buckets": ["25x480x720"]}, "learned positions", "data.buckets.0"),
        ("5b-i2v", {"validation__samples": [{"prompt": "a"}]}, "samples from an image", "validation.samples.0"),
        ("5b", {"validation__samples": [{"prompt": "a", "image": "b"}]}, "takes no image", "samples.0.image"),
        ("5b-i2v", {"validation__samples": [{"prompt": "a", "image": "b"}]}, "there is no image /nowhere/b", "image"),
        ("5b", {"validation__samples": [{"prompt": "a", "last_image": "b"}]}, "takes no image", "samples.0.last_image"),
        (
            "5b-i2v",
            {"validation__samples": [{"prompt": "a", "image": __file__, "last_image": "b"}]},
            "there is no image /nowhere/b",
            "samples.0.last_image",
        ),
        ("5b", {"data__condition_frames": "first_last"}, "first_last is wanted", "data.condition_frames"),
        ("5b-i2v", {"validation__samples": [{"prompt": "a", "keyframes": {3: __file__}}]}, "frame 3", "samples.0"),
        ("5b", {"data__sources": [{"path": "a", "split": "holdout"}]}, "nothing to train on", "data.sources"),
        ("5b", {"output_dir": "/dev/null"}, "is a file, not a folder", "output_dir"),
        (
            "5b",
            {"objective__timesteps": {"kind": "bands", "bands": [{"first": 0, "last": 1000}]}},
            "the band ends at timestep 1000; the model's timesteps are 0 to 999",
            "objective.timesteps.bands.0.last",
        ),
    ],
)  # fmt: skip
def test_what_the_model_cannot_do_is_an_error(variant, changes, said, path):
    errors, _ = check_against(run_of(variant, **changes), spec_of(variant))
    assert len(errors) == 1
    assert said in errors[0].what and path in errors[0].where


@pytest.mark.parametrize(
    ("variant", "changes", "said", "path"),
    [
        ("5b", {"model__dtype": "fp16"}, "trained in bf16", "model.dtype"),
        ("5b", {"data__buckets": ["49x320x480"]}, "made for 480x720", "data.buckets.0"),
        ("1.5-5b", {"data__buckets": ["85x768x1360"]}, "16N+1", "data.buckets.0"),
        ("5b", {"data__fps": 16}, "0.5 times as fast", "data.fps"),
        ("5b", {"data__image_dropout": 0.2}, "has no effect", "data.image_dropout"),
        ("5b", {"cache__image_draws": 2}, "has no effect", "cache.image_draws"),
        ("5b", {"data__unconditional_text": "zeros"}, "empty caption", "data.unconditional_text"),
        ("5b", {"data__holdout": 0}, "no clip is held out", "data.holdout"),
        ("5b", {"validation__every": None}, "nothing is measured", "validation.every"),
        ("5b", {"lr_schedule__warmup_steps": 100}, "never reach", "lr_schedule.warmup_steps"),
        ("5b", {"method": {"kind": "lora", "use_rslora": True}}, "5.66", "method.use_rslora"),
        ("5b", {"method": {"kind": "lora", "use_dora": True, "dropout": 0.1}}, "slow", "method.use_dora"),
        ("5b", {"data__trigger": "zkx", "validation__samples": [{"prompt": "a zkxy ring"}]}, "'zkx'", "samples"),
    ],
)
def test_what_is_unwise_is_a_warning(variant, changes, said, path):
    errors, warnings = check_against(run_of(variant, **changes), spec_of(variant))
    assert not errors
    assert len(warnings) == 1 and said in warnings[0] and path in warnings[0]


def test_what_looks_alike_and_is_fine_is_not_warned_of():
    fine = [
        ("2b", {"model__dtype": "fp16"}),
        ("5b", {"data__fps": 16, "data__span": "uniform"}),
        ("5b-i2v", {"data__image_dropout": 0.2}),
        ("5b", {"data__holdout": 0, "validation__every": None}),
        ("5b", {"data__holdout": 0, "data__sources": [{"path": "a"}, {"path": "b", "split": "holdout"}]}),
        ("5b", {"method": {"kind": "lora", "use_rslora": True, "alpha": 8}}),
        ("5b", {"method": {"kind": "full"}, "lr_schedule__warmup_steps": 99}),
        ("5b", {"data__trigger": "zkx", "validation__samples": [{"prompt": "a ring"}, {"prompt": "a zkx ring"}]}),
        ("5b", {"data__trigger": "zkx"}),
    ]
    for variant, changes in fine:
        assert check_against(run_of(variant, **changes), spec_of(variant)) == ((), ()), (variant, changes)


def test_too_many_validation_timesteps_for_the_schedule():
    short = dataclasses.replace(spec_of("5b"), num_train_timesteps=4)
    errors, _ = check_against(run_of("5b", validation__timesteps=8), short)
    assert "8 timesteps are wanted; the model has 4" in errors[0].what


def test_require_valid_raises_everything_with_lines_and_returns_warnings(write):
    path = write(
        GOOD.replace("49x480x720", "48x480x720").replace("holdout: 0.1", "fps: 4") + "validation: {bucket: 9x9x9}\n"
    )
    with pytest.raises(ConfigError) as caught:
        require_valid(load_config(path), spec_of("5b"))
    message = str(caught.value)
    assert "run.yaml:6:13 (data.buckets.0)" in message and "run.yaml:11:14 (validation.bucket)" in message
    (warning,) = require_valid(load_config(write(), ["data.fps=4"]), spec_of("5b"))
    assert "2 times as fast" in warning and "[--set data.fps=4]" in warning


def test_the_rules_report_everything_that_a_run_breaks():
    config = run_of(
        "5b", data__buckets=["50x481x721"], validation__bucket="50x481x721", output_dir="/dev/null",
        validation__samples=[{"prompt": "a", "image": "b"}], data__sources=[{"path": "a", "split": "holdout"}],
    )  # fmt: skip
    errors, _ = check_against(config, spec_of("5b"))
    assert len(errors) >= 9 and all(error.where for error in errors)
