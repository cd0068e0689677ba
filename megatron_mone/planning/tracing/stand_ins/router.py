"""transformer_engine.pytorch.router, and the product before it, without values.

fused.router, fused.router_scores, fused.router_aux_loss and their backward; fused.linear.
Shapes: T tokens of this rank, E experts.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_mone.planning.tracing.stand_ins.op import note, run, unknown

BOOL, FLOAT = torch.bool, torch.float32


def router(logits: Tensor, topk: int, **_options: Any) -> tuple[Tensor, Tensor]:
    """fused_topk_with_score_function: probabilities [T, E] and the map, which is kept."""
    kept = (unknown(logits.shape, FLOAT), unknown(logits.shape, BOOL))
    outputs = ((logits.shape, logits.dtype), (logits.shape, BOOL))
    return run("fused.router", (logits,), outputs, kept)


def router_scores(logits: Tensor, topk: int, score_function: str) -> tuple[Tensor, Tensor]:
    """fused_compute_score_for_moe_aux_loss: (map, float32 scores), both [T, E]."""
    kept = (unknown(logits.shape, FLOAT),)
    outputs = ((logits.shape, BOOL), (logits.shape, FLOAT))
    return run("fused.router_scores", (logits,), outputs, kept)


def router_aux_loss(probs: Tensor, tokens_per_expert: Tensor, **_options: Any) -> Tensor:
    """fused_moe_aux_loss: one number."""
    outputs = (((), probs.dtype),)
    (loss,) = run("fused.router_aux_loss", (probs,), outputs, (tokens_per_expert,))
    return loss


def router_product(
    a: Tensor, b: Tensor, out_dtype: torch.dtype, layout: str = "TN", **_options: Any
) -> list[Tensor]:
    """te_general_gemm of RouterGatingLinearFunction: TN b a^T, NN b a, NT b^T a."""
    name = {"TN": "fused.linear", "NN": "fused.linear_dgrad", "NT": "fused.linear_wgrad"}[layout]
    rows = b.shape[1] if layout == "NT" else b.shape[0]
    columns = a.shape[0] if layout == "TN" else a.shape[1]
    product = unknown((rows, columns), out_dtype)
    depth = b.shape[0] if layout == "NT" else b.shape[1]
    note(name, (b, a), (product,), flops=2 * rows * columns * depth, dtype=a.dtype)
    return [product]
