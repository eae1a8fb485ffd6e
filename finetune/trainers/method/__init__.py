"""What trains: a LoRA adapter (through peft), or every weight of the transformer.

A method prepares a transformer in place (``apply``), and from then on names what trains. Names are the ones the
finished product needs: peft's state-dict names for LoRA, the plain diffusers parameter names for full fine-tuning.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from finetune.trainers.method.adapter import COMPONENT, METADATA_KEY, Adapter, foreign_layout, read_adapter
from finetune.trainers.method.full import FullMethod
from finetune.trainers.method.lora import LoraMethod
from finetune.trainers.method.tensors import load_strictly, require_same

MethodConfig = Annotated[LoraMethod | FullMethod, Field(discriminator="kind")]

__all__ = [
    "COMPONENT",
    "METADATA_KEY",
    "Adapter",
    "FullMethod",
    "LoraMethod",
    "MethodConfig",
    "foreign_layout",
    "load_strictly",
    "read_adapter",
    "require_same",
]
