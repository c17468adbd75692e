"""The output layer: chunks of logits, their matrix products and their gradients."""
