"""Grades answers against the reference answer."""
