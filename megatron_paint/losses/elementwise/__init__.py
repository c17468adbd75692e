"""The elementwise work on a chunk of logits, in torch and in Triton."""
