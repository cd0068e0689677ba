"""Rank files to one profile: sums that hold for any times, lost ranks, and refusals in one line."""

import json
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mone.commands import merge_profile
from megatron_mone.common.load_edges import LOAD_EDGES
from megatron_mone.profiling.merge import merge
from megatron_mone.profiling.rank_record import RankRecord, record_name, write_record
from megatron_mone.profiling.rank_steps import align, common_steps, middle_half, take_steps
from megatron_mone.profiling.totals import histogram_quantiles
from megatron_mone.reporting.profile.view import rank_ranges
from tests.unit.profiling.profile_builders import (
    MIB,
    combined,
    make_memory,
    make_phases,
    make_profile,
    make_record,
    make_run,
)

ROOT = Path(__file__).resolve().parents[3]


def refused(folder: Path, **options) -> str:
    """The one line with which merging is refused; no profile is left behind."""
    with pytest.raises(ValueError) as caught:
        merge(folder, **options)
    line = str(caught.value)
    assert "\n" not in line
    assert ";" in line
    assert not (folder / "profile.json").exists()
    return line


def with_stages(records: list[dict], stages: int) -> list[dict]:
    """Put the first ranks into stage 0, the next into stage 1, ..."""
    per_stage = len(records) // stages
    for record in records:
        record["coordinates"] |= {
            "pp": record["rank"] // per_stage,
            "ep": record["rank"] % per_stage,
        }
        for run in record["runs"]:
            run["routing"]["layers"][0]["layer"] = 1 + record["rank"] // per_stage
    return records


# Averages -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("times", "kept"),
    [
        ([5.0], {5}),
        ([5.0, 6.0], {5, 6}),
        ([9.0, 5.0, 1.0], {5}),
        ([1.0, 2.0, 3.0, 90.0], {2, 3}),
        ([8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0], {3, 4, 5, 6}),
    ],
)
def test_the_middle_half_leaves_out_as_many_fast_steps_as_slow_ones(times, kept):
    assert {times[i] for i in middle_half(np.array(times))} == kept


@st.composite
def jobs(draw) -> list[dict]:
    """Ranks with any times; some stopped before the end, but not the first."""
    steps = draw(st.integers(1, 9))
    times = st.floats(0.001, 1000.0)
    records = []
    for rank in range(draw(st.integers(1, 4))):
        has = steps if rank == 0 else draw(st.integers(1, steps))
        phases = {
            phase: {name: draw(st.lists(times, min_size=has, max_size=has)) for name in passes}
            for phase, passes in draw(
                st.dictionaries(
                    st.sampled_from(["data", "attention", "combine", "other"]),
                    st.sets(st.sampled_from(["forward", "backward", "recompute"]), min_size=1),
                    min_size=1,
                )
            ).items()
        }
        lists = [values for passes in phases.values() for values in passes.values()]
        run = make_run(steps=has, phases=phases, step_ms=[sum(at) for at in zip(*lists)])  # noqa: B905
        records.append(make_record(rank, 4, runs=[run], complete=has == steps))
    return records


@settings(max_examples=40, deadline=None)
@given(records=jobs())
def test_phases_add_up_to_the_step_and_passes_to_their_phase(records):
    run = combined(records)["runs"][0]
    assert sum(run["phases"].values()) == pytest.approx(run["step_ms"], rel=1e-12)
    for phase, passes in run["passes"].items():
        assert sum(passes.values()) == pytest.approx(run["phases"][phase], rel=1e-12)
    assert run["step_ms"] == pytest.approx(naive_step_ms(records), rel=1e-12)


def naive_step_ms(records: list[dict]) -> float:
    """Mean over the middle half of the steps of the mean over the ranks that have it."""
    runs = [record["runs"][0] for record in records]
    steps = runs[0]["steps"]
    at = {
        step: [run["step_ms"][run["steps"].index(step)] for run in runs if step in run["steps"]]
        for step in steps
    }
    out = (len(steps) + 1) // 4
    middle = sorted(steps, key=lambda step: max(at[step]))[out : len(steps) - out]
    return statistics.mean(statistics.mean(at[step]) for step in middle)


def test_samples_hold_the_slowest_rank_and_the_mean_phases_of_every_step():
    runs = []
    for ms in (1.0, 3.0):
        phases = make_phases(3, {"attention": ms, "other": 0.5}, backward=1.0)
        runs.append(make_run(steps=3, phases=phases, step_ms=[2 * ms + 1] * 3, windows=[0, 0, 7]))
    runs[1]["step_ms"][2] = 60.0
    profile = combined([make_record(r, runs=[run]) for r, run in enumerate(runs)])
    assert profile["runs"][0]["samples"] == {
        "steps": [3, 4, 5],
        "windows": [0, 0, 7],
        "step_ms": [7.0, 7.0, 60.0],
        "phases": {"attention": [4.0] * 3, "other": [1.0] * 3},
    }


def test_traffic_is_a_mean_over_all_ranks_and_a_step():
    traffic = {"send pp": {"calls": [1, 3, 1], "bytes": [10, 30, 10], "ms": [2.0, 2.0, 2.0]}}
    sent = {"operation": "send", "group": "pp", "bytes": 10, "phase": "attention"}
    calls = [sent | {"calls": [1, 3, 1], "ms": [2.0, 2.0, 2.0]}]
    runs = [make_run(steps=3, communication=traffic, collectives=calls),
            make_run(steps=3, communication={}, collectives=[])]  # fmt: skip
    for run in runs:
        run["step_ms"] = [10.0, 20.0, 30.0]  # keeps the second step
    run = combined([make_record(r, runs=[x]) for r, x in enumerate(runs)])["runs"][0]
    assert run["communication"] == {"send pp": {"calls": 1.5, "bytes": 15.0, "ms": 1.0}}
    assert run["collectives"] == [sent | {"calls": 1.5, "ms": 1.0}]


def test_the_document_has_the_fields_of_the_schema_and_is_the_file(tmp_path):
    profile = make_profile(tmp_path, [make_record(0), make_record(1)])
    assert json.loads((tmp_path / "profile.json").read_text()) == profile
    assert set(profile) == {"schema", "config", "ranks", "runs"}
    assert profile["schema"] == "megatron-mone/profile/1"
    assert profile["config"] == make_record(0)["config"]
    assert set(profile["runs"][0]) == {
        *("name", "backend", "model", "step_ms", "phases", "passes", "samples", "over_ranks"),
        *("over_nodes", "by_rank", "stragglers", "expert_groups", "communication", "routing"),
        *("neurons", "flops", "memory", "collectives"),
    }
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


# Ranks that differ --------------------------------------------------------------------------------


def test_a_straggler_is_named_with_its_stage_its_phase_and_its_rows():
    quick = {"attention": 4.0, "up/down GEMM": 4.0, "pipeline bubble": 9.0}
    slow = {"attention": 4.1, "up/down GEMM": 6.0, "pipeline bubble": 7.0}
    # Stage 1 has more to do as a whole: no rank of it is slow among its own.
    heavy = {"attention": 16.0, "up/down GEMM": 8.0}
    times = [quick, slow, quick, quick, *[heavy] * 4]
    rows = [100.0, 300.0, 100.0, 100.0, *[50.0] * 4]
    records = with_stages(
        [make_record(r, 8, runs=[make_run(ms=times[r], rows=rows[r])]) for r in range(8)], 2
    )
    run = combined(records)["runs"][0]
    assert run["stragglers"] == [
        {
            "rank": 1,
            "host": "node00",
            "stage": 0,
            "compute_ms": pytest.approx(10.1),
            "median_ms": pytest.approx(8.0),
            "phase": "up/down GEMM",
            "rows_over_mean": pytest.approx(2.0),
        }
    ]
    assert run["by_rank"]["stage"] == [0] * 4 + [1] * 4
    assert run["by_rank"]["compute_ms"] == pytest.approx([8, 10.1, 8, 8, 24, 24, 24, 24])


@pytest.mark.parametrize(("excess", "named"), [(0.09, 0), (0.11, 1)])
def test_a_straggler_is_a_tenth_over_the_median_and_waiting_is_no_computing(excess, named):
    own = [10.0, 10.0, 10.0 * (1 + excess)]
    runs = [make_run(ms={"other": ms, "dispatch": 50.0 * r}) for r, ms in enumerate(own)]
    profile = combined([make_record(r, 3, runs=[x]) for r, x in enumerate(runs)])
    assert len(profile["runs"][0]["stragglers"]) == named


def test_expert_groups_share_stage_and_replica_and_span_expert_tensor_parallel_ranks():
    """8 ranks: 2 stages of EP 2 x ETP 2; rows differ within a group."""
    records = []
    for rank in range(8):
        ms = {"gate GEMM": 1.0, "selection": 1.0, "up/down GEMM": 2.0 + rank, "other": 90.0}
        record = make_record(rank, 8, runs=[make_run(ms=ms, rows=10.0 * (1 + rank % 4))])
        record["coordinates"] |= {"pp": rank // 4, "ep": rank // 2 % 2, "etp": rank % 2}
        records.append(record)
    groups = combined(records)["runs"][0]["expert_groups"]
    assert groups == [
        {
            "ranks": [0, 1, 2, 3],
            "rows_max_over_mean": pytest.approx(40 / 25),
            "expert_ms_max_over_mean": pytest.approx(7.0 / 5.5),
        },
        {
            "ranks": [4, 5, 6, 7],
            "rows_max_over_mean": pytest.approx(40 / 25),
            "expert_ms_max_over_mean": pytest.approx(11.0 / 9.5),
        },
    ]


def test_spread_over_ranks_and_over_nodes_names_who_is_where():
    own = [4.0, 8.0, 5.0, 5.0]  # hosts node00: 6 on average, node01: 5
    runs = [make_run(ms={"attention": ms, "other": 1.0}) for ms in own]
    records = [make_record(r, 4, runs=[run]) for r, run in enumerate(runs)]
    run = combined(records)["runs"][0]
    assert run["over_ranks"]["attention"] == {
        **{"min": 4.0, "median": 5.0, "max": 8.0, "min_rank": 0, "max_rank": 1},
    }
    assert run["over_nodes"]["step_ms"] == {
        **{"min": 6.0, "median": 6.5, "max": 7.0, "min_host": "node01", "max_host": "node00"},
    }


# Sums over ranks ----------------------------------------------------------------------------------


def test_rows_of_an_expert_add_up_over_replicas_and_not_over_its_slices():
    records = []
    for rank in range(4):  # EDP 2 x ETP 2, one expert parallel rank
        rows = (30, 10) if rank < 2 else (50, 10)
        record = make_record(rank, 4, runs=[make_run(expert_rows=rows)])
        record["coordinates"] |= {"ep": 0, "edp": rank // 2, "etp": rank % 2}
        record["config"]["layout"]["ep"] = 1
        records.append(record)
    routing = combined(records)["runs"][0]["routing"]
    assert routing["layers"] == [{"layer": 1, "rows": [80, 20], "max_over_mean": 1.6}]
    assert routing["rows_max_over_mean"] == 1.6


def test_experts_of_missing_ranks_are_unknown_or_taken_from_their_replica():
    records = []
    for rank, (ep, edp) in enumerate([(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1)]):
        run = make_run(expert_rows=(10 * (1 + ep),), first_expert=ep)
        record = make_record(rank, 6, runs=[run])
        record["coordinates"] |= {"ep": ep, "edp": edp}
        record["config"]["layout"]["ep"] = 3
        records.append(record)
    present = [record for record in records if record["rank"] not in (1, 2, 5)]
    layer = combined(present)["runs"][0]["routing"]["layers"][0]
    # Expert 1 has one replica left, expert 2 none.
    assert layer == {"layer": 1, "rows": [20, 40, None], "max_over_mean": pytest.approx(40 / 30)}


def test_neuron_loads_are_weighted_by_rows_and_dead_in_every_replica():
    records = []
    for rank in range(4):  # EP 2 x EDP 2
        run = make_run()
        layer = run["neurons"]["layers"][0]
        layer |= {"rows": 100, "kept": 1600 if rank == 3 else 400, "dead": (1, 2, 3, 4)[rank]}
        layer["max_over_mean"] = 1.0 + rank
        record = make_record(rank, 4, runs=[run])
        record["coordinates"] |= {"ep": rank % 2, "edp": rank // 2}
        records.append(record)
    neurons = combined(records)["runs"][0]["neurons"]
    assert neurons["kept_ratio"] == pytest.approx((3 * 400 + 1600) / (4 * 100 * 16))
    assert neurons["dead"] == 1 + 2
    assert neurons["max_over_mean"] == 4.0
    layer = neurons["layers"][0]
    assert layer["histogram"][20] == 4 * 32
    assert layer["dead"] == 3
    assert LOAD_EDGES[19] <= neurons["load_p1"] <= neurons["load_p50"] <= LOAD_EDGES[20]


def test_quantiles_of_a_histogram_are_those_of_its_values():
    values = np.random.default_rng(0).lognormal(0.0, 0.4, 200_000)
    histogram = np.bincount(np.digitize(values, LOAD_EDGES), minlength=len(LOAD_EDGES) + 1)
    found = histogram_quantiles(histogram, values.max(), (0.01, 0.5, 0.99))
    assert found == pytest.approx(np.quantile(values, (0.01, 0.5, 0.99)), rel=0.03)
    assert histogram_quantiles(0 * histogram, 0.0, (0.5,)) == (0.0,)
    beyond = np.zeros_like(histogram)
    beyond[-1] = 10
    (half,) = histogram_quantiles(beyond, 100.0, (0.5,))
    assert half == pytest.approx((LOAD_EDGES[-1] + 100.0) / 2)


def test_a_stock_model_without_memory_pass_has_null_for_both():
    run = make_run(neurons=None, peak_bytes=None)
    merged = combined([make_record(0, 1, runs=[run])])["runs"][0]
    assert merged["neurons"] is None
    assert merged["memory"] is None
    assert merged["by_rank"]["peak_bytes"] == [None]


def test_operations_add_up_and_are_used_against_all_peaks_or_none():
    records = [make_record(rank) for rank in range(2)]  # 10 ms steps
    flops = combined(records)["runs"][0]["flops"]
    assert (flops["executed"], flops["active"]) == (4e9, 2e9)
    assert flops["modules"] == {"attention": {"executed": 4e9, "active": 2e9}}
    assert flops["bytes"] == {"up/down GEMM": 2e6}
    assert flops["executed_per_s"] == pytest.approx(4e11)
    assert flops["utilisation_executed"] == pytest.approx(0.2)
    assert flops["utilisation_active"] == pytest.approx(0.1)
    records[1]["runs"][0]["flops"]["peak_flops"] = None
    flops = combined(records)["runs"][0]["flops"]
    assert flops["utilisation_executed"] is None
    assert flops["active_per_s"] == pytest.approx(2e11)


def test_memory_is_that_of_the_rank_with_the_highest_peak():
    peaks = [3 * MIB, 7 * MIB, 5 * MIB]
    records = [make_record(r, 3, runs=[make_run(peak_bytes=p)]) for r, p in enumerate(peaks)]
    run = combined(records)["runs"][0]
    assert run["memory"] == make_memory(7 * MIB) | {"peak_rank": 1}
    assert run["by_rank"]["peak_bytes"] == peaks


# Lost ranks ---------------------------------------------------------------------------------------


def test_missing_ranks_and_leftovers_of_writers(tmp_path):
    for rank in (1, 4):
        write_record(tmp_path, make_record(rank, 6))
    for name in (".rank-00000.json.77.tmp", "rank-00002.json.tmp", "notes.txt"):
        (tmp_path / "ranks" / name).write_text("{")
    ranks = merge(tmp_path).plain()["ranks"]
    assert ranks == {
        "world_size": 6,
        "present": 2,
        "missing": [0, 2, 3, 5],
        "incomplete": [],
        "hosts": {"node00": [1], "node02": [4]},
    }


def test_a_rank_that_stopped_early_contributes_the_steps_it_has_in_common():
    def run(ms: float, steps: list[int]) -> dict:
        n = len(steps)
        return make_run(steps=n, phases=make_phases(n, {"other": ms})) | {
            "steps": steps,
            "windows": [step // 2 for step in steps],
            "step_ms": [ms] * n,
        }

    records = [
        make_record(0, 4, runs=[run(10.0, [3, 4, 5, 6])]),
        make_record(1, 4, runs=[run(20.0, [4, 5, 6, 7])]),  # the common steps are 4, 5, 6
        make_record(2, 4, runs=[run(60.0, [3, 4, 5])], complete=False),
        make_record(3, 4, runs=[run(70.0, [3])], complete=False),  # none of them
    ]
    profile = combined(records)
    merged = profile["runs"][0]
    assert profile["ranks"]["incomplete"] == [2, 3]
    assert merged["samples"]["steps"] == [4, 5, 6]
    assert merged["samples"]["windows"] == [2, 2, 3]
    assert merged["samples"]["step_ms"] == [60.0, 60.0, 20.0]
    assert merged["samples"]["phases"]["other"] == [30.0, 30.0, 15.0]
    assert merged["step_ms"] == 30.0  # the middle one of three steps
    assert merged["by_rank"]["rank"] == [0, 1, 2]
    assert merged["by_rank"]["step_ms"] == [10.0, 20.0, 60.0]


def test_a_complete_rank_with_fewer_steps_is_incomplete_and_limits_the_others():
    runs = [make_run(steps=4), make_run(steps=2, first_expert=2)]
    records = [make_record(r, runs=[run]) for r, run in enumerate(runs)]
    profile = combined(records)
    assert profile["ranks"]["incomplete"] == [1]
    assert profile["runs"][0]["samples"]["steps"] == [3, 4]
    assert profile["runs"][0]["routing"]["layers"][0]["rows"] == [100, 100, 200, 200]


def test_a_job_that_was_stopped_whole_is_merged_on_what_all_ranks_have():
    runs = [make_run(steps=steps) for steps in (3, 2)]
    records = [make_record(r, runs=[run], complete=False) for r, run in enumerate(runs)]
    profile = combined(records)
    assert profile["ranks"]["incomplete"] == [0, 1]
    assert profile["runs"][0]["samples"]["steps"] == [3, 4]


def test_an_incomplete_rank_may_lack_a_run_and_a_complete_one_may_not(tmp_path):
    both = [make_run("mone"), make_run("moe")]
    records = [make_record(0, runs=both), make_record(1, runs=both[:1], complete=False)]
    profile = make_profile(tmp_path, records)
    assert [run["by_rank"]["rank"] for run in profile["runs"]] == [[0, 1], [0]]
    (tmp_path / "profile.json").unlink()
    write_record(tmp_path, make_record(1, runs=both[:1]))
    assert "rank 1: is complete and lacks run 'moe'" in refused(tmp_path)


def test_no_common_step_is_refused(tmp_path):
    for rank in range(2):
        run = make_run(steps=2) | {"steps": [1 + 2 * rank, 2 + 2 * rank]}
        write_record(tmp_path, make_record(rank, runs=[run]))
    assert "run 'mone': no step was measured by every rank" in refused(tmp_path)


def test_alignment_leaves_absent_steps_out_of_every_average():
    records = [RankRecord.of(make_record(rank), Path("a record")) for rank in range(2)]
    steps = [take_steps(record, record.runs[0]) for record in records]
    aligned = align(steps, common_steps(steps))
    assert aligned.weight_RS.sum() == pytest.approx(1.0)
    assert aligned.rank_weight_RS.sum(axis=1) == pytest.approx(1.0)


# Refusals -----------------------------------------------------------------------------------------


def test_an_empty_folder_is_refused(tmp_path):
    assert "has no rank-NNNNN.json" in refused(tmp_path)
    (tmp_path / "ranks").mkdir()
    assert str(tmp_path / "ranks") in refused(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r.update(job="other"), "job is 'other', and in rank-00000.json '3f1c'"),
        (lambda r: r.update(world_size=3), "world_size is 3, and in rank-00000.json 2"),
        (lambda r: r["config"]["layout"].update(pp=9), "config.layout.pp is 9, and in"),
        (lambda r: r["config"].update(routing="uniform"), "config.routing is 'uniform'"),
        (lambda r: r["runs"][0].update(backend="te"), "runs.mone.backend is 'te'"),
        (
            lambda r: r["runs"][0]["model"].update(hidden_size=17),
            "runs.mone.model.hidden_size is 17, and in rank-00000.json 16",
        ),
        (lambda r: r["runs"][0]["model"].update(extra=None), "model.extra is None, and in"),
    ],
)
def test_ranks_that_disagree_are_refused(tmp_path, change, words):
    record = make_record(1)
    change(record)
    write_record(tmp_path, make_record(0))
    path = write_record(tmp_path, record)
    line = refused(tmp_path)
    assert line.startswith(f"{path}: ")
    assert words in line


def test_ranks_may_run_on_different_machines():
    records = [make_record(0), make_record(1)]
    records[1]["config"]["machine"] = {"Processor": "another"}
    combined(records)


def test_mixed_schemas_and_two_files_of_a_rank_are_refused(tmp_path):
    good = write_record(tmp_path, make_record(0))
    (good.parent / "rank-0.json").write_text("{}")
    assert "claims rank 0 too" in refused(tmp_path)
    (good.parent / "rank-0.json").unlink()
    bad = good.with_name(record_name(1))
    bad.write_text(json.dumps(make_record(1, schema="megatron-mone/rank-profile/2")))
    assert "this version reads /1" in refused(tmp_path, skip_unreadable=True)


def test_a_file_cut_short_is_refused_or_skipped_with_its_reason(tmp_path, capsys):
    path = write_record(tmp_path, make_record(0))
    write_record(tmp_path, make_record(1))
    path.write_text(path.read_text()[:-100])
    assert "cut short" in refused(tmp_path)
    profile = merge(tmp_path, skip_unreadable=True).plain()
    assert profile["ranks"]["missing"] == [0]
    reason = capsys.readouterr().err
    assert str(path) in reason
    assert "cut short" in reason
    path.with_name(record_name(1)).write_text("")
    (tmp_path / "profile.json").unlink()
    assert "no rank's file can be read" in refused(tmp_path, skip_unreadable=True)


# The command --------------------------------------------------------------------------------------


def test_the_command_prints_the_gist(tmp_path, capsys):
    for rank in (0, 1, 5, 6, 7, 9):
        slow = {"attention": 9.0 if rank == 7 else 4.0, "other": 6.0}
        write_record(tmp_path, make_record(rank, 10, runs=[make_run(ms=slow)]))
    assert merge_profile.main([str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "6 of 10 on 4 host(s)" in text
    assert "4: 2-4, 8" in text
    assert "rank 7 on node03" in text
    assert "kept neurons 25.0%" in text
    assert rank_ranges([17, *range(40, 48)]) == "17, 40-47"


def test_the_command_fails_in_one_line(tmp_path, capsys):
    assert merge_profile.main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("megatron-mone: error: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize("start", [["tools/merge_profile.py"], ["-m", "tools.merge_profile"]])
def test_the_command_starts_both_ways_without_torch(tmp_path, start):
    write_record(tmp_path, make_record(0, 1))
    command = [sys.executable, "-X", "importtime", *start, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "written to" in done.stdout
    assert "| torch" not in done.stderr
