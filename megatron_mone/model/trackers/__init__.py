"""W&B and MLflow beside TensorBoard: what Megatron and MoNE write there once a step goes to each.

One run of a tracker for all starts of a training run: its id stands beside the checkpoints. Works
where Megatron's writers stand, on the last rank alone, for any engine. `flags` are those that ask
for it, `runs` the two trackers, `attach` where they come into Megatron's training.
"""
