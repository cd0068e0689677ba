"""The report over a profile's sizes: what is there is drawn, what is missing is explained."""

from pathlib import Path

import pytest

from launch.runs.run_manifest import begin_attempt, end_attempt
from megatron_mone.commands.gather_profiles import main, why_missing
from megatron_mone.profiling import merge as merging
from megatron_mone.profiling.profile_document import Profile, ProfiledRun, Ranks
from megatron_mone.reporting.profile import report


@pytest.fixture
def drawn(monkeypatch) -> list:
    """Ranks of the profiles that the report would be drawn of, the subject first."""
    calls: list = []

    def write_report(profile, folder, others):
        calls.append([p.ranks.world_size for p in (profile, *others)])
        return folder / "report.html"

    def merge(folder, *, skip_unreadable):
        world = (folder / "ranks" / "world").read_text()
        ranks = Ranks.model_construct(world_size=int(world), present=int(world) - 1, incomplete=[1])
        run = ProfiledRun.model_construct(name="mone", model={})
        return Profile.model_construct(ranks=ranks, runs=[run])

    monkeypatch.setattr(report, "write_report", write_report)
    monkeypatch.setattr(merging, "merge", merge)
    return calls


def size(run: Path, nodes: int) -> None:
    ranks = run / "profiles" / f"{nodes:03d}-nodes" / "ranks"
    ranks.mkdir(parents=True)
    (ranks / "world").write_text(str(8 * nodes))


def test_the_largest_is_the_subject_and_the_missing_are_named(tmp_path, drawn, capsys):
    for nodes in (1, 16, 4):
        size(tmp_path, nodes)
    case = tmp_path / "cases" / "002-nodes"
    begin_attempt(case, "42", "42.0", "n[0-1]")
    end_attempt(case, "42.0", 2, "failed with status 2")
    log = case / "logs" / "42.0" / "rank-00001.log"
    log.parent.mkdir(parents=True)
    log.write_text("warning\nmegatron-mone: error: no data\nmore\n")
    assert main([str(tmp_path), "--nodes", "1,2,8,16"]) == 0
    assert drawn == [[128, 32, 8]]
    assert capsys.readouterr().out.splitlines() == [
        "001-nodes: 8 ranks, 2 of them missing or incomplete",
        "002-nodes: missing: failed with status 2: no data",
        "004-nodes: 32 ranks, 2 of them missing or incomplete",
        "008-nodes: missing: its job never began",
        "016-nodes: 128 ranks, 2 of them missing or incomplete",
        f"wrote {tmp_path}/profiles/report/report.html",
    ]


def test_a_job_without_an_end_was_killed(tmp_path):
    begin_attempt(tmp_path, "42", "42.0", "n0")
    assert why_missing(tmp_path, ValueError("no rank files")) == "its job was killed"


def test_a_job_that_ended_well_without_a_profile_says_what_is_wrong_with_it(tmp_path):
    begin_attempt(tmp_path, "42", "42.0", "n0")
    end_attempt(tmp_path, "42.0", 0, "finished")
    assert why_missing(tmp_path, ValueError("no rank files")) == "no rank files"


@pytest.mark.parametrize(
    ("words", "said"), [([], "has no profile"), (["--nodes", "1,x"], "must be numbers of nodes")]
)
def test_a_mistake_is_one_line(tmp_path, capsys, words, said):
    assert main([str(tmp_path), *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_rank_files_that_are_none_count_as_missing(tmp_path, capsys):
    ranks = tmp_path / "profiles" / "001-nodes" / "ranks"
    ranks.mkdir(parents=True)
    (ranks / "rank-00000.json").write_text("{")
    assert main([str(tmp_path)]) == 2
    assert "001-nodes: missing: its job never began" in capsys.readouterr().out
