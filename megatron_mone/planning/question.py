"""What a user asks the planner, as typed and as checked before anything expensive starts.

May touch: files under configs/ and those it is given.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import yaml
from typer import Option

from megatron_mone.common.spelling import nearest_name
from megatron_mone.conversion.hf_config import CONFIG
from megatron_mone.conversion.inspect import model_file
from megatron_mone.planning.cost.efficiency import Efficiency, efficiency_of
from megatron_mone.planning.cost.hardware import Cluster, load_cluster
from megatron_mone.planning.cost.routing_skew import Skew, parse_skew
from megatron_mone.planning.job import JobSpec, job_spec, run_job
from megatron_mone.planning.layout_axes import ALLOWABLE
from megatron_mone.profiling.baselines import RunSpec, run_specs

_LAYOUT_HELP = (
    "of configs/parallel/, a YAML file, or "
    "tp=..,cp=..,pp=..,vpp=..,ep=..,etp=..,mbs=..,gbs=..,recompute=.."
)
_MODEL_HELP = "of configs/model/, a YAML file, or a Hugging Face model's folder or config.json"
_ALLOW_HELP = (
    "what a search may also change, by comma: precision (of moments and gradients: other numerics),"
    " offload (of optimizer and activations to the host); without, only where nothing fits"
)
_BEST_HELP = "fastest layouts that a search seeks and shows; more of them take it longer"
BEST, LIMIT = 5, 200
_EFFICIENCY_HELP = "file of --calibrate; without, what is fitted for the cluster, or assumptions"


@dataclass(frozen=True)
class Asked:
    """The options as typed."""

    model: Annotated[str | None, Option(help=_MODEL_HELP)] = None
    config: Annotated[
        Path | None,
        Option(help="a whole run file, or its name, instead of --model, --layout and --train"),
    ] = None
    compare: Annotated[
        tuple[Path, Path] | None,
        Option(
            metavar="A.yaml B.yaml",
            help="two run files, instead of --model or --config: where their difference goes",
        ),
    ] = None
    gpus: Annotated[int | None, Option(help="devices of the job, W")] = None
    layout: Annotated[str | None, Option(help=_LAYOUT_HELP)] = None
    train: Annotated[str, Option(help="of configs/train/, or a YAML file")] = "plan-4k"
    cluster: Annotated[str, Option(help="of configs/cluster/hardware/, or a YAML file")] = (
        "h100-ndr"
    )
    flags: Annotated[
        str, Option(help="Megatron's flags on it: of configs/cluster/, or a YAML file")
    ] = "gpu"
    against: Annotated[
        str, Option(help="models compared, by comma: moe, moe-active, NAME:field=value")
    ] = ""
    routing: Annotated[
        str, Option(help="balanced, zipf:EXPONENT, or the profile.json of a run")
    ] = "balanced"
    document_tokens: Annotated[
        int | None, Option(help="of each packed document; without, 1024 are assumed")
    ] = None
    efficiency: Annotated[Path | None, Option(help=_EFFICIENCY_HELP)] = None
    calibrate: Annotated[
        Path | None,
        Option(help="fit to a profile.json or a GPU's answer.json, and plan nothing"),
    ] = None
    search: Annotated[bool, Option("--search", help="try layouts instead of planning one")] = False
    limit: Annotated[int, Option(help="layouts that a search plans")] = LIMIT
    best: Annotated[int, Option(help=_BEST_HELP)] = BEST
    allow: Annotated[str, Option(help=_ALLOW_HELP)] = ""
    sweep: Annotated[bool, Option("--sweep", help="also plan other r, and other K_E x K_N")] = False
    json: Annotated[Path, Option(help="file to write")] = Path("out/plan/plan.json")


@dataclass(frozen=True)
class Question:
    """What was asked, checked.

    Attributes:
        job: of the model asked about.
        gpus: W.
        cluster, efficiency, skew: of the planner.
        baselines: models compared.
        json: file to write.
        document_tokens: of each packed document; None: assumed.
        model_file: text of a model file, made of a Hugging Face config.json; or nothing.
        second: the job that `job` is compared with, part by part.
        allowed: of layout_axes.ALLOWABLE, what a search may also change.
    """

    job: JobSpec
    gpus: int
    cluster: Cluster
    efficiency: Efficiency
    skew: Skew
    baselines: tuple[RunSpec, ...]
    json: Path
    document_tokens: int | None = None
    model_file: str = ""
    second: JobSpec | None = None
    allowed: tuple[str, ...] = ()


def read_question(asked: Asked) -> Question:
    """Check the command line, before anything expensive starts.

    Raises:
        ValueError: one line naming the option, its value and the fix.
    """
    if asked.compare is not None:
        _check_comparison(asked)
    elif (asked.model is None) == (asked.config is None):
        raise ValueError("give --model NAME, or --config RUN.yaml, and not both")
    if asked.gpus is None or asked.gpus < 1:
        given = "is missing" if asked.gpus is None else f"{asked.gpus} is not allowed"
        raise ValueError(f"--gpus {given}: give the devices of the job, from 1")
    for option, count, usual in (("limit", asked.limit, LIMIT), ("best", asked.best, BEST)):
        if count < 1:
            raise ValueError(f"--{option} {count} is not allowed: give at least 1")
        if count != usual and not asked.search:
            raise ValueError(
                f"--{option} {count} says nothing without --search: give both, or none"
            )
    if asked.json.suffix != ".json":
        raise ValueError(f"--json {asked.json} must end in .json: reports go beside it")
    text, second = "", None
    if asked.compare is not None:
        job, second = map(run_job, asked.compare)
    elif asked.config is None:
        model, shape = str(asked.model), None
        if _is_hugging_face(model):
            text = model_file(Path(model))
            shape, model = yaml.safe_load(text), _hugging_face_name(model)
        job = job_spec(model, asked.layout, asked.flags, asked.train, shape)
    else:
        job = run_job(asked.config)
        if asked.layout is not None:
            job = job.with_text_layout(asked.layout)
    if asked.sweep and not is_mone(job):
        raise ValueError("--sweep needs a MoNE model: choose one with mone_neuron_ratio")
    specs = run_specs([name for name in asked.against.split(",") if name])[1:]
    for spec in specs:
        if spec.grouped_mm:
            raise ValueError(f"--against {spec.name} is a CPU baseline: on GPUs `moe` is grouped")
        if spec.by_deepspeed:
            raise ValueError(
                f"--against {spec.name} is not planned: DeepSpeed steps it: leave it out"
            )
        compared = job.against(spec)  # refuses what the model has nothing of
        if compared.values() == job.values():
            given = ", ".join(f"{name} = {value}" for name, value in spec.fields.items())
            raise ValueError(
                f"--against {spec.name}: {given or 'it'} changes nothing of {job.name}"
                f"{'' if is_mone(job) else ', which has no MoNE: give a MoNE model, or'}"
                f"{': ' if is_mone(job) else ' '}leave it out"
            )
    cluster = load_cluster(asked.cluster)
    return Question(
        job, asked.gpus, cluster,
        efficiency_of(cluster.name) if asked.efficiency is None
        else Efficiency.read(asked.efficiency),
        parse_skew(asked.routing), tuple(specs), asked.json, asked.document_tokens, text,
        second, _allowed(asked),
    )  # fmt: skip


def _allowed(asked: Asked) -> tuple[str, ...]:
    names = tuple(name.strip() for name in asked.allow.split(",") if name.strip())
    if names and not asked.search:
        raise ValueError(f"--allow {asked.allow} says nothing without --search: give both, or none")
    for name in names:
        if name not in ALLOWABLE:
            raise ValueError(
                f"--allow {name} is none of {', '.join(ALLOWABLE)}"
                f"{nearest_name(name, list(ALLOWABLE))}"
            )
    return names


def _check_comparison(asked: Asked) -> None:
    given = {
        "--model": asked.model, "--config": asked.config, "--layout": asked.layout,
        "--against": asked.against, "--search": asked.search, "--sweep": asked.sweep,
    }  # fmt: skip
    for name, value in given.items():
        if value:
            raise ValueError(f"{name} beside --compare says nothing: the two run files are all")


def _is_hugging_face(model: str) -> bool:
    """Whether a model is named by its config.json, or the folder that holds it."""
    path = Path(model)
    return path.name == CONFIG or (path / CONFIG).is_file()


def _hugging_face_name(model: str) -> str:
    path = Path(model)
    return (path.parent if path.name == CONFIG else path).resolve().name


def is_mone(job: JobSpec) -> bool:
    """Whether a job's model has fields of MoNE."""
    return any(name.startswith("mone_") for name in job.model)
