"""The interface of one implementation in the race."""

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_mone.benchmarking.cases import Cell, Inputs


@dataclass(frozen=True)
class Experts:
    """Experts that are ready to run: layouts are arranged, nothing is left to set up.

    Attributes:
        forward: (x_NH, probs_N) -> y_NH, the probabilities applied.
        parameters: leaves, whose gradients are asked for beside those of x and probs.
    """

    forward: Callable[[Tensor, Tensor], Tensor]
    parameters: list[Tensor]


class Adapter(ABC):
    """One implementation.

    Attributes:
        name: in tables.
        ratio: r of a MoNE entry; None says that it is dense.
        timed: what is timed beside the experts' products, in a few words.
        module, package: what it imports, and what is installed for that.
    """

    name: str
    ratio: float | None = None
    timed: str = ""
    module, package = "torch", "torch"

    def why_absent(self, cell: Cell, device: torch.device) -> str | None:
        """One line why it cannot run this cell here, or None."""
        return why_no_package(self.module, self.package)

    @abstractmethod
    def build(self, cell: Cell, inputs: Inputs) -> Experts:
        """Arrange the weights; not timed."""

    def forget(self) -> None:  # noqa: B027 - most keep nothing
        """Give back work space kept between calls, so that the meter of memory sees it."""


def why_no_package(module: str, package: str) -> str | None:
    """One line when `module` cannot be found, or None."""
    found = importlib.util.find_spec(module) is not None
    return None if found else f"the package {package} is not installed"
