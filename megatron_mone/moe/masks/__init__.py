"""Neuron masks as data: recorded from a run, replayed into another."""
