"""Which implementation a call's products take: measured rules, one function each.

Measured with tests/unit/kernels/measure_cpu_backend.py on an AVX2 processor, 2 cores, torch 2.14:
    float32, gate of few rows   the native product takes 0.3 to 0.8 of torch's time at 2 to 64 rows
                                an expert, as long as torch's at 128
    few rows                    reading kept weights in place takes 0.6 to 0.95 of the other routes'
                                time up to 6 rows for each neuron that is kept, in bfloat16 up to 3
                                (AVX2 and AVX-512, forward and backward)
    bfloat16 without AMX        torch's GEMM reaches 10 GFLOP/s a core, half of its float32 one with
                                avx512_bf16; the native kernels, which convert what they load, 45 to
                                80. The gate by a float32 GEMM of converted weights takes as long as
                                by ours; where all is kept such GEMMs take 0.83 of our time
Not measured: AMX. There torch's bfloat16 GEMM is several times its float32 one, so that GEMMs over
all neurons beat native kernels that compute in float32; few rows are bound by memory instead.
"""

from functools import cache

import torch

from megatron_mone.kernels.cpu import native

DENSE_ABOVE = 0.7  # kept share above which torch's GEMMs are faster than the sparse kernels
GEMM_ROWS = 64  # rows an expert up to which torch's GEMM of the gate is slower than ours
# Rows that keep a neuron, on average, up to which reading its weights counts most.
FEW_USES = {torch.float32: 6, torch.bfloat16: 3}


@cache
def fast_bfloat16() -> bool:
    """Whether torch multiplies bfloat16 matrices in matrix units (AMX)."""
    probe = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return probe is not None and bool(probe())


def gemm_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which torch's GEMM multiplies the fastest what is of `dtype`."""
    return dtype if fast_bfloat16() else torch.float32


def by_gemm(layout: native.Layout, dtype: torch.dtype) -> bool:
    """Whether torch's GEMM, not the native product, computes x weight^T of all neurons."""
    return gemm_dtype(dtype) == dtype and _rows_an_expert(layout) > GEMM_ROWS


def route(layout: native.Layout, kept: int, dtype: torch.dtype, block: int) -> str:
    """How products at the `kept` entries of a mask over the layout's rows are computed.

    Args:
        layout: rows of each expert, F.
        kept: K entries in all.
        dtype: of x and the weights.
        block: B, the entries are whole aligned blocks of so many neurons.

    Returns:
        "dense": torch's GEMMs over all neurons; "few", "blocks" or "sparse": kept entries alone.
    """
    share, most = kept / max(1, layout.rows * layout.neurons), max(layout.counts, default=0)
    if most <= native.FEW_ROWS and most * share <= FEW_USES[dtype]:
        return "few"
    few_rows = dtype == torch.bfloat16 and _rows_an_expert(layout) <= GEMM_ROWS
    if computes_all(share, dtype) and not few_rows:
        return "dense"
    return "blocks" if block % native.BLOCK == 0 else "sparse"


def computes_all(kept_share: float, dtype: torch.dtype) -> bool:
    """Whether training shapes run GEMMs over every neuron, because those are faster."""
    return kept_share > DENSE_ABOVE or (dtype == torch.bfloat16 and fast_bfloat16())


def _rows_an_expert(layout: native.Layout) -> float:
    """Mean over the experts that have rows."""
    return layout.rows / max(1, sum(count > 0 for count in layout.counts))
