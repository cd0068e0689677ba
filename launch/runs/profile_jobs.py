"""submit --profile: the profiler on several numbers of nodes, and a report over them.

    RUN/profiles/002-nodes/     what tools/profile.py wrote on 2 nodes
    RUN/profiles/report/        report.html of the largest, with the scaling curve over all
    RUN/cases/002-nodes/        batch script, logs and attempts of that job
    RUN/                        the same of the report's job

Each number of nodes is a job of its own: elements of one Slurm array all have one size, and would
hold 16 nodes for the run of one. The report is a job that depends on the end of all others,
however they end. May touch: the run folder, Slurm through slurm/commands.py.
"""

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

from typer import Option

from launch.runs.run_commands import SCRIPT
from launch.runs.run_manifest import locked, open_run
from launch.runs.start_commands import judged
from launch.runs.submission import SUBMIT_LOCK, noted, refuse_if_submitted
from launch.slurm.commands import SlurmUnavailable, cancel
from launch.slurm.script import sbatch_script
from launch.spec.checks import checked, limit_seconds
from launch.spec.launch_spec import LaunchSpec
from launch.spec.pre_submit import PreSubmitChecks, Refused, pre_submit_checks
from launch.spec.profile_sizes import Size, Sizes
from launch.spec.sbatch_options import without_gpus
from launch.spec.training_job import check_hostfile, data_prefixes, training_variables
from megatron_mone.common.files import atomic_write
from megatron_mone.common.places import program_words
from megatron_mone.common.program import parse
from megatron_mone.model.run_config import find_run, load_run
from megatron_mone.profiling.baselines import run_specs
from megatron_mone.profiling.job_options import Asked, Options, read_options

PROFILES = "profiles"
CASES = "cases"
REPORT = "report"
PAGE = "report.html"
_NOT_OURS = ("--out", "--ranks", "--config", "--save", "--load")
_REPORT_LIMIT = "00:30:00"


@dataclass(frozen=True)
class ProfileSweep:
    """The jobs of one profile.

    Attributes:
        name: of the run.
        folder: of the run.
        values: Megatron's arguments of the run file.
        words: Megatron flags after them.
        options: of the profiler.
        config: JSON value with all that decides the result, but for the numbers of nodes: a later
            submission may add some.
        sizes: of the jobs.
        specs: job of each of them.
        left_out: why a number of nodes has no job, a line each.
    """

    name: str
    folder: Path
    values: Mapping[str, Any]
    words: tuple[str, ...]
    options: Options
    config: Any
    sizes: tuple[Size, ...]
    specs: tuple[LaunchSpec, ...]
    left_out: tuple[str, ...]


@dataclass
class ProfileFlags:
    """The flags of a profile, which stand before `--`."""

    profile: Annotated[
        bool, Option("--profile", help="submit: profile on several numbers of nodes, then report")
    ] = False
    profile_nodes: Annotated[
        str | None,
        Option(metavar="N,N", help="numbers of nodes (powers of two, and --nodes)"),
    ] = None
    profile_steps: Annotated[int, Option(metavar="N", help="measured steps")] = 20
    against: Annotated[str, Option(help="baselines, by comma (docs/PROFILER.md)")] = "moe"
    strong: Annotated[bool, Option("--strong", help="keep the global batch at every size")] = False


def refuse_profile_flags(options: Any) -> None:
    """Refuse flags of a profile where there is none: they would change nothing.

    Raises:
        ValueError: names the flag and the fix.
    """
    for one in fields(ProfileFlags):
        if one.name != "profile" and getattr(options, one.name) != one.default:
            raise ValueError(
                f"--{one.name.replace('_', '-')} is for --profile: add that, or drop it"
            )


def submit_profile(options: Any, words: Sequence[str], site: Mapping[str, Any]) -> None:
    """Hand the jobs of a profile to Slurm, all or none; or print the scripts, or Slurm's judgement.

    Args:
        options: of the command line before `--`, with a config.
        words: after it: flags of Megatron, and of tools/profile.py.
        site: fields of the launch file and of flags.

    Raises:
        ValueError: one line; a wrong flag, no number of nodes can be profiled, Slurm refuses a
            job, or the folder holds another run.
        SlurmUnavailable: Slurm does not answer.
    """
    sweep = read_sweep(options, words, site)
    if not options.dry_run:
        with pre_submit_checks(options.force) as checks:
            if checks is not None:
                sweep = _checked(sweep, checks, options.force)
    if not sweep.sizes:
        raise ValueError(f"no number of nodes can be profiled: {'; '.join(sweep.left_out)}")
    for line in sweep.left_out:
        print(f"left out: {line}", file=sys.stderr)
    if options.dry_run:
        for spec in (*sweep.specs, _report_job(sweep, ["ID"] * len(sweep.specs))):
            print(sbatch_script(spec), end="")
    elif options.test_only:
        for spec in (*sweep.specs, _report_job(sweep, [])):
            print(f"{spec.name}: {judged(sbatch_script(spec))}")
    else:
        _submit_all(sweep)


def read_sweep(options: Any, words: Sequence[str], site: Mapping[str, Any]) -> ProfileSweep:
    """The jobs that a command line asks for; arguments as `submit_profile`.

    Raises:
        ValueError: one line naming the flag, the value and the fix.
    """
    if options.action != "submit":
        raise ValueError("--profile is for submit; here: python tools/profile.py")
    if options.config is None or options.grid or site.get("array"):
        raise ValueError("--profile takes --config FILE, and neither --grid nor --array")
    for word in words:
        if word.partition("=")[0] in _NOT_OURS:
            raise ValueError(
                f"{word}: a profile is kept in the run folder and saves no checkpoints; leave it "
                "out"
            )
    config = find_run(options.config)
    values, name = load_run(config), options.name or config.stem
    folder = options.runs.resolve() / name
    steps = ["--steps", str(options.profile_steps), "--against", options.against]
    asked, megatron = parse(Asked, [*steps, *words])
    profiler = read_options(asked)
    base = checked(_size_job(config, name, folder, values, megatron, site))
    sizes = Sizes(values, megatron, base.nodes, base.ranks_per_node, options.strong)
    sizes.check_steps(profiler.steps_of_a_run)
    fitting, left_out = sizes.of(options.profile_nodes)
    own = {
        "values": values, "arguments": list(words), "steps": options.profile_steps,
        "against": options.against, "strong": options.strong, "nodes": base.nodes,
        "ranks_per_node": base.ranks_per_node,
    }  # fmt: skip
    return ProfileSweep(
        name, folder, values, tuple(megatron), profiler, {"profile": own}, tuple(fitting),
        tuple(_sized(base, size, folder, [*steps, *words]) for size in fitting), tuple(left_out),
    )  # fmt: skip


def _size_job(
    config: Path, name: str, folder: Path, values: Mapping[str, Any], words: Sequence[str],
    site: Mapping[str, Any],
) -> LaunchSpec:  # fmt: skip
    """The job of --nodes, from which those of other sizes are made."""
    # A profile that is stopped or lost is not made again: the report names it.
    check_hostfile(site, values, words)
    once = {"requeue": False, "signal_lead_seconds": 0, "hang_seconds": 0}
    spec = LaunchSpec(
        name=name,
        command=("true",),
        workdir=str(Path.cwd()),
        folder=str(folder),
        variables=training_variables(values, words, site),
        **{**site, **once},
    )
    program = (spec.python, *program_words("profile"), "--config", str(config.resolve()))
    return replace(spec, command=program)


def _sized(base: LaunchSpec, size: Size, folder: Path, words: Sequence[str]) -> LaunchSpec:
    out = str(folder / PROFILES / size.folder)
    return checked(
        replace(
            base,
            name=f"{base.name}-{size.folder}",
            nodes=size.nodes,
            folder=str(folder / CASES / size.folder),
            command=(*base.command, *words, *size.flags, "--out", out),
        )
    )


def _report_job(sweep: ProfileSweep, job_ids: Sequence[str]) -> LaunchSpec:
    """The job that draws the report when the others have ended."""
    base = sweep.specs[0]
    limit = base.time_limit
    if limit is not None and limit_seconds(limit) > limit_seconds(_REPORT_LIMIT):
        limit = _REPORT_LIMIT
    nodes = ",".join(str(size.nodes) for size in sweep.sizes)
    program = (base.python, *program_words("gather_profiles"), str(sweep.folder), "--nodes", nodes)
    return checked(
        replace(
            base,
            name=f"{sweep.name}-{REPORT}",
            nodes=1,
            gpus_per_node=0,
            gpu_type=None,
            sbatch=without_gpus(base.sbatch),
            tasks_per_node=1,
            cpus_per_task=None,
            memory=None,
            exclusive=False,
            preflight=False,
            spare_nodes=0,
            hostfile=False,
            time_limit=limit,
            dependency=":".join(["afterany", *job_ids]) if job_ids else None,
            folder=str(sweep.folder),
            command=program,
        )
    )


def _checked(sweep: ProfileSweep, checks: PreSubmitChecks, force: bool) -> ProfileSweep:
    """The sweep without the sizes that Megatron refuses or that cannot fit the GPUs.

    Raises:
        Refused: none is left.
    """
    main = checks.stated(sweep.name, sweep.values, sweep.words)
    checks.data(main, data_prefixes(sweep.values, sweep.words))
    planned = checks.plans(sweep.specs[0]) if sweep.specs else False
    kept, refused = [], []
    for size, spec in zip(sweep.sizes, sweep.specs, strict=True):
        words = [*sweep.words, *size.flags]
        try:
            jobs = checks.compared(
                checks.stated(sweep.name, sweep.values, words), run_specs(sweep.options.against)[1:]
            )
            known = [checks.flags(job, spec) for job in jobs.values()]
            if planned and all(known):
                checks.memory(jobs, spec, str(size))
        except Refused as error:
            if not force:
                text = str(error)
                refused.append(text if str(size) in text else f"{size}: {text}")
                continue
            print(f"megatron-mone: warning: {size}: {error}", file=sys.stderr)
        kept.append((size, spec))
    if refused and not kept:
        raise Refused(refused[0])
    sizes, specs = zip(*kept, strict=True) if kept else ((), ())
    return replace(sweep, sizes=sizes, specs=specs, left_out=(*sweep.left_out, *refused))


def _submit_all(sweep: ProfileSweep) -> None:
    sweep.folder.mkdir(parents=True, exist_ok=True)
    with locked(sweep.folder / SUBMIT_LOCK):
        refuse_if_submitted(sweep.folder)
        data = data_prefixes(sweep.values, sweep.words)
        open_run(sweep.folder, sweep.name, sweep.config, data)
        with _all_or_none() as job_ids:
            for size, spec in zip(sweep.sizes, sweep.specs, strict=True):
                log = _submit_one(sweep, spec, job_ids)
                print(f"job {job_ids[-1]}, {size}, log {log}", flush=True)
            log = _submit_one(sweep, _report_job(sweep, job_ids), job_ids)
            page = sweep.folder / PROFILES / REPORT / PAGE
            print(f"job {job_ids[-1]}, after them {page}, log {log}", flush=True)


def _submit_one(sweep: ProfileSweep, spec: LaunchSpec, job_ids: list[str]) -> str:
    """Submit a job and note it in the manifest and in `job_ids`; returns the path of its log."""
    folder = Path(spec.folder)
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    atomic_write(folder / SCRIPT, sbatch_script(spec).encode())
    with noted(sweep.folder, {"ranks": spec.nodes * spec.ranks_per_node}) as send:
        job_ids.append(send(folder / SCRIPT))
    return f"{folder}/logs/{job_ids[-1]}.log"


@contextlib.contextmanager
def _all_or_none() -> Iterator[list[str]]:
    """A list of the jobs submitted, which are cancelled where one of them cannot be."""
    job_ids: list[str] = []
    try:
        yield job_ids
    except BaseException:
        for job_id in job_ids:
            try:
                cancel(job_id)
            except (ValueError, SlurmUnavailable) as error:
                print(f"megatron-mone: warning: job {job_id} is left: {error}", file=sys.stderr)
        raise
