"""The evaluate command: a model, or recorded responses, on benchmarks; results as files."""
