"""The operands of an expert's products by name, as fp8 recipes tell them apart."""

from typing import Literal

Operand = Literal["x", "fc1", "h", "fc2", "dfc1", "dy"]
"""What a product takes: rows x [N, H], h [N, F]; weights fc1 (gate or up) and fc2 (down); gradients
dfc1 [N, F] of what gate or up gave, dy [N, H]."""

FORWARD: tuple[Operand, ...] = ("x", "fc1", "h", "fc2")
BACKWARD: tuple[Operand, ...] = ("dfc1", "dy")
OPERANDS: tuple[Operand, ...] = (*FORWARD, *BACKWARD)
WEIGHTS = frozenset(("fc1", "fc2"))
