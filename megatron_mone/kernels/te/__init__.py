"""The masked grouped expert MLP on Transformer Engine's grouped GEMMs. Not run on a GPU yet.

Importing this package needs no transformer_engine.
"""
