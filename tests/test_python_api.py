"""The functions of the package: signatures, what they take, what they refuse, and the page that shows them."""

from __future__ import annotations

import inspect
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from endpoint import said
from tiny_vlm import save_painter
from worlds import run_values

import finetune
from finetune.core.errors import ConfigError, FinetuneError, ModelError

ROOT = Path(finetune.__file__).parent.parent

FUNCTIONS = [getattr(finetune, name) for name in finetune.__all__ if name != "__version__"]

PAGE = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")


def test_importing_the_package_imports_nothing_else(tmp_path):
    probe = (
        "import sys; before = set(sys.modules); import finetune\n"
        "from finetune import check, convert, export, generate, load_config, plan, precompute, train\n"
        "print([name for name in ('torch', 'pydantic', 'yaml', 'numpy', 'typer') if name in sys.modules])\n"
        "import finetune.conversion.export, finetune.caching.precompute\n"
        "print([getattr(finetune, f.__name__) is f for f in (convert, export, precompute)])"
    )
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["[]", "[True, True, True]"], done.stderr


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_every_function_says_what_it_takes_and_raises(function):
    parameters = inspect.signature(function).parameters.values()
    assert parameters and all(parameter.annotation is not parameter.empty for parameter in parameters)
    text = inspect.getdoc(function)
    assert "Args:" in text and "Raises:" in text
    assert not [parameter.name for parameter in parameters if f"\n    {parameter.name}:" not in text]
    paths = [parameter for parameter in parameters if "Path" in parameter.annotation]
    assert not [parameter.name for parameter in paths if "str" not in parameter.annotation]


# ------------------------------------------------------------------------------------------- arguments that are none


@pytest.mark.parametrize("given", [None, 7, object(), ["run.yaml"]], ids=["none", "number", "object", "list"])
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_what_is_no_configuration_path_or_prompt_is_no_type_error(function, given):
    if function in (finetune.generate, finetune.enhance, finetune.report) and given == ["run.yaml"]:
        given = [7]
    parameters = [*inspect.signature(function).parameters.values()]
    needed = [each for each in parameters if each.default is each.empty] or parameters[:1]
    positional = [given for each in needed if each.kind is each.POSITIONAL_OR_KEYWORD]
    named = {each.name: given for each in needed if each.kind is each.KEYWORD_ONLY}
    with pytest.raises(ConfigError, match=rf"is no (configuration|path)|{function.__name__}\(\)"):
        function(*positional, **named)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: finetune.train({}, on_step=5), "'on_step' is 5"),
        (lambda: finetune.export("run", checkpoint="newest"), "'checkpoint' is 'newest', which is not possible"),
        (lambda: finetune.export("run", strength="much"), "'strength' is 'much': should be a number"),
        (lambda: finetune.export("run", layout=None, weights="emma"), r"2 faults in export\(\)"),
        (lambda: finetune.plan({}, processes="two"), "'processes' is 'two': should be a whole number"),
        (lambda: finetune.precompute({}, progress=[]), "'progress' is a list: should be true or false"),
        (lambda: finetune.precompute({}, progress="1"), "'progress' is '1': should be true or false"),
        (lambda: finetune.plan({}, processes=True), "'processes' is True: should be a whole number"),
        (lambda: finetune.plan({}, card=b"24GB"), "'card' is b'24GB': should be text"),
        (lambda: finetune.generate("x", out=b"videos"), "out is b'videos': should be text; or should be an inst"),
        (lambda: finetune.generate("x", bucket="9x64"), "a bucket is frames x height x width"),
        (lambda: finetune.generate("x", images=["a", "b"]), "2 images for 1 prompts"),
        (lambda: finetune.generate("x", adapters="a:much"), "strength 'much' is not a number"),
        (lambda: finetune.load_config("run.yaml", 5), "5 are no overrides"),
    ],
)
def test_a_wrong_argument_is_named(call, message):
    with pytest.raises(FinetuneError, match=message):
        call()


def test_an_unknown_keyword_is_python_s_own_error():
    with pytest.raises(TypeError, match="stepz"):
        finetune.train({}, stepz=3)


@pytest.mark.parametrize("name", ["train", "precompute", "check", "plan"])
def test_a_configuration_is_one_or_its_values_or_its_file(name, tmp_path):
    """All of them arrive at the model, which is not there."""
    values = {"model": {"pretrained": "./absent"}, "data": {"sources": [{"path": "x"}], "buckets": ["9x64x64"]}}
    values |= {"train": {"steps": 1}, "output_dir": str(tmp_path / "run")}
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(values))
    for config in (str(path), path, values, finetune.load_config(str(path))):
        with pytest.raises(ModelError, match="no such model folder"):
            getattr(finetune, name)(config)
    with pytest.raises(ConfigError, match="there is no configuration file"):
        getattr(finetune, name)(str(tmp_path / "absent.yaml"))


# ------------------------------------------------------------------------------------------------------------ the page


def test_the_page_shows_every_function_and_runs(tiny_model, demo_clips, tmp_path, monkeypatch, capsys, serve):
    values = run_values(tiny_model(), demo_clips, tmp_path / "run", data={"holdout": 1})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    shutil.copytree(demo_clips, tmp_path / "footage")
    monkeypatch.chdir(tmp_path)
    here = {"http://localhost:8000/v1": serve(lambda request: said("a red circle moving left")).url}
    here |= {"5b-i2v": str(tiny_model("5b-i2v")), "black-forest-labs/FLUX.1-schnell": str(save_painter(tmp_path / "p"))}
    page = PAGE
    for name, stand_in in here.items():
        page = page.replace(f'"{name}"', f'"{stand_in}"')
    program = re.findall(r"```python\n(.*?)```", page, re.S)
    assert len(program) >= 6 and not [
        each.__name__ for each in FUNCTIONS if f"{each.__name__}(" not in "".join(program)
    ]
    scope: dict[str, Any] = {}
    for block in program:
        exec(compile(block, "docs/python.md", "exec"), scope)
    assert len(scope["losses"]) == scope["trained"].step > 0
    assert Path("my-lora/pytorch_lora_weights.safetensors").is_file() and len(scope["videos"].videos) == 2
    printed = capsys.readouterr().out
    assert (
        "4 clips from 4 videos" in printed and "did you mean 'steps'" in printed and "'on_step' is 'print'" in printed
    )


def test_what_on_step_raises_ends_the_run_and_the_steps_before_it_stand(tiny_run):
    seen = []

    def stop(record: Any) -> None:
        seen.append(record.step)
        if record.step == 2:
            raise ZeroDivisionError("mine")

    config = tiny_run(checkpoint={"every": 1})
    with pytest.raises(ZeroDivisionError, match="mine"):
        finetune.train(config, on_step=stop)
    assert seen == [1, 2]
    report = finetune.train(config, on_step=lambda record: seen.append(record.step))
    assert report.step == seen[-1] and seen[2] in (2, 3), "it continues"
