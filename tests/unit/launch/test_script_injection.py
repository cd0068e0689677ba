"""Hostile text in any field of a job arrives as it was given, or is refused in one line."""

from pathlib import Path
from typing import Any

import pytest

from launch.slurm.script import sbatch_script
from launch.spec.checks import checked
from launch.spec.launch_spec import Case, Container, LaunchSpec
from tests.unit.launch.fake_slurm import FakeSlurm, sbatch_words
from tests.unit.launch.hostile_text import CANARY, HOSTILE

REFUSED_EVERYWHERE = {
    "newline": f"a\ntouch {CANARY}",
    "newline and directive": "a\n#SBATCH --hold",
    "newline and other scheduler": "a\n#PBS -A root",
    "carriage return": "a\rb",
    "null": "a\0b",
    "escape": "a\x1b[2Jb",
    "not UTF-8": "a\udcffb",
}
SBATCH_FIELDS = (
    "account", "partition", "qos", "constraint", "reservation", "mail_user", "mail_type",
    "dependency",
)  # fmt: skip


def _job(home: Path, slurm: FakeSlurm, /, **fields: Any) -> LaunchSpec:
    needed: dict[str, Any] = {
        "name": "run",
        "command": (str(slurm.dump),),
        "workdir": str(home),
        "folder": str(home / "run"),
    }
    return checked(LaunchSpec(**{**needed, **fields}))


def _hostile_fields(text: str, slurm: FakeSlurm) -> dict[str, Any]:
    """`text` in every field that takes any text."""
    return {
        "command": (str(slurm.dump), text, f"--x={text}", ""),
        "environment": {"HOSTILE": text},
        "sbatch": {"comment": text},
        **{name: text for name in SBATCH_FIELDS},
    }


@pytest.fixture
def slurm(tmp_path: Path) -> FakeSlurm:
    (tmp_path / "slurm").mkdir()
    apptainer = """printf '%s\\0' "$@" >"$0.words"; exec dump"""
    return FakeSlurm(tmp_path / "slurm", apptainer=apptainer)


def _succeed(slurm: FakeSlurm, script: str, **variables: str) -> None:
    done = slurm.run(script, **variables)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", HOSTILE)
def test_values_arrive_as_given(kind, tmp_path, slurm):
    text = HOSTILE[kind]
    spec = _job(tmp_path, slurm, **_hostile_fields(text, slurm))
    script = sbatch_script(spec)

    words = sbatch_words(script)
    options = {word.partition("=")[0]: word.partition("=")[2] for word in words}
    for name in SBATCH_FIELDS:
        assert options[f"--{name.replace('_', '-')}"] == text
    assert options["--comment"] == text
    assert "--hold" not in options

    _succeed(slurm, script)
    arguments, environment = slurm.dumped()
    assert arguments == [text, f"--x={text}", ""]
    assert environment["HOSTILE"] == text
    assert not list(tmp_path.rglob(CANARY))


@pytest.mark.parametrize("kind", HOSTILE)
def test_paths_arrive_as_given_or_are_refused(kind, tmp_path, slurm):
    """The job's name, its folders and a virtual environment."""
    name = HOSTILE[kind]
    place = tmp_path / f"work{name}"
    fields = {
        "name": name,
        "workdir": str(place),
        "folder": str(place / "run"),
        "virtual_environment": str(place / "venv"),
    }
    if "\\" in name or "%" in name:
        with pytest.raises(ValueError, match="reads '%'"):
            _job(tmp_path, slurm, **fields)
        return
    spec = _job(tmp_path, slurm, **fields)
    place.mkdir()
    script = sbatch_script(spec)
    assert f"--job-name={name}" in sbatch_words(script)
    assert f"--output={place}/run/logs/%j.log" in sbatch_words(script)

    _succeed(slurm, script)
    _, environment = slurm.dumped()
    assert environment["PWD"] == str(place)
    assert environment["VIRTUAL_ENV"] == str(place / "venv")
    assert environment["PATH"].startswith(f"{place}/venv/bin:")
    assert len(list((place / "run/attempts").iterdir())) == 2
    assert not list(tmp_path.rglob(CANARY))


@pytest.mark.parametrize("kind", HOSTILE)
def test_cases_and_containers_arrive_as_given_or_are_refused(kind, tmp_path, slurm):
    text = HOSTILE[kind]
    fields: dict[str, Any] = {
        "container": Container("pyxis", f"x{text}", (f"/data{text}",)),
        "cases": (Case(str(tmp_path / "case"), (text,)),),
    }
    if "," in text:
        with pytest.raises(ValueError, match="without a comma"):
            _job(tmp_path, slurm, **fields)
        return
    _succeed(
        slurm,
        sbatch_script(_job(tmp_path, slurm, **fields)),
        SLURM_ARRAY_JOB_ID="69",
        SLURM_ARRAY_TASK_ID="0",
    )
    assert slurm.words("dump") == [text]
    words = slurm.words("srun")
    assert f"--container-image=x{text}" in words
    mounts = f"{tmp_path}:{tmp_path},{tmp_path}/run:{tmp_path}/run,/data{text}"
    assert f"--container-mounts={mounts}" in words
    assert (tmp_path / "case/attempts/69_0.0.end.json").exists()
    assert not list(tmp_path.rglob(CANARY))


@pytest.mark.parametrize("kind", [kind for kind in HOSTILE if "," not in HOSTILE[kind]])
def test_apptainer_gets_them_as_given(kind, tmp_path, slurm):
    """Apptainer's words lie in a here-document and are read by the shell of each task."""
    text = HOSTILE[kind]
    spec = _job(tmp_path, slurm, container=Container("apptainer", f"x{text}", (f"/data{text}",)))
    _succeed(slurm, sbatch_script(spec))
    words = slurm.words("apptainer")
    assert f"x{text}" in words
    assert f"/data{text}" in words
    assert not list(tmp_path.rglob(CANARY))


def _places(text: str, slurm: FakeSlurm) -> dict[str, dict[str, Any]]:
    """`text` in one field at a time, all fields that hold text."""
    hostile = _hostile_fields(text, slurm)
    one = {name: {name: value} for name, value in hostile.items()}
    return one | {
        "name": {"name": text},
        "workdir": {"workdir": f"/w{text}"},
        "folder": {"folder": f"/w{text}"},
        "virtual_environment": {"virtual_environment": text},
        "modules": {"modules": (text,)},
        "array": {"array": text},
        "memory": {"memory": text},
        "time_limit": {"time_limit": text},
        "limit": {"preflight_limits": {"tmp_disk_gib": text}},
        "limit's name": {"preflight_limits": {text: "1"}},
        "variable's name": {"environment": {text: "1"}},
        "option's name": {"sbatch": {text: "1"}},
        "container's kind": {"container": Container(text, "x")},
        "image": {"container": Container("pyxis", text)},
        "mount": {"container": Container("pyxis", "x", (text,))},
        "case's folder": {"cases": (Case(f"/w{text}", ()),)},
        "case's arguments": {"cases": (Case("/w", (text,)),)},
    }


@pytest.mark.parametrize("kind", REFUSED_EVERYWHERE)
def test_line_breaks_and_control_characters_are_refused_in_every_field(kind, tmp_path, slurm):
    for place, fields in _places(REFUSED_EVERYWHERE[kind], slurm).items():
        with pytest.raises(ValueError) as refusal:
            _job(tmp_path, slurm, **fields)
        assert len(str(refusal.value).splitlines()) == 1, place


@pytest.mark.parametrize("kind", HOSTILE)
def test_names_that_are_not_data_are_refused(kind, tmp_path, slurm):
    """Names of variables, options and modules, and what has a form of its own."""
    if HOSTILE[kind] == "RANK":
        return  # a name like any other
    places = _places(HOSTILE[kind], slurm)
    for place in (
        "variable's name", "option's name", "modules", "array", "memory", "time_limit",
        "container's kind", "limit", "limit's name",
    ):  # fmt: skip
        with pytest.raises(ValueError) as refusal:
            _job(tmp_path, slurm, **places[place])
        assert len(str(refusal.value).splitlines()) == 1, place


@pytest.mark.parametrize(
    "kind", [kind for kind in HOSTILE if not set(HOSTILE[kind]) & set("\\\\%")]
)
def test_all_that_a_job_does_about_its_nodes_takes_any_path(kind, tmp_path):
    """A pre-flight that finds a node bad, ranks that hang, and starting again."""
    place = tmp_path / f"work{HOSTILE[kind]}"
    place.mkdir()
    (tmp_path / "slurm").mkdir()
    slurm = FakeSlurm(tmp_path / "slurm", python=BAD_N1, squeue="echo RUNNING", sleep=":")
    spec = _job(
        place, slurm, name=f"x{HOSTILE[kind]}", command=("bash", "-c", "exit 5"), preflight=True,
        spare_nodes=1, requeue=True, hang_seconds=600, virtual_environment="/venv",
    )  # fmt: skip
    done = slurm.run(sbatch_script(spec))
    assert done.returncode == 5, done.stderr
    run = place / "run"
    assert '"left_out": "n1"' in (run / "attempts/70000.0.start.json").read_text()
    assert (run / "preflight/excluded").read_text() == "n1\n"
    assert (run / "attempts/70000.failures").read_text() == "1 none\n"
    assert not list(tmp_path.rglob(CANARY))


# Names that are none are left out, whatever the judge writes.
BAD_N1 = f"""[ "$3" = judge ] || exit 0
printf 'n0\\n' >"${{4%.jsonl}}.nodes"
printf 'n1\\n$(touch {CANARY})\\n"; touch {CANARY}; "\\n-n2,\\n' >"${{4%.jsonl}}.bad\""""


def test_the_stand_ins_would_show_an_injection(tmp_path, slurm):
    """The table above can fail: an unquoted value does leave the canary."""
    script = sbatch_script(_job(tmp_path, slurm, command=(str(slurm.dump), "PLACE")))
    slurm.run(script.replace("PLACE", HOSTILE["command substitution"]))
    assert list(tmp_path.rglob(CANARY))
