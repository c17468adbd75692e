"""Checkpoint formats on disk: Hugging Face, PEFT and Megatron; needs no Megatron."""
