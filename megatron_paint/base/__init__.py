"""What everything may use: errors, keys of randomness, strict JSON, the argument parser."""
