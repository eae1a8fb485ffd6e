"""What stands behind ``finetune.export``: where weights come from, how they are verified, what is said of them."""
