"""What becomes of each of Megatron's flags when MoNE is on: the table behind docs/FEATURES.md."""
