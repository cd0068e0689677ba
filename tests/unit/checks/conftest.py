"""What the tests of checks share."""

import pytest
import torch

from megatron_mone.model.arguments import flag_parser


@pytest.fixture(scope="module")
def parser():
    """Megatron's and ours, as the ranks of this machine have it."""
    from megatron_mone import cpu_emulation

    if not torch.cuda.is_available():
        cpu_emulation.install()
    return flag_parser()
