"""What of a run decides which memory techniques it can use."""

from __future__ import annotations

from finetune.config.schema import RunConfig
from finetune.errors import ConfigError
from finetune.facts import Facts
from finetune.memory import Traits
from finetune.trainers.method import LoraMethod


def memory_traits(config: RunConfig, facts: Facts, *, processes: int = 1, sharded: bool = False) -> Traits:
    """The traits of a run.

    Args:
        config: of the run.
        facts: of its model.
        processes: of the launch.
        sharded: whether FSDP2 or ZeRO spreads the model over them.
    """
    method = config.method
    lora = method if isinstance(method, LoraMethod) else None
    return Traits(
        full=lora is None,
        adapts_modulation=lora is not None and any(map(lora.matches, _modulation(facts))),
        dora=lora is not None and lora.use_dora,
        processes=processes,
        sharded=sharded,
        accumulation=config.train.accumulation,
        batch_size=config.train.batch_size,
    )


def memory_errors(config: RunConfig, traits: Traits) -> list[ConfigError]:
    """What of the memory section cannot be used in a run of such traits, each with the place where it is written."""
    return [
        ConfigError(fault.what, where=config.where(f"memory.{fault.option}"), fix=fault.fix)
        for fault in config.memory.faults(traits)
    ]


def _modulation(facts: Facts) -> list[str]:
    """Names of the linear layers between the timestep and the blocks' scales, shifts and gates."""
    embeddings = [f"{name}.linear_{part}" for name in ("time_embedding", "ofs_embedding") for part in (1, 2)]
    blocks = [f"transformer_blocks.{index}.norm{part}.linear" for index in range(facts.num_layers) for part in (1, 2)]
    return embeddings + blocks
