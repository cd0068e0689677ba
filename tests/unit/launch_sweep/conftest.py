"""Commands under test submit nothing real: Megatron and the planner are not asked either."""

import pytest

from launch import __main__ as command


@pytest.fixture(autouse=True)
def unjudged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Submit without the verdict, which costs ten seconds: tests/unit/launch_profile has it."""
    monkeypatch.setattr(command, "check_before_submit", lambda job, force: None)
