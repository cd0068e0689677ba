"""MoNE for Megatron-Bridge: its provider of GPT models, whose experts choose their neurons.

Needs the package megatron-bridge, which is no dependency here. May touch: nothing but its classes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron.bridge.models.gpt_provider import GPTModelProvider

from megatron_mone.config import MoNEFields, validate
from megatron_mone.model.layer_spec import mone_layer_spec


@dataclass
class MoNEModelProvider(MoNEFields, GPTModelProvider):  # type: ignore[misc]  # its class is Any
    """Megatron-Bridge's GPTModelProvider with the mone_* fields, for recipes.

    The fields are checked when it is finalized, as all of its are. Not run on a GPU yet.
    """

    transformer_layer_spec: Callable[..., Any] = mone_layer_spec

    def finalize(self) -> None:
        """Fill derived fields and check all.

        Raises:
            ValueError: a mone_* field; names it, its value and what is allowed.
        """
        super().finalize()
        validate(self)
