"""Runs on a Slurm cluster: one batch script, its submission, and what a job does when it ends."""
