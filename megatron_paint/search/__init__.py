"""A search over settings: trials are training runs, chosen and pruned by Optuna on held-out problems."""
