"""``finetune init --from``: other trainers' scripts and files, each in its own form, as configurations of ours."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import finetune
from finetune.cli.init import write_translated
from finetune.config.other_trainers import translate
from finetune.core.errors import ConfigError

COGVIDEO = r"""#!/usr/bin/env bash
export TOKENIZERS_PARALLELISM=false
MODEL=(
    --model_path "THUDM/CogVideoX1.5-5B-I2V"
    --model_name "cogvideox1.5-i2v"  # ["cogvideox-i2v"]
    --model_type "i2v"
    --training_type "lora"
)
DATA=(
    --data_root "my clips"
    --caption_column "prompt.txt"
    # --image_column "images.txt"  # a comment's flag is none
    --video_column "videos.txt"
    --train_resolution "81x768x1360"
)
REST=(
    --output_dir ../out --report_to "all" --train_epochs 10 --batch_size 1
    --mixed_precision "bf16" --nccl_timeout 1800
    --checkpointing_steps 10 --resume_from_checkpoint "/old/checkpoint-10"
    --do_validation true --validation_dir val --validation_steps 20
    --validation_prompts prompts.txt --validation_images images.txt --gen_fps 16
)
accelerate launch --config_file accelerate_config.yaml train.py \
    "${MODEL[@]}" \
    "${DATA[@]}" \
    "${REST[@]}" 2>&1 | tee log.txt
"""

COGKIT = """
name4train: "t2v-train"
model_name: "cogvideox1.5-t2v"
model_path: "THUDM/CogVideoX1.5-5B"
output_dir: "/path/to/output"
report_to: null
data_root: "/path/to/data"
seed: 7
training_type: "sft"
strategy: "FULL_SHARD"
enable_packing: false
train_resolution: [81, 768, 1360]
train_epochs: 3
batch_size: 2
mixed_precision: "bf16"
learning_rate: 2.0e-5
do_validation: false
validation_steps: 10
"""

FACTORY = r"""
RATES=("1e-4" "1e-3")
ROOT="/data/disney"
for rate in "${RATES[@]}"; do
  out="./lora_${rate}/"
  cmd="accelerate launch --gpu_ids 0 training/cogvideox_text_to_video_lora.py \
    --pretrained_model_name_or_path THUDM/CogVideoX-5b --data_root $ROOT \
    --caption_column prompt.txt --video_column videos.txt --id_token BW_STYLE \
    --height_buckets 480 --width_buckets 720 848 --frame_buckets 49 --random_flip 0.5 \
    --validation_prompt \"BW_STYLE a goat -- and friends:::BW_STYLE a panda\" \
    --validation_prompt_separator ::: --num_validation_videos 2 --rank 128 \
    --train_batch_size 1 --max_train_steps 3000 --learning_rate $rate \
    --lr_scheduler cosine_with_restarts --lr_warmup_steps 400 --lr_num_cycles 1 \
    --optimizer adam --use_8bit --gradient_checkpointing --output_dir $out"
  echo "Running command: $cmd"
  eval $cmd
done
"""

FINETRAINERS = r"""
data_cmd=( --dataset_config sets.json --precomputation_items 25 )
DDP_1="--parallel_backend ptd --dp_degree 1 --cp_degree 2"
FSDP_2="--parallel_backend ptd --dp_shards 2"
parallel_cmd=( $DDP_1 )
torchrun --standalone --nproc_per_node=1 train.py "${parallel_cmd[@]}" "${data_cmd[@]}" \
  --model_name cogvideox --pretrained_model_name_or_path ./local --training_type lora \
  --target_modules "blocks.*(to_q|to_k)" --rank 32 --lora_alpha 32 --lr 3e-5 \
  --lr_scheduler=polynomial --lr_power 2 --optimizer adamw-bnb-8bit --train_steps 5000 \
  --validation_dataset_file val.json --validation_steps 500 --output_dir /out --report_to wandb --wombat 3
"""

SETS = {
    "datasets": [
        {"data_root": "a", "dataset_type": "video", "id_token": "zkx", "video_resolution_buckets": [[49, 480, 720]]},
        {"data_root": "stills", "dataset_type": "image", "image_resolution_buckets": [[480, 720]]},
    ]
}

CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "CogVideo": (
        "train.sh",
        COGVIDEO,
        {
            "model.pretrained": "zai-org/CogVideoX1.5-5B-I2V",
            "model.dtype": "bf16",
            "data.sources": [{"path": "theirs/my clips"}],
            "data.buckets": ["81x768x1360"],
            "method.rank": 128,
            "method.alpha": 64,
            "optimizer.lr": 2e-5,
            "optimizer.kind": "adamw",
            "lr_schedule.warmup_steps": 100,
            "train.epochs": 10,
            "validation.sample_every": 20,
            "validation.samples": [{"prompt": "a cat", "image": "theirs/val/cat.png"}],
            "checkpoint.every": 10,
            "tracking.kind": "tensorboard",
            "output_dir": "out",
        },
    ),
    "CogKit": (
        "config.yaml",
        COGKIT,
        {
            "data.sources": [{"path": "/path/to/data"}],
            "data.buckets": ["81x768x1360"],
            "method": {"kind": "full"},
            "train.epochs": 3,
            "train.batch_size": 2,
            "train.seed": 7,
            "validation.sample_every": None,
            "tracking.kind": "none",
        },
    ),
    "cogvideox-factory": (
        "train.sh",
        FACTORY,
        {
            "data.trigger": "BW_STYLE",
            "data.sources": [{"path": "/data/disney", "random_flip": True}],
            "data.buckets": ["49x480x720", "49x480x848"],
            "method.rank": 128,
            "method.alpha": 64,
            "optimizer.kind": "adamw8bit",
            "optimizer.lr": 1e-4,
            "lr_schedule": {"kind": "cosine", "warmup_steps": 400},
            "train.steps": 3000,
            "memory.checkpointing": "full",
            "validation.samples": [
                {"prompt": f"BW_STYLE a {what}", "seed": seed}
                for what in ("goat -- and friends", "panda")
                for seed in (0, 1)
            ],
            "output_dir": "theirs/lora_1e-4",
        },
    ),
    "finetrainers": (
        "train.sh",
        FINETRAINERS,
        {
            "model.pretrained": "theirs/local",
            "data.sources": [{"path": "theirs/a", "trigger": "zkx"}],
            "data.buckets": ["49x480x720"],
            "method.targets": "blocks.*(to_q|to_k)",
            "optimizer.kind": "adamw8bit",
            "optimizer.lr": 3e-5,
            "lr_schedule": {"warmup_steps": 500},
            "train.steps": 5000,
            "parallel.context": 2,
            "validation.samples": [{"prompt": "a dog"}],
            "tracking.kind": "wandb",
        },
    ),
}


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    folder = tmp_path / "theirs"
    (folder / "val").mkdir(parents=True)
    (folder / "local").mkdir()
    (folder / "val" / "prompts.txt").write_text("a cat\n")
    (folder / "val" / "images.txt").write_text("cat.png\n")
    (folder / "sets.json").write_text(json.dumps(SETS))
    (folder / "val.json").write_text(json.dumps({"data": [{"caption": "a dog", "num_frames": 49}]}))
    return folder


@pytest.mark.parametrize("trainer", CASES)
def test_settings_and_defaults_become_ours_and_the_file_can_be_run(trainer, theirs):
    name, text, expected = CASES[trainer]
    source, output = theirs / name, theirs.parent / "run.yaml"
    source.write_text(text)
    translation = translate(source, theirs.parent)
    assert translation.trainer == trainer
    for place, value in expected.items():
        got: Any = translation.values
        for part in place.split("."):
            got = got[part]
        assert got == value, place
    write_translated(source, output)
    finetune.load_config(output)
    with pytest.raises(ConfigError, match="exists already"):
        write_translated(source, output)


def test_what_a_script_of_finetrainers_leaves_out_is_as_their_parser_has_it(theirs):
    script = theirs / "least.sh"
    script.write_text("python train.py --pretrained_model_name_or_path local --model_name cogvideox --data_root a\n")
    values = translate(script, theirs.parent).values
    assert {name: values["method"][name] for name in ("rank", "alpha")} == {"rank": 64, "alpha": 64}
    assert values["data"]["caption_dropout"] == 0


def test_a_file_that_a_script_names_from_its_repository_is_found(theirs, tmp_path):
    (theirs / "examples").mkdir()
    script = theirs / "examples" / "train.sh"
    line = "python train.py --pretrained_model_name_or_path local --model_name cogvideox --dataset_config {}\n"
    script.write_text(line.format("sets.json"))  # beside neither the script nor where this runs
    found = translate(script, tmp_path)
    assert found.values["data"]["sources"] == [{"path": "theirs/a", "trigger": "zkx"}]
    script.write_text(line.format("nowhere.json"))
    lost = translate(script, tmp_path)
    assert ("dataset_config", "it cannot be read here") in [(setting.name, why) for setting, why in lost.unmapped]
    assert any("nowhere.json is not here" in note for note in lost.notes)


def test_the_example_of_diffusers_calls_some_settings_otherwise(theirs):
    script = theirs / "example.sh"
    script.write_text(
        "accelerate launch train_cogvideox_lora.py --pretrained_model_name_or_path local --dataset_name a/b"
        " --optimizer AdamW --adam_beta1 0.8 --adam_beta2 0.9 --adam_weight_decay 0.1\n"
    )
    values = translate(script, theirs.parent).values
    assert values["data"]["sources"] == [{"kind": "hub", "path": "a/b"}]
    assert values["optimizer"]["betas"] == [0.8, 0.9] and values["optimizer"]["weight_decay"] == 0.1


@pytest.mark.parametrize("trainer", CASES)
def test_every_line_is_mapped_or_named_with_a_reason(trainer, theirs):
    name, text, _ = CASES[trainer]
    (theirs / name).write_text(text)
    translation = translate(theirs / name, theirs.parent)
    rows = {setting.name: (setting.line, outcome) for setting, outcome in translation.mapped + translation.unmapped}
    flag = re.compile(r"^(\w+):" if trainer == "CogKit" else r"(?<![\w-])--(\w+)")
    written = [
        (number, name)
        for number, line in enumerate(text.splitlines(), start=1)
        if not line.lstrip().startswith("#")
        for name in flag.findall(line.split("  # ")[0])
    ]
    launcher = {"config_file", "gpu_ids", "standalone", "nproc_per_node", "dp_shards"}
    missing = [(number, name) for number, name in written if name not in rows and name not in launcher]
    assert not missing
    lines = {(line, name) for name, (line, _) in rows.items() if line is not None}
    assert lines <= set(written)
    assert all(outcome for _, outcome in rows.values())
    shown = translation.text()
    assert all(setting.name in shown for setting, _ in translation.mapped + translation.unmapped)


@pytest.mark.parametrize(
    ("trainer", "note"),
    [
        ("CogVideo", "a learning rate of 2e-05 hardly moves a LoRA"),
        ("cogvideox-factory", "the script tries rate = 1e-4, 1e-3: 1e-4 is taken"),
        ("cogvideox-factory", "Adam became AdamW"),
        ("finetrainers", "stills holds images"),
        ("CogVideo", "data.caption_dropout is 0 as it was with them"),
    ],
)
def test_what_to_look_at_is_said(trainer, note, theirs):
    name, text, _ = CASES[trainer]
    (theirs / name).write_text(text)
    assert any(note in each for each in translate(theirs / name, theirs).notes)


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("lr_scheduler", "there is no such schedule"),
        ("wombat", "none of ours is known for it"),
        ("parallel_backend", "the launcher's"),
        ("precomputation_items", "the cache holds all"),
    ],
)
def test_what_has_no_counterpart_is_said_why(setting, reason, theirs):
    (theirs / "train.sh").write_text(FINETRAINERS)
    unmapped = {each.name: why for each, why in translate(theirs / "train.sh", theirs).unmapped}
    assert reason in unmapped[setting]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.sh", b"echo hello", "starts no training of"),
        ("a.yaml", b"model: {pretrained: x}", "starts no training of"),
        ("a.yaml", b"a: [", "a.yaml"),
        ("a.sh", b"python train.py --prompt 'never ends", "a quote that begins with .* never ends"),
        ("a.sh", b"X=(a b\npython train.py --model_path x", "starts no training of"),
        ("a.sh", b"\xff\xfe\x00", "no text in UTF-8"),
        ("a.sh", b"A=xx\n" + b"A=$A${A}\n" * 80, "grow beyond any command line"),
        ("a.sh", b"#" * (1 << 21), "too large for a script"),
        ("absent.sh", None, "cannot be read: No such file"),
        (
            "a.sh",
            b"python train.py --model_path x --train_resolution 81x768 --data_root d --output_dir o",
            "data.buckets",
        ),
    ],
)
def test_what_is_no_script_of_theirs_is_refused(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        write_translated(tmp_path / name, tmp_path / "run.yaml")
