"""What studies measure of checkpoints and of given models: functions that a task names, each called
in a process of its own, and what they are made of. Formulas name their source."""
