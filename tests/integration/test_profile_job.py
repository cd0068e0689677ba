"""tools/profile.py as a user runs it: several models in one job, one folder of results."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import forked_ranks
from tests.training_cases import MOCK, MONE, ROOT, TINY

pytestmark = pytest.mark.slow

ONE_RANK = ("--expert-model-parallel-size", "1")
MODEL = (*TINY, *MONE, *MOCK, "--expert-model-parallel-size", "2", "--mone-backend", "cpu")


def profile(folder: Path, *flags: str, ranks: int = 2) -> subprocess.CompletedProcess:
    """Run the command with the test model."""
    command = [sys.executable, "tools/profile.py", "--ranks", str(ranks), "--out", str(folder)]
    environment = {key: v for key, v in os.environ.items() if key not in ("WORLD_SIZE", "RANK")}
    return subprocess.run(
        [*command, *MODEL, "--train-iters", "40", *flags],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job") / "profile"
    (folder / "ranks").mkdir(parents=True)
    (folder / "ranks" / "rank-00007.json").write_text("of an earlier job")
    against = "moe,grouped_mm,blocks:mone_neuron_block=4"
    ended = profile(
        folder,
        *("--steps", "4", "--windows", "2", "--warm-up", "1", "--routing", "replayed", "--trace"),
        *("--against", against),
    )
    assert ended.returncode == 0, ended.stderr
    return folder, ended


@pytest.fixture(scope="module")
def result(done):
    return json.loads((done[0] / "profile.json").read_text())


@pytest.fixture(scope="module")
def by_deepspeed(tmp_path_factory):
    """A run that DeepSpeed steps, against its own layer and against the other engine; forked."""
    folder = tmp_path_factory.mktemp("deepspeed") / "profile"
    words = [
        *("--out", str(folder), *MODEL, "--train-iters", "40"),
        *("--engine", "deepspeed", "--zero-stage", "2", "--steps", "2", "--windows", "2"),
        *("--warm-up", "1", "--routing", "replayed"),
        *("--against", "deepspeed-moe,megatron"),
    ]
    log = folder.with_suffix(".log")
    job = forked_ranks.start(2, forked_ranks.command, ("profile", words), log)
    assert job.wait(timeout=600) == 0, log.read_text(errors="replace")[-6000:]
    return json.loads((folder / "profile.json").read_text())


def test_a_run_of_deepspeed_says_so(by_deepspeed):
    names = [(run["name"], run["backend"]) for run in by_deepspeed["runs"]]
    assert names == [("mone", "cpu"), ("deepspeed-moe", "DeepSpeed MoE"), ("megatron", "cpu")]
    engines = [
        (r["model"].get("engine"), r["model"].get("zero_stage")) for r in by_deepspeed["runs"]
    ]
    assert engines == [("deepspeed", 2), ("deepspeed", 2), (None, None)]


def test_phases_of_both_engines_are_their_steps(by_deepspeed):
    """One phase at a time; the gather of parameters is DeepSpeed's alone in this layout."""
    for run in by_deepspeed["runs"]:
        assert sum(run["phases"].values()) == pytest.approx(run["step_ms"])
        of_experts = {"router", "permute", "dispatch", "up/down GEMM", "combine"}
        assert of_experts | {"grad reduce", "clipping", "optimizer"} <= set(run["phases"])
    gathers = ["parameter gather" in run["phases"] for run in by_deepspeed["runs"]]
    assert gathers == [True, True, False]


def test_deepspeeds_layer_replays_the_choices(by_deepspeed):
    mone, layer, megatron = (run["routing"] for run in by_deepspeed["runs"])
    assert layer == mone == megatron
    assert mone["layers"][0]["rows"] != [128] * 4


def test_memory_of_deepspeed_is_named(by_deepspeed):
    mone, _, megatron = (run["memory"]["by_kind"] for run in by_deepspeed["runs"])
    assert mone["weights"] == pytest.approx(megatron["weights"], rel=0.01)
    # Adam's moments; and float32 weights of its own beside the model's, sharded.
    assert mone["optimizer"] > 0.9 * megatron["optimizer"] * (1 + 1 / 2) / 2


def test_every_promised_file_is_there(done):
    folder, ended = done
    assert "report.html" in ended.stderr
    assert sorted(path.name for path in (folder / "ranks").iterdir()) == [
        "rank-00000.json",
        "rank-00001.json",
    ]
    for name in ("report.html", "tensorboard", "plots"):
        assert (folder / name).exists(), name
    assert not list(folder.rglob("*.tmp"))


def test_all_runs_are_measured_alike(result):
    assert [run["name"] for run in result["runs"]] == ["mone", "moe", "grouped_mm", "blocks"]
    assert [run["backend"] for run in result["runs"]] == [
        *("cpu", "SequentialMLP", "GroupedMMExperts", "cpu"),
    ]  # fmt: skip
    # one step of warm-up, then one that settles at the head of each window
    assert all(run["samples"]["steps"] == [2, 3, 5, 6] for run in result["runs"])
    assert all(run["samples"]["windows"] == [0, 0, 1, 1] for run in result["runs"])
    assert result["config"]["routing"] == "replayed"


def test_replayed_runs_route_alike(result):
    routed = [run["routing"] for run in result["runs"]]
    assert routed[0]["layers"][0]["rows"] != [256] * 4  # by chance alike, it would show nothing
    assert all(other == routed[0] for other in routed[1:])


def test_models_are_what_their_names_say(result):
    models = {run["name"]: run["model"] for run in result["runs"]}
    assert models["mone"]["mone_neuron_ratio"] == 0.25
    assert not any(name.startswith("mone_") for name in models["moe"])
    assert models["moe"] == models["grouped_mm"]
    assert models["blocks"]["mone_neuron_block"] == 4
    operations = {run["name"]: run["flops"]["executed"] for run in result["runs"]}
    assert operations["moe"] == operations["grouped_mm"] > operations["mone"]


def test_memory_is_each_runs_own(result):
    """Runs share a process; a run's ledger counts what it holds, not what the others do."""
    held = {run["name"]: run["memory"]["by_kind"] for run in result["runs"]}
    # Of 2 layers, 2 experts a rank with 48 neurons each: int64 counts of a step and of a window.
    counters = 2 * 2 * (2 * 48 + 2) * 8
    assert held["mone"]["weights"] == held["grouped_mm"]["weights"] + counters
    assert held["mone"]["activations"] < held["moe"]["activations"]
    for run in result["runs"]:
        memory = run["memory"]
        assert sum(memory["by_kind"].values()) == memory["peak_bytes"]
        kinds = [memory["by_kind"][kind] for kind in ("weights", "gradients", "optimizer")]
        assert sum(kinds) > 0.3 * memory["peak_bytes"], run["name"]
        assert memory["measured"]["process_peak_bytes"] > 0


def test_the_trace_has_our_phases_beside_torchs_events(done):
    with gzip.open(done[0] / "traces" / "mone-rank-00000.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    ours = [event for event in events if event.get("cat") == "phase"]
    assert {"attention", "gate GEMM", "selection", "optimizer"} <= {e["name"] for e in ours}
    step = next(e for e in events if e.get("name") == "megatron-mone: step" and "dur" in e)
    assert min(e["ts"] for e in ours) >= step["ts"]
    assert max(e["ts"] + e["dur"] for e in ours) <= step["ts"] + step["dur"]
    inside = [e for e in events if e.get("name") == "aten::mm" and "dur" in e]
    spans = [(e["ts"], e["ts"] + e["dur"]) for e in ours if e["name"] == "gate GEMM"]
    assert any(a <= e["ts"] and e["ts"] + e["dur"] <= b for e in inside for a, b in spans)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--against", "x:moe_ffn_hidden_sise=32"], "did you mean 'moe_ffn_hidden_size'"),
        (["--against", "x:mone_backend=cuda"], "--mone-backend: invalid choice: 'cuda'"),
        (
            ["--against", "deepspeed-moe:zero_stage=3"],
            "deepspeed-moe: zero_stage = 3 is not trained",
        ),
        (["--against", "deepspeed", "--engine", "deepspeed"], "stepped by DeepSpeed already"),
        (
            ["--against", "deepspeed-moe", "--moe-shared-expert-intermediate-size", "32"],
            "moe_shared_expert_intermediate_size = 32 is not in DeepSpeed's layer",
        ),
        (["--steps", "4", "--no-such-flag"], "--no-such-flag"),
    ],
)
def test_a_wrong_job_is_one_line_of_a_rank(tmp_path, flags, words):
    """A rank by itself, of which the command shows that line."""
    log, out = tmp_path / "log", tmp_path / "profile"
    command = ["--out", str(out), *MODEL, "--train-iters", "40", *flags, *ONE_RANK]
    job = forked_ranks.start(1, forked_ranks.command, ("profile", command), log)
    assert job.wait(timeout=600) != 0
    lines = log.read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("megatron-mone: error: ")]
    assert words in line
    assert lines[-1].endswith("ended with 2")
    assert not (out / "ranks").exists()


def test_a_wrong_job_is_one_line(tmp_path):
    ended = profile(tmp_path, "--steps", "100", *ONE_RANK, ranks=1)
    assert ended.returncode == 2
    assert ended.stderr.startswith("megatron-mone: error: ")
    assert ended.stderr.count("\n") == 1
    assert "train_iters = 40 is fewer than the 110 steps that each run takes" in ended.stderr
    assert not (tmp_path / "ranks").exists()
