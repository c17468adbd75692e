"""`megatron-paint plan`: which layout of a model on given GPUs is the fastest one that fits into their memory."""
