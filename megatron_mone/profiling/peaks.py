"""What a rank's machine could do at most: operations a second, and bytes a second of memory.

A GPU's published dense peak, by its name; a CPU's measured one, of this rank's threads while all
ranks measure at once, since ranks of a host share its memory and its clock. None where unknown: a
utilisation against a guess is worse than none. May touch: torch, the time.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_mone.common.device import device_of

SIDES = (256, 512, 1024, 2048, 4096)  # of square products
LONG_ENOUGH = 0.02  # seconds of a product; a larger one is taken while it takes less
COPIED = 1 << 25  # float32 elements, more than caches hold when every rank copies
SUSTAINED = 0.5  # seconds


@dataclass(frozen=True)
class RankPeaks:
    """Of one rank's device.

    Attributes:
        flops: operations a second of dense products in the run's dtype, or None.
        bytes_per_s: bytes a second read and written, or None.
    """

    flops: float | None
    bytes_per_s: float | None


# Dense rates (the data sheets' sparse ones are twice these) and memory bandwidth: of a cluster's
# hardware file, or from NVIDIA's data sheets "A100 Tensor Core GPU" (2021) and "H100 Tensor Core
# GPU" (PCIe and NVL columns). Name as torch gives it -> the file, or (bf16, fp32 by TF32 units,
# bytes a second); the first that is part of a device's name counts.
PUBLISHED: dict[str, str | tuple[float, float, float]] = {
    "A100-SXM4-80GB": "a100-hdr",
    "A100 80GB PCIe": (312e12, 156e12, 1.935e12),
    "A100": (312e12, 156e12, 1.555e12),  # 40 GB
    "H100 PCIe": (756e12, 378e12, 2.0e12),
    "H100 NVL": (835e12, 417.5e12, 3.9e12),
    "H100 80GB HBM3": "h100-ndr",  # SXM
    "H200": "h200-ndr",
    "B200": "b200-ndr",
}


def published_peaks(name: str, dtype: torch.dtype) -> RankPeaks:
    """Of a GPU; Nones for one that is not in PUBLISHED.

    Args:
        name: as torch.cuda.get_device_name gives it.
        dtype: of the model's products. float32 counts TF32 units, whether torch uses them or not.
    """
    row = next((rates for part, rates in PUBLISHED.items() if part in name), None)
    if row is None:
        return RankPeaks(None, None)
    if isinstance(row, str):
        device = device_of(row)
        row = device.peak("bf16"), device.peak("tf32"), device.memory_bandwidth
    flops = {torch.bfloat16: row[0], torch.float16: row[0], torch.float32: row[1]}
    return RankPeaks(flops.get(dtype), row[2])


def measured_peaks(dtype: torch.dtype, barrier: Callable[[], object]) -> RankPeaks:
    """Of this rank's threads on the CPU; some seconds, and 256 MiB for the last of them.

    Rates over a while in which every rank works, so that ranks that outnumber the cores have their
    share of them and no more.

    Args:
        dtype: of the model's products. bfloat16 may also run in float32, which is the faster of
            the two without bfloat16 units, so that the higher rate counts.
        barrier: holds every rank until all have come. Every rank must call this function.
    """
    rates = [_product_rate(kind, barrier) for kind in dict.fromkeys((torch.float32, dtype))]
    source = torch.ones(COPIED)
    target = torch.empty_like(source)
    copies = _calls_per_second(lambda: target.copy_(source), barrier)
    return RankPeaks(max(rates), 2 * source.nbytes * copies)


def _product_rate(dtype: torch.dtype, barrier: Callable[[], object]) -> float:
    """Operations a second of the smallest square product that takes long enough."""
    for side in SIDES:
        a, b = (torch.randn(side, side).to(dtype) for _ in range(2))
        torch.mm(a, b.t())  # allocates, starts threads
        start = time.perf_counter()
        torch.mm(a, b.t())
        if time.perf_counter() - start > LONG_ENOUGH:
            break
    return 2 * side**3 * _calls_per_second(lambda: torch.mm(a, b.t()), barrier)


def _calls_per_second(call: Callable[[], object], barrier: Callable[[], object]) -> float:
    barrier()
    start = time.perf_counter()
    calls = 0
    while time.perf_counter() - start < SUSTAINED:
        call()
        calls += 1
    return calls / (time.perf_counter() - start)


def rank_peaks(dtype: torch.dtype, barrier: Callable[[], object]) -> RankPeaks:
    """`published_peaks` of this rank's GPU where there is one, else `measured_peaks`."""
    if torch.cuda.is_available():
        return published_peaks(torch.cuda.get_device_name(), dtype)
    return measured_peaks(dtype, barrier)
