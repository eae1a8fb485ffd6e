"""What a checkpoint says of itself: the numbers that training needs, read from its JSON and from nothing else.

No code here or above asks for a model's name. Two checkpoints with the same numbers are treated alike, so that a new
CogVideoX variant, or a tiny look-alike of a published one, costs no code. Reading needs neither weights nor diffusers.
"""

from finetune.facts.guard import (
    CONFIG_FILES,
    read_json,
    read_part,
    require_loadable,
    require_own_files,
    require_plain_index,
)
from finetune.facts.locate import (
    HUB_IDS,
    KNOWN_MODELS,
    canonical_name,
    hub_sha256,
    id_in_cache,
    is_commit,
    json_folder,
    known_model,
    pin_revision,
    published_variant,
    resolve_pretrained,
)
from finetune.facts.model import Facts
from finetune.facts.parts import SchedulerClass
from finetune.facts.read import read_facts
from finetune.facts.tokenizer import require_tokenizer

__all__ = [
    "CONFIG_FILES",
    "HUB_IDS",
    "KNOWN_MODELS",
    "Facts",
    "SchedulerClass",
    "canonical_name",
    "hub_sha256",
    "id_in_cache",
    "is_commit",
    "json_folder",
    "known_model",
    "pin_revision",
    "published_variant",
    "read_facts",
    "read_json",
    "read_part",
    "require_loadable",
    "require_own_files",
    "require_plain_index",
    "require_tokenizer",
    "resolve_pretrained",
]
