"""A MoNE model for transformers: configuration_mone.py and modeling_mone.py, which are copied into
exported folders (`auto_map`, trust_remote_code) and hence stand alone."""
