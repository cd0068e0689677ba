"""A script that knows nothing of the emulation trains, saves and resumes under it."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mone.cpu_emulation import __main__ as emulation
from tests import forked_ranks

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "tests" / "integration" / "stock_pretrain_gpt.py"

MODEL = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --ffn-hidden-size 48 "
    "--seq-length 16 --max-position-embeddings 16 --position-embedding-type rope --no-rope-fusion "
    "--normalization RMSNorm --swiglu --disable-bias-linear "
    "--untie-embeddings-and-output-weights --transformer-impl local "
    "--num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 24 "
    "--moe-token-dispatcher-type alltoall"
)
TRAINING = (
    "--micro-batch-size 1 --global-batch-size 2 --train-iters 6 --eval-iters 0 "
    "--eval-interval 1000 --lr 1e-3 --min-lr 1e-4 --mock-data --tokenizer-type NullTokenizer "
    "--vocab-size 63 --split 100,0,0 --num-workers 0 --no-gradient-accumulation-fusion "
    "--ckpt-format torch_dist --save-interval 3"
)
LAYOUT = (
    "--tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 2 "
    "--expert-tensor-parallel-size 1 --use-distributed-optimizer"
)


def by_torchrun(arguments, log):
    """In interpreters of their own, where the emulation is installed before Megatron is there."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
        *("--master-port", str(port), "-m", "megatron_mone.cpu_emulation", *arguments),
    ]
    with log.open("w") as file:
        return subprocess.run(command, stdout=file, stderr=file, check=False, cwd=ROOT).returncode


def by_forks(arguments, log):
    """The same command on ranks that need not import Megatron again."""
    return forked_ranks.start(2, emulation.main, (arguments,), log).wait(timeout=600)


def train(start, folder, name, *flags):
    """Train on two ranks; return {(iteration, rank): [loss of each micro-batch, in full]}."""
    losses, log = folder / f"{name}.losses", folder / f"{name}.log"
    arguments = [str(SCRIPT), *MODEL.split(), *TRAINING.split(), *LAYOUT.split()]
    arguments += ["--record-losses", str(losses), *map(str, flags)]
    assert start(arguments, log) == 0, log.read_text(errors="replace")[-4000:]
    found: dict[tuple[int, int], list[str]] = {}
    for line in losses.read_text().splitlines():
        iteration, rank, loss = line.split()
        found.setdefault((int(iteration), int(rank)), []).append(loss)
    return found


@pytest.mark.slow
def test_resumed_run_is_bit_equal_to_the_run_that_never_stopped(tmp_path):
    """TP 2, sequence parallel, EP 2, distributed optimizer, dropout 0.1 in the default places."""
    checkpoint = tmp_path / "checkpoint"
    whole = train(by_torchrun, tmp_path, "whole", "--save", checkpoint)
    assert {iteration for iteration, _ in whole} == set(range(6))
    assert len({loss for losses in whole.values() for loss in losses}) > 6
    # TP ranks see the same tokens, so a replicated part that drew otherwise would show here.
    assert all(whole[i, 0] == whole[i, 1] for i in range(6))

    (checkpoint / "latest_checkpointed_iteration.txt").write_text("3")
    resumed = train(by_forks, tmp_path, "resumed", "--load", checkpoint)
    assert resumed == {key: losses for key, losses in whole.items() if key[0] >= 3}
