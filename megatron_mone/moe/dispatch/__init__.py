"""Token dispatchers that carry neuron masks, and where a dispatched row came from."""
