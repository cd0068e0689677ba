"""The masked expert MLP on CPUs: native kernels whose work and memory follow the mask."""
