"""Which kernel computes attention: what may be chosen where, by what, and that a run keeps it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from worlds import assert_same_run

from finetune.cogvideox.spec import spec_of
from finetune.config.rules import check_against
from finetune.config.schema import RunConfig, load_config
from finetune.core.errors import ConfigError
from finetune.memory import attention
from finetune.memory.attention import AttentionRequest, attention_kernel, choose_kernel, forward_backward, obstacles
from finetune.memory.checkpointing import SavedAttention
from finetune.trainers.loop import train

CPU = AttentionRequest(torch.device("cpu"), torch.float32, 1, 2, 16, (40, 272))
GPU = replace(CPU, device=torch.device("cuda"), dtype=torch.bfloat16, lengths=(17_776,))
GOOD, OLD = 92000, 91002


@pytest.fixture
def cudnn(monkeypatch):
    def use(version: int) -> None:
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
        monkeypatch.setattr(attention, "shadowing_cudnn", lambda: "")

    use(GOOD)
    return use


@pytest.mark.parametrize(
    ("request_", "version", "refused"),
    [
        (GPU, GOOD, {"flash3", "flash4"}),
        (GPU, OLD, {"flash3", "flash4", "cudnn"}),
        (replace(GPU, lengths=(17_664, 256)), OLD, {"flash3", "flash4"}),
        (replace(GPU, deterministic=True), GOOD, {"flash3", "flash4", "cudnn"}),
        (CPU, GOOD, {"flash3", "flash4", "cudnn", "efficient"}),
    ],
    ids=["a GPU", "an old cuDNN", "lengths that 128 divides", "deterministic", "a CPU"],
)
def test_what_cannot_be_used_is_known_before_it_is_tried(request_, version, refused, cudnn):
    cudnn(version)
    assert obstacles(request_).keys() == refused


def test_a_package_that_was_built_for_another_torch_is_passed_over(cudnn, monkeypatch, tmp_path):
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    monkeypatch.syspath_prepend(tmp_path)
    assert "cannot be imported" in obstacles(GPU)["flash4"]


@pytest.mark.parametrize("kernel", ["cudnn", "flash3", "efficient"])
def test_a_kernel_that_is_not_here_is_refused_with_those_that_are(kernel):
    with pytest.raises(ConfigError, match=kernel) as caught:
        attention.require_kernel(kernel, CPU, where="model.attention")
    assert caught.value.fix == "use auto, flash, math" and caught.value.where == "model.attention"


@pytest.mark.parametrize("kernel", ["auto", "flash", "math"])
def test_what_runs_here_computes_the_same(kernel):
    attention.require_kernel(kernel, CPU, where="model.attention")
    inputs = [torch.randn(CPU.shape, dtype=torch.float64) for _ in range(4)]
    leaves = [tensor.clone().requires_grad_() for tensor in inputs[:3]]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        theirs = torch.autograd.grad(functional.scaled_dot_product_attention(*leaves), leaves, inputs[3])
    with attention_kernel(kernel):
        ours = forward_backward(inputs[:3], inputs[3])
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference)


def test_the_fastest_is_chosen_and_what_fails_is_passed_over(cudnn, monkeypatch):
    rates = {"CUDNN_ATTENTION": None, "FLASH_ATTENTION": 300e12, "EFFICIENT_ATTENTION": 200e12}

    def rate(request: AttentionRequest, *, seconds: float) -> float:
        # Otherwise a few tokens are tried. What is an Exception is an obstacle, which a failed test must not become.
        if seconds and (seconds != pytest.approx(1 / 3) or request.shape != (1, 2, 17_776, 16)):
            pytest.fail(f"timed for {seconds} s on {request.shape}")
        (name,) = (backend.name for backend in torch.nn.attention._cur_sdpa_kernel_backends())
        if rates[name] is None:
            raise RuntimeError("No available kernel. Aborting execution.")
        return rates[name]

    monkeypatch.setattr(attention, "attention_rate", rate)
    choice = choose_kernel(GPU)
    assert choice.kernel == "flash" and "flash 300, efficient 200" in choice.lines[0] and "9.20.0" in choice.lines[0]
    rates["CUDNN_ATTENTION"] = 500e12
    assert choose_kernel(GPU).kernel == "cudnn"
    assert choose_kernel(GPU, recorded="efficient").kernel == "efficient"
    rates["CUDNN_ATTENTION"] = None  # the run goes on on another card
    choice = choose_kernel(GPU, recorded="cudnn")
    assert choice.kernel == "flash" and "No available kernel" in choice.lines[1]
    cudnn(OLD)
    with pytest.raises(pytest.fail.Exception, match=r"for 0\.5 s"):  # a third of the second was for cuDNN
        choose_kernel(GPU, recorded="cudnn")


def test_where_none_can_be_timed_torch_chooses(cudnn, monkeypatch):
    def rate(request: AttentionRequest, *, seconds: float) -> float:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(attention, "attention_rate", rate)
    choice = choose_kernel(GPU)
    assert choice.kernel == "auto" and "out of luck" in choice.lines[0]
    assert choose_kernel(CPU).kernel == "auto" and not choose_kernel(CPU).lines


def test_a_cudnn_in_the_place_of_torchs_own_is_named():
    line = "7f00-7f01 r-xp 00000000 08:01 42 {}/libcudnn{}.so.9\n"
    wheel = Path("/venv/nvidia/cudnn")
    own = line.format("/venv/nvidia/cudnn/lib", "") + line.format("/venv/nvidia/cudnn/lib", "_graph")
    assert attention.describe_shadowing(own, wheel) == ""
    told = attention.describe_shadowing(own + line.format("/usr/lib/x86_64-linux-gnu", "_ops"), wheel)
    assert "/usr/lib/x86_64-linux-gnu/libcudnn_ops.so.9" in told and "LD_LIBRARY_PATH" in told


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "arguments"), [("cudnn", (None, False)), ("flash", ()), ("efficient", (None, False))])
def test_each_kernel_of_a_gpu_is_kept_with_its_logsumexp(name, arguments):
    """On tensors that only claim to be on a GPU: the operation is dispatched once, and asked for its logsumexp."""
    op = getattr(torch.ops.aten, f"_scaled_dot_product_{name}_attention").default
    with FakeTensorMode(), torch.no_grad(), Seen() as seen:
        q, k, v = (torch.empty(1, 2, 272, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        saved = SavedAttention(enabled=True)
        with saved.recording():
            first = op(q, k, v, *arguments)
        with saved.replaying():
            again = op(q, k, v, *arguments)
    assert seen.names.count(op.name()) == 1 and again[0] is first[0]
    assert first[0].shape == (1, 2, 272, 64) and first[1].numel() >= 2 * 272


def with_attention(config: RunConfig, kernel: str) -> RunConfig:
    return config.model_copy(update={"model": config.model.model_copy(update={"attention": kernel})})


def test_a_run_goes_on_with_the_kernel_that_it_began_with(tiny_run, capsys):
    train(with_attention(tiny_run("a", train={"steps": 1}), "math"))
    resumed = train(tiny_run("a", train={"steps": 2}))
    assert "attention: math, as this run was trained so far" in capsys.readouterr().out
    assert load_config(tiny_run("a").output_dir / "config.yaml").model.attention == "math"
    assert_same_run(resumed, train(with_attention(tiny_run("b", train={"steps": 2}), "math")))
    assert torch.nn.attention._cur_sdpa_kernel_backends() != [torch.nn.attention.SDPBackend.MATH]


def test_what_math_forms_cannot_be_kept(tiny_run):
    config = with_attention(tiny_run("run", memory={"checkpointing": "selective"}), "math")
    assert any("math" in error.what for error in check_against(config, spec_of(config.model, shipped=True)).errors)
