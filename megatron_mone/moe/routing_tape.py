"""Stands where Megatron's router asks for its top-k, and writes choices down or hands them out.

Probabilities remain those of the router that asks. Touches nothing; who holds a tape sets it as a
router's `router_replay`. Shapes: T tokens of a micro-batch on this rank, E experts, k chosen.
"""

from collections.abc import Callable

from torch import Tensor

from megatron_mone.moe.recompute import in_recompute


class RoutesError(ValueError):
    """Routes that are missing, damaged, or of another run; one line."""


class RoutingTape:
    """The expert choices of one layer in one step, in the order of its forwards.

    Attributes:
        records: whether choices are made here; otherwise they are handed out.
        choices: [T, k] of each forward so far.
    """

    def __init__(self, *, records: bool) -> None:
        self.records = records
        self.choices: list[Tensor] = []
        self._next = 0
        self._next_recompute = 0

    def begin_step(self, choices: list[Tensor]) -> None:
        """Forget the last step; `choices` are to be handed out, or to be filled."""
        self.choices = choices
        self._next = self._next_recompute = 0

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Callable[..., tuple[Tensor, Tensor]] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(scores [T, k] of the chosen, their numbers [T, k]); see RouterReplay.get_replay_topk.

        Raises:
            RoutesError: the choices are of other tokens.
        """
        if in_recompute():  # in the order of the forwards, as micro-batches go backward
            index, self._next_recompute = self._next_recompute, self._next_recompute + 1
        elif self.records:
            assert default_compute_topk is not None
            found = default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
            self.choices.append(found[1])
            return found
        else:
            index, self._next = self._next, self._next + 1
        chosen = self.choices[index]
        if len(chosen) != len(scores):  # which gather and scatter would not mind
            raise RoutesError(
                f"routes of {len(chosen)} tokens for a micro-batch of {len(scores)}: replay them "
                "with the seq_length, micro_batch_size and layout that they were recorded with"
            )
        return scores.gather(1, chosen), chosen
