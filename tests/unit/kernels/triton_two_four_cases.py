"""The sparse24 backend in Triton's interpreter, with a stand-in for torch's product on a GPU.

Cases of triton_interpreter_cases.py, which runs them.
"""

from unittest import mock

import pytest
import torch

from megatron_mone.kernels import Selection, sparse24
from megatron_mone.kernels.neuron_mask import NeuronMask
from megatron_mone.kernels.triton import self_check, two_four
from tests.unit.kernels.triton_case_tools import against_reference, case, inputs
from tests.unit.kernels.two_four_stand_ins import stand_ins


@case()
def a_layer_of_two_of_four() -> None:
    """Values and all gradients; a mask given back makes the same output, and rows that are not
    finite are marked; another mask is refused."""
    counts, options = [1, 0, 2], {"activation": "silu"}
    leaves = inputs(counts, 16, 64, torch.bfloat16)

    def run(*operands):
        made = sparse24.run(*operands, choose=Selection(32, groups=16), **options)
        assert not made.entries.bad_N.any()
        outputs.append(made.y_NH.detach())
        return made.y_NH, made.mask

    outputs: list[torch.Tensor] = []
    with stand_ins(two_four.CUTLASS) as seen:
        mask = against_reference(run, leaves, counts, "silu")
        assert seen == [(32, 64)] * 6  # down of two experts with rows, then dx of two terms each
        x, p, gate, up, down = (leaf.detach() for leaf in leaves)
        down[2, :, 0] = torch.inf
        operands = (x, p, counts, gate, up, down)
        again = NeuronMask.from_bool(mask.to_bool())  # which does not say S
        made = sparse24.run(*operands, choose=again, **options)
        assert torch.equal(made.y_NH[:1], outputs[0][:1])
        assert made.entries.bad_N.tolist() == [0, 1, 1]
        assert made.mask == mask
        wrong = NeuronMask.from_bool(mask.to_bool().roll(1, dims=1), kept=32)
        with pytest.raises(ValueError, match="does not keep two of every four neurons"):
            sparse24.run(*operands, choose=wrong, **options)


@case()
def the_product_passes_its_own_check() -> None:
    """And one that is wrong, or does not run, is one line."""

    def found() -> str | None:
        self_check._fault.cache_clear()
        return self_check.two_four_fault(torch.device("cpu"))

    with stand_ins(two_four.CUSPARSELT):
        assert found() is None
    with stand_ins(two_four.CUSPARSELT, factor=1.05):
        assert str(found()).startswith("kernel 2:4 of cuSPARSELt is wrong on cpu in torch.bfloat16")
    lost = mock.Mock(side_effect=RuntimeError("architecture mismatch\nwhen calling"))
    with stand_ins(two_four.CUSPARSELT), mock.patch.object(torch, "_cslt_sparse_mm", lost):
        assert found() == (
            "torch's semi-structured product does not run on cpu: architecture mismatch"
        )
