"""The bins in which relative neuron loads are counted: metrics, records and reports alike."""

LOAD_EDGES = tuple(round(2.0 ** (k / 4), 6) for k in range(-20, 21))
"""In multiples of a balanced load; the first bin is [0, first edge)."""
