"""What trains: LoRA adapters or every weight."""
