"""Limits from text: typed, and refused in one line with the fix."""

import pytest

from launch.preflight.limits import Limits, read_limits


def test_without_limits_the_defaults_hold() -> None:
    assert read_limits({}) == Limits()


def test_text_becomes_numbers_of_the_limit_s_type() -> None:
    limits = read_limits({"gpus": "4", "relative": "0", "megabytes": "1.5", "backend": "gloo"})
    assert limits == Limits(gpus=4, relative=0.0, megabytes=1.5, backend="gloo")
    assert isinstance(limits.gpus, int)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("second", "5", "is not a limit (did you mean 'seconds'?)"),
        ("gpus", "0", "must be a whole number above 0"),
        ("gpus", "1.5", "must be a whole number above 0"),
        ("ecc_errors", "-1", "must be a whole number of 0 or more"),
        ("seconds", "0", "must be a number above 0"),
        ("seconds", "soon", "must be a number above 0"),
        ("megabytes", "inf", "must be a number above 0"),
        ("memory_gib", "nan", "must be a number of 0 or more"),
        ("relative", "1.5", "must be a share from 0 to 1"),
        ("backend", "mpi", "must be gloo or nccl"),
    ],
)
def test_a_wrong_limit_is_named_with_the_fix(name: str, text: str, says: str) -> None:
    with pytest.raises(ValueError) as caught:
        read_limits({name: text})
    said = str(caught.value)
    assert said.startswith("preflight_limits: ")
    assert name in said
    assert repr(text) in said
    assert says in said
    assert "\n" not in said
