"""The only folder that imports Megatron-Core or Transformer Engine."""
