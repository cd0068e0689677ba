"""What is known of a checkpoint before Megatron loads it."""
