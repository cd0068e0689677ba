"""A loss that is not finite ends the run with status 3 and a line; a spike is warned of."""

import math
import re
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from megatron_mone.model import loss_check
from megatron_mone.model.gpt_training import loss_func
from megatron_mone.moe import faults
from tests import forked_ranks
from tests.training_cases import MOCK, TINY
from tests.unit.moe.builders import build_layer

# At this rate the weights overflow; stock experts, for MoNE's say themselves that they do.
BLOWS_UP = [
    *(*TINY, *MOCK, "--lr", "1e30", "--min-lr", "1e29", "--clip-grad", "0", "--train-iters", "4"),
]
REFUSED = "megatron-mone: error: the loss or a gradient is not finite"
CASES = {
    "runs the step again": (
        ["--save", "{tmp}/save", "--save-interval", "9"],
        rf"{REFUSED}, and was the same when",
    ),
    "cannot be tried again": ([], rf"{REFUSED}: Rank 0, .*, iteration 3: Unexpected result nan"),
}


@pytest.fixture
def machine(monkeypatch) -> None:
    """A rerun state machine that may not run a step again, and all checks on."""
    from megatron.core import rerun_state_machine as module

    args = Namespace(check_for_nan_in_loss_and_grad=True, check_for_spiky_loss=True)
    monkeypatch.setattr(loss_check, "get_args", lambda: args)
    monkeypatch.setattr(module, "_GLOBAL_RERUN_STATE_MACHINE", None)
    module.initialize_rerun_state_machine(mode=module.RerunMode.DISABLED)


@pytest.mark.usefixtures("one_rank", "machine")
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_refused(value):
    mask, output = torch.ones(2, 3), torch.ones(2, 3)
    assert loss_func(mask, output)[0] == 6
    output[0, 1] = value
    with pytest.raises(RuntimeError, match="local forward loss") as error:
        loss_func(mask, output)
    assert str(loss_check.rejection(error.value)).startswith(
        "the loss or a gradient is not finite:"
    )
    mask[0, 1] = 0  # times NaN it is NaN still, as in Megatron
    with pytest.raises(RuntimeError):
        loss_func(mask, output)


@pytest.mark.usefixtures("one_rank", "machine")
def test_an_expert_says_first_where_a_refused_loss_began(monkeypatch):
    """What a GPU keeps until somebody looks."""
    monkeypatch.setattr(faults, "DEFER", True)
    monkeypatch.setattr(faults, "_kept", {})
    layer = build_layer()
    with torch.no_grad():
        layer.experts.linear_fc2[2] = math.nan
    output, _ = layer(torch.randn(40, 1, 16))
    with pytest.raises(faults.NonFiniteExpertError, match="layer 1, expert 2 gave NaN"):
        loss_func(torch.ones(40, 1), output.sum(dim=2))
    with pytest.raises(RuntimeError, match="local forward loss"):  # and was all they found
        loss_func(torch.ones(40, 1), output.sum(dim=2))


@pytest.mark.usefixtures("one_rank", "machine")
def test_a_spike_is_warned_of(caplog):
    """Of 10 times the largest of the first 100."""
    mask = torch.ones(1, 1)
    for _ in range(100):
        loss_func(mask, torch.full((1, 1), 2.0))
    loss_func(mask, torch.full((1, 1), 19.0))
    assert "Spiky loss" not in caplog.text
    loss_func(mask, torch.full((1, 1), 21.0))
    assert "Unexpected result 21.0 (message='Spiky loss')" in caplog.text


def test_other_ends_are_left_alone():
    for error in (RuntimeError("gloo"), SystemExit(2), SystemExit(0), SystemExit(None)):
        assert loss_check.rejection(error) is None
    assert "another one when the step ran again" in str(loss_check.rejection(SystemExit(17)))


def train(flags: list[str]) -> None:
    """Of a rank."""
    from megatron_mone import pretrain
    from tests.training_cases import spare_repeated_work

    spare_repeated_work()
    pretrain.main(flags)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_run_says_why_it_ends(name: str, tmp_path: Path) -> None:
    flags, says = CASES[name]
    log = tmp_path / "log"
    given = [flag.format(tmp=tmp_path) for flag in (*BLOWS_UP, *flags)]
    job = forked_ranks.start(1, train, (given,), log)
    try:
        assert job.wait(timeout=600) == 1
    finally:
        job.kill()
    text = log.read_text(errors="replace")
    assert "ended with 3\n" in text, text[-3000:]
    assert re.search(says, text), text[-3000:]
    assert "Traceback" not in text
