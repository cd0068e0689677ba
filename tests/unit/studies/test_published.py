"""The published studies: every number of a page is of the JSON beside it."""

import re
from pathlib import Path

import pytest

from megatron_mone.common.places import ROOT
from megatron_mone.studies.catalogue import MODULES, study_of
from megatron_mone.studies.command import PAGE, RESULTS
from megatron_mone.studies.document import StudyResults
from megatron_mone.studies.page import study_page
from megatron_mone.studies.published import README, with_claims

PUBLISHED = sorted((ROOT / "docs" / "studies").glob("*/" + RESULTS))
_PICTURE = re.compile(r'src="data:[^"]*"')


@pytest.mark.parametrize("file", PUBLISHED, ids=lambda file: file.parent.name)
def test_a_published_page_is_made_of_its_numbers(file: Path, tmp_path):
    """The page that is made of the JSON now is the page that is published, but for its pictures'
    bytes, which are another library's."""
    results = StudyResults.read(file, "publish it again")
    page = study_page(study_of(results.study), results, tmp_path)
    published = (file.parent / PAGE).read_text(encoding="utf-8")
    assert _PICTURE.sub("", published) == _PICTURE.sub("", page)


@pytest.mark.parametrize("file", PUBLISHED, ids=lambda file: file.parent.name)
def test_a_study_is_published_with_three_seeds_or_more(file: Path):
    results = StudyResults.read(file, "publish it")
    assert results.preset == "cpu"
    for cell in results.cells:
        assert len({run.seed for run in cell.runs}) >= 3


def test_every_study_is_published():
    assert {file.parent.name for file in PUBLISHED} == {*MODULES}


def test_the_readmes_table_is_of_the_published_numbers():
    """After a change of either: python -m megatron_mone.commands.publish_studies."""
    text = README.read_text(encoding="utf-8")
    assert with_claims(text) == text
    assert "| claim or question |" in text
