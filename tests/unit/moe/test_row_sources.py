"""Blocks of rows from counts that never leave their device."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_mone.moe.dispatch.row_sources import SourceMap, cell_of_row


@given(
    st.integers(1, 4).flatmap(
        lambda sources: st.lists(
            st.lists(st.integers(0, 3), min_size=sources, max_size=sources), min_size=1, max_size=5
        )
    ),
    st.integers(0, 3),
)
def test_a_row_stands_in_the_cell_of_its_count(counts, more):
    """Empty cells too; rows beyond the counted ones are in the cell after the last."""
    rows_ER = torch.tensor(counts).t().contiguous().t()  # strided as a transposed table is
    cells = [c for c, n in enumerate(rows_ER.flatten().tolist()) for _ in range(n)]
    cells += [rows_ER.numel()] * more
    assert cell_of_row(rows_ER, len(cells)).tolist() == cells


def test_a_cell_has_the_block_of_its_sources_micro_batch():
    sources = SourceMap((1, 0, 1), 2, None, (0, 1, 1))
    assert sources.block_of_cell(2, parted=True) == [1, 0, 1, 3, 2, 3, 4]
    assert sources.block_of_cell(2, parted=False) == [0, 0, 0, 1, 1, 1, 2]
