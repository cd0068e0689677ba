"""What lm-eval asks of a language model, answered by a Megatron checkpoint: its model `mone`.

Importing this module registers the name. lm-eval 0.4.13 looks for no plugins, so its own program
does not find it: `python -m megatron_mone.evaluation.lm_eval_door` is that program, with the name
known.
"""

import atexit
import os
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megatron_mone.evaluation.batches import Prompt, Row
from megatron_mone.evaluation.requests import prompt_of, row_of
from megatron_mone.evaluation.service import Service
from megatron_mone.evaluation.tokens import Tokenizer

BATCH = 8


class MegatronLM(TemplateLM):
    """A model on all ranks, asked by rank 0.

    Attributes:
        truncated: requests whose beginning did not fit into the model's length.
    """

    def __init__(self, service: Service, tokenizer: Tokenizer, length: int) -> None:
        """`length`: most tokens of a sequence, the model's seq_length."""
        super().__init__()
        self._service, self._tokenizer, self._length = service, tokenizer, length
        self.truncated = 0

    @property
    def eot_token_id(self) -> int:
        """Of the end of a document, which also stands before a text's first token."""
        return self._tokenizer.eod

    @property
    def max_length(self) -> int:
        """Most tokens of a sequence."""
        return self._length

    @property
    def tokenizer_name(self) -> str:
        """For caches of requests, which are not kept."""
        return "mone"

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """The ids of a text alone, whatever is asked for, as in training's data."""
        del add_special_tokens, kwargs
        return self._tokenizer.encode(string)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        del kwargs
        return self._service.log_likelihoods([self._row(c, s) for _, c, s in requests])

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each text, every token once, in windows of the model's length."""
        del disable_tqdm
        rows: list[Row] = []
        counts = []
        for request in requests:
            windows = get_rolling_token_windows(
                self._tokenizer.encode(request.args[0]), self.prefix_token_id, self._length, 1
            )
            pairs = [make_disjoint_window(pair) for pair in windows]
            rows += [self._row(context, scored) for context, scored in pairs]
            counts.append(len(pairs))
        scores = iter(self._service.log_likelihoods(rows))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations.

        Raises:
            ValueError: a task asks for samples, or for more tokens than the model's length.
        """
        del disable_tqdm
        return self._service.continuations([self._prompt(*request.args) for request in requests])

    def _row(self, context: Sequence[int], scored: Sequence[int]) -> Row:
        row, cut = row_of(context, scored, self._length)
        self.truncated += cut
        return row

    def _prompt(self, text: str, options: dict[str, Any]) -> Prompt:
        tokens = self._tokenizer.encode(text) or [self.prefix_token_id]
        prompt, cut = prompt_of(tokens, options, self._length)
        self.truncated += cut
        return prompt


@register_model("mone")
class RegisteredLM(MegatronLM):
    """`--model mone`: the checkpoint named by model_args, loaded where lm-eval makes the model.

    Args:
        load: folder of checkpoints.
        config: run file.
        flags: Megatron's flags, as a shell has them.
        batch_size: most rows of a forward pass on a rank.
    """

    def __init__(
        self,
        load: str | None = None,
        config: str | None = None,
        flags: str = "",
        batch_size: int | str = BATCH,
        **ignored: Any,
    ) -> None:
        given = {name: value for name, value in ignored.items() if name not in _LM_EVALS_OWN}
        if given:
            name, value = next(iter(given.items()))
            raise ValueError(f"model_args: {name} = {value!r} is not of mone: load, config, flags")
        from megatron_mone.evaluation import loading
        from megatron_mone.evaluation.scoring import Scorer

        words = shlex.split(flags)
        words += [] if config is None else ["--config", config]
        words += [] if load is None else ["--load", load]
        loaded = loading.load(words)
        service = Service(Scorer(loaded, int(batch_size), lambda *told: None))
        if os.environ.get("RANK", "0") != "0":
            service.serve()
            sys.exit(0)
        atexit.register(service.end)
        super().__init__(service, loaded.tokenizer, loaded.args.seq_length)


_LM_EVALS_OWN = ("max_batch_size", "device")
