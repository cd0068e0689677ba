"""The name by which stock scripts ask: `--spec megatron_mone.layer_spec mone_layer_spec`."""

from megatron_mone.model.layer_spec import mone_layer_spec

__all__ = ["mone_layer_spec"]
