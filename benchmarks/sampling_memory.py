"""What sampling takes of a GPU, however the model is held, and what fewer bits change in the transformer's output.

Peaks are predicted for the published models at their own sizes. Errors are measured against bfloat16 on one block of
CogVideoX-5B's width over a few hundred tokens, with random weights, where the machine can run the scheme. Random
weights have no outliers, which trained ones may have: read them as a comparison of the schemes.

    python benchmarks/sampling_memory.py [--output benchmarks/results/sampling_memory.json]

writes the figures, and the table of docs/inference.md from them.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from finetune.cogvideox.load import ModelConfig, empty_transformer, load_transformer
from finetune.cogvideox.model_files import KNOWN_MODELS, known_model
from finetune.cogvideox.spec import read_spec
from finetune.core.types import GIB, Bucket
from finetune.inference.loading import load_denoiser
from finetune.inference.offload import OFFLOADS
from finetune.inference.placement import Placement, Sampling, peaks
from finetune.inference.quantization import SCHEMES, scheme_faults

ROOT = Path(__file__).parents[1]
PAGE, RESULTS = ROOT / "docs/inference.md", ROOT / "benchmarks/results/sampling_memory.json"
BEGIN = "<!-- table: written by benchmarks/sampling_memory.py from its results; do not edit -->"
END = "<!-- /table -->"

PLACEMENTS: Mapping[str, Placement] = {
    **{f"bf16, `{how}`": Placement(how, stream_text=how != "none") for how in OFFLOADS},
    **{
        f"`{scheme}`, `{how}`": Placement(how, stream_text=True, quantization=scheme)
        for scheme in ("int8", "fp8-cast", "nf4")
        for how in ("none", "model")
    },
    "`int8`, `group`": Placement("group", stream_text=True, quantization="int8"),
}
"""T5 is streamed wherever something is saved; dynamic schemes, fp8 and bnb-int8 take what int8 takes."""


def predicted() -> dict[str, dict[str, float]]:
    """GiB of the highest phase, by placement and model."""
    found: dict[str, dict[str, float]] = {name: {} for name in PLACEMENTS}
    for variant in KNOWN_MODELS:
        folder = known_model(variant)
        spec = read_spec(str(folder))
        sampling = Sampling(folder, spec, spec.training_bucket, torch.bfloat16, encodes=spec.image_to_video)
        for name, placement in PLACEMENTS.items():
            found[name][variant] = round(max(peaks(sampling, placement).values()) / GIB, 2)
    return found


def measured(folder: Path, device: torch.device) -> dict[str, float | None]:
    """Norm of the output's difference from bfloat16's over its norm, by scheme; None where it cannot run here."""
    from quantization_error import predict, random_weights

    from finetune.memory.quantized_linear import placement

    config = json.loads((known_model("5b") / "transformer/config.json").read_text())
    (folder / "transformer").mkdir(parents=True)
    (folder / "transformer/config.json").write_text(json.dumps({**config, "num_layers": 1}))
    module = empty_transformer(folder, dtype=torch.bfloat16, device="cpu")
    weights = random_weights({name: tensor.shape for name, tensor in module.state_dict().items()})
    module.load_state_dict(dict(weights))
    module.save_pretrained(folder / "transformer")
    spec, model, bucket = read_spec(str(known_model("5b"))), ModelConfig(pretrained=str(folder)), Bucket(9, 128, 192)

    def output(transformer: Any) -> torch.Tensor:
        return predict(transformer, spec, bucket, device).float()

    native = output(load_transformer(model, device=device, dtype=torch.bfloat16))
    found: dict[str, float | None] = {}
    for scheme in SCHEMES:
        if (
            scheme == "nf4" and device.type == "cpu"
        ):  # the same format through the training's own layers, which run here
            other = load_transformer(model, device=device, dtype=torch.bfloat16, placement=placement("nf4"))
        elif [*scheme_faults(scheme, "--quantize", device, torch.bfloat16)]:
            found[scheme] = None
            continue
        else:
            other = load_denoiser(model, Placement(quantization=scheme), device, torch.bfloat16)
        error = torch.linalg.vector_norm(output(other) - native) / torch.linalg.vector_norm(native)
        found[scheme] = round(error.item(), 5)
        print(scheme, found[scheme], flush=True)
    return found


def table(found: Mapping[str, Any]) -> Iterator[str]:
    """The page's lines."""
    yield "**Predicted**: GiB of tensors at the highest moment, at each model's own size, with guidance."
    yield ""
    yield f"| held as | {' | '.join(KNOWN_MODELS)} |"
    yield "|---" * (len(KNOWN_MODELS) + 1) + "|"
    for name, row in found["predicted_gib"].items():
        yield f"| {name} | {' | '.join(f'{row[variant]:.1f}' for variant in KNOWN_MODELS)} |"
    yield ""
    yield (
        "T5 is whole in the first row and streamed in all others. `int8-dynamic`, `fp8`, `fp8-dynamic` and `bnb-int8`"
        " take what `int8` takes.\n\nThe difference from bf16 in the output of one block of 5B's width with random"
        f" weights, **measured** on {found['machine']}:"
    )
    yield ""
    yield f"| {' | '.join(f'`{scheme}`' for scheme in found['relative_error'])} |"
    yield "|---" * len(found["relative_error"]) + "|"
    errors = ("not measured" if error is None else f"{error:.2%}" for error in found["relative_error"].values())
    yield f"| {' | '.join(errors)} |"


def renewed(page: str, found: Mapping[str, Any]) -> str:
    """The page with the table of these figures."""
    before, rest = page.split(BEGIN)
    return "\n".join([before + BEGIN, "", *table(found), "", END + rest.split(END)[1]])


def main() -> None:
    """Predict, measure, and write figures and table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS)
    output = parser.parse_args().output
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"a CPU ({platform.machine()})"
    with tempfile.TemporaryDirectory() as folder:
        errors = measured(Path(folder), device)
    found = {
        "predicted_gib": predicted(),
        "relative_error": errors,
        "machine": f"{name}, torch {torch.__version__}",
    }
    output.write_text(json.dumps(found, indent=1) + "\n")
    PAGE.write_text(renewed(PAGE.read_text(encoding="utf-8"), found), encoding="utf-8")


if __name__ == "__main__":
    main()
