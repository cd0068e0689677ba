"""The figures of docs/PLANNER.md about searches and large plans, made anew in one go.

    python -m tests.search_figures [30b 30b-200 106b 106b-200 106b-by-hand 671b] [--out DIR]

Runs `megatron-mone plan` with a cache of traces of its own, empty at first, and prints of each what
the command says, its CPU seconds with those of its tracing processes, and the memory of the
largest process. Those named -200 seek the 200 best, so that no bound ends them before 200 are
planned. The other table of the page is `megatron_mone.commands.plan_zero`.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from megatron_mone.common.places import ROOT

# The shape of GLM-4.5-Air (arXiv 2508.06471, table 1), without its layer of multi-token prediction:
# 106B parameters, 12B active.
MODEL_106B = {
    "num_layers": 46, "hidden_size": 4096, "ffn_hidden_size": 10944, "num_attention_heads": 96,
    "kv_channels": 128, "group_query_attention": True, "num_query_groups": 8, "num_experts": 128,
    "moe_layer_freq": "([0]+[1]*45)", "moe_ffn_hidden_size": 1408, "moe_router_topk": 8,
    "moe_shared_expert_intermediate_size": 1408, "moe_router_dtype": "fp32",
    "moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": 1e-4, "swiglu": True,
    "add_bias_linear": False, "normalization": "RMSNorm", "position_embedding_type": "rope",
    "attention_dropout": 0.0, "hidden_dropout": 0.0, "untie_embeddings_and_output_weights": True,
    "max_position_embeddings": 131072, "vocab_size": 151552, "make_vocab_size_divisible_by": 1184,
}  # fmt: skip
BY_HAND = "tp=1,pp=4,ep=16,recompute=layernorm+moe_act,stages=Et*11|t*12|t*12|t*11L"


def commands(folder: Path) -> dict[str, list[str]]:
    """Name -> the words after `plan`."""
    model = folder / "moe-106b.yaml"
    model.write_text(yaml.safe_dump(MODEL_106B, sort_keys=False))
    of_106b = ["--model", str(model), "--gpus", "64", "--cluster", "h100-ndr"]
    of_30b = ["--model", "moe-30b-a3b", "--gpus", "64", "--cluster", "h100-ndr"]
    search = ["--search", "--limit", "200"]
    return {
        "30b": [*of_30b, *search],
        "30b-200": [*of_30b, *search, "--best", "200"],
        "106b": [*of_106b, *search],
        "106b-200": [*of_106b, *search, "--best", "200"],
        "106b-by-hand": [*of_106b, "--layout", BY_HAND],
        "671b": ["--config", "configs/plan/moe-671b-a37b-1024.yaml", "--gpus", "1024"],
    }


def main() -> int:
    """Those asked for, one after another; what `sys.exit` takes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="of them; all if none")
    parser.add_argument("--out", type=Path, default=Path("out/search-figures"))
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    known = commands(asked.out)
    worst = 0
    for name in asked.names or known:
        words = [*known[name], "--json", str(asked.out / name / "plan.json")]
        print(f"$ megatron-mone plan {' '.join(words)}", flush=True)
        began = time.monotonic()
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        with tempfile.TemporaryDirectory() as cache:
            environment = {**os.environ, "XDG_CACHE_HOME": cache}
            program = [sys.executable, "-m", "megatron_mone", "plan", *words]
            done = subprocess.run(program, env=environment, check=False, cwd=ROOT)
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        worst = max(worst, done.returncode)
        print(
            f"{name}: {used.ru_utime - before.ru_utime:.0f} user and "
            f"{used.ru_stime - before.ru_stime:.0f} system CPU s, "
            f"{time.monotonic() - began:.0f} s by the clock, the largest process so far "
            f"{used.ru_maxrss / 2**20:.1f} GiB\n",
            flush=True,
        )
    return worst


if __name__ == "__main__":
    sys.exit(main())
