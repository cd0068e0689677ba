"""What a rank record holds beside measurements: who this rank is, and what it had to compute.

May touch: Megatron's parallel state (read only), module_flops, the rank files of an older job.
"""

import socket
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.utils import get_model_config

from megatron_mone.common.machine import cores, cpu_model, facts
from megatron_mone.model.module_flops import expert_bytes, module_flops, rank_share
from megatron_mone.profiling.load_facts import LoadFacts
from megatron_mone.profiling.peaks import RankPeaks
from megatron_mone.profiling.rank_record import RankRecord, clear_records
from megatron_mone.profiling.run_meter import Run


def rank_facts(args: Any, words: Sequence[str], job: str, routing: str) -> dict[str, Any]:
    """The fields of a rank record above its runs.

    Args:
        args: Megatron's arguments, for the layout and the batch.
        words: that they were read from, those of a run file written out.
        job: the same text on all ranks of this job, and on no other's.
        routing: how tokens found their experts: real, balanced or replayed.
    """
    micro_batches = get_num_microbatches()
    return {
        "schema": RankRecord.SCHEMA,
        "job": job,
        "rank": torch.distributed.get_rank(),
        "world_size": torch.distributed.get_world_size(),
        "host": socket.gethostname(),
        "device": device_name(),
        "coordinates": {
            "tp": parallel_state.get_tensor_model_parallel_rank(),
            "cp": parallel_state.get_context_parallel_rank(),
            "dp": parallel_state.get_data_parallel_rank(),
            "pp": parallel_state.get_pipeline_model_parallel_rank(),
            "ep": parallel_state.get_expert_model_parallel_rank(),
            "etp": parallel_state.get_expert_tensor_parallel_rank(),
            "edp": parallel_state.get_expert_data_parallel_rank(),
        },
        "config": {
            "layout": {
                "tp": parallel_state.get_tensor_model_parallel_world_size(),
                "cp": parallel_state.get_context_parallel_world_size(),
                "dp": parallel_state.get_data_parallel_world_size(),
                "pp": parallel_state.get_pipeline_model_parallel_world_size(),
                "vpp": args.virtual_pipeline_model_parallel_size or 1,
                "ep": parallel_state.get_expert_model_parallel_world_size(),
                "etp": parallel_state.get_expert_tensor_parallel_world_size(),
                "edp": parallel_state.get_expert_data_parallel_world_size(),
            },
            "routing": routing,
            "micro_batches": micro_batches,
            "tokens_per_step": args.global_batch_size * args.seq_length,
            "argv": list(words),
            "machine": machine_facts(),
        },
    }


def begin_job(folder: Path) -> str:
    """A random name that all ranks share; the folder has no rank files after it. Collective."""
    name = [uuid.uuid4().hex]
    if torch.distributed.get_rank() == 0:
        clear_records(folder)
    torch.distributed.broadcast_object_list(name, src=0)  # no rank writes before rank 0 has cleared
    return name[0]


def machine_facts() -> dict[str, str]:
    """What a report says of the machine: no names of hosts or folders."""
    found = facts()
    if torch.cuda.is_available():
        found["GPU"] = torch.cuda.get_device_name()
    return found


def device_name() -> str:
    """Of what this rank computes on."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU: {cpu_model()}, {cores()} cores"


def counted_flops(
    run: Run, load: LoadFacts, peaks: RankPeaks, document_tokens: float | None = None
) -> dict[str, Any]:
    """The `flops` object of a run: of a mean measured step on this rank.

    Args:
        run: measured.
        load: its rows and kept neurons over the measured steps.
        peaks: of this rank's device.
        document_tokens: of packed documents; see rank_share.
    """
    steps = max(1, len(load.rows()))
    routing, neurons = load.routing()["layers"], load.neurons()
    kept = {x["layer"]: x["kept"] / steps for x in neurons["layers"]} if neurons else None
    config = get_model_config(run.model[0])
    share = rank_share(
        run.args,
        config,
        run.model,
        micro_batches=get_num_microbatches(),
        rows={layer["layer"]: sum(layer["rows"]) / steps for layer in routing},
        kept=kept,
        computed={layer: rows / steps for layer, rows in load.computed().items()},
        document_tokens=document_tokens,
    )
    return {
        "modules": module_flops(config, share),
        "bytes": expert_bytes(config, share),
        "peak_flops": peaks.flops,
        "peak_bytes_per_s": peaks.bytes_per_s,
    }
