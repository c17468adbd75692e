"""Grading, benchmarks and statistics, and on top of them the evaluate command (`command`, `recorded`, `requested`).

Importing this package loads nothing heavy, because grading workers import it.
"""
