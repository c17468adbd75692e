"""Checkpoint formats on disk: Hugging Face, PEFT and Megatron. They are read and written without Megatron."""
