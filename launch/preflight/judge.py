"""Reads all lines of a check and leaves the verdict beside them; the job script goes by it.

May touch: ATTEMPT.json, ATTEMPT.nodes and ATTEMPT.bad beside ATTEMPT.jsonl.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from launch.preflight.limits import Limits
from launch.preflight.lines import read_lines, task_lines
from launch.preflight.place import read_hosts
from launch.preflight.verdict import Verdict, verdict
from megatron_mone.common.files import atomic_write, write_json

TOO_FEW = 69
"""Exit status when too few nodes are good: EX_UNAVAILABLE of sysexits.h."""


def judge(lines_file: Path, hosts_file: Path, need: int, limits: Limits) -> int:
    """Name the bad nodes on stderr, sum up on stdout, write the three files; 0 or TOO_FEW.

    Raises:
        ValueError: the host list is no host list.
        OSError: a file cannot be read or written.
    """
    hosts = read_hosts(hosts_file)
    found = verdict(task_lines(read_lines(lines_file), hosts), hosts, need, limits)
    _write(lines_file, hosts, found, need)
    for node, reasons in found.bad.items():
        print(
            f"megatron-mone: node {hosts[node]} is left out: {'; '.join(reasons)}", file=sys.stderr
        )
    for (lower, upper), why in found.failed_pairs.items():
        print(
            f"megatron-mone: nodes {hosts[lower]} and {hosts[upper]} do not work together, "
            f"either may be bad: {why}",
            file=sys.stderr,
        )
    print(_summary(hosts, found, need))
    return 0 if len(found.chosen) == need else TOO_FEW


def _summary(hosts: Sequence[str], found: Verdict, need: int) -> str:
    text = f"pre-flight: {len(found.good)} of {len(hosts)} nodes are good"
    if found.bad:
        text += f", bad: {' '.join(hosts[node] for node in found.bad)}"
    if found.median_pair is not None:
        text += f"; all-reduce between two nodes {found.median_pair:.3g} GB/s (median)"
    if len(found.chosen) < need:
        text += f"; {need} are needed, {len(found.chosen)} can work together"
    return text


def _write(lines_file: Path, hosts: Sequence[str], found: Verdict, need: int) -> None:
    write_json(
        lines_file.with_suffix(".json"),
        {
            "need": need,
            "enough": len(found.chosen) == need,
            "chosen": [hosts[node] for node in found.chosen],
            "good": [hosts[node] for node in found.good],
            "bad": {hosts[node]: list(reasons) for node, reasons in found.bad.items()},
            "failed_pairs": [
                {"nodes": [hosts[lower], hosts[upper]], "why": why}
                for (lower, upper), why in found.failed_pairs.items()
            ],
            "pair_gb_per_s": [
                {"nodes": [hosts[lower], hosts[upper]], "value": value}
                for (lower, upper), value in sorted(found.pairs.items())
            ],
            "median_pair_gb_per_s": found.median_pair,
        },
    )
    for suffix, nodes in ((".nodes", found.chosen), (".bad", tuple(found.bad))):
        text = "".join(f"{hosts[node]}\n" for node in nodes)
        atomic_write(lines_file.with_suffix(suffix), text.encode())
