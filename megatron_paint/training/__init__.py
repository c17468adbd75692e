"""One training run: its inputs, its start and its loop."""
