"""The report of runs: one HTML file with curves, evaluations, settings, warnings and a sample viewer."""
