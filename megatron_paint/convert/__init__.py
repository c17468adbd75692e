"""Qwen3 checkpoints between Hugging Face's format and Megatron's, tensor by tensor. Needs neither Megatron nor a GPU."""
