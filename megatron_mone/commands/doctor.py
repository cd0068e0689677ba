"""`doctor`: what is installed, what works on this machine, and what a run file lacks here."""

import json
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

from typer import Context, Option

from megatron_mone.common import installed, machine
from megatron_mone.common.exit_status import USER_ERROR
from megatron_mone.common.program import PASSES_REST, Program

SLURM = ("sbatch", "scancel", "scontrol", "squeue", "sacct")
program = Program()
main = program.main


@program.command("doctor", context_settings=PASSES_REST)
def doctor(
    context: Context,
    config: Annotated[
        Path | None, Option(help="a run file: what it needs, with the flags after --")
    ] = None,
    as_json: Annotated[bool, Option("--json", help="one JSON object instead of tables")] = False,
) -> int:
    """Say what is installed, what works on this machine, and what a run file lacks here.

        megatron-mone doctor
        megatron-mone doctor --config configs/demo-mone.yaml -- --optimizer muon

    Each missing thing comes with the line that installs it. A run file is looked at for packages
    and devices; its data and folders are looked at when it is trained. Exit status: 0; 2 where the
    run file, or without one the base installation, lacks something that it needs.
    """
    if context.args and config is None:
        raise ValueError(f"{context.args[0]}: flags are of a run file: give --config too")
    found = report(config, context.args)
    print(json.dumps(found, indent=1)) if as_json else _print(found)
    return USER_ERROR if found["missing"] else 0


def report(config: Path | None, flags: Sequence[str]) -> dict[str, Any]:
    """All that there is to say, as JSON holds it.

    Args:
        config: run file, or None.
        flags: Megatron's, after those of the run file.

    Raises:
        ValueError: one line; the run file or a flag is wrong.
    """
    packages = installed.packages()
    missing = [f"{one.name}: {one.install}" for one in packages if one.required and one.install]
    if config is not None and not missing:
        missing = lacking(["--config", str(config), *flags])
    return {
        "schema": "megatron-mone/doctor/1",
        "version": installed.own()[0],
        "machine": {**machine.facts(), **_gpus()},
        "installed": [asdict(one) for one in (*packages, *installed.programs())],
        "works": works(),
        "config": config and str(config),
        "missing": missing,
    }


def _gpus() -> dict[str, str]:
    try:
        import torch
    except (ImportError, OSError):  # works() says so
        return {}
    count = torch.cuda.device_count()
    return {"GPUs": f"{count} x {torch.cuda.get_device_name()}" if count else "none"}


def works() -> dict[str, str]:
    """What can be run -> why not here; empty where it works. Imports torch, and no Megatron."""
    no_slurm = [name for name in SLURM if shutil.which(name) is None]
    found = {"launch submit": (no_slurm and f"{', '.join(no_slurm)} not on PATH") or ""}
    try:
        import torch

        from megatron_mone.kernels import BACKENDS, Call
    except (ImportError, OSError) as error:
        return {**found, "all else": f"torch cannot be imported: {error}"}
    from megatron_mone.planning.tracing.trace_cache import TraceCache

    gpus = torch.cuda.device_count()
    gloo = torch.distributed.is_available() and torch.distributed.is_gloo_available()
    found["ranks on CPUs"] = "" if gloo else "this torch was built without gloo"
    absent = "" if find_spec("deepspeed") else "the package deepspeed is not installed"
    found["engine deepspeed"] = absent
    found["ranks on GPUs"] = "" if gpus else "torch finds no CUDA device"
    for name, backend in BACKENDS.items():
        reasons = [backend.why_not(Call(device)) for device in ("cpu", "cuda")[: 1 + bool(gpus)]]
        found[f"backend {name}"] = "" if None in reasons else str(reasons[-1])
    try:
        TraceCache()
        found["plan"] = ""
    except ValueError as error:
        found["plan"] = str(error)
    return found


def lacking(words: Sequence[str]) -> list[str]:
    """What a training run would need of packages and devices that is not here, a line each.

    Args:
        words: of its command line.

    Raises:
        ValueError: one line; the run file or a flag is wrong.
    """
    warnings.simplefilter("ignore")  # Megatron's, of packages that nothing may need
    import torch

    if not torch.cuda.is_available():
        from megatron_mone import cpu_emulation

        cpu_emulation.install()
    from megatron_mone.deepspeed.supported import check_package
    from megatron_mone.model.arguments import parse_given, written_out
    from megatron_mone.model.checks.machine import machine_faults
    from megatron_mone.model.checks.optimizer import check_optimizer_package
    from megatron_mone.model.layer_spec import package_faults

    args = parse_given(written_out(words))
    # megatron/training/arguments.py: validate_args, which wants the ranks of the run
    args.params_dtype = torch.half if args.fp16 else torch.bfloat16 if args.bf16 else torch.float
    found = [*machine_faults(args), *package_faults(args)]
    for check in (check_optimizer_package, check_package):
        try:
            check(args)
        except ValueError as error:
            found.append(str(error))
    return found


def _print(found: dict[str, Any]) -> None:
    head = [("megatron-mone", found["version"]), *found["machine"].items()]
    _table("", [(label, text) for label, text in head if label not in ("Versions", "Date")])
    lines = {one["name"]: f"{one['use']}: {one['install']}" for one in found["installed"]}
    rows = [
        (one["name"], one["version"] or "-", lines[one["name"]] if one["install"] else "")
        for one in found["installed"]
    ]
    _table("installed", rows)
    _table("works here", [(k, "no" if v else "yes", v) for k, v in found["works"].items()])
    if found["config"] or found["missing"]:
        what = found["config"] or "the base installation"
        _table(f"{what} lacks", [(line,) for line in found["missing"]] or [("nothing",)])


def _table(head: str, rows: Sequence[tuple[str, ...]]) -> None:
    """A head, and rows of columns of one width each; the last may be long."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print(f"\n{head}" if head else "", end="\n" if head else "")
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        print("  ".join(["", *cells]).rstrip())
