"""Studies at sizes that are not trained here: what their runs cost by the planner, written out and
submitted as Slurm sweeps by the launcher, and read when they have finished."""
