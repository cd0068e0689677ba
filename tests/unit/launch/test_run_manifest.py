"""The run manifest: what was run, one config a folder, all attempts, safe for two at once."""

import json
import multiprocessing
from pathlib import Path

import pytest

from launch.runs import run_manifest as manifest
from megatron_mone.common.places import ROOT

CONFIG = {"values": {"lr": 1e-3}, "arguments": ["--seed", "1"]}


def _start(folder: Path, config=CONFIG, **facts) -> None:
    manifest.record_start(folder, "run", config, (), facts)


def _written(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def test_a_start_is_recorded_with_code_and_config(tmp_path):
    _start(tmp_path, job_id="5")
    written = _written(tmp_path)
    assert written["schema"] == "megatron-mone/launch/1"
    assert written["config"] == CONFIG
    assert written["starts"][0]["job_id"] == "5"
    pins = manifest.sha256_of(ROOT / "constraints.txt")
    assert written["starts"][0]["constraints_sha256"] == pins


def test_a_git_around_an_installation_is_not_asked(monkeypatch):
    monkeypatch.setattr(manifest, "IS_CHECKOUT", False)
    assert set(manifest.code_facts().values()) == {None}


def test_starts_add_up(tmp_path):
    _start(tmp_path, job_id="5")
    _start(tmp_path, job_id="6")
    assert [start["job_id"] for start in _written(tmp_path)["starts"]] == ["5", "6"]


def test_a_run_that_never_began_stands_in_nobodys_way(tmp_path):
    manifest.open_run(tmp_path, "run", CONFIG, ())
    assert manifest.gather(tmp_path).starts == []
    other = {**CONFIG, "arguments": ["--seed", "2"]}
    _start(tmp_path, other, job_id="5")
    with pytest.raises(ValueError, match="another config"):
        manifest.open_run(tmp_path, "run", CONFIG, ())
    manifest.open_run(tmp_path, "run", other, ())
    assert len(_written(tmp_path)["starts"]) == 1


TRAINING = {"values": {"train_iters": 6, "lr": 1e-3}, "arguments": ["--seed", "1"], "sweep": False}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--seed", "1", "--train-iters", "10"],
        ["--seed", "1", "--train-iters=10"],
        ["--train-iters", "10", "--seed", "1", "--override-opt-param-scheduler"],
        ["--train-iters", "10", "--use-checkpoint-opt-param-scheduler", "--seed", "1"],
        ["--seed", "1", "--train-iters", "10", "--lr-decay-iters", "6"],
    ],
)
def test_a_run_goes_on_with_more_steps_under_its_name(tmp_path, arguments):
    """The manifest has the config of the last start, to which the next is held."""
    _start(tmp_path, TRAINING, job_id="5")
    longer = {**TRAINING, "arguments": arguments}
    manifest.check_config(tmp_path, longer)
    _start(tmp_path, longer, job_id="6")
    assert _written(tmp_path)["config"] == longer
    with pytest.raises(ValueError, match="train_iters = 6 is fewer than the 10 that the run"):
        manifest.check_config(tmp_path, TRAINING)


@pytest.mark.parametrize(
    "change",
    [
        {"arguments": ["--seed", "2", "--train-iters", "10"]},
        {"values": {"train_iters": 10, "lr": 2e-3}},
        {"values": {"lr": 1e-3}, "arguments": ["--seed", "1", "--train-samples", "99"]},
        {"arguments": ["--seed", "1", "--train-iters", "5"]},
        {"sweep": True, "values": {"train_iters": 10, "lr": 1e-3}},
    ],
)
def test_more_than_its_length_makes_another_run(tmp_path, change):
    _start(tmp_path, TRAINING, job_id="5")
    with pytest.raises(ValueError, match=r"another config|is fewer than the 6"):
        manifest.check_config(tmp_path, {**TRAINING, **change})


def test_a_job_that_nobody_noted_is_known_by_its_attempts(tmp_path):
    """The launcher's machine died between sbatch's answer and the note of it."""
    manifest.open_run(tmp_path, "run", CONFIG, ())
    manifest.begin_attempt(tmp_path, "7", "7.0", "n0")
    manifest.begin_attempt(tmp_path, "local-1-2", "local-1-2.0", "here")
    for number in (0, 1):
        case = tmp_path / "cases" / f"00{number}-r={number}"
        case.mkdir(parents=True)
    manifest.begin_attempt(case, "8_1", "8_1.0", "n1")
    for _ in range(2):
        starts = manifest.gather(tmp_path).starts
        assert {start["job_id"]: start["cases"] for start in starts} == {"7": [0, 1], "8": [0, 1]}
    with pytest.raises(ValueError, match="another config"):
        _start(tmp_path, {**CONFIG, "arguments": []})


def test_the_digest_is_of_the_values_not_of_their_order():
    one = manifest.digest({"a": 1, "b": [1, 2]})
    assert one == manifest.digest({"b": [1, 2], "a": 1})
    assert one != manifest.digest({"a": 1, "b": [2, 1]})


def test_a_folder_holds_one_config(tmp_path):
    _start(tmp_path)
    other = {**CONFIG, "arguments": ["--seed", "2"]}
    for refused in (
        lambda: _start(tmp_path, other),
        lambda: manifest.check_config(tmp_path, other),
    ):
        with pytest.raises(ValueError, match="run of another config: choose another --name"):
            refused()
    assert len(_written(tmp_path)["starts"]) == 1


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": "other/1"}', '{"starts": 3}'])
def test_a_file_that_is_no_manifest_is_named(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=r"manifest\.json") as refusal:
        _start(tmp_path)
    assert "\n" not in str(refusal.value)


def test_a_wrong_field_is_named(tmp_path):
    _start(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({**_written(tmp_path), "starts": 3}))
    with pytest.raises(ValueError, match=r"manifest\.json.*: starts: must be a list; choose anoth"):
        _start(tmp_path)


def test_what_another_version_wrote_stays(tmp_path):
    _start(tmp_path, job_id="5")
    (tmp_path / "manifest.json").write_text(json.dumps({**_written(tmp_path), "later": [1]}))
    _start(tmp_path, job_id="6")
    assert _written(tmp_path)["later"] == [1]
    assert len(_written(tmp_path)["starts"]) == 2


def test_data_has_the_checksums_of_its_manifest(tmp_path, monkeypatch):
    from megatron_mone.data.manifest import FileFacts, Manifest, TokenizerFacts

    facts = {field: "" for field in Manifest.__dataclass_fields__}
    facts |= {"documents": 1, "schema": 1, "inputs": [], "bad_lines_named": []}
    facts["tokenizer"] = TokenizerFacts("bpe", "bpe:9", "t", "sha-of-tokenizer", 9, 0, "e")
    facts["bin"] = FileFacts("d.bin", 1, "sha-of-bin")
    facts["idx"] = FileFacts("d.idx", 1, "sha-of-idx")
    (tmp_path / "d.manifest.json").write_bytes(Manifest(**facts).to_json())
    prefix, unknown = str(tmp_path / "d_text_document"), str(tmp_path / "other")
    assert manifest.data_facts([prefix, unknown]) == {
        prefix: {
            "bin_sha256": "sha-of-bin",
            "idx_sha256": "sha-of-idx",
            "tokenizer_sha256": "sha-of-tokenizer",
        },
        unknown: None,
    }


def test_attempts_are_gathered_oldest_first(tmp_path):
    _start(tmp_path)
    manifest.begin_attempt(tmp_path, "9", "9.0", "n[0-1]")
    manifest.end_attempt(tmp_path, "9.0", 75, "requeued after a checkpoint")
    manifest.begin_attempt(tmp_path, "9", "9.1", "n[2-3]")
    manifest.begin_attempt(tmp_path / "cases/000-a", "10", "10.0", "n4")
    for number, path in enumerate(("attempts/9.1", "cases/000-a/attempts/10.0", "attempts/9.0")):
        start = tmp_path / f"{path}.start.json"
        start.write_text(json.dumps({**json.loads(start.read_text()), "start": 100 - number}))
    found = manifest.gather(tmp_path).attempts
    assert [attempt["attempt"] for attempt in found] == ["9.0", "10.0", "9.1"]
    assert (found[0]["status"], found[0]["reason"]) == (75, "requeued after a checkpoint")
    assert found[0]["node_list"] == "n[0-1]"
    assert found[1]["case"] == "000-a"
    assert found[2]["end"] is None
    assert _written(tmp_path)["attempts"] == found


def test_gathering_where_nothing_was_started_says_so(tmp_path):
    with pytest.raises(ValueError, match="no run was started there"):
        manifest.gather(tmp_path)


def _start_often(folder: Path, who: int) -> None:
    for number in range(20):
        _start(folder, who=who, number=number)


def test_two_users_at_once_lose_nothing(tmp_path):
    spawn = multiprocessing.get_context("fork")
    users = [spawn.Process(target=_start_often, args=(tmp_path, who)) for who in range(3)]
    for user in users:
        user.start()
    for user in users:
        user.join()
    starts = {(start["who"], start["number"]) for start in _written(tmp_path)["starts"]}
    assert starts == {(who, number) for who in range(3) for number in range(20)}


def test_a_lock_that_is_held_refuses_who_does_not_wait(tmp_path):
    with manifest.locked(tmp_path / "lock"):
        with pytest.raises(ValueError, match="busy"):
            with manifest.locked(tmp_path / "lock", "busy"):
                pass
    with manifest.locked(tmp_path / "lock", "busy"):
        pass
