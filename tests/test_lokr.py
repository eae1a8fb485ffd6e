"""LoKr: a way to train of its own, from the first step to the file that diffusers' transformers load."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from peft.tuners.lokr.layer import LoKrLayer
from stock_pipeline import load_pipeline
from test_export import LORA, make_run
from test_method import perturb, predict
from worlds import assert_same_run, run_config, stop_after

import finetune
from finetune.cogvideox.config import MergedAdapter, ModelConfig
from finetune.cogvideox.load import load_transformer
from finetune.cogvideox.spec import read_spec
from finetune.config.rules import check_against, memory_traits
from finetune.core.distributed import ProcessGroup
from finetune.core.errors import ConfigError, FinetuneError
from finetune.core.files import LORA_FILE
from finetune.inference.adapters import LoadedAdapters, read_sources
from finetune.inference.offload import offloading
from finetune.inference.request import AdapterArgument
from finetune.memory.config import MemoryConfig
from finetune.methods.lokr import LokrMethod
from finetune.methods.lora import LoraMethod, adapted_layers
from finetune.methods.merged_base import require_readable
from finetune.methods.prior import without_adapter
from finetune.parallel.fsdp import FullShard
from finetune.testing.tiny import tiny_transformer
from finetune.trainers.launch import require_launch
from finetune.trainers.loop import train

LOKR = {"kind": "lokr", "rank": 2, "alpha": 3, "decompose_factor": 4}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{"rank": 2}, {"rank": 2, "decompose_both": True}, {"rank": 64, "targets": ".*"}])
def test_it_begins_as_the_base_and_computes_what_peft_does(options, dtype):
    method, transformer = LokrMethod(decompose_factor=8, **options), tiny_transformer().to(dtype)
    expected, state = predict(transformer), torch.random.get_rng_state()
    method.apply(transformer, seed=3)
    assert torch.equal(predict(transformer), expected) and torch.equal(torch.random.get_rng_state(), state)
    parameters = method.trainable(transformer)
    assert {p.dtype for p in parameters.values()} == {torch.float32} and all(".lokr_w" in name for name in parameters)
    layers = dict(adapted_layers(transformer))
    sides = [(layer.base_layer.in_features, layer.base_layer.out_features) for layer in layers.values()]
    assert sum(p.numel() for p in parameters.values()) == sum(method.weights(*side) for side in sides)

    perturb(parameters)
    for layer in layers.values():
        inputs = torch.randn(3, layer.in_features).to(dtype)
        theirs = LoKrLayer.forward(layer.eval(), inputs).float()
        close = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(layer(inputs).float(), theirs, atol=close * theirs.abs().max().item(), rtol=close)
    assert not torch.equal(predict(transformer), expected)
    with without_adapter(transformer):
        assert torch.equal(predict(transformer), expected)


STATES = [{"activations": "host"}, {"streamed_blocks": "all", "modulation": "host"}, {"checkpointing": "selective"}]


@pytest.mark.parametrize("state", STATES, ids=str)
def test_memory_techniques_give_the_same_gradients(tiny_model, state):
    def gradients(memory: MemoryConfig) -> list[torch.Tensor]:
        method, model = LokrMethod(rank=2, decompose_factor=4), ModelConfig(pretrained=str(tiny_model("5b")))
        transformer = load_transformer(model, dtype=torch.bfloat16)
        method.apply(transformer, seed=0)
        perturb(method.trainable(transformer))
        memory.apply(transformer, torch.device("cpu"))
        predict(transformer.train()).float().square().mean().backward()
        return [parameter.grad for parameter in method.trainable(transformer).values()]

    for ours, theirs in zip(
        gradients(MemoryConfig(**state)), gradients(MemoryConfig(checkpointing="none")), strict=True
    ):
        assert torch.equal(ours, theirs) and ours.abs().max() > 0


def test_a_run_stopped_and_resumed_is_the_run_that_was_not(tiny_run):
    changes = {"method": LOKR, "optimizer": {"lr": 1e-2}, "train": {"steps": 6}}
    whole, stopped = train(tiny_run("whole", **changes)), tiny_run("stopped", **changes)
    stop_after(3, stopped)
    assert_same_run(whole, train(stopped))
    report = finetune.strength(whole.run_dir, strengths=[0.5], clips=1)
    assert len(set(report.losses.values())) == 3 and all(any(change.values()) for change in report.changes.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memory": {"block": "lean"}}, "not with memory.block: lean"),
        ({"memory": {"base": "nf4"}}, "not with memory.base: nf4"),
        ({"memory": {"compile": "block"}}, "not with memory.compile: block"),
        ({"model": {"adapters": [{"path": "style.safetensors"}]}}, "LoRAs merged into it"),
        ({"model": {"control": True}}, "projection of a control video"),
        ({"parallel": {"context": 2}}, "divide a clip's tokens"),
        ({"method": {"targets": "to_z"}}, "selects nothing"),
        ({"method": {"ranks": {"to_q": 4}}}, "ranks"),
        ({"method": {"decompose_factor": 0}}, "decompose_factor"),
        ({}, ""),
    ],
    ids=str,
)
def test_what_it_does_not_go_with_is_said_before_anything_is_loaded(tiny_model, tmp_path, changes, message):
    changes = {**changes, "method": {**LOKR, **changes.get("method", {})}}
    spec = read_spec(str(tiny_model("5b")), control="control" in changes.get("model", {}))
    try:
        config = run_config(tiny_model("5b"), tmp_path, tmp_path / "run", **changes)
        faults = [str(fault) for fault in check_against(config, spec).errors]
    except ConfigError as fault:
        faults = [str(fault)]
    assert (len(faults) == 1 and message in faults[0] and "method" in faults[0]) if message else not faults
    if not message:
        states = MemoryConfig().fallbacks(memory_traits(config, spec))
        assert len(states) == 4 and not any("lean" in str(state) for state in states)
        with pytest.raises(ConfigError, match="under DDP, and not where the model is sharded"):
            require_launch(FullShard(), config, spec, ProcessGroup(0, 2))


# --------------------------------------------------------------------------------------------------------- its file


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_its_file_is_the_trained_model_in_the_stock_class(tiny_model, tmp_path, dtype):
    model = tiny_model("5b")
    run = make_run(tmp_path, model, LOKR, dtype=dtype)
    report = finetune.export(run)
    assert "load_lora_weights of the pipeline refuses a LoKr" in str(report) and report.max_abs_diff <= report.tolerance
    if dtype == "bf16":
        return
    # The day that the pipeline takes it, the card and the note of an export may say so.
    with pytest.raises(ValueError, match="Invalid LoRA checkpoint"):
        load_pipeline(str(model), adapter=str(report.folder))
    stock = CogVideoXTransformer3DModel.from_pretrained(model, subfolder="transformer")
    base = predict(stock)
    stock.load_lora_adapter(report.folder, prefix="transformer", weight_name=LORA_FILE, adapter_name="tuned")
    merged = finetune.export(run, layout="merged").folder
    whole = predict(CogVideoXTransformer3DModel.from_pretrained(merged, subfolder="transformer"))
    torch.testing.assert_close(predict(stock), whole, rtol=0, atol=1e-5)
    assert not torch.allclose(base, whole, atol=1e-2)

    def sampled(*adapters: str, **options: Any) -> torch.Tensor:
        out = tmp_path / f"videos-{len(list(tmp_path.iterdir()))}"
        words = {"model": str(model), "bucket": "9x32x48", "num_inference_steps": 1, "seed": 5, **options}
        return torch.from_numpy(finetune.generate("a red ring", out, adapters=adapters, **words).frames[0])

    exported, kept = str(report.folder), str(run)
    # On a GPU the hooks that bring blocks in know the weights that were there when they were made.
    offloaded = load_pipeline(str(model))
    argument = AdapterArgument(report.folder)
    sources, _ = read_sources([argument])
    adapters = LoadedAdapters(read_spec(str(model)), offloaded.transformer, offloaded.scheduler, sources)
    with offloading(offloaded, "group", torch.device("cpu")):
        hook = offloaded.transformer.transformer_blocks[0]._diffusers_hook.get_hook("group_offloading")
        adapters.use([argument])
        again = offloaded.transformer.transformer_blocks[0]._diffusers_hook.get_hook("group_offloading")
    assert None is not again is not hook

    half = sampled(f"{exported}:0.5")
    assert torch.equal(half, sampled(f"{kept}:0.5")) and not torch.equal(half, sampled(exported))
    assert (sampled(f"{exported}:0.5", f"{kept}:0.5").int() - sampled(exported).int()).abs().max() <= 1
    for path in (report.folder, run / "checkpoints" / "step-00000003"):
        found = finetune.inspect(path)
        assert (found.kind, found.ranks, found.alphas, found.scales) == ("LoKr", (2,), (3.0,), (1.5,)) and found.blocks
    file, out = report.folder / LORA_FILE, tmp_path / "x.safetensors"
    lora = finetune.export(make_run(tmp_path / "lora", model, LORA)).folder
    for refused in (
        lambda: finetune.export(run, out, layout="comfyui"),
        lambda: finetune.convert(file, out),
        lambda: finetune.merge([file], out),
        lambda: LoraMethod(init_from=file).read_start(file),
        lambda: require_readable(ModelConfig(pretrained=str(model), adapters=(MergedAdapter(path=file),))),
        lambda: sampled(exported, str(lora)),
        lambda: sampled(exported, quantize="int8"),
    ):
        with pytest.raises(FinetuneError, match="LoKr"):
            refused()
