"""What every part of the Triton backend knows of its arguments. Plain torch."""

ACTIVATIONS = ("silu", "sigmoid", "gelu", "relu", "squared_relu")
