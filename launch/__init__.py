"""Starts runs: one description of a job -> ranks on this machine, or a script for Slurm."""
