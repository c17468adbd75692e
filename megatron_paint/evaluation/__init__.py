"""Evaluates a model: benchmarks, sampled answers on disk, statistics, reports and comparisons."""
