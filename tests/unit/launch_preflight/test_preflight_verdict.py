"""From lines to the verdict: every kind of bad node, and what the job script reads of it."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.preflight.__main__ import main
from launch.preflight.limits import Limits
from launch.preflight.lines import TaskLine
from launch.preflight.pairs import pair_rounds
from launch.preflight.verdict import Verdict, verdict

VERSIONS = {"torch": "2.14.1", "python": "3.12.3"}


def partners(node: int, nodes: int) -> list[int]:
    return [a + b - node for pairs in pair_rounds(nodes) for a, b in pairs if node in (a, b)]


def healthy(nodes: int, ranks: int = 2) -> list[dict[str, Any]]:
    """Lines of all tasks, as keyword arguments of TaskLine; heads come first on their nodes."""
    return [
        {
            "node": node,
            "local_rank": rank,
            "ranks_per_node": ranks,
            "time": 1.7e9 + node,
            "faults": (),
            "versions": {} if rank else dict(VERSIONS),
            "node_gb_per_s": None if rank else 400.0,
            "pairs": {} if rank else dict.fromkeys(partners(node, nodes), 40.0),
        }
        for node in range(nodes)
        for rank in range(ranks)
    ]


def head(lines: list[dict[str, Any]], node: int) -> dict[str, Any]:
    return next(line for line in lines if line["node"] == node and line["local_rank"] == 0)


def set_pair(lines: list[dict[str, Any]], a: int, b: int, value: float | str) -> None:
    head(lines, a)["pairs"][b] = head(lines, b)["pairs"][a] = value


def judged(lines: list[dict[str, Any]], nodes: int, need: int = 1, **limits: Any) -> Verdict:
    hosts = [f"n{node}" for node in range(nodes)]
    return verdict([TaskLine(**line) for line in lines], hosts, need, Limits(**limits))


def test_healthy_nodes_are_all_good_and_the_first_are_chosen() -> None:
    found = judged(healthy(6), 6, need=4)
    assert found.good == tuple(range(6))
    assert found.chosen == (0, 1, 2, 3)
    assert (found.bad, found.failed_pairs, found.median_pair) == ({}, {}, 40.0)


def test_a_task_s_fault_makes_its_node_bad_once() -> None:
    lines = healthy(4)
    for line in lines:
        if line["node"] == 2:
            line["faults"] = ("7 of 8 GPUs are there",)
    found = judged(lines, 4, need=3)
    assert found.bad == {2: ("7 of 8 GPUs are there",)}
    assert found.chosen == (0, 1, 3)


def test_silent_nodes_and_missing_tasks_are_bad() -> None:
    lines = [line for line in healthy(4) if line["node"] != 1 and line != healthy(4)[-1]]
    assert judged(lines, 4).bad == {
        1: ("none of its tasks answered",),
        3: ("1 of its 2 tasks answered",),
    }
    assert judged([], 2).good == ()


def test_what_differs_from_most_nodes_is_named_with_both_versions() -> None:
    lines = healthy(5)
    head(lines, 3)["versions"]["torch"] = "2.13.0"
    del head(lines, 4)["versions"]["python"]
    assert judged(lines, 5).bad == {
        3: ("torch is 2.13.0, 2.14.1 on the others",),
        4: ("python is absent, 3.12.3 on the others",),
    }


def test_of_two_different_nodes_the_first_is_right() -> None:
    lines = healthy(2)
    head(lines, 0)["versions"]["torch"] = "2.13.0"
    assert judged(lines, 2).bad == {1: ("torch is 2.14.1, 2.13.0 on the others",)}


@pytest.mark.parametrize(
    ("seconds", "says"),
    [
        (59, None),
        (-59, None),
        (3600, "its clock is 3600 s ahead"),
        (-90, "its clock is 90 s behind"),
    ],
)
def test_a_wrong_clock_is_named_beyond_a_minute(seconds: int, says: str | None) -> None:
    lines = healthy(5)
    for line in lines:
        line["time"] = 1.7e9 + (seconds if line["node"] == 4 else 0)
    assert judged(lines, 5).bad == ({4: (says,)} if says else {})


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        ({}, "all-reduce within it has 150 GB/s, 200 are expected"),
        ({"relative": 0.3}, None),
        ({"relative": 0.0, "node_gb_per_s": 300.0},
         "all-reduce within it has 150 GB/s, 300 are expected"),
    ],
)  # fmt: skip
def test_a_slow_node_is_bad(limits: dict[str, float], says: str | None) -> None:
    lines = healthy(4)
    head(lines, 1)["node_gb_per_s"] = 150.0
    assert judged(lines, 4, **limits).bad == ({1: (says,)} if says else {})


@given(st.data(), st.integers(4, 24), st.sampled_from(["failed", "slow"]))
def test_bad_nodes_that_are_not_side_by_side_are_left_out_exactly(
    data: st.DataObject, nodes: int, how: str
) -> None:
    """The theorem of pairs.py through the whole judgement, slowness against an absolute limit."""
    bad: set[int] = set()
    for node in range(nodes):
        if node - 1 not in bad and data.draw(st.booleans()):
            bad.add(node)
    lines = healthy(nodes)
    for node in bad:
        for partner in partners(node, nodes):
            set_pair(lines, node, partner, "timed out" if how == "failed" else 5.0)
    found = judged(lines, nodes, need=nodes, pair_gb_per_s=20.0, relative=0.0)
    assert set(found.bad) == bad
    assert found.failed_pairs == {}
    assert found.chosen == tuple(node for node in range(nodes) if node not in bad)


def test_a_slow_node_is_slow_against_the_median_of_all_pairs() -> None:
    lines = healthy(8)
    for partner in partners(5, 8):
        set_pair(lines, 5, partner, 19.0)
    says = "all-reduce with each of its partners failed or was slow: 19 GB/s, 20 are expected"
    assert judged(lines, 8).bad == {5: (says,)}
    assert judged(lines, 8, relative=0.0).bad == {}


def test_three_results_have_no_meaningful_median() -> None:
    lines = healthy(3)
    set_pair(lines, 0, 1, 1.0)
    found = judged(lines, 3)
    assert (found.bad, found.failed_pairs) == ({}, {})


def test_of_two_nodes_that_fail_neither_is_bad_and_only_one_is_chosen() -> None:
    lines = healthy(2)
    set_pair(lines, 0, 1, "timed out")
    found = judged(lines, 2, need=2)
    assert (found.bad, found.good, found.chosen) == ({}, (0, 1), (0,))
    assert found.failed_pairs == {(0, 1): "timed out"}


def test_a_link_between_two_good_nodes_costs_one_of_them() -> None:
    lines = healthy(6)
    set_pair(lines, 2, 3, "timed out")
    found = judged(lines, 6, need=5)
    assert (found.bad, found.chosen) == ({}, (0, 1, 2, 4, 5))


def test_the_pairs_of_a_node_that_is_bad_anyway_are_explained() -> None:
    lines = [line for line in healthy(2) if line["node"] == 0]
    head(lines, 0)["pairs"] = {1: "nobody came"}
    found = judged(lines, 2)
    assert (set(found.bad), found.failed_pairs, found.chosen) == ({1}, {}, (0,))


@pytest.mark.parametrize(
    ("one", "other", "kept"),
    [
        (40.0, 30.0, 30.0),
        (30.0, 40.0, 30.0),
        (40.0, "gone", "gone"),
        ("gone", 40.0, "gone"),
        (40.0, None, 40.0),
    ],
)
def test_of_two_reports_of_a_pair_the_worse_counts(one: Any, other: Any, kept: Any) -> None:
    lines = healthy(2)
    set_pair(lines, 0, 1, one)
    if other is None:
        head(lines, 1)["pairs"] = {}
    else:
        head(lines, 1)["pairs"][0] = other
    found = judged(lines, 2)
    assert {**found.pairs, **found.failed_pairs} == {(0, 1): kept}


def run_judge(folder: Path, lines: list[dict[str, Any]], need: int, *more: str) -> int:
    nodes = max(line["node"] for line in lines) + 1
    (folder / "7.0.hosts").write_text("".join(f"n{node}\n" for node in range(nodes)))
    texts = [
        json.dumps({"host": f"n{line['node']}", **line, "pairs": {str(k): v for k, v in
                    line["pairs"].items()}})
        for line in lines
    ]  # fmt: skip
    (folder / "7.0.jsonl").write_text("\n".join(["srun: warning: hello", *texts]) + "\n")
    files = [str(folder / "7.0.jsonl"), "--hosts", str(folder / "7.0.hosts")]
    return main(["judge", *files, "--need", str(need), *more])


def test_judge_leaves_the_files_that_the_job_script_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = healthy(4)
    head(lines, 3)["faults"] = ["GPU 5 has 12 uncorrected ECC errors", "$(touch\n/tmp/x)"]
    assert run_judge(tmp_path, lines, 3) == 0
    said = capsys.readouterr()
    assert said.err == (
        "megatron-mone: node n3 is left out: GPU 5 has 12 uncorrected ECC errors; $(touch /tmp/x)\n"
    )
    assert said.out == (
        "pre-flight: 3 of 4 nodes are good, bad: n3; all-reduce between two nodes 40 GB/s "
        "(median)\n"
    )
    assert (tmp_path / "7.0.nodes").read_text() == "n0\nn1\nn2\n"
    assert (tmp_path / "7.0.bad").read_text() == "n3\n"
    result = json.loads((tmp_path / "7.0.json").read_text())
    assert (result["enough"], result["chosen"]) == (True, ["n0", "n1", "n2"])
    assert list(result["bad"]) == ["n3"]
    assert {path.name for path in tmp_path.iterdir()} == {
        f"7.0.{suffix}" for suffix in ("hosts", "jsonl", "json", "nodes", "bad")
    }


def test_too_few_good_nodes_are_status_69(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = healthy(2)
    set_pair(lines, 0, 1, "timed out")
    assert run_judge(tmp_path, lines, 2) == 69
    said = capsys.readouterr()
    assert said.err == (
        "megatron-mone: nodes n0 and n1 do not work together, either may be bad: timed out\n"
    )
    assert said.out.endswith("; 2 are needed, 1 can work together\n")
    assert (tmp_path / "7.0.bad").read_text() == ""
    result = json.loads((tmp_path / "7.0.json").read_text())
    assert result["failed_pairs"] == [{"nodes": ["n0", "n1"], "why": "timed out"}]
    assert (result["enough"], result["bad"]) == (False, {})


def test_limits_reach_the_judgement(tmp_path: Path) -> None:
    assert run_judge(tmp_path, healthy(2), 2, "--limit", "pair_gb_per_s=40") == 0
    assert run_judge(tmp_path, healthy(2), 2, "--limit", "relative=0", "pair_gb_per_s=41") == 69


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--limit", "speed=1"], "preflight_limits: 'speed' = '1' is not a limit"),
        (["--limit", "speed"], "--limit 'speed' must be NAME=VALUE"),
    ],
)
def test_a_user_s_mistake_is_one_line_and_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], says: str
) -> None:
    assert run_judge(tmp_path, healthy(2), 2, *more) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"megatron-mone: error: {says}")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [["judge", "--hosts", "x", "--need", "1"], ["judge", "x", "--hosts", "x"],
     ["check", "x", "--hosts", "x"], ["check", "--hosts", "x", "--need", "1"], ["check"], [],
     ["judge", "x", "--hosts", "x", "--need", "0"]],
)  # fmt: skip
def test_a_wrong_command_line_is_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
