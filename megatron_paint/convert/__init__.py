"""Qwen3 checkpoints between Hugging Face's format and Megatron's, tensor by tensor; needs no Megatron, no GPU."""
