"""Megatron's router with a balance loss of what is left after top-k, the published MoNE's.

May touch: Megatron's TopKRouter, three of whose methods are given other probabilities. Shapes: T
tokens of this rank, E experts.
"""

from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor


class AfterTopKRouter(TopKRouter):
    """Balance losses whose P averages what the chosen experts weigh.

        L = coefficient * E * sum over experts i of f_i P_i
        f_i = tokens that chose i / (T * K_E)          as Megatron's
        P_i = mean over tokens of p_i, 0 where i was not chosen
    In Megatron, as in Switch (arXiv 2101.03961, eq. 6) and DeepSeek, p is of all experts, before
    the choice. A reviewer of MoNE says that its router averages after it. Where p is a softmax
    over the chosen alone (no moe_router_pre_softmax), P adds up to 1 in both.
    """

    def _apply_aux_loss(
        self, probs: Tensor, scores_for_aux_loss: Tensor, routing_map: Tensor,
        with_padding_mask: bool = False,
    ) -> Tensor:  # fmt: skip
        scores = _weighed(probs, routing_map)
        return super()._apply_aux_loss(probs, scores, routing_map, with_padding_mask)

    def _apply_seq_aux_loss(
        self, probs: Tensor, scores_for_aux_loss: Tensor, routing_map: Tensor, seq_length: int,
        bsz: int, with_padding_mask: bool = False,
    ) -> Tensor:  # fmt: skip
        scores = _weighed(probs, routing_map)
        return super()._apply_seq_aux_loss(
            probs, scores, routing_map, seq_length, bsz, with_padding_mask
        )

    def _apply_global_aux_loss(
        self, probs: Tensor, scores_for_aux_loss: Tensor, routing_map: Tensor,
        with_padding_mask: bool = False,
    ) -> Tensor:  # fmt: skip
        scores = _weighed(probs, routing_map)
        return super()._apply_global_aux_loss(probs, scores, routing_map, with_padding_mask)


def _weighed(probs_TE: Tensor, map_TE: Tensor) -> Tensor:
    """[T, E] float32, what each expert weighs; 0 in rows of padding, which Megatron's map leaves
    out."""
    return probs_TE.float() * map_TE.any(dim=1, keepdim=True)
