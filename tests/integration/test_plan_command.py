"""The planner's command from end to end: a tiny model on 16 GPUs, its files, promises and errors.

One process is a real one, with a trace cache of its own; the others run here and share a tracer.
"""

import contextlib
import gzip
import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import pytest
import yaml

from megatron_mone.commands import plan as plan_command
from megatron_mone.common.device import HARDWARE_ROOT
from megatron_mone.model.run_config import load_run
from megatron_mone.planning.cost.efficiency import Efficiency
from megatron_mone.planning.cost.hardware import load_cluster
from megatron_mone.planning.cost.rank_memory import CONTEXT, MIB, ORDER
from megatron_mone.planning.job import run_job
from megatron_mone.planning.plan_document import Comparison, Plan, Search
from megatron_mone.planning.plan_parts import layout_document
from megatron_mone.planning.planner import Planner
from megatron_mone.planning.tracing import trace_server
from megatron_mone.planning.tracing.trace_cache import TraceCache
from tests.training_cases import ROOT

pytestmark = pytest.mark.slow

GPUS, LAYERS, EXPERTS = 16, 4, 8
MODEL = {
    "num_layers": LAYERS, "hidden_size": 256, "ffn_hidden_size": 512, "num_attention_heads": 4,
    "num_experts": EXPERTS, "moe_ffn_hidden_size": 64, "moe_router_topk": 4,
    "moe_router_dtype": "fp32", "moe_router_load_balancing_type": "aux_loss",
    "moe_aux_loss_coeff": 1e-3, "swiglu": True, "add_bias_linear": False,
    "normalization": "RMSNorm", "position_embedding_type": "rope", "attention_dropout": 0.0,
    "hidden_dropout": 0.0, "untie_embeddings_and_output_weights": True,
    "max_position_embeddings": 4096, "vocab_size": 1024,
}  # fmt: skip
MONE = {"mone_neuron_ratio": 0.25, "mone_ng_loss_coeff": 1e-3}
LAYOUT = ("--layout", "tp=1,ep=4,pp=2,gbs=64")
ON_16 = ("--gpus", str(GPUS))


@dataclass(frozen=True)
class Done:
    """A command that ended.

    Attributes:
        status: exit status.
        out, err: what it printed.
        folder: of its files.
    """

    status: int
    out: str
    err: str
    folder: Path

    @property
    def plan(self) -> dict:
        """The checked plan.json."""
        return Plan.read(self.folder / "plan.json", "").plain()

    def model(self, name: str) -> dict:
        """One model of the plan."""
        [found] = [one for one in self.plan["models"] if one["name"] == name]
        return found


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """Models, runs, a GPU of 3.5 GiB, one with a MiB beside what CUDA takes, and exact.json, by
    which launches cost nothing."""
    folder = tmp_path_factory.mktemp("inputs")
    models = {"tiny": {**MODEL, **MONE}, "stock": MODEL}
    for name, model in models.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(model))
    replace(Efficiency().without_host(), source="a test's").write(folder / "exact.json")
    (folder / "damaged.json").write_bytes((folder / "exact.json").read_bytes()[:-40])
    (folder / "no-profile.json").write_text('{"schema": "other"}')
    run = {"model": {**MODEL, **MONE}, "cluster": "gpu", "train": "plan-4k"}
    (folder / "job.run.yaml").write_text(yaml.safe_dump(run))
    cluster = yaml.safe_load((HARDWARE_ROOT / "h100-ndr.yaml").read_text())
    for name, mib in (("small-gpu", 3584), ("full-gpu", CONTEXT // MIB + 1)):
        cluster["device"]["memory_mib"] = mib
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(cluster))
    return folder


@pytest.fixture(scope="module")
def tracer(shared_tracer, tmp_path_factory):
    """Of all commands that run in this process."""
    with patch.dict(os.environ, XDG_CACHE_HOME=str(tmp_path_factory.mktemp("cache"))):
        yield shared_tracer(TraceCache())


@pytest.fixture(scope="module")
def command(tracer, tmp_path_factory):
    """Runs tools/plan_scale.py with some words and --json in a new folder."""

    def run(*words: str) -> Done:
        folder = tmp_path_factory.mktemp("plan")
        out, err = io.StringIO(), io.StringIO()
        with (
            patch.object(trace_server, "Tracer", lambda: contextlib.nullcontext(tracer)),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            try:
                status = plan_command.main(["--json", str(folder / "plan.json"), *words])
            except SystemExit as ended:
                status = int(ended.code or 0)
        return Done(status, out.getvalue(), err.getvalue(), folder)

    return run


@pytest.fixture(scope="module")
def asked(inputs) -> tuple[str, ...]:
    """The plan that most tests read."""
    return (
        *("--model", f"{inputs}/tiny.yaml", *ON_16, *LAYOUT),
        *("--efficiency", f"{inputs}/exact.json"),
        *("--against", "moe,all:mone_neuron_ratio=1.0:mone_ng_loss_coeff=0.0"),
    )


@pytest.fixture(scope="module")
def planned(command, asked) -> Done:
    return command(*asked)


def test_a_plan_and_its_files(planned):
    assert planned.status == 0, planned.err
    assert planned.err == ""
    plan = planned.plan
    assert [one["name"] for one in plan["models"]] == ["mone", "moe", "all"]
    assert plan["tokens_per_step"] == 64 * 4096
    assert plan["efficiency"] == "a test's"
    for one in plan["models"]:
        assert one["fits"]
        assert f"{one['name']:12}" in planned.out
        assert sum(one["parts_ms"].values()) == pytest.approx(one["step_ms"])
        assert [stage["layers"].count("*2") for stage in one["stages"]] == [1, 1]
    assert set(plan["scaling"][0]["models"]) == {"mone", "moe", "all"}
    assert [point["gpus"] for point in plan["scaling"]] == [128 << k for k in range(8)]
    page = (planned.folder / "report.html").read_text()
    assert "tiny" in page
    assert "moe" in page
    timeline = json.loads(gzip.decompress((planned.folder / "timeline.json.gz").read_bytes()))
    passes = [e for e in timeline["traceEvents"] if e.get("cat") in ("forward", "backward")]
    # Three models, two stages, 8 micro-batches there and back.
    assert len(passes) == 3 * 2 * 8 * 2
    names = {path.name for path in planned.folder.glob("*.run.yaml")}
    assert names == {"mone.run.yaml", "moe.run.yaml", "all.run.yaml"}


@pytest.mark.parametrize("name", ["mone", "moe", "all"])
def test_a_planned_layout_is_a_run_that_megatron_accepts(planned, tracer, name):
    path = planned.folder / f"{name}.run.yaml"
    values = load_run(path)
    assert values["expert_model_parallel_size"] == 4
    assert values["global_batch_size"] == 64
    facts = tracer.describe(["--config", str(path)], GPUS).facts
    assert layout_document(facts).plain() == planned.model(name)["layout"]
    cluster = load_cluster("h100-ndr")
    again = Planner(tracer, cluster, Efficiency.read(_exact(planned))).plan(run_job(path), GPUS)
    assert again.traced.facts == facts
    assert again.traced.traced == 0  # the traces are those of the plan
    assert 1e3 * again.prediction.seconds == planned.model(name)["step_ms"]


def _exact(planned: Done) -> Path:
    path = planned.folder / "exact.json"
    replace(Efficiency().without_host(), source="a test's").write(path)
    return path


def test_the_same_answer_twice_by_a_process_that_knows_nothing(command, asked, tmp_path):
    """Of one model: each stage's trace takes that process seconds."""
    alone, written = asked[:-2], tmp_path / "out" / "plan.json"
    planned = command(*alone)
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "plan_scale.py"), *alone,
         "--json", str(written)],
        capture_output=True, text=True, timeout=300, cwd=tmp_path,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert written.read_bytes() == (planned.folder / "plan.json").read_bytes()
    assert "\n".join(planned.out.splitlines()[:-1]) in done.stdout  # the last line names the file
    assert (tmp_path / "cache" / "megatron-mone" / "traces").is_dir()


def test_all_neurons_kept_is_the_dense_moe(planned):
    all_kept, dense = planned.model("all"), planned.model("moe")
    assert all_kept["memory_gib"] == dense["memory_gib"]
    assert all_kept["collectives"] == dense["collectives"]
    for one in (all_kept, dense):
        one.pop("name")
        for stage in one["stages"]:
            stage["layers"] = stage["layers"].replace("mone", "moe")
    assert all_kept == dense
    assert planned.model("mone")["step_ms"] != dense["step_ms"]


def test_both_sweeps(planned, command, asked):
    swept = command(*asked[:-2], "--sweep")
    assert swept.status == 0, swept.err
    points, pairs = swept.plan["ratio_sweep"], swept.plan["expert_sweep"]
    assert [(point["r"], point["neurons"]) for point in points] == [
        (1.0, 64), (0.5, 32), (0.25, 16), (0.125, 8),
    ]  # fmt: skip
    dense, mone = planned.model("moe"), planned.model("mone")
    assert points[0]["step_ms"] == dense["step_ms"]
    assert points[0]["peak_gib"] == dense["memory_gib"]["peak"]
    assert points[2]["step_ms"] == mone["step_ms"]
    # Operations of 4 experts with 16 of 64 neurons: 4 (64 + 8 x 16) = 3 (64 + 8 x 24) =
    # 2 (64 + 8 x 40), gate whole; of 5 and 6 to the nearest multiple of 8.
    assert [(one["topk"], one["neurons"]) for one in pairs] == [
        (2, 40), (3, 24), (4, 16), (5, 8), (6, 8),
    ]  # fmt: skip
    assert pairs[2]["step_ms"] == mone["step_ms"]


def test_two_of_its_run_files_are_compared(planned, command):
    files = [str(planned.folder / f"{name}.run.yaml") for name in ("mone", "moe")]
    done = command("--compare", *files, "--gpus", str(GPUS), "--cluster", "h100-ndr")
    assert done.status == 0, done.err
    found = Comparison.read(done.folder / "plan.json", "")
    total = found.second.step_ms - found.first.step_ms
    assert sum(one.difference for one in found.step_ms) == pytest.approx(total, rel=1e-6)
    assert "GiB" in done.out
    assert not (done.folder / "report.html").exists()


def test_skewed_routing_is_slower(planned, command, asked):
    skewed = command(*asked, "--routing", "zipf:0.6")
    assert skewed.status == 0, skewed.err
    assert skewed.plan["routing"]["kind"] == "zipf"
    assert skewed.plan["routing"]["hottest"] > 1.1 > planned.plan["routing"]["hottest"] == 1.0
    for name in ("mone", "moe", "all"):
        assert skewed.model(name)["step_ms"] > planned.model(name)["step_ms"]


def test_a_search(command, inputs, tracer):
    words = ["--model", f"{inputs}/tiny.yaml", *ON_16, "--layout", "gbs=64", "--search"]
    done = command(*words, "--limit", "3")
    assert done.status == 0, done.err
    found = Search.read(done.folder / "plan.json", "").plain()
    assert len(found["candidates"]) == 3
    steps = [one["step_ms"] for one in found["candidates"]]
    assert steps == sorted(steps)
    assert found["candidates"][0]["pareto"]
    bands = [one["step_ms_band"] for one in found["candidates"]]
    for one, band in zip(found["candidates"], bands, strict=True):
        assert one["tied"] == (one["fits"] and band["low"] <= bands[0]["high"])
    assert all(band["low"] < step < band["high"] for band, step in zip(bands, steps, strict=True))
    assert found["not_tried"]["limit"] > 0
    best = found["best"][0]
    assert best["layout"] == found["candidates"][0]["name"]
    assert f"1. {best['layout']}" in done.out
    facts = tracer.describe(["--config", str(done.folder / "best.run.yaml")], GPUS).facts
    assert layout_document(facts).plain() == found["candidates"][0]["layout"]
    assert (done.folder / "report.html").is_file()
    alone = command(*words, "--best", "1")
    (first,) = Search.read(alone.folder / "plan.json", "").plain()["best"]
    assert first["layout"] == best["layout"]


def test_what_does_not_fit_says_by_what_and_what_would_help(command, inputs):
    done = command("--model", f"{inputs}/tiny.yaml", *ON_16, "--layout", "tp=1,ep=8,mbs=32",
                   "--cluster", f"{inputs}/small-gpu.yaml")  # fmt: skip
    assert done.status == 4, done.err
    assert done.err == ""
    model = done.model("mone")
    assert not model["fits"]
    assert model["first_unfit"] == "activations"
    before = sum(model["memory_gib"][part] for part in ORDER[:3])
    limit = done.plan["cluster"]["memory_gib"]
    assert before < limit < before + model["memory_gib"]["activations"]
    fix = model["cheapest_fix"]
    assert fix["peak_gib"] < limit
    assert f"no, by activations; cheapest fix: {fix['change']} ({fix['step_ms']:,.0f} ms)" in (
        done.out
    )


# name: (words, what the one line says)
WRONG = {
    "refused layout": (
        ("--layout", "tp=3"),
        "--gpus 16 is no multiple of tp x cp",
    ),
    "unknown cluster": (("--cluster", "h100-ndrr"), "(did you mean 'h100-ndr'?)"),
    "unknown model": (("--model", "moe-30b-a3b-moan"), "(did you mean 'moe-30b-a3b-mone'?)"),
    "layout without a value": (("--layout", "tp=2,ep"), "write NAME=VALUE"),
    "layout of no size": (("--layout", "tp=two"), "layout tp = 'two' must be a whole number"),
    "unknown argument": (
        ("--layout", "epp=2"),
        "epp = 2 of the layout is no argument (did you mean 'pp'?)",
    ),
    "nothing to compare": (
        ("--model", "{inputs}/stock.yaml", "--against", "blocks:mone_neuron_block=32"),
        "--against blocks: mone_neuron_block = 32 changes nothing of stock, which has no MoNE",
    ),
    "model and run": (("--config", "{inputs}/job.run.yaml"), "--model NAME, or --config RUN.yaml"),
    "no devices": (("--gpus", "0"), "--gpus 0 is not allowed"),
    "json": (("--json", "plan.txt"), "--json plan.txt must end in .json"),
    "damaged efficiency": (("--efficiency", "{inputs}/damaged.json"), "damaged.json"),
    "no efficiency": (("--efficiency", "{inputs}/none.json"), "none.json"),
    "unknown baseline": (("--against", "moee"), "--against 'moee' is not a baseline"),
    "routing": (("--routing", "nonsense"), "--routing 'nonsense' is neither balanced"),
    "exponent": (("--routing", "zipf:five"), "the exponent must be 0 to 4"),
    "calibrating to no profile": (("--calibrate", "{inputs}/no-profile.json"), "no-profile.json"),
    "sweep of stock experts": (("--model", "{inputs}/stock.yaml", "--sweep"), "needs a MoNE model"),
    "unknown option": (("--layouts", "tp=2"), "--layouts"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_input_is_one_line(command, inputs, name):
    words, said = WRONG[name]
    given = [word.format(inputs=inputs) for word in words]
    done = command("--model", f"{inputs}/tiny.yaml", *ON_16, *LAYOUT, *given)
    _is_one_line(done, said)
    assert not list(done.folder.iterdir())


@pytest.mark.parametrize("words", [(), ("--model", "{inputs}/tiny.yaml")])
def test_without_devices_or_a_model_nothing_is_planned(command, inputs, words):
    done = command(*(word.format(inputs=inputs) for word in words))
    _is_one_line(done, "--gpus is missing" if words else "give --model NAME, or --config RUN.yaml")


def test_a_model_that_fits_no_layout(command, inputs):
    """Three million parameters, at most by 16 on a device, of which none fits into a MiB."""
    done = command("--model", f"{inputs}/tiny.yaml", *ON_16, "--layout", "gbs=64", "--search",
                   "--limit", "2", "--cluster", f"{inputs}/full-gpu.yaml")  # fmt: skip
    _is_one_line(done, "tiny does not fit 16 x NVIDIA H100")
    assert "are too large even without activations" in done.err


def _is_one_line(done: Done, said: str) -> None:
    assert done.status == 2, done.out
    assert said in done.err
    assert done.err.startswith("megatron-mone: error: ")
    assert done.err.count("\n") == 1, done.err
