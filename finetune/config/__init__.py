"""One YAML file, strict, composed of the sections that other modules declare.

``schema`` composes ``RunConfig`` and holds no default of its own beyond which section stands where; ``plain_yaml``
reads YAML with the line of every key, ``document`` applies ``--set`` to it; ``messages`` turns what does not validate
into errors with a line and a suggestion; ``rules`` checks what no section can see alone, against the facts of the
model; ``pinning`` settles which version of the model that is.
"""

from finetune.config.load import as_config, as_path, load_config
from finetune.config.pinning import pin_model
from finetune.config.rules import Findings, check_against, require_valid
from finetune.config.schema import DataConfig, RunConfig, json_schema
from finetune.config.traits import memory_errors, memory_traits

__all__ = [
    "DataConfig",
    "Findings",
    "RunConfig",
    "as_config",
    "as_path",
    "check_against",
    "json_schema",
    "load_config",
    "memory_errors",
    "memory_traits",
    "pin_model",
    "require_valid",
]
