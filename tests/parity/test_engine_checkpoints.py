"""A run goes on from its checkpoint, and from the other engine's, as if it had never stopped.

Six steps, saved at the third: of Megatron's engine with a plain and a distributed optimizer, of
DeepSpeed's at every ZeRO stage; each then goes on from step 3 of its own and of the others.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parity.layouts import EP2, TRAIN
from tests.training_cases import Case, run_cases, scalars

pytestmark = pytest.mark.slow

STEPS, SAVED, TOLERANCE = 6, 3, 1e-5
RESHARDABLE = ("--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable")
BF16, HOST = ("--bf16",), ("--zero-offload-optimizer",)


def deepspeed(stage: int) -> tuple[str, ...]:
    """Flags of its engine."""
    return ("--engine", "deepspeed", "--zero-stage", str(stage))


@dataclass(frozen=True)
class Layout:
    """Runs that can go on from each other.

    Attributes:
        flags: of all.
        runs: name -> flags of the engine.
        pairs: saved by the one, gone on with by the other.
    """

    flags: tuple[str, ...]
    runs: dict[str, tuple[str, ...]]
    pairs: tuple[tuple[str, str], ...]


PLAIN = {"Megatron": (), "Megatron, distributed": RESHARDABLE}
LAYOUTS = {
    "DP2": Layout(
        (),
        {**PLAIN, "ZeRO 0": deepspeed(0), "ZeRO 2": deepspeed(2), "ZeRO 3": deepspeed(3)},
        (("ZeRO 0", "ZeRO 0"), ("ZeRO 2", "ZeRO 2"), ("ZeRO 3", "ZeRO 3"),
         ("Megatron", "ZeRO 0"), ("ZeRO 3", "Megatron"), ("Megatron", "ZeRO 3"),
         ("ZeRO 0", "Megatron, distributed"), ("ZeRO 2", "ZeRO 3")),
    ),
    "EP2": Layout(
        EP2,
        {**PLAIN, "ZeRO 1": deepspeed(1), "ZeRO 2": deepspeed(2)},
        (("ZeRO 1", "ZeRO 1"), ("ZeRO 1", "Megatron"), ("Megatron", "ZeRO 2"),
         ("ZeRO 2", "Megatron, distributed"), ("Megatron, distributed", "ZeRO 1")),
    ),
    "EP2, bf16": Layout(
        (*EP2, *BF16),
        {**PLAIN, "ZeRO 1": deepspeed(1), "ZeRO 2, on the host": (*deepspeed(2), *HOST)},
        (("ZeRO 1", "ZeRO 1"), ("ZeRO 2, on the host", "ZeRO 2, on the host"),
         ("ZeRO 1", "Megatron"), ("Megatron", "ZeRO 2, on the host"),
         ("ZeRO 1", "Megatron, distributed"), ("Megatron, distributed", "ZeRO 1")),
    ),
}  # fmt: skip
ROWS = [(name, *pair) for name, layout in LAYOUTS.items() for pair in layout.pairs]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    cases = []
    for name, layout in LAYOUTS.items():
        words = (*TRAIN, *layout.flags, "--train-iters", str(STEPS))
        for run, engine in layout.runs.items():
            save = ("--save", str(saved(folder, name, run)), "--save-interval", str(SAVED))
            cases.append(Case(f"{name}, {run}", (*words, *engine, *save)))
        for one, other in layout.pairs:
            load = ("--load", str(saved(folder, name, one)), "--ckpt-step", str(SAVED), "--convert")
            cases.append(Case(f"{name}, {one} > {other}", (*words, *layout.runs[other], *load)))
    run_cases(cases, 2, folder)
    return folder


def saved(folder: Path, layout: str, run: str) -> Path:
    """A run's checkpoints."""
    return folder / f"saved {layout}, {run}"


@pytest.mark.parametrize(("layout", "one", "other"), ROWS)
def test_a_run_goes_on(runs, layout, one, other):
    """From its own checkpoint to the bit; from another's it is the run that this engine has."""
    for tag in ("lm loss", "grad-norm", "mone/ng_loss"):
        straight = scalars(runs / f"{layout}, {other}", tag)
        went_on = scalars(runs / f"{layout}, {one} > {other}", tag)
        assert sorted(went_on) == list(range(SAVED + 1, STEPS + 1))
        for step, value in went_on.items():
            wanted = straight[step] if one == other else pytest.approx(straight[step], TOLERANCE)
            assert value == wanted, (tag, step)


def optimizer_state(folder: Path) -> dict[str, Any]:
    """Key -> whole tensor, of the optimizer's."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    found = FileSystemReader(folder).read_metadata().state_dict_metadata
    state = {
        key: torch.empty(one.size, dtype=one.properties.dtype) for key, one in found.items()
        if key.startswith("optimizer.state.") and isinstance(one, TensorStorageMetadata)
    }  # fmt: skip
    load(state, storage_reader=FileSystemReader(folder), no_dist=True)
    return state


@pytest.mark.parametrize("layout", LAYOUTS)
def test_state_is_saved_by_value(runs, layout):
    """Every moment, experts' too, is that of Megatron's run, under its names."""
    wanted = optimizer_state(saved(runs, layout, "Megatron, distributed") / f"iter_{SAVED:07d}")
    assert sum("experts" in key for key in wanted) >= 6
    for run in LAYOUTS[layout].runs:
        if "ZeRO" not in run:
            continue
        state = optimizer_state(saved(runs, layout, run) / f"iter_{SAVED:07d}")
        assert sorted(state) == sorted(wanted)
        for key, tensor in wanted.items():
            assert tensor.abs().max() > 0, key
            torch.testing.assert_close(
                state[key], tensor, rtol=0, atol=TOLERANCE * tensor.abs().max().item(), msg=key
            )
