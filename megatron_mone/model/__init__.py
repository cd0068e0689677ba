"""A run's arguments, its checks, and the GPT model that Megatron trains of them."""
