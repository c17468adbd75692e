"""Rollouts from vLLM servers, and the transfer of the trainer's weights to them. Facts about vLLM are of 0.32."""
