"""``inspect``: what a file is, from its header alone, and what it says of other programs is what they do."""

from __future__ import annotations

import json
import pickle
import re
import shlex
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXPipeline
from other_programs import comfyui_updates, kijai_updates
from safetensors.torch import load_file, save_file
from stock_pipeline import load_pipeline
from test_export import FULL, LORA, make_run

from finetune import export, inspect
from finetune.cli.main import main
from finetune.cogvideox.components import Transformer, read_json_as
from finetune.cogvideox.load import empty_transformer
from finetune.cogvideox.model_files import KNOWN_MODELS, known_model
from finetune.conversion.lora_layouts import LAYOUTS, Lora, from_diffusers
from finetune.conversion.stored import layer_shapes
from finetune.core.errors import ConfigError, FinetuneError
from finetune.inference.adapters import read_sources
from finetune.inference.request import AdapterArgument
from finetune.methods.adapter import read_adapter


def lora_of(shapes: Mapping[str, tuple[int, int]], *, rank: int = 4, alpha: float = 2.0, dora: bool = False) -> Lora:
    """A random LoRA on layers of these shapes [out, in]."""
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for module, (out, width) in shapes.items():
        tensors[f"{module}.lora_A.weight"] = torch.randn(rank, width, generator=generator)
        tensors[f"{module}.lora_B.weight"] = torch.randn(out, rank, generator=generator)
        if dora:
            tensors[f"{module}.lora_magnitude_vector"] = torch.rand(out, generator=generator) + 1
    return Lora(tensors, dict.fromkeys(shapes, alpha))


def attention(width: int, blocks: int) -> dict[str, tuple[int, int]]:
    layers = ("to_q", "to_k", "to_v", "to_out.0")
    return {f"transformer_blocks.{i}.attn1.{layer}": (width, width) for i in range(blocks) for layer in layers}


def write(path: Path, lora: Lora, layout: str, metadata: dict[str, str] | None = None) -> Path:
    """A file of a program's layout; a DoRA with what LyCORIS calls ``dora_scale`` where peft's names are not used."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = LAYOUTS[layout]
    plain = {name: t for name, t in lora.tensors.items() if names.takes_dora or "magnitude" not in name}
    tensors = from_diffusers(Lora(plain, lora.alphas), names)
    for name in lora.tensors.keys() - plain.keys():
        tensors[f"{names.stem_of(name.rpartition('.')[0])}.dora_scale"] = lora.tensors[name][:, None]
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


# ------------------------------------------------------------------------------------------------------------ the base


@pytest.mark.parametrize("variant", KNOWN_MODELS)
def test_the_shapes_of_a_published_model_are_those_of_diffusers(variant):
    module = empty_transformer(known_model(variant), dtype=torch.bfloat16, device="meta", layers=1)
    theirs = {
        name.removesuffix(".weight").replace("blocks.0.", "blocks.{i}."): tuple(tensor.shape)
        for name, tensor in module.state_dict().items()
        if name.endswith(".weight") and tensor.ndim > 1
    }
    assert layer_shapes(read_json_as(Transformer, known_model(variant) / "transformer" / "config.json")) == theirs


FIVE = ("5b", "5b-i2v", "1.5-5b", "1.5-5b-i2v")


@pytest.mark.parametrize(
    ("shapes", "bases"),
    [
        (attention(1920, 30), ("2b",)),
        (attention(3072, 42), FIVE),
        (attention(1920, 42), ()),  # no such model: the 2b has 30 blocks
        (attention(64, 2), ()),
        (attention(3072, 1) | {"ofs_embedding.linear_1": (512, 512)}, ("1.5-5b-i2v",)),
        (attention(3072, 1) | {"patch_embed.proj": (3072, 128)}, ("1.5-5b",)),
        (attention(3072, 1) | {"proj_out": (64, 3072)}, ("5b", "5b-i2v")),
    ],
)
def test_the_base_is_told_by_shapes(tmp_path, shapes, bases):
    report = inspect(write(tmp_path / "a.safetensors", lora_of(shapes, rank=1), "diffusers"))
    assert report.bases == bases and report.kind == "LoRA" and report.ranks == (1,)
    assert sum(report.targets.values()) == len(shapes)


# ---------------------------------------------------------------------------------------------------- what programs do


@pytest.fixture(scope="module")
def pipeline(tiny_model) -> CogVideoXPipeline:
    return load_pipeline(str(tiny_model("5b")))


def stock_takes_all(pipeline: CogVideoXPipeline, file: Path) -> bool:
    """Whether the published pipeline gives every tensor of the file its place."""
    from peft import get_peft_model_state_dict

    try:
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name="a")
    except ValueError:
        return False
    if "a" not in getattr(pipeline.transformer, "peft_config", {}):
        return False
    placed = len(get_peft_model_state_dict(pipeline.transformer, adapter_name="a"))
    pipeline.unload_lora_weights()
    return placed == len(load_file(file))


def refused(call) -> bool:
    try:
        call()
    except FinetuneError:
        return True
    return False


def what_happens(pipeline: CogVideoXPipeline, file: Path) -> dict[str, bool]:
    """Program -> whether all of the file takes effect, by loading it there."""
    transformer, tensors = pipeline.transformer, load_file(file)
    stock = stock_takes_all(pipeline, file)
    if any("lora_B" in name for name in tensors):
        kijai = stock
    else:
        try:
            kijai = bool(kijai_updates(transformer, tensors)) and not any("dora" in name for name in tensors)
        except KeyError:
            kijai = False
    return {
        "diffusers": stock,
        "ComfyUI": not comfyui_updates(transformer, tensors)[1] and not any("dora" in name for name in tensors),
        "ComfyUI, kijai's wrapper": kijai,
        "method.init_from": not refused(lambda: read_adapter(file)),
        "generate --adapter": not read_sources([AdapterArgument(file)])[1],
    }


WITH_DORA = [(layout, dora) for layout in LAYOUTS for dora in (False, True) if not (dora and layout.startswith("sat"))]


@pytest.mark.parametrize(("layout", "dora"), WITH_DORA)
def test_what_it_says_of_each_program_is_what_happens(pipeline, tmp_path, layout, dora):
    file = write(tmp_path / "a.safetensors", lora_of(attention(64, 2), dora=dora), layout)
    report = inspect(file)
    assert {loading.program: loading.loads for loading in report.loadings} == what_happens(pipeline, file)
    assert report.layout == LAYOUTS[layout].label


def test_the_verdicts_are_not_all_alike(pipeline, tmp_path):
    """The table above would also hold if nothing ever loaded."""
    verdicts = {}
    for layout in LAYOUTS:
        report = inspect(write(tmp_path / layout / "a.safetensors", lora_of(attention(64, 2)), layout))
        verdicts[layout] = [loading.loads for loading in report.loadings]
    assert verdicts["diffusers"] == [True, False, True, True, True]
    assert verdicts["comfyui"][:3] == [False, True, False] and verdicts["kohya"][:3] == [False, False, True]
    lacking = write(tmp_path / "lacking" / "a.safetensors", lora_of(attention(64, 2)), "diffusers", header(r=4))
    assert "for want of target_modules" in str(inspect(lacking))
    with pytest.raises(KeyError):
        pipeline.load_lora_weights(str(lacking.parent), weight_name="a.safetensors")
    trap = inspect(write(tmp_path / "orbit" / "a.safetensors", lora_of(attention(64, 2)), "diffusers"))
    assert "multiplies by 1 / rank" in str(trap) and not trap.loadings[2].loads


# ----------------------------------------------------------------------------------------------- alpha, norms, kinds


def header(**settings) -> dict[str, str]:
    return {"lora_adapter_metadata": json.dumps({f"transformer.{name}": value for name, value in settings.items()})}


FINETRAINERS = {
    "lora_config": json.dumps({"r": 4, "lora_alpha": 2, "target_modules": "(transformer_blocks).*(to_q|to_k)"})
}


def test_an_alpha_that_diffusers_does_not_read_is_read_or_refused_and_never_dropped(tmp_path):
    file = write(tmp_path / "a.safetensors", lora_of(attention(64, 2)), "diffusers", FINETRAINERS)
    report = inspect(file)
    loads = {loading.program: loading.loads for loading in report.loadings}
    assert not loads["diffusers"] and not loads["generate --adapter"] and loads["method.init_from"]
    assert "trained to count 0.5" in str(report) and "finetrainers, by lora_config" in report.origin
    adapter = read_adapter(file)
    assert adapter.scale == 0.5 and adapter.settings["alpha"] == 2
    (fault,) = read_sources([AdapterArgument(file)])[1]
    assert "trained to count 0.5" in fault.what and f"finetune convert {file}" in fault.fix

    equal = {"lora_config": json.dumps({"r": 4, "lora_alpha": 4})}  # by which diffusers' rule is right
    file = write(tmp_path / "b.safetensors", lora_of(attention(64, 2)), "diffusers", equal)
    assert not read_sources([AdapterArgument(file)])[1] and inspect(file).loadings[0].loads


@pytest.mark.parametrize(
    ("layout", "metadata", "norms", "alphas", "scales", "source"),
    [
        ("diffusers", None, False, (), (1.0,), "programs take the rank"),
        ("diffusers", header(r=4, lora_alpha=2), False, (2.0,), (0.5,), "in its header"),
        ("diffusers", header(r=4, lora_alpha=8, use_rslora=True), False, (8.0,), (4.0,), "in its header"),
        ("diffusers", header(lora_alpha=2, alpha_pattern={"to_q": 8}), False, (2.0, 8.0), (0.5, 2.0), "in its header"),
        ("diffusers", {"lora_adapter_metadata": "[]"}, False, (), (1.0,), "programs take the rank"),
        ("diffusers", FINETRAINERS, False, (2.0,), (0.5,), "in its header, as finetrainers writes it"),
        ("comfyui", None, False, (), (), "which --norms reads"),
        ("comfyui", None, True, (2.0,), (0.5,), "in its .alpha tensors"),
        ("sat", None, False, (1.0,), (0.25,), "as SAT has it"),
    ],
)
def test_alpha_and_where_it_stands(tmp_path, layout, metadata, norms, alphas, scales, source):
    report = inspect(write(tmp_path / "a.safetensors", lora_of(attention(64, 2)), layout, metadata), norms=norms)
    assert (report.alphas, report.scales) == (alphas, scales) and source in report.alpha_source
    assert source in str(report)


@pytest.mark.parametrize("layout", ["diffusers", "comfyui", "peft"])
def test_norms_are_those_of_the_update_as_it_is_added(tmp_path, layout):
    lora = lora_of(attention(64, 3), alpha=2)
    with torch.no_grad():
        for name, tensor in lora.tensors.items():  # a block that was not trained
            tensor.mul_(0 if name.startswith("transformer_blocks.1.") and "lora_B" in name else 1)
    file = write(tmp_path / "adapter_model.safetensors", lora, layout, header(r=4, lora_alpha=2))
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"r": 4, "lora_alpha": 2, "base_model_name_or_path": "x/y"})
    )
    report = inspect(file, norms=True)
    products = {
        module: 0.5 * lora.tensors[f"{module}.lora_B.weight"] @ lora.tensors[f"{module}.lora_A.weight"]
        for module in lora.ranks
    }

    def norm(part: str) -> float:
        return sum(product.square().sum().item() for module, product in products.items() if part in module) ** 0.5

    assert report.norms.blocks == pytest.approx([norm(f"blocks.{i}.") for i in range(3)], rel=1e-5)
    assert report.norms.layers["attn1.to_q"] == pytest.approx(norm("to_q"), rel=1e-5)
    assert "_" in str(report.norms).split()[0] and len(str(report.norms).split()[0]) == 3
    assert "adapter_config.json names x/y" in report.stated_base
    with torch.no_grad():
        lora.tensors["transformer_blocks.2.attn1.to_k.lora_A.weight"][0, 0] = float("nan")
    assert str(inspect(write(file, lora, layout), norms=True).norms).split()[0].endswith("!")


def test_no_tensor_is_read_unless_asked_for(tmp_path):
    """Of a file whose numbers lie in a hole of the disk, more than this machine's memory holds."""
    shapes = {"transformer.transformer_blocks.0.attn1.to_q.lora_A.weight": [16, 1 << 33]}
    begin, entries = 0, {}
    for name, shape in [*shapes.items(), ("transformer.transformer_blocks.0.attn1.to_q.lora_B.weight", [64, 16])]:
        size = shape[0] * shape[1] * 4
        entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, begin + size]}
        begin += size
    text = json.dumps(entries).encode()
    file = tmp_path / "huge.safetensors"
    with file.open("wb") as target:
        target.write(len(text).to_bytes(8, "little") + text)
        target.truncate(8 + len(text) + begin)
    assert inspect(file).ranks == (16,) and inspect(file).bases == ()


class RunsCode:
    def __reduce__(self):
        return (pytest.fail, ("the pickle was executed",))


def test_a_pickle_is_not_read(tmp_path):
    (tmp_path / "lora.pt").write_bytes(pickle.dumps(RunsCode()))
    report = inspect(tmp_path / "lora.pt", norms=True)
    assert "pickle" in report.kind and "can run code" in str(report) and not report.loadings


def test_runs_exports_models_and_their_parts(tiny_model, tmp_path):
    model = tiny_model("5b")
    run, full = (make_run(tmp_path / name, model, m, ema=True) for name, m in (("lora", LORA), ("full", FULL)))
    report = inspect(run)
    assert report.kind == "LoRA" and report.alphas == (2.0,) and report.scales == (0.5,)
    assert f"its run names {model}" in str(report) and "step-00000003" in str(report)
    assert [loading.loads for loading in report.loadings] == [False, False, False, True, True]
    report = inspect(export(run, pretrained=str(model)).folder)
    assert report.origin.startswith("this package") and report.loadings[0].loads and report.alphas == (2.0,)
    for whole, loads in ((export(full).folder, True), (model, True), (full, False)):
        report = inspect(whole, norms=True)
        assert report.kind == "transformer" and report.bases == () and report.blocks == 2
        assert [report.loadings[0].loads, report.loadings[4].loads] == [loads, loads]
        assert len(report.norms.blocks) == 2 and min(report.norms.blocks) > 0
    assert inspect(model / "vae").kind == "VAE" and "T5" in inspect(model / "text_encoder" / "model.safetensors").kind
    checkpoint = run / "checkpoints" / "step-00000003"
    assert "averaged weights" in inspect(checkpoint / "ema.safetensors").kind


def test_the_command_prints_the_report_or_json(tmp_path, capsys):
    file = write(tmp_path / "a.safetensors", lora_of(attention(3072, 2), rank=1), "kohya", {"ss_network_module": "x"})
    assert main(["inspect", str(file)]) == 0
    text = capsys.readouterr().out
    for part in ("LoRA", "kohya's layout", "5b or 5b-i2v", "attn1.to_q x 2", "ss_network_module = x", "ComfyUI: no"):
        assert part in text
    assert main(["inspect", str(file), "--json", "--norms"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["bases"] == list(FIVE) and content["loadings"][1]["loads"] is False
    assert len(content["norms"]["blocks"]) == 2


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no weights"),
        ({"a.safetensors": b"", "b.safetensors": b""}, "several files: a.safetensors, b.safetensors"),
        ({"a.safetensors": b"nonsense"}, "no safetensors file, or a damaged one"),
        ({"trainable/0.safetensors": b""}, "in shares"),
    ],
)
def test_what_cannot_be_looked_at(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        inspect(tmp_path)
    with pytest.raises(ConfigError, match="no such file or folder"):
        inspect(tmp_path / "nowhere")


HOSTILE = {
    "nan": header(r=4, lora_alpha=float("nan")),
    "text": header(r=4, lora_alpha="64", alpha_pattern=[1]),
    "huge": {"lora_adapter_metadata": '{"transformer.lora_alpha": 1' + "0" * 400 + "}"},
    "nested": {"lora_adapter_metadata": "[" * 100_000},
    "escapes": {"software": "\x1b[2Jgone", "\x1b[31mred": "\u202e"},
}


@pytest.mark.parametrize("metadata", HOSTILE.values(), ids=HOSTILE)
def test_a_stranger_s_header_is_only_read(tmp_path, metadata):
    """Numbers that are none count as not stated, and nothing in it acts on a terminal."""
    file = tmp_path / "a.safetensors"
    tensors = {
        "transformer.\x1b[2J.lora_A.weight": torch.zeros(4, 8),
        "transformer.\x1b[2J.lora_B.weight": torch.zeros(8, 4),
        "transformer.transformer_blocks.0.attn1.to_q.lora_A.weight": torch.zeros(0, 8),
        "transformer.transformer_blocks.0.attn1.to_q.lora_B.weight": torch.zeros(8, 0),
        "transformer.transformer_blocks.0.attn1.to_k.lora_A.weight": torch.zeros(4),
        "\x1b[2J": torch.zeros(1),
    }
    save_file(tensors, file, metadata)
    report = inspect(file, norms=True)
    assert report.alphas == () and report.kind == "LoRA"
    assert "\x1b" not in str(report) and "\u202e" not in str(report)
    assert "\x1b" not in report.to_json()


def test_every_command_of_the_page_runs(tiny_model, tmp_path, monkeypatch, capsys):
    """docs/sharing.md, in a folder where its run and its file stand."""
    page = (Path(__file__).parent.parent / "docs" / "sharing.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    export(make_run(tmp_path / "runs", tiny_model("5b"), LORA))
    write(tmp_path / "my_lora.safetensors", lora_of(attention(64, 2)), "diffusers", header(r=4, lora_alpha=2))
    words = [shlex.split(line) for block in re.findall(r"```bash\n(.*?)```", page, re.S) for line in block.splitlines()]
    assert len(words) >= 3
    for program, *arguments in words:
        assert program == "finetune" and main(arguments) == 0, arguments
    assert "LoRA" in capsys.readouterr().out
