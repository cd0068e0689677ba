"""How far a plan is from a run after `calibrate`, on CPU ranks of this machine.

    python -m tests.calibrated_layouts [LAYOUT ...] [--seconds 90] [--steps 12] [--out DIR]

For each layout: plan with what is assumed, calibrate, plan again with its efficiency, run (profiled
on the same balanced routing), and print both plans beside the run, the load of the machine with
them. No test: the times are of a machine that others may use. Writes out/calibrated/LAYOUT/.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import yaml

from megatron_mone.common.device import HARDWARE_ROOT
from megatron_mone.common.machine import cpu_model, load_average
from megatron_mone.common.places import ROOT
from megatron_mone.model.run_config import load_run

LAYOUTS = {
    "one rank": (1, 1, "tp=1"),
    "DP 2": (2, 1, "tp=1,use_distributed_optimizer=true"),
    "EP 2": (2, 1, "tp=1,ep=2,use_distributed_optimizer=true"),
    "TP 2": (2, 1, "tp=2"),
    "PP 2": (2, 2, "tp=1,pp=2"),
    "TP 2 EP 2": (2, 1, "tp=2,ep=2,etp=1"),
}
"""Name -> (ranks, stages, layout); no more ranks than there are cores."""
LAYERS = 4  # of a stage: the small job has two of them
MODEL = {
    "hidden_size": 512, "ffn_hidden_size": 1024, "num_attention_heads": 8,
    "num_experts": 8, "moe_ffn_hidden_size": 704, "moe_router_topk": 2,
    "moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 1e-2, "swiglu": True,
    "add_bias_linear": False, "normalization": "RMSNorm", "position_embedding_type": "rope",
    "attention_dropout": 0.0, "hidden_dropout": 0.0, "vocab_size": 1023,
    "untie_embeddings_and_output_weights": True, "max_position_embeddings": 512,
    "tokenizer_type": "NullTokenizer", "mone_neuron_ratio": 0.25, "mone_ng_loss_coeff": 1e-3,
}  # fmt: skip
TRAIN = {
    "seq_length": 256, "micro_batch_size": 2, "global_batch_size": 8, "train_iters": 1000,
    "lr": 1e-3, "min_lr": 1e-4, "mock_data": True, "num_workers": 0,
    "eval_interval": 1000, "eval_iters": 0,
}  # fmt: skip


def write_inputs(folder: Path, model: dict, train: dict) -> tuple[Path, Path]:
    """A run file, and the cluster of this machine: cpu-avx2's figures by this processor's name."""
    folder.mkdir(parents=True, exist_ok=True)
    run, cluster = folder / "job.yaml", folder / "here.yaml"
    parts = {"model": model, "parallel": {}, "cluster": "cpu", "train": train}
    run.write_text(yaml.safe_dump(parts))
    here = yaml.safe_load((HARDWARE_ROOT / "cpu-avx2.yaml").read_text())
    here["device"]["name"] = cpu_model()
    cluster.write_text(yaml.safe_dump(here))
    return run, cluster


def command(*words: str, timeout: float = 900.0) -> str:
    """A command of ours in a process of its own; what it printed.

    Raises:
        RuntimeError: it failed; the end of what it said.
    """
    done = subprocess.run(
        [sys.executable, "-m", "megatron_mone", *words], capture_output=True, text=True,
        timeout=timeout, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    if done.returncode not in (0, 4):
        raise RuntimeError(f"{' '.join(words[:1])}: {(done.stderr or done.stdout)[-800:]}")
    return done.stdout + done.stderr


def measure(
    name: str, folder: Path, seconds: float, steps: int
) -> tuple[float, float, float, float]:
    """(ms planned before, planned after, of the run, of its fastest step) of one layout."""
    ranks, stages, layout = LAYOUTS[name]
    run, cluster = write_inputs(folder, {**MODEL, "num_layers": LAYERS * stages}, TRAIN)
    job = ["--config", str(run), "--layout", layout, "--gpus", str(ranks),
           "--cluster", str(cluster)]  # fmt: skip
    command("plan", *job, "--json", str(folder / "before" / "plan.json"))
    command("calibrate", *job, "--ranks", str(ranks), "--seconds", str(seconds),
            "--out", str(folder / "calibrated"))  # fmt: skip
    efficiency = folder / "calibrated" / "efficiency.json"
    after = folder / "after" / "plan.json"
    command("plan", *job, "--efficiency", str(efficiency), "--json", str(after))
    flags = profile_words(folder / "after" / "mone.run.yaml")
    command("profile", "--ranks", str(ranks), "--steps", str(steps), "--windows", "3",
            "--warm-up", "2", "--routing", "balanced",
            "--out", str(folder / "profile"), *flags)  # fmt: skip
    profile = json.loads((folder / "profile" / "profile.json").read_text())
    plans = [json.loads((folder / one / "plan.json").read_text()) for one in ("before", "after")]
    run = profile["runs"][0]
    before, after = (plan["models"][0]["step_ms"] for plan in plans)
    return before, after, run["step_ms"], min(run["samples"]["step_ms"])


def profile_words(run: Path) -> list[str]:
    """Flags of a run file, as a profile that is to be compared keeps them."""
    from megatron_mone.model.arguments import flag_parser
    from megatron_mone.model.run_config import to_flags

    return to_flags(load_run(run), flag_parser(), run)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("layouts", nargs="*", metavar="LAYOUT", help=", ".join(LAYOUTS))
    parser.add_argument("--seconds", type=float, default=90.0)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--out", type=Path, default=Path("out/calibrated"))
    asked = parser.parse_args()
    if unknown := [name for name in asked.layouts if name not in LAYOUTS]:
        parser.error(f"LAYOUT {unknown[0]!r} is not one of {', '.join(LAYOUTS)}")
    print(f"{cpu_model()}, load {load_average():.1f}")
    print(
        f"{'layout':12}{'assumed':>9}{'calibrated':>12}{'run, ms':>9}{'error':>8}"
        f"{'its fastest':>13}{'error':>8}{'load':>7}", flush=True,
    )  # fmt: skip
    errors = []
    for name in asked.layouts or LAYOUTS:
        folder = asked.out / name.replace(" ", "-").lower()
        before, after, ran, fastest = measure(name, folder, asked.seconds, asked.steps)
        errors.append(abs(after / ran - 1))
        print(
            f"{name:12}{before:9,.0f}{after:12,.0f}{ran:9,.0f}{after / ran - 1:+8.1%}"
            f"{fastest:13,.0f}{after / fastest - 1:+8.1%}{load_average():7.1f}", flush=True,
        )  # fmt: skip
    print(f"mean |error| {sum(errors) / len(errors):.1%}, worst {max(errors):.1%}")


if __name__ == "__main__":
    main()
