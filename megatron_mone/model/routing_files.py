"""Tokens routed as in an earlier run: --mone-replay-routing FOLDER.

Megatron's --moe-routing-trace-path writes a file a rank, router_trace_rankN.jsonl: for each step,
layer and micro-batch the experts of every token, in order. They name no sample, so a run replays
them in the layout, and on the batches, that they were written in. Probabilities, and so gradients
of the router, are the run's own. May touch: `training.train_step`, and `router_replay` of routers
while a step is trained. Source: megatron/core/transformer/moe/router_trace.py.
"""

import argparse
import json
from argparse import Namespace
from collections.abc import Generator
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_mone.common.patch import Replaced
from megatron_mone.model.wrappers import unwrapped
from megatron_mone.moe.routing_tape import RoutesError, RoutingTape

Place = tuple[str, int | None, int]
"""Block, number of the multi-token-prediction head, layer: as router_trace.py names a router."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flag to Megatron's parser."""
    parser.add_argument_group("MoNE routing").add_argument(
        "--mone-replay-routing",
        metavar="DIR",
        help="route tokens as the files of --moe-routing-trace-path in this folder say",
    )


def check_combination(args: Namespace) -> None:
    """What can be told without the files.

    Args:
        args: Megatron's, parsed.

    Raises:
        ValueError: one line.
    """
    if args.mone_replay_routing is None:
        return
    kinds = args.moe_router_load_balancing_type
    own = {"sinkhorn", "quantile_balancing"} & set(kinds if isinstance(kinds, list) else [kinds])
    for wrong, name, why in (
        (not args.num_experts, "num_experts", "has no router"),
        (own, "moe_router_load_balancing_type", "chooses experts by other ways than a top-k"),
        (args.moe_router_fusion, "moe_router_fusion", "chooses experts in one kernel"),
        (args.moe_expert_capacity_factor, "moe_expert_capacity_factor", "drops tokens, of which "
         "Megatron writes no routes"),
    ):  # fmt: skip
        if wrong:
            raise ValueError(
                f"mone_replay_routing = {args.mone_replay_routing!r} does not go with {name} = "
                f"{getattr(args, name)!r}, which {why}: leave one of them out"
            )


def check_files(args: Namespace) -> None:
    """Whether the folder has a file for each rank.

    Args:
        args: Megatron's, parsed; `world_size` is the job's.

    Raises:
        ValueError: one line.
    """
    name = args.mone_replay_routing
    if name is None:
        return
    found = len(list(Path(name).glob("router_trace_rank*.jsonl")))
    if found != args.world_size or not all(_file(name, r).exists() for r in range(found)):
        raise ValueError(
            f"mone_replay_routing = {name!r} holds routes of {found} ranks, and this run has "
            f"{args.world_size}: name the folder that a run of the same layout wrote with "
            "--moe-routing-trace-path"
        )


def attach(args: Namespace) -> ExitStack:
    """Route each step of training as the files say, until what is returned is closed.

    Args:
        args: Megatron's, validated.
    """
    attached = ExitStack()
    if args.mone_replay_routing is not None:
        from megatron.training import training

        replay = _Replay(_file(args.mone_replay_routing, args.rank), training.train_step)
        attached.enter_context(Replaced(training, "train_step", replay.step))
        attached.callback(replay.close)
    return attached


def _file(folder: str, rank: int) -> Path:
    return Path(folder, f"router_trace_rank{rank}.jsonl")


class _Replay:
    def __init__(self, path: Path, train_step: Any) -> None:
        self._path, self._train_step = path, train_step
        self._steps = _steps(path)
        self._routers: dict[Place, Any] | None = None

    def close(self) -> None:
        self._steps.close()

    def step(self, *args: Any, iteration: int, **kwargs: Any) -> Any:
        from megatron.core.num_microbatches_calculator import get_num_microbatches

        if self._routers is None:
            self._routers = _routers(args[2])
        routes = self._of(iteration) if self._routers else {}
        with ExitStack() as replaying:
            for place, router in self._routers.items():
                choices = routes.get(place, [])
                self._check(place, choices, router, get_num_microbatches(), iteration)
                tape = RoutingTape(records=False)
                tape.begin_step([one.to(router.weight.device) for one in choices])
                replaying.enter_context(Replaced(router, "router_replay", tape))
            return self._train_step(*args, iteration=iteration, **kwargs)

    def _of(self, iteration: int) -> dict[Place, list[Tensor]]:
        """The routes of a step; those before it are passed by."""
        for step, routes in self._steps:
            if step == iteration:
                return routes
        raise RoutesError(
            f"{self._path} holds no routes of step {iteration + 1}: record more steps, or train "
            "fewer (--train-iters)"
        )

    def _check(
        self, place: Place, choices: list[Tensor], router: Any, micro_batches: int, iteration: int
    ) -> None:
        block, _, layer = place
        where = f"{self._path}: step {iteration + 1}, layer {layer + 1} of {block}"
        if len(choices) != micro_batches:
            raise RoutesError(
                f"{where} has the routes of {len(choices)} forwards, and this run makes "
                f"{micro_batches}: record with this layout and batch, and without recompute"
            )
        experts = router.config.num_moe_experts
        for one in choices:
            fits = one.shape[1] == router.topk and int(one.min()) >= 0 and int(one.max()) < experts
            if not fits:
                raise RoutesError(
                    f"{where} sends a token to {one.shape[1]} experts up to number "
                    f"{int(one.max())}: this model has moe_router_topk = {router.topk} and "
                    f"num_experts = {experts}"
                )


def _routers(chunks: Any) -> dict[Place, Any]:
    """The routers of this rank's model."""
    from megatron.core.transformer.moe.router import TopKRouter
    from megatron.core.transformer.moe.router_trace import _parse_router_module_name

    found = {}
    for chunk in chunks:
        for name, module in unwrapped(chunk).named_modules():
            if isinstance(module, TopKRouter):
                place = _parse_router_module_name(name)
                assert place is not None, name
                found[place] = module
    return found


def _steps(path: Path) -> Generator[tuple[int, dict[Place, list[Tensor]]]]:
    """(step from 0, routes [T, k] of each micro-batch by place) in the order of the file."""
    with path.open(encoding="utf-8") as lines:
        records = (_record(path, number, line) for number, line in enumerate(lines, 1))
        for step, of_step in groupby(records, key=lambda one: one[0]):
            routes: dict[Place, list[Tensor]] = {}
            for _, place, chosen in of_step:
                routes.setdefault(place, []).append(chosen)
            yield step, routes


def _record(path: Path, number: int, line: str) -> tuple[int, Place, Tensor]:
    try:
        one = json.loads(line)
        chosen = torch.tensor(one["top_indices"], dtype=torch.int64)
        if chosen.dim() != 2:
            raise ValueError("top_indices is no table")
        return one["step"], (one["block"], one.get("mtp_idx"), one["layer"]), chosen
    except (ValueError, KeyError, TypeError) as error:
        raise RoutesError(
            f"{path}, line {number} is no record of --moe-routing-trace-path: {error}"
        ) from None
