"""What one accelerator could do at most, as the `device` of a cluster's hardware file says.

The files of configs/cluster/hardware/ are the one place that holds published peaks of the devices
they name, with their source. May touch: those files, read by safe loading.
"""

from dataclasses import dataclass

from megatron_mone.common.checked_yaml import Section, read_yaml
from megatron_mone.common.places import CONFIG_ROOT
from megatron_mone.common.spelling import nearest_name

HARDWARE_ROOT = CONFIG_ROOT / "cluster" / "hardware"
DTYPES = ("bf16", "fp16", "fp8", "tf32", "fp32")
EXAMPLE = "configs/cluster/hardware/h100-ndr.yaml is a whole example"


@dataclass(frozen=True)
class Device:
    """One accelerator.

    Attributes:
        name: as its maker calls it.
        flops: dtype (of DTYPES) -> dense peak in operations a second, a multiply-add being two.
        memory_bytes: of device memory, before any reservation of the driver.
        memory_bandwidth: peak bytes a second, read and written.
    """

    name: str
    flops: dict[str, float]
    memory_bytes: float
    memory_bandwidth: float

    def peak(self, dtype: str) -> float:
        """Dense peak in operations a second; ValueError where the device has no such units."""
        if dtype not in self.flops:
            raise ValueError(
                f"{self.name} has no peak for dtype {dtype!r}: choose one of "
                f"{', '.join(self.flops)}{nearest_name(dtype, list(self.flops))}"
            )
        return self.flops[dtype]


def device_of(cluster: str) -> Device:
    """The device of one of the files in configs/cluster/hardware/.

    Args:
        cluster: the file's name without its ending.
    """
    return read_device(read_yaml(HARDWARE_ROOT / f"{cluster}.yaml", EXAMPLE).section("device"))


def read_device(part: Section) -> Device:
    """The device of a hardware file's section.

    Raises:
        ValueError: one line naming the file, the field, its value and the fix.
    """
    part.only("name", "tflops", "memory_mib", "memory_gb_per_s", "source")
    rates = part.section("tflops")
    rates.only(*DTYPES)
    if not rates.values:
        part.fail("tflops", f"must give at least one of {', '.join(DTYPES)}")
    return Device(
        name=part.text("name"),
        flops={dtype: 1e12 * rates.number(dtype) for dtype in rates.values},
        memory_bytes=part.number("memory_mib") * 2**20,
        memory_bandwidth=1e9 * part.number("memory_gb_per_s"),
    )
