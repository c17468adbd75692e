"""Loggers: places outside of the run folder's own files that show a run. Rank 0 alone has any."""
