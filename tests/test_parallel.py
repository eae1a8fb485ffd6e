"""Which strategy a launch gets, what is refused by name, and the strategies in a single process."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from checkpoints import rewrite_marker
from launcher import FSDP
from safetensors import safe_open
from waiting import HANG_S
from worlds import SMOOTH_ADAM, fabricate_cache, fails_where, merged, run_config, run_values

from finetune.checkpoint.load import load_checkpoint
from finetune.checkpoint.shares import HEADER
from finetune.cogvideox.config import ModelConfig
from finetune.cogvideox.load import load_transformer, load_vae
from finetune.cogvideox.model_files import known_model
from finetune.cogvideox.spec import read_spec
from finetune.config.schema import RunConfig
from finetune.core import distributed
from finetune.core.distributed import ProcessGroup, compute_device, peers
from finetune.core.errors import CheckpointError, ConfigError, LaunchError, ModelError, TrainingError
from finetune.core.tensor_files import atomic_save_tensors
from finetune.methods.full import FullMethod
from finetune.optim.optimizers import AdamW
from finetune.parallel import fsdp as fsdp_module
from finetune.parallel.deepspeed import Zero, import_deepspeed
from finetune.parallel.fsdp import FullShard, FullyShardedDataParallel
from finetune.parallel.strategy import require_agreement
from finetune.trainers.launch import Replicate, read_launch, require_launch
from finetune.trainers.loop import TrainReport, train
from finetune.trainers.run import TrainedModel

SPEC = read_spec(str(known_model("5b")))

ROOT = Path(__file__).parents[1]
CONFIGS = {
    "single_gpu": Replicate(),
    "ddp": Replicate(),
    "cpu": Replicate(),
    "fsdp2": FullShard(),
    "fsdp2_offload": FullShard(offload=True),
    "zero2": Zero(2),
    "zero2_offload": Zero(2, offload_optimizer=True),
    "zero3": Zero(3),
    "zero3_offload": Zero(3, offload_optimizer=True, offload_parameters=True),
}


# ----------------------------------------------------------------------------------------------- what a launch asks for


def launched(config: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment that ``accelerate launch --config_file`` gives to a training process."""
    from accelerate.commands import launch
    from accelerate.utils import launch as prepare

    monkeypatch.setattr("accelerate.commands.launch.is_deepspeed_available", lambda: True)
    words = ["--config_file", str(config), "--num_cpu_threads_per_process", "1", "train.py"]
    arguments, defaults, _ = launch._validate_launch_command(launch.launch_command_parser().parse_args(words))
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = ",".join([*defaults.deepspeed_config, "mixed_precision"])
        environment = prepare.prepare_deepspeed_cmd_env(arguments)[1]
    elif arguments.use_fsdp or arguments.multi_gpu:
        environment = prepare.prepare_multi_gpu_env(arguments)
    else:
        environment = prepare.prepare_simple_launcher_cmd_env(arguments)[1]
    return {name: value for name, value in environment.items() if name.startswith(("ACCELERATE_", "FSDP_"))}


def test_every_shipped_configuration_asks_for_its_strategy(monkeypatch):
    shipped = {path.stem: path for path in (ROOT / "accelerate_configs").glob("*.yaml")}
    assert shipped.keys() == CONFIGS.keys()
    for name, path in shipped.items():
        assert read_launch(launched(path, monkeypatch)) == CONFIGS[name], name
        assert yaml.safe_load(path.read_text())["mixed_precision"] == "no"


FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM is not supported"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "tensor, context, sequence"),
        ({"ACCELERATE_USE_SAGEMAKER": "true"}, "SageMaker"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, r"mixed precision \(bf16\)"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, r"mixed precision \(fp8\)"),
        (FSDP2 | {"FSDP_VERSION": "1"}, "fsdp_version to '1'"),
        (FSDP2 | {"FSDP_SHARDING_STRATEGY": "HYBRID_SHARD"}, "fsdp_sharding_strategy to 'HYBRID_SHARD'"),
        (FSDP2 | {"FSDP_RESHARD_AFTER_FORWARD": "2"}, "fsdp_reshard_after_forward to '2'"),
        (FSDP2 | {"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, "fsdp_auto_wrap_policy"),
        (FSDP2 | {"FSDP_TRANSFORMER_CLS_TO_WRAP": "T5Block"}, "fsdp_transformer_cls_to_wrap to 'T5Block'"),
        (FSDP2 | {"FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}, "fsdp_state_dict_type"),
        (FSDP2 | {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "fsdp_activation_checkpointing"),
        (FSDP2 | {"FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "true"}, "checkpointing_offload"),
        (FSDP2 | {"FSDP_BACKWARD_PREFETCH": "BACKWARD_POST"}, "fsdp_backward_prefetch"),
        (FSDP2 | {"FSDP_FORWARD_PREFETCH": "true"}, "fsdp_forward_prefetch"),
        (FSDP2 | {"FSDP_IGNORED_MODULES": "proj_out"}, "fsdp_ignored_modules"),
        (ZERO | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds.json"}, "deepspeed_config_file"),
        (ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}, "zero_stage"),
        (ZERO | {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "nvme"}, "offload_optimizer_device to 'nvme'"),
        (ZERO | {"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "nvme"}, "offload_param_device to 'nvme'"),
        (ZERO | {"ACCELERATE_GRADIENT_CLIPPING": "0.5"}, "gradient_clipping to '0.5'"),
        (ZERO | {"ACCELERATE_DEEPSPEED_ZERO3_INIT": "true"}, "zero3_init"),
        (ZERO | {"ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES": "Moe"}, "moe_layer_cls_names"),
        (
            ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2", "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"},
            "only ZeRO-3 can offload",
        ),
    ],
)
def test_what_is_not_supported_is_refused_by_name(environment, said):
    with pytest.raises(ConfigError, match=said) as caught:
        read_launch(environment)
    assert caught.value.fix and any(variable in caught.value.where for variable in environment)


def test_defaults_of_the_launcher_are_no_fault(monkeypatch, tmp_path):
    """What accelerate sets by itself where a file says nothing of it."""
    bare = yaml.safe_load((ROOT / "accelerate_configs" / "fsdp2.yaml").read_text())
    bare["fsdp_config"] = {"fsdp_version": 2}
    path = tmp_path / "bare.yaml"
    path.write_text(yaml.safe_dump(bare))
    assert read_launch(launched(path, monkeypatch)) == FullShard()
    assert read_launch({}) == Replicate()
    with pytest.raises(ConfigError, match="fsdp_version to '1'"):  # accelerate's default, where the file names none
        read_launch({"ACCELERATE_USE_FSDP": "true"})


# -------------------------------------------------------------------------------------- settings that do not go with it


@pytest.fixture
def fsdp(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process as a launch of one that asks for FSDP2: the same code as with several."""
    for name, value in FSDP.items():
        monkeypatch.setenv(name, value)


SHARDED: dict[str, dict[str, Any]] = {
    "adamw8bit does not treat each element by itself": {"optimizer": {"kind": "adamw8bit"}},
    **{
        f"{name} does not treat each element by itself": {"optimizer": {"kind": "custom", "name": name}}
        for name in ("torch.optim.Adafactor", "torch.optim.Muon")
    },
    "stochastic rounding draws by parameter": {"method": {"kind": "full"}, "optimizer": {"weights": "stochastic"}},
    "equally many forward passes": {"train": {"batch_size": 2}, "memory": {"clips_at_once": 1}},
}
UNDER_ZERO: dict[str, dict[str, Any]] = {
    "no moving average": {"train": {"ema_decay": 0.9}},
    "fp16 is not supported": {"model": {"dtype": "fp16"}},
    "adamw8bit is not supported under DeepSpeed": {"optimizer": {"kind": "adamw8bit"}},
    "DeepSpeed ZeRO keeps fp32 master copies": {"method": {"kind": "full"}, "optimizer": {"weights": "kahan"}},
}


@pytest.mark.parametrize(
    ("launch", "words", "changes"),
    [(FullShard(), *row) for row in SHARDED.items()] + [(Zero(2), *row) for row in UNDER_ZERO.items()],
)
def test_settings_that_do_not_go_with_a_launch_are_refused(tiny_model, tmp_path, monkeypatch, launch, words, changes):
    monkeypatch.setattr("finetune.trainers.launch.import_deepspeed", lambda: None)
    config = RunConfig.from_dict(merged(run_values(tiny_model(), tmp_path, tmp_path / "run"), changes))
    with pytest.raises(ConfigError, match=words):
        require_launch(launch, config, SPEC, ProcessGroup(0, 2))
    require_launch(Replicate(), config, SPEC, ProcessGroup(0, 2))  # the canary


def test_a_missing_deepspeed_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ConfigError, match="cannot be imported") as caught:
        import_deepspeed()
    assert "cogvideox-finetune[deepspeed]" in caught.value.fix


# ---------------------------------------------------------------------------------------------- FSDP2, a group of one


def in_one_process(model: Path, output: Path, steps: int = 4, dtype: str = "auto", **changes: Any) -> TrainReport:
    train_section = {"steps": steps, "accumulation": 2, "batch_size": 2, **changes.pop("train", {})}
    shared = {"cache": {"mode": "require"}, "train": train_section, "optimizer": SMOOTH_ADAM}
    config = run_config(model, output.parent / "no-videos", output, **shared | changes)
    config = config.model_copy(update={"model": config.model.model_copy(update={"dtype": dtype})})
    fabricate_cache(config, clips=5)
    return train(config)


def test_the_group_is_closed_by_who_opened_it(tiny_model, tmp_path, fsdp):
    assert not torch.distributed.is_initialized()
    in_one_process(tiny_model(), tmp_path / "run", steps=1)
    assert not torch.distributed.is_initialized()
    with pytest.raises(ConfigError):
        in_one_process(tiny_model(), tmp_path / "other", steps=1, optimizer={"kind": "adamw8bit"})
    assert not torch.distributed.is_initialized()
    ranks = ProcessGroup.current(sharding=True)
    in_one_process(tiny_model(), tmp_path / "run", steps=2)
    assert torch.distributed.is_initialized()
    ranks.close()
    assert not torch.distributed.is_initialized()


def test_what_failed_in_a_step_is_kept_beyond_its_group(tiny_model, tmp_path, fsdp, monkeypatch):
    """A model under DDP that is freed while gloo reduces its gradients keeps the process from ending."""
    kept: list[BaseException] = []
    monkeypatch.setattr(distributed, "_failures", kept)
    fails_where(monkeypatch, lambda batch, call: True, RuntimeError("[gloo] Connection closed by peer"))
    with pytest.raises(LaunchError) as caught:
        in_one_process(tiny_model(), tmp_path / "run", steps=1)
    assert kept == [caught.value.__cause__]
    assert not torch.distributed.is_initialized()


def test_float32_adapters_share_a_group_with_a_bf16_base(tiny_model, tmp_path, monkeypatch):
    method = {"kind": "lora", "rank": 4, "alpha": 4, "dropout": 0.1}
    saved = {}
    for strategy in ({}, FSDP):
        for name, value in strategy.items():
            monkeypatch.setenv(name, value)
        report = in_one_process(tiny_model(), tmp_path / f"run{len(strategy)}", steps=2, dtype="bf16", method=method)
        assert report.checkpoint is not None
        saved[len(strategy)] = load_checkpoint(report.checkpoint)
    ours, theirs = saved[len(FSDP)], saved[0]
    assert {tensor.dtype for tensor in ours.trainable.values()} == {torch.float32}
    for name in theirs.trainable:
        torch.testing.assert_close(ours.trainable[name], theirs.trainable[name], rtol=1e-5, atol=1e-6)


@pytest.mark.arithmetic
def test_averaged_weights_do_not_stay_behind_in_the_gathered_ones(tiny_model, demo_clips, tmp_path, fsdp, monkeypatch):
    """Measuring with averaged weights between two steps must leave the next step's alone; also the root's weights."""

    def weights(name: str, **changes: Any) -> dict[str, torch.Tensor]:
        shared = {"method": {"kind": "full"}, "train": {"ema_decay": 0.5}, "data": {"holdout": 1}}
        report = train(run_config(tiny_model(), demo_clips, tmp_path / name, **shared, **changes))
        assert report.checkpoint is not None
        return dict(load_checkpoint(report.checkpoint).trainable)

    measured = {"every": 1, "timesteps": 1}
    without, with_it = weights("without"), weights("with", validation=measured)
    assert not [name for name in without if not torch.equal(without[name], with_it[name])]

    # Canary: with torch's default for the root, they do stay.
    inner = fsdp_module._shard

    def lazily(launch: FullShard, ranks: ProcessGroup, module: Any) -> None:
        inner(launch, ranks, module)
        module.set_reshard_after_forward(False, recurse=False)

    monkeypatch.setattr(fsdp_module, "_shard", lazily)
    stale = weights("stale", validation=measured)
    assert [name for name in without if not torch.equal(without[name], stale[name])]


def test_a_bad_step_is_not_taken_under_fsdp2(tiny_model, tmp_path, fsdp, monkeypatch):
    inner, calls = TrainedModel.losses, 0

    def poisoned(*arguments: Any, **named: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return inner(*arguments, **named) * (float("nan") if calls == 5 else 1.0)

    monkeypatch.setattr(TrainedModel, "losses", poisoned)
    with pytest.raises(TrainingError, match="step 2"):
        in_one_process(tiny_model(), tmp_path / "run", checkpoint={"every": 1})
    last = max((tmp_path / "run" / "checkpoints").glob("step-*"))
    assert last.name == "step-00000002"
    assert all(tensor.isfinite().all() for tensor in load_checkpoint(last).trainable.values())


@pytest.mark.arithmetic
def test_the_norm_and_the_clipping_are_torchs(tiny_model, tmp_path, fsdp):
    ranks = ProcessGroup.current(sharding=True)
    try:
        module = load_transformer(ModelConfig(pretrained=str(tiny_model())))
        method = FullMethod()
        method.apply(module, seed=0)
        strategy = FullyShardedDataParallel(FullShard(), ranks, module, method)
        strategy.start(AdamW(), None)
        theirs = []
        generator = torch.Generator().manual_seed(1)
        for name, parameter in method.trainable(module).items():
            gradient = torch.randn(strategy.parameters[name].shape, generator=generator) * 1e3
            parameter.grad = strategy.shares({name: gradient})[name]
            theirs.append(torch.nn.Parameter(torch.zeros_like(gradient)))
            theirs[-1].grad = gradient.clone() / 8
        expected = torch.nn.utils.clip_grad_norm_(theirs, 2.0)
        assert strategy.clip(2.0, scale=8.0) == pytest.approx(expected.item(), rel=1e-6)
        for ours, reference in zip(strategy._gradients().values(), theirs, strict=True):
            torch.testing.assert_close(ours, reference.grad, rtol=1e-5, atol=0)
        next(iter(method.trainable(module).values())).grad.to_local()[0] = float("nan")
        assert math.isnan(strategy.clip(1.0))
    finally:
        ranks.close()


# ---------------------------------------------------------------------------------------------- checkpoints in shares


@pytest.fixture(scope="module")
def in_shares(tiny_model, tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in FSDP.items():
            patch.setenv(name, value)
        report = in_one_process(tiny_model(), tmp_path_factory.mktemp("shares") / "run", steps=2)
    assert report.checkpoint is not None
    return report.checkpoint


def test_shares_are_safetensors_and_json_and_nothing_else(in_shares):
    files = [path for path in in_shares.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json", ""}
    assert [path.name for path in files if not path.suffix] == ["COMPLETE"]
    with safe_open(next(in_shares.glob("trainable/*")), "pt") as file:
        assert file.metadata()["format"] == "pt"


@pytest.mark.parametrize("part", ["trainable", "optimizer"])
@pytest.mark.parametrize("damage", ["a flipped bit", "a missing file", "a missing share"])
def test_damaged_shares_are_found(in_shares, tmp_path, part, damage):
    path = tmp_path / "checkpoints" / in_shares.name
    shutil.copytree(in_shares, path)
    file = next((path / part).iterdir())
    if damage == "a flipped bit":
        content = bytearray(file.read_bytes())
        content[-3] ^= 16
        file.write_bytes(content)
    elif damage == "a missing file":
        file.unlink()
    else:
        with safe_open(file, "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            header = {HEADER: opened.metadata()[HEADER]}
        name = next(name for name in tensors if tensors[name].ndim == 2)
        header[HEADER] = header[HEADER].replace(f'"{name}": {{"saved_offsets": [0', f'"{name}": {{"saved_offsets": [9')
        atomic_save_tensors(file, tensors, header)
        rewrite_marker(path)
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(path)


# ------------------------------------------------------------------------------------------------------------ agreement


def test_agreement_is_between_processes(monkeypatch):
    tensors = {"weight of a": torch.ones(3), "weight of b": torch.zeros(2, dtype=torch.bfloat16)}
    require_agreement(0, tensors, {"gradient norm": 1.0}, ProcessGroup())
    for field, said in (("weight of b", "the weight of b"), ("gradient norm", "the gradient norm")):

        def answers(self: ProcessGroup, work: Any, field: str = field) -> list[Any]:
            mine = work()
            return [mine, mine, mine | {field: "other"}]

        monkeypatch.setattr(ProcessGroup, "run_on_all", answers)
        with pytest.raises(TrainingError, match=f"step 7: {said} differs between processes: process 2") as caught:
            require_agreement(7, tensors, {"gradient norm": 1.0}, ProcessGroup())
        assert "not updated" in caught.value.what


def test_the_check_costs_nothing_when_off(tiny_model, tmp_path, monkeypatch):
    def never(*_: object) -> None:
        raise AssertionError("train.check_ranks is off")

    monkeypatch.setattr("finetune.trainers.run.require_agreement", never)
    in_one_process(tiny_model(), tmp_path / "off", steps=1)
    with pytest.raises(AssertionError, match="is off"):
        in_one_process(tiny_model(), tmp_path / "on", steps=1, train={"check_ranks": True})


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:50863"), True),
        (RuntimeError("[gloo/transport/tcp/unbound_buffer.cc] Timed out waiting 600000ms for recv"), True),
        (torch.distributed.DistBackendError("NCCL error: remote process exited"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
        (torch.distributed.DistBackendError("NCCL error\nCuda failure 2 'out of memory'"), False),
    ],
)
def test_a_lost_peer_is_told_from_a_bug(error, lost):
    with pytest.raises(LaunchError if lost else type(error)) as caught, peers():
        raise error
    assert isinstance(caught.value, LaunchError) == lost


@pytest.fixture
def cudnn(monkeypatch) -> Callable[..., None]:
    """``cudnn(91002)``: a torch for NVIDIA GPUs with that cuDNN, and one that launchers compute on."""

    def install(version: int | None, cuda: str | None = "12.8") -> None:
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(distributed, "on_cpu", lambda: False)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        state = SimpleNamespace(process_index=0, num_processes=1, device=torch.device("cuda", 0))
        monkeypatch.setattr("accelerate.PartialState", lambda **_: state)

    return install


def test_a_process_computes_on_the_gpu_that_was_current_when_it_began(cudnn, monkeypatch):
    """In another thread, or after somebody's ``set_device``, "cuda" alone would be another one."""
    cudnn(91501)
    alone = SimpleNamespace(process_index=0, num_processes=1, device=torch.device("cuda"))
    monkeypatch.setattr("accelerate.PartialState", lambda **_: alone)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert ProcessGroup.current().device == compute_device() == compute_device("cuda") == torch.device("cuda", 1)
    alone.device = torch.device("cuda", 3)  # as LOCAL_RANK says
    assert ProcessGroup.current().device == torch.device("cuda", 3) and compute_device("cpu") == torch.device("cpu")


ON_A_GPU = {
    "train, precompute": ProcessGroup.current,
    "export, replay, generate": compute_device,
    "generate --device": lambda: compute_device("cuda:0"),
    "the VAE": lambda: load_vae(ModelConfig(pretrained="/no/such/model"), device="cuda"),
}


@pytest.mark.parametrize("entry", ON_A_GPU)
@pytest.mark.parametrize(("version", "name"), [(91002, "cuDNN 9.10.2"), (8902, "cuDNN 8.9.2"), (91500, "cuDNN 9.15.0")])
def test_a_wrong_cudnn_is_refused_by_name_before_anything_computes(cudnn, entry, version, name):
    cudnn(version)
    with pytest.raises(LaunchError) as caught:
        ON_A_GPU[entry]()
    assert name in caught.value.what and "9.15.1" in caught.value.what
    assert "nvidia-cudnn-cu12>=9.15.1" in caught.value.fix


@pytest.mark.parametrize("entry", ON_A_GPU)
@pytest.mark.parametrize("right", [{"version": 91501}, {"version": 91900}, {"version": 3005000, "cuda": None}], ids=str)
def test_a_right_cudnn_is_not(cudnn, entry, right):
    """Canary of the test above; AMD's counterpart counts otherwise, and is not asked."""
    cudnn(**right)
    with pytest.raises(ModelError, match="no such model folder") if entry == "the VAE" else nullcontext():
        ON_A_GPU[entry]()


def test_no_cudnn_is_named_and_a_cpu_needs_none(cudnn):
    cudnn(None)
    assert compute_device("cpu") == torch.device("cpu")
    with pytest.raises(LaunchError, match="has no cuDNN"):
        compute_device("cuda")


# ---------------------------------------------------------------------------------------------------------- by launcher


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "fsdp2", "fsdp2_offload"])
def test_the_shipped_configuration_launches(tiny_model, demo_clips, tmp_path, name):
    """Where there is no GPU, ``accelerate launch`` starts the same two processes, and they train on the CPU."""
    config = run_config(tiny_model(), demo_clips, tmp_path / "run")
    run_yaml = tmp_path / "run.yaml"
    run_yaml.write_text(config.to_yaml())
    file = ROOT / "accelerate_configs" / f"{name}.yaml"
    words = f"-m accelerate.commands.launch --config_file {file} --main_process_port 0"
    command = [sys.executable, *words.split()]
    finished = subprocess.run(
        [*command, str(ROOT / "train.py"), "--config", str(run_yaml)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-2000:]
    assert {"ddp": "DDP", "fsdp2": "FSDP2", "fsdp2_offload": "kept on the host"}[name] in finished.stdout
