"""The names by which stock scripts ask: `--spec megatron_mone.layer_spec mone_layer_spec`, of GPT
models, and `mone_hybrid_spec`, of hybrid ones, which is a spec and no function that makes one."""

from megatron_mone.model import hybrid_spec
from megatron_mone.model.layer_spec import mone_layer_spec

__all__ = ["mone_hybrid_spec", "mone_layer_spec"]

mone_hybrid_spec = hybrid_spec.mone_hybrid_spec()
