"""The lowest package: errors, keys for randomness, strict JSON, the argument parser."""
