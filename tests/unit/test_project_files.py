"""What the files at the top say of each other: one version, one set of linters."""

import re
import tomllib

import pytest
import yaml

from megatron_mone.common.places import ROOT


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_version_is_one():
    version = tomllib.loads(text("pyproject.toml"))["project"]["version"]
    released = re.findall(r"(?m)^## \[(\d\S+)\] - (\S+)$", text("CHANGELOG.md"))[0]
    citation = yaml.safe_load(text("CITATION.cff"))
    assert released == (version, citation["date-released"])
    assert citation["version"] == version


def test_hooks_before_a_commit_are_those_of_make_lint():
    (hooks,) = (repo["hooks"] for repo in yaml.safe_load(text(".pre-commit-config.yaml"))["repos"])
    (lint,) = re.findall(r"(?m)^lint: setup\n\t@(.+)$", text("Makefile"))
    assert " && ".join(hook["entry"] for hook in hooks) == lint.replace("$(PY)", ".venv/bin/python")


@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda p: p.stem)
def test_what_github_would_leave_out_in_silence_can_be_read(path):
    read = yaml.safe_load(path.read_text(encoding="utf-8"))
    if path.parent.name == "workflows":
        (job,) = read["jobs"].values()
        assert job["steps"][-1]["run"] == ".ci/run"
        assert "secrets" not in text(str(path))  # a fork has none
    else:
        assert {"name", "description", "body"} <= set(read)
        assert all(part["attributes"]["label"] for part in read["body"])
