"""Converts Qwen3 checkpoints between Hugging Face's format and Megatron's. It needs neither Megatron nor a GPU."""
