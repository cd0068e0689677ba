"""What a GPU job imports and this machine has not: Transformer Engine, DeepEP, our kernels."""
