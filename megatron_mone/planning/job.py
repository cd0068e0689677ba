"""What a user asks the planner about: a model, a layout, a cluster's flags, as Megatron arguments.

A job is the same four parts that a run file holds (run_config.py: model, parallel, cluster, train),
each by name, path or mapping; a layout may be written in short, "tp=2,pp=8,vpp=4,ep=32". What comes
out is Megatron's arguments by name, and a run file that the entry point and the launcher take.
May touch: files under configs/ and those it is given.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_mone.common.files import atomic_write
from megatron_mone.common.spelling import nearest_name
from megatron_mone.common.yaml_values import read_scalar
from megatron_mone.config_checks import is_mone
from megatron_mone.model.run_config import PARTS, merge_parts, read_part, read_run
from megatron_mone.profiling.baselines import RunSpec

SHORT = {
    "tp": "tensor_model_parallel_size",
    "cp": "context_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "vpp": "num_virtual_stages_per_pipeline_rank",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
    "mbs": "micro_batch_size",
    "gbs": "global_batch_size",
}
_NO_TOKENIZER = "NullTokenizer"
_ON_THE_CLUSTER = (
    "data_path", "train_data_path", "valid_data_path", "test_data_path", "data_args_path",
    "per_split_data_args_path", "data_cache_path", "split", "load", "save", "pretrained_checkpoint",
    "tensorboard_dir", "wandb_project", "wandb_exp_name", "wandb_save_dir", "wandb_entity",
    "mlflow_experiment", "mlflow_run_name", "mlflow_tracking_uri",
)  # fmt: skip
_DISPATCHER = "moe_token_dispatcher_type"
RECOMPUTE = "recompute"
NO_RECOMPUTE = "none"
FULL_RECOMPUTE = "full"
STATE = "state"
_STATES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16-moments": {
        "use_precision_aware_optimizer": True, "exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16",
    },
    "bf16": {
        "use_precision_aware_optimizer": True, "exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16",
        "main_grads_dtype": "bf16", "grad_reduce_in_bf16": True,
    },
    "host": {
        "use_precision_aware_optimizer": True, "optimizer_cpu_offload": True,
        "overlap_cpu_optimizer_d2h_h2d": True,
    },
}  # fmt: skip
STATES = tuple(_STATES)
"""What is kept from step to step beside the weights: all as the job has it; the optimizer's moments
in bf16; its moments and the gradients in bf16, also as they are reduced; moments and fp32 weights
on the host, which updates them."""
FP32, BF16_MOMENTS, BF16, ON_HOST = STATES
OFFLOAD = "offload"
NO_OFFLOAD = "none"
STAGES = "stages"
_STAGES = "pipeline_model_parallel_layout"
_HOME = dict.fromkeys(("micro_batch_size", "global_batch_size"), "train")
_OFFLOAD_FIELDS = ("fine_grained_activation_offloading", "offload_modules")
_RECOMPUTE_FIELDS = ("recompute_granularity", "recompute_modules", "recompute_method",
                     "recompute_num_layers")  # fmt: skip


@dataclass(frozen=True)
class JobSpec:
    """One job, by parts.

    Attributes:
        model, parallel, cluster, train: Megatron argument name -> value; no name in two of them.
        name: of the model, for reports.
    """

    name: str
    model: Mapping[str, Any]
    parallel: Mapping[str, Any]
    cluster: Mapping[str, Any]
    train: Mapping[str, Any]

    def values(self) -> dict[str, Any]:
        """All arguments.

        Raises:
            ValueError: one is set by two parts.
        """
        return merge_parts(self.parts(), Path(self.name))

    def planned_values(self) -> dict[str, Any]:
        """All arguments but what lies on the cluster: data, checkpoints, a tokenizer's files.

        Raises:
            ValueError: one is set by two parts, or the vocabulary's size is not to be known here.
        """
        values = {k: v for k, v in self.values().items() if k not in _ON_THE_CLUSTER}
        values["mock_data"] = True
        files = values.get("tokenizer_model")
        is_here = files is not None and Path(files).exists()
        if is_here or values.get("tokenizer_type") == _NO_TOKENIZER:
            return values
        if values.get("vocab_size") is None:
            raise ValueError(
                f"{self.name}: tokenizer_model = {files!r} is not here: to plan without it give "
                "the vocabulary's vocab_size"
            )
        values.pop("tokenizer_model", None)
        return {**values, "tokenizer_type": _NO_TOKENIZER}

    def parts(self) -> dict[str, dict[str, Any]]:
        """The parts as a run file holds them."""
        return {name: dict(getattr(self, name)) for name in PARTS}

    def with_layout(self, layout: Mapping[str, Any]) -> JobSpec:
        """The job with another layout; what it does not name stays, and None takes a name away.

        Args:
            layout: as `parse_layout` answers.
        """
        parts = self.parts()
        if any(name in layout for name in _RECOMPUTE_FIELDS):
            layout = {**dict.fromkeys(_RECOMPUTE_FIELDS), **layout}
        for name, value in layout.items():
            homes = [part for part in PARTS if name in parts[part]]
            home = homes[0] if homes else _HOME.get(name, "parallel")
            parts[home][name] = value
        if (parts["parallel"].get(SHORT["tp"]) or 1) > 1 and self.model.get("num_experts"):
            # Megatron trains experts under tensor parallelism with sequence parallelism alone.
            parts["parallel"].setdefault("sequence_parallel", True)
        if self.model.get("num_experts") and not any(_DISPATCHER in parts[part] for part in PARTS):
            # Megatron's default gathers every token on every rank.
            parts["parallel"][_DISPATCHER] = "alltoall"
        return JobSpec(self.name, **{part: _present(values) for part, values in parts.items()})

    def with_text_layout(self, text: str) -> JobSpec:
        """The job with a layout in short form, or by name or path.

        Raises:
            ValueError: one line naming what is wrong.
        """
        if "=" in text:
            return self.with_layout(parse_layout(text))
        return self.with_layout(read_part(Path("plan"), "parallel", text))

    def against(self, spec: RunSpec) -> JobSpec:
        """The baseline of a run spec (profiling/baselines.py): its fields, then its edit."""
        model = {**self.model, **spec.fields}
        edited = Namespace(**{**dict.fromkeys(_EDITED), **model})
        spec.edit(edited)
        left = {k: v for k, v in vars(edited).items() if k in model or v is not None}
        if not is_mone(edited):
            left = {k: v for k, v in left.items() if not k.startswith("mone_")}
        return JobSpec(
            spec.name, _present(left), self.parallel, _without_mone(self.cluster, left),
            _without_mone(self.train, left),
        )  # fmt: skip

    def write(self, path: Path) -> None:
        """Write the run file, whole or not at all.

        Where the job says none it gets an eval_interval, the whole run: Megatron's training
        divides by it (training.py: get_train_valid_test_num_samples), evaluated or not.
        """
        parts, values = self.parts(), self.values()
        if values.get("eval_interval") is None:
            parts["train"]["eval_interval"] = values.get("train_iters") or _NO_EVALUATION
        text = "# A planned layout; `python -m megatron_mone.pretrain --config` takes it.\n"
        text += yaml.safe_dump(parts, sort_keys=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, text.encode())


_NO_EVALUATION = 1_000_000_000  # steps; of a run whose length is given in samples
_EDITED = ("mone_neuron_ratio", "mone_neurons_per_token", "moe_ffn_hidden_size")


def job_spec(
    model: str,
    layout: str | None = None,
    cluster: str = "gpu",
    train: str = "plan-4k",
    shape: Mapping[str, Any] | None = None,
) -> JobSpec:
    """A job of parts by name or path.

    Args:
        model: of configs/model/, or a file.
        layout: of configs/parallel/, a file, or short form; None: all sizes 1.
        cluster: of configs/cluster/, Megatron's flags on that cluster.
        train: of configs/train/.
        shape: of the model, whose `model` is then the name alone.

    Raises:
        ValueError: one line naming the part, the name and the nearest known one.
    """
    here = Path("plan")
    job = JobSpec(
        Path(model).stem if model.endswith((".yaml", ".yml")) else model,
        read_part(here, "model", model if shape is None else dict(shape)), {},
        read_part(here, "cluster", cluster),
        read_part(here, "train", train),
    )  # fmt: skip
    return job if layout is None else job.with_text_layout(layout)


def run_job(path: Path) -> JobSpec:
    """The job of a run file.

    Raises:
        ValueError: one line naming the file, the key and the fix.
    """
    parts = read_run(path)
    return JobSpec(
        path.stem, *(parts.get(p, {}) for p in ("model", "parallel", "cluster", "train"))
    )


def parse_layout(text: str) -> dict[str, Any]:
    """Megatron arguments of "tp=2,pp=8,vpp=4,ep=32,mbs=1,gbs=2048,recompute=layernorm+moe_act".

    Names are those of SHORT, any Megatron argument, and `recompute`: none, full, or modules of
    selective recompute joined by +; `state`: one of STATES; `offload`: none, or modules whose
    activations go to the host, joined by +; `stages`: what each stage holds, Et*3|t*4|t*4|t*3L.

    Raises:
        ValueError: one line naming what is wrong.
    """
    found: dict[str, Any] = {}
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not name or not value:
            raise ValueError(f"layout {text!r}: write NAME=VALUE[,NAME=VALUE...], as tp=2,ep=8")
        if name == RECOMPUTE:
            found.update(recompute_fields(value))
        elif name == STATE:
            found.update(state_fields(value))
        elif name == OFFLOAD:
            found.update(offload_fields(value))
        elif name == STAGES:
            found[_STAGES] = value
        elif name in SHORT:
            if not value.isascii() or not value.isdecimal() or int(value) < 1:
                raise ValueError(f"layout {name} = {value!r} must be a whole number of 1 or more")
            found[SHORT[name]] = int(value)
        else:
            found[name] = _value(text, name, value)
    if found.get(SHORT["vpp"]) == 1:
        found[SHORT["vpp"]] = None
    return found


def recompute_fields(text: str) -> dict[str, Any]:
    """Megatron's recompute arguments of "none", "full" or "module+module"."""
    if text == NO_RECOMPUTE:
        return dict.fromkeys(_RECOMPUTE_FIELDS)
    if text == FULL_RECOMPUTE:
        return {**dict.fromkeys(_RECOMPUTE_FIELDS), "recompute_granularity": "full",
                "recompute_method": "uniform", "recompute_num_layers": 1}  # fmt: skip
    return {**dict.fromkeys(_RECOMPUTE_FIELDS), "recompute_granularity": "selective",
            "recompute_modules": text.split("+")}  # fmt: skip


def state_fields(text: str) -> dict[str, Any]:
    """Megatron's arguments of one of STATES.

    Raises:
        ValueError: another.
    """
    if text not in _STATES:
        raise ValueError(
            f"layout {STATE} = {text!r} is none of {', '.join(STATES)}"
            f"{nearest_name(text, list(STATES))}"
        )
    every = {name for fields in _STATES.values() for name in fields}
    return {**dict.fromkeys(sorted(every)), **_STATES[text]}


def offload_fields(text: str) -> dict[str, Any]:
    """Megatron's arguments of "none" or "module+module", whose activations go to the host."""
    if text == NO_OFFLOAD:
        return dict.fromkeys(_OFFLOAD_FIELDS)
    return dict(zip(_OFFLOAD_FIELDS, (True, text.split("+")), strict=True))


def short_layout(values: Mapping[str, Any]) -> str:
    """The short form of Megatron's arguments; sizes of 1 and what is not in SHORT are left out."""
    sizes = [(k, values.get(name)) for k, name in SHORT.items()]
    named = ["tp", "pp"]
    if (values.get(SHORT["tp"]) or 1) > 1 and values.get(SHORT["etp"]) is not None:
        named.append("etp")  # Megatron's default is tp
    parts = [f"{k}={value}" for k, value in sizes if value not in (None, 1) or k in named]
    granularity = values.get("recompute_granularity")
    if granularity == "full":
        parts.append(f"{RECOMPUTE}={FULL_RECOMPUTE}")
    elif granularity:
        modules = values.get("recompute_modules") or ["core_attn"]
        parts.append(f"{RECOMPUTE}={'+'.join(modules)}")
    if values.get("fine_grained_activation_offloading"):
        parts.append(f"{OFFLOAD}={'+'.join(values.get('offload_modules') or [])}")
    given = {name: values[name] for name in state_fields(FP32) if values.get(name) is not None}
    known = [name for name, fields in _STATES.items() if fields == given]
    if known and given:
        parts.append(f"{STATE}={known[0]}")
    elif given:
        parts += [f"{name}={value}" for name, value in given.items()]
    if values.get(_STAGES) is not None:
        parts.append(f"{STAGES}={values[_STAGES]}")
    return ",".join(p if "=None" not in p else p.replace("None", "1") for p in parts)


def _value(text: str, name: str, value: str) -> Any:
    if not name.replace("_", "").isalnum():
        raise ValueError(
            f"layout {text!r}: {name!r} is no argument"
            f"{nearest_name(name, [*SHORT, RECOMPUTE, STATE, OFFLOAD, STAGES])}"
        )
    try:
        return read_scalar(value)
    except yaml.YAMLError:
        raise ValueError(f"layout {text!r}: {name} = {value!r} cannot be read") from None


def _present(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _without_mone(part: Mapping[str, Any], model: Mapping[str, Any]) -> Mapping[str, Any]:
    """A part without mone_* arguments where the model has none: they would be refused."""
    if any(name.startswith("mone_") for name in model):
        return part
    return {name: value for name, value in part.items() if not name.startswith("mone_")}
