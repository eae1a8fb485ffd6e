"""What holding the base in few bits costs in accuracy: the error of the transformer's output against bfloat16.

On the tiny look-alikes of every variant, and on a transformer of CogVideoX-5B's width with random weights: 42 blocks on
a GPU, one on a CPU. For scale, bfloat16 itself is compared with float32 where there is a float32.
Random weights have no outliers, which trained ones may have: read the figures as a comparison of the formats.

    python benchmarks/quantization_error.py [--blocks 1] [--output benchmarks/results/quantization_error_cpu.json]
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from finetune.cogvideox.denoise import denoise
from finetune.cogvideox.load import ModelConfig, empty_transformer, load_transformer, place
from finetune.cogvideox.model_files import known_model
from finetune.cogvideox.spec import ModelSpec, read_spec
from finetune.core.rng import generator
from finetune.core.types import Bucket
from finetune.memory.config import QuantisedFormat
from finetune.memory.quantized_linear import placement
from finetune.testing.tiny import VARIANTS, build_tiny

FORMATS: tuple[QuantisedFormat, ...] = get_args(QuantisedFormat)


@torch.no_grad()
def predict(transformer: Any, spec: ModelSpec, bucket: Bucket, device: torch.device) -> Tensor:
    """The velocity of one noisy clip at the middle of the schedule, on the CPU."""
    channels, _, height, width = spec.latent_shape(bucket)
    shape = (1, channels, spec.padded_latent_frames(bucket.frames), height, width)

    def noise(name: str, *size: int) -> Tensor:
        return torch.randn(size, generator=generator(0, "quantization-error", name)).to(device)

    image = noise("image", 1, channels, 1, height, width) if spec.image_to_video else None
    embeds = noise("embeds", 1, spec.max_text_seq_length, spec.text_embed_dim)
    return denoise(transformer, spec, noise("latents", *shape), embeds, torch.tensor([500], device=device), image).cpu()


def errors(outputs: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """Every output against bfloat16; and bfloat16 against float32, where that is there."""
    native = outputs["bf16"]
    found = {kind: _error(outputs[kind], native) for kind in FORMATS}
    if "fp32" in outputs:
        found["bf16 against fp32"] = _error(native, outputs["fp32"])
    return {kind: {name: round(value, 6) for name, value in error.items()} for kind, error in found.items()}


def _error(output: Tensor, reference: Tensor) -> dict[str, float]:
    """Norm of the difference over the norm of the reference, and the cosine of the angle between the two."""
    ours, theirs = output.float().flatten(), reference.float().flatten()
    distance = torch.linalg.vector_norm(ours - theirs) / torch.linalg.vector_norm(theirs)
    return {"relative_l2": distance.item(), "cosine": torch.cosine_similarity(ours, theirs, dim=0).item()}


def tiny(variant: str, folder: Path) -> dict[str, dict[str, float]]:
    """The errors of a look-alike with two blocks."""
    spec, model = read_spec(str(build_tiny(folder, variant))), ModelConfig(pretrained=str(folder))
    cpu, bucket = torch.device("cpu"), Bucket(9, 64, 64)
    outputs = {
        kind: predict(load_transformer(model, dtype=torch.bfloat16, placement=placement(kind)), spec, bucket, cpu)
        for kind in FORMATS
    }
    outputs["bf16"] = predict(load_transformer(model, dtype=torch.bfloat16), spec, bucket, cpu)
    outputs["fp32"] = predict(load_transformer(model, dtype=torch.float32), spec, bucket, cpu)
    return errors(outputs)


def random_weights(shapes: dict[str, torch.Size]) -> Iterator[tuple[str, Tensor]]:
    """Weights of unit gain, the same in each call, one at a time."""
    for name, shape in shapes.items():
        drawn = torch.randn(shape, generator=generator(0, "quantization-error", name))
        if len(shape) == 1:  # of a norm, or a bias
            yield name, drawn * 0.02 + (1.0 if name.endswith(("norm.weight", "norm_q.weight", "norm_k.weight")) else 0)
        else:
            yield name, drawn / shape[1:].numel() ** 0.5


def full(blocks: int, bucket: Bucket, device: torch.device) -> dict[str, dict[str, float]]:
    """The errors of a transformer as wide as CogVideoX-5B's, ``blocks`` deep."""
    spec = read_spec(str(known_model("5b")))
    outputs = {}
    with tempfile.TemporaryDirectory() as folder:
        own = Path(folder) / "transformer"
        own.mkdir()
        config = json.loads((known_model("5b") / "transformer/config.json").read_text())
        (own / "config.json").write_text(json.dumps({**config, "num_layers": blocks}))
        for kind in ("native", *FORMATS):
            module = empty_transformer(Path(folder), dtype=torch.bfloat16, device="meta")
            weights = random_weights({name: tensor.shape for name, tensor in module.state_dict().items()})
            place(module, weights, device, placement(kind))
            outputs["bf16" if kind == "native" else kind] = predict(module.eval(), spec, bucket, device)
    return errors(outputs)


def main() -> None:
    """Measure, print and write the figures."""
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    results = Path(__file__).parent / "results" / f"quantization_error_{device.type}.json"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=42 if gpu else 1, help="of the wide transformer; 0 for none")
    parser.add_argument("--output", type=Path, default=results)
    args = parser.parse_args()
    bucket = Bucket(49, 480, 720) if gpu else Bucket(9, 64, 64)
    with tempfile.TemporaryDirectory() as folder:
        found: dict[str, Any] = {"tiny": {variant: tiny(variant, Path(folder) / variant) for variant in VARIANTS}}
    if args.blocks:
        found["wide"] = {
            "blocks": args.blocks,
            "bucket": str(bucket),
            "errors": full(args.blocks, bucket, device),
        }
    name = torch.cuda.get_device_name() if gpu else platform.machine()
    found["machine"] = f"{name}, {platform.system()}, torch {torch.__version__}"
    figures = json.dumps(found, indent=1)
    print(figures)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(figures + "\n")


if __name__ == "__main__":
    main()
