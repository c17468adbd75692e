"""Qwen3: its sizes from config.json, and its tensors in Hugging Face and Megatron checkpoints."""
