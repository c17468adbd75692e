"""Starts runs."""
