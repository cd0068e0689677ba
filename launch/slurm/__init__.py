"""The batch script, and what Slurm is asked and answers."""
