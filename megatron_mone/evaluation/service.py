"""Rank 0 asks, all ranks answer: one of them runs lm-eval, and the others need not know tasks."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from megatron_mone.evaluation.batches import Prompt, Row
from megatron_mone.evaluation.scoring import Scorer

_END = "end"


class Service:
    """What rank 0 asks for; other ranks `serve` until it ends."""

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer

    def log_likelihoods(self, rows: Sequence[Row]) -> list[tuple[float, bool]]:
        """As `Scorer.log_likelihoods`; on rank 0."""
        return self._ask("log_likelihoods", rows)

    def continuations(self, prompts: Sequence[Prompt]) -> list[str]:
        """As `Scorer.continuations`; on rank 0."""
        return self._ask("continuations", prompts)

    def end(self) -> None:
        """Let the other ranks go; on rank 0."""
        torch.distributed.broadcast_object_list([_END, None], src=0)

    def serve(self) -> None:
        """Answer until rank 0 ends; on the other ranks."""
        asked: list[Any] = [None, None]
        while True:
            torch.distributed.broadcast_object_list(asked, src=0)
            if asked[0] == _END:
                return
            self._answer(asked[0])(asked[1])

    def _ask(self, what: str, requests: Sequence[Any]) -> list[Any]:
        requests = list(requests)
        torch.distributed.broadcast_object_list([what, requests], src=0)
        return self._answer(what)(requests)

    def _answer(self, what: str) -> Callable[[Sequence[Any]], list[Any]]:
        return getattr(self._scorer, what)
