"""How a model lies on processes and how a step is taken there: one process and DDP, FSDP2, DeepSpeed ZeRO."""
