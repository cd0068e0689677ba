"""Emulated ranks: attention, random states, collectives. Two ranks start once for all cases."""

import emulation_attention_cases as attention
import emulation_rank_cases as ranks
import pytest
from emulation_ranks import run_cases


def case_that_fails():
    raise AssertionError("on purpose")


LAYOUTS = (
    ({"context_parallel_size": 2}, (*attention.CP_1, *attention.CP_2)),
    ({"tensor_model_parallel_size": 2}, (*ranks.TP_2, case_that_fails)),
)
PASSING = [*attention.CP_1, *attention.CP_2, *ranks.TP_2]


@pytest.fixture(scope="module")
def results():
    return run_cases(2, LAYOUTS)


@pytest.mark.slow
@pytest.mark.parametrize("name", [case.__name__ for case in PASSING])
def test_case(results, name):
    assert results[name] == ""


@pytest.mark.slow
def test_a_failing_case_is_reported(results):
    assert results["case_that_fails"].count("on purpose") >= 2
