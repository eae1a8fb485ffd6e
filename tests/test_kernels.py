"""The Triton kernels: what they compute, what they move, and what they compile to; none of it needs a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.memory import kernel_choice, modulation, qk_norm

triton = pytest.importorskip("triton", reason="Triton is not installed: kernels can be neither run nor compiled")

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def interpreted() -> Any:
    command = [sys.executable, str(TESTS / "interpreted_kernels.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


AUTOGRAD = {"float32": 1e-6, "bfloat16": 0.01, "float16": 0.001}
"""Against float64 it is the rounding of what goes in and comes out."""


@pytest.mark.parametrize("dtype", AUTOGRAD)
def test_a_kernel_of_heads_computes_what_its_twin_does(interpreted, dtype):
    """One unit in the last place: the interpreter cuts off where a GPU rounds. Sums over tokens have some more."""
    rows = {name: row for name, row in interpreted["errors"].items() if name.endswith(f", {dtype}")}
    assert len(rows) == 5
    assert max(max(row["forward"], row["backward"], row["trained"]) for row in rows.values()) <= 1.01, rows
    assert max(row["sums"] for row in rows.values()) <= 4, rows
    assert max(max(row["autograd"], row["trained autograd"]) for row in rows.values()) < AUTOGRAD[dtype], rows


@pytest.mark.parametrize("dtype", AUTOGRAD)
def test_a_kernel_of_streams_computes_what_its_twin_does(interpreted, dtype):
    rows = {name: row for name, row in interpreted["streams"].items() if name.endswith(f", {dtype}")}
    assert len(rows) == 6
    assert max(row["twin"] for row in rows.values()) <= 1.01, rows
    assert max(row["autograd"] for row in rows.values()) < AUTOGRAD[dtype], rows


def test_a_kernel_reads_and_writes_what_it_declares_once(interpreted):
    assert len(interpreted["traffic"]) == 7
    assert all(0.9 < ratio <= 1.1 for ratio in interpreted["traffic"].values()), interpreted["traffic"]


POINTERS = {
    **dict.fromkeys(("x", "out", "grad", "heads_in", "weight", "bias"), "*bf16"),
    **dict.fromkeys(("features", "gate", "shift", "scale", "out_sum", "of_out"), "*bf16"),
    **dict.fromkeys(("rstd_out", "rstd_in", "cosines", "sines", "sums"), "*fp32"),
}

HEADS = {"rotates": True, "most_heads": 64, "padded": 64, "num_warps": 8}
STREAMS = {"padded": 4096, "num_warps": 16}
KERNELS: dict[str, tuple[str, dict[str, Any]]] = {
    "norm_and_rotate": ("norm_and_rotate_kernel", HEADS),
    "gradient, undone": ("gradient_kernel", HEADS | {"undoes": True}),
    "gradient, trained": ("gradient_kernel", HEADS | {"undoes": False}),
    "modulate": ("modulate_kernel", STREAMS | {"gated": True, "summed": True}),
    "modulate_gradient": ("modulate_gradient_kernel", STREAMS | {"gated": True, "summed": True}),
    "modulate_gradient, frozen": ("modulate_gradient_kernel", STREAMS | {"gated": True, "summed": False}),
    "add_gated": ("add_gated_kernel", STREAMS),
    "gate_gradient": ("gate_gradient_kernel", STREAMS | {"summed": True}),
}
"""What is compiled: a kernel's name, and its constants for 5B; the most that each computes."""

SMALL = ("modulate_gradient, frozen", "add_gated", "gate_gradient")
"""Less than others, so that one compute capability is enough."""


def resources(kernel: Any, capability: int, constants: dict[str, Any], **options: Any) -> dict[str, int]:
    """Registers a thread, and bytes of stack and local memory, as ``cuobjdump`` reads them from the binary."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    options = {"enable_fp_fusion": True, "num_warps": constants["num_warps"]} | options
    constants = {name: value for name, value in constants.items() if name in names}
    kinds = POINTERS | {"eps": "fp32"} | dict.fromkeys(constants, "constexpr")
    # As Triton's own look at a run's arguments has it: memory, and heads and tokens in it, begin at multiples of 16.
    strides = [name for name in names if name.endswith(("_clip", "_token", "_head")) and name.split("_")[0] != "rstd"]
    aligned = {(at,): [["tt.divisibility", 16]] for at, name in enumerate(names) if name in {*POINTERS, *strides}}
    source = ASTSource(
        kernel,
        {name: kinds.get(name, "i32") for name in names},
        {(names.index(n),): v for n, v in constants.items()},
        aligned,
    )
    return resources_of(triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["cubin"])


def resources_of(binary: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    (line,) = [line for line in text.splitlines() if "REG:" in line]
    fields = dict(field.split(":") for field in line.split() if field.startswith(("REG", "STACK", "LOCAL")))
    return {name: int(value) for name, value in fields.items()}


@pytest.fixture
def kernels(monkeypatch, tmp_path) -> Any:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from finetune.memory import kernels

    return kernels


@pytest.mark.parametrize(
    ("name", "capability"),
    [(name, capability) for name in KERNELS for capability in ([90] if name in SMALL else [80, 89, 90, 100])],
)
def test_a_kernel_compiles_and_keeps_all_in_registers(name, capability, kernels):
    kernel, constants = KERNELS[name]
    needed = resources(getattr(kernels, kernel), capability, constants)
    assert 16 < needed["REG"] <= 128 and needed["STACK"] == needed["LOCAL"] == 0, needed


def test_a_spill_is_seen(kernels):
    """Canary."""
    needed = resources(kernels.gradient_kernel, 90, HEADS | {"undoes": True}, maxnreg=24)
    assert needed["STACK"] or needed["LOCAL"]


class NoCompiler:
    @property
    def active(self) -> None:
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable")


def test_without_a_compiler_plain_torch_is_taken(monkeypatch):
    """Triton compiles what starts its kernels when it first meets a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("triton.runtime.driver", NoCompiler())
    kernel_choice.triton_kernels.cache_clear()
    try:
        with pytest.warns(UserWarning, match=r"gcc and Python's headers are needed \(Failed to find C compiler"):
            assert kernel_choice.triton_kernels() is None
    finally:
        kernel_choice.triton_kernels.cache_clear()


def test_without_triton_plain_torch_is_taken_and_it_is_said_once(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "finetune.memory.kernels", raising=False)
    kernel_choice.triton_kernels.cache_clear()
    try:
        with pytest.warns(UserWarning, match="Triton cannot be imported"):
            assert kernel_choice.triton_kernels() is None
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert kernel_choice.triton_kernels() is None
    finally:
        kernel_choice.triton_kernels.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_gpu_computes_what_plain_torch_does(dtype):
    norm = torch.nn.LayerNorm(64, eps=1e-6).to(dtype).requires_grad_(False)
    heads, grad = (torch.randn(2, 333, 48, 64).to(dtype) for _ in range(2))
    angles = torch.rand(300, 32)
    rotary = angles.cos().repeat_interleave(2, 1), angles.sin().repeat_interleave(2, 1)
    wide, rows = torch.nn.LayerNorm(3072).to(dtype).requires_grad_(False), torch.randn(2, 1, 6 * 3072).to(dtype)
    streams = [torch.randn(2, 333, 3072).to(dtype) for _ in range(4)]
    found = []
    for device in ("cpu", "cuda"):
        own, tables = norm.to(device), (rotary[0].to(device), rotary[1].to(device))
        result = qk_norm.Normed(torch.empty_like(heads, device=device), torch.empty(2, 333, 48, 1, device=device))
        qk_norm.norm_and_rotate_into(heads.to(device), own, tables, result)
        of_heads, of_input = grad.to(device, copy=True), grad.to(device, copy=True)
        qk_norm.gradient_in_place(of_heads, result, own, tables)
        sums = qk_norm.input_gradient_in_place(of_input, heads.to(device), own, tables)
        found.append([result.heads, of_heads, of_input, sums / 333])
        shift, scale, gate = rows.to(device).chunk(6, -1)[:3]
        tokens, features, of_out, of_tokens = (stream.to(device, copy=True) for stream in streams)
        modulated, totals = torch.empty_like(tokens), torch.zeros(2, 3, 3072, device=device)
        arguments = modulation.Gated(features, gate), modulation.Modulation(wide.to(device), shift, scale)
        modulation.modulate(tokens, *arguments, modulated)
        modulation.modulate_gradient(of_out, tokens, *arguments, of_tokens, totals)
        modulation.add_gated(tokens, modulation.Gated(of_out, gate))
        found[-1] += [modulated, of_tokens, features, totals / 333, tokens]
    unit = torch.finfo(dtype).eps
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs.cpu(), rtol=8 * unit, atol=32 * unit)
