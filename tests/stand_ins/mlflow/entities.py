"""What a batch is made of."""

from typing import NamedTuple


class Metric(NamedTuple):
    """As MLflow's."""

    key: str
    value: float
    timestamp: int
    step: int


class Param(NamedTuple):
    """As MLflow's."""

    key: str
    value: str
