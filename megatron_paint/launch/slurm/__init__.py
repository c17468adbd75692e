"""Runs on a Slurm cluster: the batch script, its submission, and the decision at the end of a job."""
