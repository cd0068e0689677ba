"""What carrying neuron masks adds to a dispatch: bytes predicted, bytes counted, time.

    python -m tools.bench_dispatch [--ranks 2 --rows 8192 --hidden 2048 --widths 512,1408]

Starts CPU ranks and dispatches one micro-batch through each dispatcher with and without masks, in
interleaved repeats. A routed row of bf16 weighs 2 H bytes and its packed mask ceil(F / 8). Bytes
are counted where they leave a rank, by the type of what torch.distributed is given; times are
medians over gloo on one machine, so that their ratio says little about a GPU's network.
"""

import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_mone.common.child_processes import end_with
from megatron_mone.common.files import write_json
from megatron_mone.common.patch import Replaced

DISPATCHERS = ("alltoall", "allgather")


def run(options: Any) -> None:
    """Start the ranks, print a table; `options.json` gets the same numbers.

    Args:
        options: of the command (commands/bench.py).
    """
    try:
        options.widths = [int(width) for width in options.widths.split(",")]
    except ValueError as error:
        raise ValueError(f"--widths {options.widths!r} must be numbers joined by commas") from error
    if options.experts % options.ranks or options.rows % options.topk:
        raise ValueError("--experts must be a multiple of --ranks, and --rows of --topk")
    if torch.cuda.is_available():
        raise ValueError("this measures CPU ranks; hide the GPUs with CUDA_VISIBLE_DEVICES=''")
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(
            _rank, args=(folder, options, os.getpid()), nprocs=options.ranks
        )
        rows = torch.load(Path(folder) / "rows.pt", weights_only=True)
    _print(options, rows)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.json, {"config": vars(options) | {"json": None}, "rows": rows})


def _rank(rank: int, folder: str, options: Any, starter: int) -> None:
    end_with(starter)  # torch's own SIGINT is not seen by a rank that waits in a collective
    from megatron_mone import cpu_emulation

    torch.set_num_threads(1)
    cpu_emulation.install()
    from megatron.core import parallel_state

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=options.ranks
    )
    parallel_state.initialize_model_parallel(expert_model_parallel_size=options.ranks)
    with _bytes_that_leave() as sent:
        rows = [
            _measure(kind, width, options, sent) for width in options.widths for kind in DISPATCHERS
        ]
    if rank == 0:
        torch.save(rows, Path(folder) / "rows.pt")


def _measure(kind: str, width: int, options: Any, sent: Counter[str]) -> dict[str, Any]:
    """One line of the table, of this rank; times are medians in ms."""
    from megatron_mone.kernels.neuron_bits import pack_bits
    from megatron_mone.moe.dispatch.carrier import predicted_mask_bytes

    dispatcher, first = _build(kind, width, options)
    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    tokens = options.rows // options.topk
    hidden = torch.randn(tokens, 1, options.hidden, dtype=torch.bfloat16)
    score = torch.rand(tokens, options.experts, generator=generator)
    chosen = score.topk(options.topk, dim=1).indices
    routing_map = torch.zeros(score.shape, dtype=torch.bool).scatter_(1, chosen, True)
    mask = torch.rand(options.rows, width, generator=generator) < 0.25
    bits = pack_bits(mask)
    local = options.experts // options.ranks
    if kind == "alltoall":
        leaving = options.rows - int(routing_map[:, first : first + local].sum())
    else:
        leaving = options.rows * (options.ranks - 1)
    token_bytes = (
        2 * options.hidden * (leaving if kind == "alltoall" else tokens * (options.ranks - 1))
    )
    times: dict[str, list[float]] = {"without": [], "with": []}
    counted: dict[str, Counter[str]] = {}
    for _ in range(options.repeats + 1):
        for name in times:
            sent.clear()
            torch.distributed.barrier()
            start = time.perf_counter()
            if name == "with":
                dispatcher.set_mask(bits)
            with torch.no_grad():
                parts = dispatcher.dispatch_preprocess(hidden, routing_map, score * routing_map)
                dispatcher.dispatch_postprocess(*dispatcher.token_dispatch(*parts))
            dispatcher.take_mask()
            times[name].append(1e3 * (time.perf_counter() - start))
            counted[name] = Counter(sent)
    milliseconds = {name: statistics.median(t[1:]) for name, t in times.items()}  # 1: warm-up
    return {
        "dispatcher": kind,
        "F": width,
        "rows_sent": leaving,
        "token_bytes_predicted": token_bytes,
        "token_bytes_counted": counted["with"]["torch.bfloat16"],
        "mask_bytes_predicted": predicted_mask_bytes(leaving, width),
        "mask_bytes_counted": counted["with"]["torch.uint8"] - counted["without"]["torch.uint8"],
        "other_bytes_added": sum(
            counted["with"][t] - counted["without"][t] for t in counted["with"] if "uint8" not in t
        ),
        **{f"ms_{name}": value for name, value in milliseconds.items()},
    }


def _build(kind: str, width: int, options: Any) -> tuple[Any, int]:
    """(a dispatcher of this rank, its first expert)."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_mone.benchmarking.adapters.megatron_sequential import swiglu_experts
    from megatron_mone.config import MoNEConfig
    from megatron_mone.moe.dispatch.build import build_dispatcher

    config = MoNEConfig(
        **swiglu_experts(options.hidden, width, options.experts),
        moe_router_topk=options.topk,
        transformer_impl="local",
        moe_token_dispatcher_type=kind,  # type: ignore[arg-type]
        expert_model_parallel_size=options.ranks,
        mone_neuron_ratio=0.25,
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    local = options.experts // options.ranks
    first = groups.ep.rank() * local
    return build_dispatcher(local, list(range(first, first + local)), config, groups), first


@contextmanager
def _bytes_that_leave() -> Iterator[Counter[str]]:
    """Counts, by element type, what this rank gives torch.distributed for other ranks."""
    from megatron.core.tensor_parallel import mappings

    sent: Counter[str] = Counter()
    all_to_all, all_gather = torch.distributed.all_to_all_single, mappings.dist_all_gather_func

    def counted_all_to_all(
        output: Tensor, given: Tensor, output_split_sizes: Any = None,
        input_split_sizes: Any = None, group: Any = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        ranks = torch.distributed.get_world_size(group)
        rows = given.shape[0]
        mine = torch.distributed.get_rank(group)
        stays = rows // ranks if input_split_sizes is None else int(input_split_sizes[mine])
        sent[str(given.dtype)] += (
            (rows - stays) * given[:1].numel() * given.element_size() if rows else 0
        )
        return all_to_all(output, given, output_split_sizes, input_split_sizes, group, **kwargs)

    def counted_all_gather(output: Tensor, given: Tensor, group: Any = None, **kwargs: Any) -> Any:
        ranks = torch.distributed.get_world_size(group)
        sent[str(given.dtype)] += given.numel() * given.element_size() * (ranks - 1)
        return all_gather(output, given, group, **kwargs)

    with (
        Replaced(torch.distributed, "all_to_all_single", counted_all_to_all),
        Replaced(mappings, "dist_all_gather_func", counted_all_gather),  # its own name, on import
    ):
        yield sent


def _print(options: Any, rows: list[dict[str, Any]]) -> None:
    print(
        f"{options.ranks} CPU ranks over gloo, E {options.experts}, top-{options.topk}, "
        f"{options.rows} routed rows a rank, H {options.hidden}, bf16, torch {torch.__version__}, "
        f"median of {options.repeats}; bytes sent by rank 0"
    )
    print("| dispatcher | F | token MB, predicted / counted | mask MB, predicted / counted | "
          "mask / token | ms without | ms with | ratio |")  # fmt: skip
    print("| --- | --: | --: | --: | --: | --: | --: | --: |")
    for row in rows:
        print(
            f"| {row['dispatcher']} | {row['F']} | "
            f"{row['token_bytes_predicted'] / 1e6:.3f} / {row['token_bytes_counted'] / 1e6:.3f} | "
            f"{row['mask_bytes_predicted'] / 1e6:.4f} / {row['mask_bytes_counted'] / 1e6:.4f} | "
            f"{row['mask_bytes_counted'] / row['token_bytes_counted']:.3f} | "
            f"{row['ms_without']:.1f} | {row['ms_with']:.1f} | "
            f"{row['ms_with'] / row['ms_without']:.2f} |"
        )
