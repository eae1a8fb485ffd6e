"""Nothing that this package reads can run code: no pickle, no unsafe YAML, no eval; proven by files that would."""

from __future__ import annotations

import ast
import pickle
import shutil
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import FILES, rewrite_marker, write

import finetune
from finetune.checkpoint.load import choose_checkpoint, load_checkpoint
from finetune.cogvideox.load import ModelConfig, load_scheduler, load_text, load_transformer, load_vae
from finetune.core.errors import CheckpointError, ConfigError, ModelError
from finetune.core.files import COMPLETE, TRAINABLE
from finetune.inference.adapters import read_sources
from finetune.inference.request import AdapterArgument
from finetune.methods.adapter import read_adapter
from finetune.optim.optimizers import AdamW
from finetune.optim.state import load_optimizer_state, optimizer_state

ROOT = Path(finetune.__file__).parent.parent

# ---------------------------------------------------------------------------------------------------------- the source

MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "multiprocessing"}
"""Modules that unpickle, or, as multiprocessing, do so on the way."""
BUILTINS = {"eval", "exec", "compile", "__import__"}
CALLS = {
    *("import_module", "unsafe_load", "full_load", "read_pickle", "FileSystemReader", "FileSystemWriter"),
    *("broadcast_object_list", "all_gather_object", "gather_object", "scatter_object_list", "recv_object_list"),
}
"""Last part of the name of a call that runs code, imports by name, or unpickles."""
LOADS = {
    "torch.load",
    "yaml.load",
    "yaml.load_all",
    "torch.hub.load",
    "np.load",
    "numpy.load",
    "accelerator.load_state",
}
SAFETENSORS_ONLY = {"from_pretrained", "load_lora_weights", "load_lora_adapter", "lora_state_dict"}
ALLOWED: Mapping[tuple[str, str], tuple[int, str]] = {
    ("finetune/optim/optimizers.py", "import_module"): (1, "the class that the user's configuration names"),
    ("finetune/optim/state.py", "import_module"): (1, "of torchao's modules; any other name is refused"),
    ("finetune/core/distributed.py", "broadcast_object_list"): (1, "between processes of one launch"),
    ("finetune/core/distributed.py", "all_gather_object"): (1, "between processes of one launch"),
    ("finetune/footage/scorers.py", "import_module"): (1, "the scorer that the user's command names"),
    ("finetune/footage/scenes.py", "torch.load"): (1, "as tensors only, a file of an installed package's own"),
    ("finetune/conversion/distributed_checkpoints.py", "import pickle"): (
        1,
        "a reader of a list of classes and no others",
    ),
    ("finetune/conversion/torch_files.py", "torch.load"): (
        2,
        "as tensors only; what else is named becomes an empty object",
    ),
    ("finetune/inference/postprocess.py", "torch.load"): (1, "as tensors only"),
    ("finetune/inference/preview.py", "torch.load"): (1, "as tensors only"),
    ("finetune/captioning/captioners.py", "reader.from_pretrained"): (1, "text files, no weights"),
    ("finetune/captioning/captioners.py", "AutoConfig.from_pretrained"): (1, "JSON, no weights"),
    ("finetune/cogvideox/load.py", "_class_of(folder, 'scheduler').from_pretrained"): (
        1,
        "a scheduler: JSON, no weights",
    ),
}
"""What is allowed: (file, call) -> how often, and why."""


def risks(text: str) -> Iterator[tuple[int, str]]:
    """(line, call) of everything that could run what it reads."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from ((node.lineno, f"import {name}") for name in names if name.split(".")[0] in MODULES)
            if isinstance(node, ast.ImportFrom) and node.module == "torch":
                yield from ((node.lineno, "from torch import load") for alias in node.names if alias.name == "load")
        elif isinstance(node, ast.Call):
            dotted = ast.unparse(node.func)
            last = dotted.rpartition(".")[2]
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if dotted in BUILTINS or last in CALLS:
                yield node.lineno, last
            elif dotted in LOADS or dotted.endswith(".accelerator.load_state"):
                if not (dotted.startswith("yaml.") and "Safe" in keywords.get("Loader", "")):
                    yield node.lineno, dotted
            elif keywords.get("trust_remote_code", "False") != "False" or keywords.get("weights_only") == "False":
                yield node.lineno, f"{last} that trusts"
            elif last in SAFETENSORS_ONLY and keywords.get("use_safetensors") != "True":
                yield node.lineno, dotted


def scanned() -> tuple[Counter[tuple[str, str]], int]:
    paths = [*sorted((ROOT / "finetune").rglob("*.py")), ROOT / "train.py"]
    found = Counter(
        (path.relative_to(ROOT).as_posix(), call)
        for path in paths
        for _, call in risks(path.read_text(encoding="utf-8"))
    )
    return found, len(paths)


def test_no_code_of_ours_could_run_what_it_reads():
    found, files = scanned()
    assert files >= 60
    assert found == {place: count for place, (count, _) in ALLOWED.items()}


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from pickle import loads",
        "def f():\n    import joblib",
        "import multiprocessing.pool",
        "torch.load(path)",
        "from torch import load",
        "torch.load(path, weights_only=False)",
        "yaml.load(text)",
        "yaml.load(text, Loader=yaml.FullLoader)",
        "yaml.unsafe_load(text)",
        "np.load(path, allow_pickle=True)",
        "eval(text)",
        "exec(text)",
        "__import__(name)",
        "importlib.import_module(name)",
        "Model.from_pretrained(folder)",
        "Model.from_pretrained(folder, use_safetensors=None)",
        "AutoModel.from_pretrained(folder, use_safetensors=True, trust_remote_code=True)",
        "pipeline.load_lora_weights(folder)",
        "accelerator.load_state(folder)",
        "dcp.FileSystemReader(folder)",
        "dist.all_gather_object(out, mine)",
    ],
)
def test_the_scan_can_fail(text):
    assert list(risks(text)), text


@pytest.mark.parametrize(
    "text",
    [
        "re.compile(pattern)",
        "yaml.load(text, Loader=SafeLoader)",
        "Model.from_pretrained(folder, use_safetensors=True)",
        "pipeline.load_lora_weights(folder, use_safetensors=True)",
        "safetensors.torch.load(content)",
        "json.load(file)",
    ],
)
def test_the_scan_lets_pass_what_is_safe(text):
    assert not list(risks(text)), text


# ----------------------------------------------------------------------------------------------------- hostile files


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, sprung: Path) -> None:
        self._sprung = sprung

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._sprung,)


@pytest.fixture
def trap(tmp_path: Path) -> Iterator[tuple[bytes, Path]]:
    """(a pickle, the file that it would create): the test fails if it was created."""
    sprung = tmp_path / "sprung"
    yield pickle.dumps({"weight": Trap(sprung)}), sprung
    assert not sprung.exists(), "a pickle was run"


def torch_file(content: bytes, path: Path) -> None:
    """As ``torch.save`` lays it out, with this pickle in it."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/version", "3\n")


def test_the_trap_springs(tmp_path):
    """The canary: whoever unpickles it, or loads it with torch without care, runs it."""
    for number, load in enumerate((pickle.load, lambda file: torch.load(file, weights_only=False))):
        sprung = tmp_path / f"sprung{number}"
        torch_file(pickle.dumps({"weight": Trap(sprung)}), tmp_path / "model.bin")
        with (tmp_path / "model.bin").open("rb") as file:
            if number == 0:
                pickle.loads(pickle.dumps({"weight": Trap(sprung)}))
            else:
                load(file)
        assert sprung.exists()


@pytest.mark.parametrize("name", FILES)
def test_a_pickle_in_a_checkpoint_is_refused_even_under_a_right_checksum(tmp_path, trap, name):
    content, _ = trap
    path = write(tmp_path, 1)
    for harm in (lambda file: file.write_bytes(content), lambda file: torch_file(content, file)):
        harm(path / name)
        if name != COMPLETE:
            rewrite_marker(path)
        for read in (lambda: load_checkpoint(path), lambda: choose_checkpoint(tmp_path, "latest")):
            with pytest.raises(CheckpointError):
                read()
    if name in (TRAINABLE, COMPLETE):
        with pytest.raises(ConfigError):
            read_adapter(path)


def test_pickles_beside_a_checkpoints_files_are_not_looked_at(tmp_path, trap):
    content, _ = trap
    path = write(tmp_path, 1)
    for name in ("trainable.bin", "optimizer.bin", "optimizer.pt", "random_states_0.pkl", ".metadata", "scheduler.bin"):
        (path / name).write_bytes(content)
        torch_file(content, path / f"torch-{name}")
    found = choose_checkpoint(tmp_path, "latest")
    assert found is not None and found.state.step == 1 and read_adapter(path).settings["rank"] == 4


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".safetensors", ".ckpt"])
def test_an_adapter_that_is_a_pickle_is_refused(tmp_path, trap, suffix):
    content, _ = trap
    file = tmp_path / f"pytorch_lora_weights{suffix}"
    for harm in (lambda: file.write_bytes(content), lambda: torch_file(content, file)):
        harm()
        for path in (file, tmp_path):
            with pytest.raises(ConfigError):
                read_adapter(path)
            assert len(read_sources([AdapterArgument(path)])[1]) == 1


COMPONENTS = {
    "transformer": (load_transformer, "diffusion_pytorch_model.bin"),
    "vae": (load_vae, "diffusion_pytorch_model.bin"),
    "text_encoder": (load_text, "pytorch_model.bin"),
    "scheduler": (load_scheduler, "scheduler.bin"),
    "tokenizer": (load_text, "tokenizer.pkl"),
}


@pytest.mark.parametrize("beside", [False, True], ids=["in place of the weights", "beside the weights"])
@pytest.mark.parametrize("component", COMPONENTS)
def test_a_pickle_in_a_model_folder_is_not_run(tmp_path, trap, tiny_model, component, beside):
    content, _ = trap
    folder = tmp_path / "model"
    shutil.copytree(tiny_model("5b"), folder)
    load, name = COMPONENTS[component]
    weights = list((folder / component).glob("*.safetensors"))
    for harm in (lambda file: file.write_bytes(content), lambda file: torch_file(content, file)):
        harm(folder / component / name)
        if beside or not weights:
            load(ModelConfig(pretrained=str(folder)))
            continue
        for file in weights:
            file.unlink(missing_ok=True)
        with pytest.raises(ModelError):
            load(ModelConfig(pretrained=str(folder)))


@pytest.mark.parametrize(
    "changes",
    [{"class": None}, {"parameters": "a"}, {"scalars": {"a": 1}}, {"shared": []}, {"composed": {"x": "os.system"}}],
    ids=str,
)
def test_an_optimizers_state_of_another_form_is_no_traceback(changes):
    parameter = torch.nn.Parameter(torch.zeros(4))
    optimizer = AdamW().build([("a", parameter)])
    tensors, meta = optimizer_state(optimizer, {"a": parameter})
    load_optimizer_state(optimizer, (tensors, meta), {"a": parameter})
    for odd in ({**meta, **changes}, {key: value for key, value in meta.items() if key not in changes}):
        with pytest.raises(CheckpointError, match=f"another version of this package: {next(iter(changes))}"):
            load_optimizer_state(optimizer, (tensors, odd), {"a": parameter})


def test_an_optimizers_state_cannot_name_code(tmp_path):
    """The class of a composed tensor is looked up by name: the one that this optimizer uses, and no other."""
    parameter = torch.nn.Parameter(torch.zeros(4))
    optimizer = AdamW().build([("a", parameter)])
    parameter.grad = torch.ones(4)
    optimizer.step()
    tensors, meta = optimizer_state(optimizer, {"a": parameter})
    for name in ("pathlib.Path", "os.system", "builtins.eval", "torchaox.Evil"):
        composed = {"state.a.exp_avg": {"class": name, "parts": [], "context": [str(tmp_path / "sprung")]}}
        with pytest.raises(CheckpointError, match=r"state\.a\.exp_avg is .*, not float32 \[4\]"):
            load_optimizer_state(optimizer, (tensors, {**meta, "composed": composed}), {"a": parameter})
    assert not (tmp_path / "sprung").exists()
