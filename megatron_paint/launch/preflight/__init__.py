"""Checks every node of a job before any model is loaded: docs/preflight.md."""
