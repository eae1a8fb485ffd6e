"""How a model, or one clip, lies on processes and how a step is taken there: DDP, FSDP2, DeepSpeed ZeRO, context."""
