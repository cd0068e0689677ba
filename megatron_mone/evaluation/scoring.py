"""Log-likelihoods and greedy continuations of token rows, the work of all ranks.

Every rank is given all requests, so that all agree on the passes; data-parallel ranks share a pass,
the others of a model take part in it. What a rank found goes to rank 0.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core import mpu
from torch import Tensor

from megatron_mone.evaluation.batches import Pass, Prompt, Row, passes, width_of
from megatron_mone.evaluation.forward import Forward, log_probabilities, most_likely
from megatron_mone.evaluation.loading import Loaded

Say = Callable[[int, int, str], None]


class Scorer:
    """Scores rows with one model; all methods are collective over all ranks.

    Args:
        loaded: the model.
        batch: most rows of a forward pass on a rank (of a micro-batch, in a pipeline).
        say: told (requests done, of how many, of what).
    """

    def __init__(self, loaded: Loaded, batch: int, say: Say) -> None:
        self._forward = Forward(loaded)
        self._tokenizer = loaded.tokenizer
        self._batch, self._say = batch, say
        self._replicas = mpu.get_data_parallel_world_size()
        self._replica = mpu.get_data_parallel_rank()
        self._reports = mpu.is_pipeline_last_stage() and mpu.get_tensor_model_parallel_rank() == 0

    def log_likelihoods(self, rows: Sequence[Row]) -> list[tuple[float, bool]]:
        """For each row (log-likelihood in nats of its scored tokens, whether each is the greedy
        choice); on rank 0, elsewhere empty."""
        found: dict[int, tuple[float, bool]] = {}
        for step in self._passes([len(row.tokens) for row in rows], "log-likelihoods"):
            own = step.dealt[self._replica]
            longest = max(len(rows[i].tokens) for dealt in step.dealt for i in dealt)
            inputs = [rows[i].tokens[:-1] for i in own]
            targets = [rows[i].tokens[1:] for i in own]
            width = width_of(longest - 1, self._forward.multiple)
            wanted = self._matrix(targets, step.rows, width).cuda().chunk(self._forward.micro)
            order = iter(wanted)

            def read(logits: Tensor, tokens: Tensor, order: Any = order) -> tuple[Tensor, Tensor]:
                target = next(order)
                greedy = most_likely(logits, self._tokenizer.size)
                return log_probabilities(logits, target), greedy == target

            parts = self._forward(self._matrix(inputs, step.rows, width), read)
            if self._reports:
                scores = torch.cat([part[0] for part in parts]).double().cpu()
                greedy = torch.cat([part[1] for part in parts]).cpu()
                for place, i in enumerate(own):
                    end = len(rows[i].tokens) - 1
                    kept = slice(end - rows[i].scored, end)
                    found[i] = (float(scores[place, kept].sum()), bool(greedy[place, kept].all()))
        return self._gather(found, len(rows))

    def continuations(self, prompts: Sequence[Prompt]) -> list[str]:
        """The text after each prompt, without the stop; on rank 0, elsewhere empty.

        Every token costs a forward pass over all that is before it: there is no cache.
        """
        found: dict[int, str] = {}
        for step in self._passes([len(prompt.tokens) for prompt in prompts], "continuations"):
            own = [prompts[i] for i in step.dealt[self._replica]]
            most = max(prompts[i].most for dealt in step.dealt for i in dealt)
            longest = max(len(prompts[i].tokens) for dealt in step.dealt for i in dealt)
            texts = self._continue(own, step.rows, longest, most)
            if self._reports:
                found.update(zip(step.dealt[self._replica], texts, strict=True))
        return self._gather(found, len(prompts))

    def _continue(self, prompts: Sequence[Prompt], rows: int, longest: int, most: int) -> list[str]:
        """`longest` and `most` are of all replicas, so that all make the same passes."""
        ids: list[list[int]] = [[] for _ in prompts]
        texts: list[str | None] = [None for _ in prompts]
        for done in range(most):
            tokens = [(*p.tokens, *new) for p, new in zip(prompts, ids, strict=True)]
            width = width_of(longest + done, self._forward.multiple)
            last = [len(row) - 1 for row in tokens] + [0] * (rows - len(tokens))
            chosen = self._next_tokens(self._matrix(tokens, rows, width), torch.tensor(last))
            for place, prompt in enumerate(prompts):
                if texts[place] is None:
                    texts[place] = self._extended(prompt, ids[place], chosen[place])
            if self._all_done(all(text is not None for text in texts)):
                break
        return [text or "" for text in texts]

    def _extended(self, prompt: Prompt, ids: list[int], token: int) -> str | None:
        """Append a token; the text, if it ends here."""
        if token == self._tokenizer.eod:
            return self._tokenizer.decode(ids)
        ids.append(token)
        text = self._tokenizer.decode(ids)
        ends = [text.index(stop) for stop in prompt.until if stop in text]
        if ends:
            return text[: min(ends)]
        return text if len(ids) >= prompt.most else None

    def _next_tokens(self, tokens: Tensor, last: Tensor) -> list[int]:
        """The greedy token after column `last` of each row, on all ranks of the model."""
        order = iter(last.cuda().chunk(self._forward.micro))

        def read(logits: Tensor, tokens: Tensor) -> Tensor:
            del tokens
            column = next(order)[:, None, None].expand(-1, 1, logits.shape[-1])
            return most_likely(logits.gather(1, column), self._tokenizer.size)[:, 0]

        parts = self._forward(tokens, read)
        chosen = torch.cat(parts) if parts else torch.zeros(len(tokens), dtype=torch.int64).cuda()
        if mpu.get_pipeline_model_parallel_world_size() > 1:
            last_stage = mpu.get_pipeline_model_parallel_last_rank()
            torch.distributed.broadcast(
                chosen, last_stage, group=mpu.get_pipeline_model_parallel_group()
            )
        return chosen.tolist()

    def _all_done(self, done: bool) -> bool:
        flag = torch.tensor([int(done)]).cuda()
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MIN)
        return bool(flag.item())

    def _passes(self, lengths: Sequence[int], what: str) -> Any:
        """Each pass in turn, told when it is done."""
        done = 0
        for step in passes(lengths, self._replicas, self._forward.micro, self._batch):
            yield step
            done += _requests(step)
            self._say(done, len(lengths), what)

    def _matrix(self, rows: Sequence[Sequence[int]], count: int, width: int) -> Tensor:
        """[count, width] int64, padded on the right and below."""
        padded = torch.full((count, width), self._tokenizer.eod, dtype=torch.int64)
        for place, row in enumerate(rows):
            padded[place, : len(row)] = torch.tensor(row, dtype=torch.int64)
        return padded

    def _gather(self, found: dict[int, Any], count: int) -> list[Any]:
        """All results in order on rank 0."""
        first = torch.distributed.get_rank() == 0
        everyone: list[Any] | None = [None] * torch.distributed.get_world_size() if first else None
        torch.distributed.gather_object(found if self._reports else {}, everyone, dst=0)
        if everyone is None:
            return []
        whole: dict[int, Any] = {}
        for part in everyone:
            whole.update(part)
        return [whole[i] for i in range(count)]


def _requests(step: Pass) -> int:
    return sum(len(dealt) for dealt in step.dealt)
