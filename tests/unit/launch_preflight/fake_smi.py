"""A stand-in for nvidia-smi that answers the fields it is asked for, from tables of a folder.

The values and messages are written after nvidia-smi's documented CSV format and its answers as
published for H100, A100 and GeForce cards; they were not recorded on this project's machines.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

SCRIPT = r"""#!/bin/sh
# $1 is --query-TABLE=FIELD,FIELD; a table of this host's name wins over the common one.
what=${1#--query-}
table="@FOLDER@/${what%%=*}"
[ ! -e "$table.$SLURMD_NODENAME" ] || table="$table.$SLURMD_NODENAME"
[ -e "$table" ] || { echo "Unable to determine the device handle for GPU0000:5B:00.0: GPU is lost.\
  Reboot the system to recover this GPU"; exit 15; }
exec awk -F '\t' -v asked="${what#*=}" '
  NR == 1 {
    count = split(asked, want, ",")
    for (i = 1; i <= NF; i++) column[$i] = i
    for (i = 1; i <= count; i++) if (!(want[i] in column)) {
      printf "Field \"%s\" is not a valid field to query.\n\n", want[i]
      exit 2
    }
    next
  }
  { for (i = 1; i <= count; i++) printf "%s%s", $column[want[i]], i < count ? ", " : "\n" }
' "$table"
"""

H100 = {
    "name": "NVIDIA H100 80GB HBM3",
    "driver_version": "550.90.07",
    "clocks.max.sm": "1980",
    "clocks.current.sm": "345",
    "temperature.gpu": "31",
    "memory.used": "1",
    "pcie.link.width.current": "16",
    "pcie.link.width.max": "16",
    "retired_pages.pending": "[N/A]",
    "ecc.errors.uncorrected.volatile.total": "0",
    "ecc.errors.uncorrected.aggregate.total": "0",
    "clocks_event_reasons.hw_slowdown": "Not Active",
    "clocks_event_reasons.hw_thermal_slowdown": "Not Active",
    "clocks_event_reasons.hw_power_brake_slowdown": "Not Active",
}
GEFORCE = H100 | {
    "name": "NVIDIA GeForce RTX 4090",
    "clocks.max.sm": "3105",
    "retired_pages.pending": "[N/A]",
    "ecc.errors.uncorrected.volatile.total": "[N/A]",
    "ecc.errors.uncorrected.aggregate.total": "[N/A]",
}


def uuid(index: int) -> str:
    return f"GPU-{index}2e5c1f0-7d31-4a0b-9d4f-0c6b1de4a9f{index}"


def gpus(count: int, kind: Mapping[str, str] = H100, **changes: Mapping[str, str]):
    """Rows of `count` GPUs; `gpu5={...}` changes fields of one."""
    return [
        {"index": str(i), "uuid": uuid(i), **kind, **changes.get(f"gpu{i}", {})}
        for i in range(count)
    ]


def healthy_rows(count: int) -> list[dict[str, str]]:
    return [
        {"gpu_uuid": uuid(i), "remapped_rows.pending": "0", "remapped_rows.failure": "0"}
        for i in range(count)
    ]


def write_table(folder: Path, name: str, rows: Sequence[Mapping[str, str]]) -> None:
    lines = ["\t".join(rows[0]), *("\t".join(row.values()) for row in rows)]
    (folder / name).write_text("\n".join(lines) + "\n")


def install(folder: Path, rows: Sequence[Mapping[str, str]]) -> Path:
    """Write an nvidia-smi and its tables; returns the folder for PATH."""
    programs = folder / "bin"
    programs.mkdir(parents=True)
    script = programs / "nvidia-smi"
    script.write_text(SCRIPT.replace("@FOLDER@", str(folder)))
    script.chmod(0o755)
    write_table(folder, "gpu", rows)
    write_table(folder, "remapped-rows", healthy_rows(len(rows)))
    return programs
