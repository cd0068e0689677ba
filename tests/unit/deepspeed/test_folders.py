"""A folder of DeepSpeed's is looked at before anything starts, and nothing in it is run."""

from pathlib import Path

import pytest
import torch

from megatron_mone.deepspeed.folders import _data_alone
from megatron_mone.deepspeed.settings import LATEST, UNIVERSAL, tag_of


def test_the_tag_is_named_by_the_folder(tmp_path):
    (tmp_path / "global_step3").mkdir()
    (tmp_path / LATEST).write_text("global_step3\n")
    assert tag_of(tmp_path) == ("global_step3", False)
    (tmp_path / UNIVERSAL).write_text("global_step3")
    assert tag_of(tmp_path) == ("global_step3", True)


@pytest.mark.parametrize("tag", ["", "global_step4", "../global_step3", "/etc"])
def test_a_tag_that_is_no_folder_there(tmp_path, tag):
    (tmp_path / "inside" / "global_step3").mkdir(parents=True)
    (tmp_path / "global_step3").mkdir()
    (tmp_path / "inside" / LATEST).write_text(tag)
    with pytest.raises(ValueError, match=r"latest names .*: write the name of one into it"):
        tag_of(tmp_path / "inside")


def test_another_folder(tmp_path):
    with pytest.raises(ValueError, match="holds no latest and no latest_universal"):
        tag_of(tmp_path)


class Bad:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.mkdir, (self.path,)


def test_no_pickle_is_run(tmp_path):
    path = tmp_path / "mp_rank_00_model_states.pt"
    torch.save({"module": Bad(tmp_path / "made")}, path)
    with _data_alone(), pytest.raises(Exception, match="Weights only load failed"):
        torch.load(path, weights_only=False)
    assert not (tmp_path / "made").exists()
    torch.load(path, weights_only=False)  # as DeepSpeed would
    assert (tmp_path / "made").exists()
