"""Checks every node of a job in under a minute, before any model is loaded: docs/preflight.md."""
