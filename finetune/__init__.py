"""Fine-tune CogVideoX: LoRA and full, from clips and captions to a verified diffusers export.

    from finetune import export, load_config, precompute, train

    config = load_config("run.yaml", ["train.steps=500"])
    precompute(config)
    report = train(config)
    export(report.run_dir)

``import finetune`` costs nothing: a verb loads what it needs when it is called. ``docs/python.md`` has them all.
"""

from finetune.data import caption, check, doctor, prepare
from finetune.precompute import precompute
from finetune.runs import load_config, lr_find, plan, report, strength, train, ui
from finetune.sampling import enhance, generate, invert, story, vae
from finetune.sharing import convert, export, inspect, merge, push

__version__ = "0.1.0"
__all__ = [
    "__version__",
    "caption",
    "check",
    "convert",
    "doctor",
    "enhance",
    "export",
    "generate",
    "inspect",
    "invert",
    "load_config",
    "lr_find",
    "merge",
    "plan",
    "precompute",
    "prepare",
    "push",
    "report",
    "story",
    "strength",
    "train",
    "ui",
    "vae",
]
