"""Text that a run held out, from data that is made up."""

import numpy as np
import pytest
import torch

from megatron_mone.studies.measuring.held_out import held_out


@pytest.fixture
def run(monkeypatch, tmp_path) -> dict:
    """Arguments of a run on 10 documents of 100 ids: 0 to 999."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix = tmp_path / "text"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for first in range(0, 1000, 100):
        builder.add_document(torch.arange(first, first + 100), [100])
    builder.finalize(f"{prefix}.idx")
    saved = {"data_path": [str(prefix)], "split": "80,20,0", "seq_length": 10}
    monkeypatch.setattr("megatron_mone.model.saved_model.saved_arguments", lambda folder: saved)
    return saved


def test_it_is_of_the_validation_documents_and_sets_share_no_window(run, tmp_path):
    one, other = (held_out(tmp_path, 4, part, 2) for part in (0, 1))
    assert one.shape == other.shape == (4, 11)
    for window in [*one, *other]:
        assert window.tolist() == list(range(window[0], window[0] + 11))
        assert window[0] % 10 == 0
    first = one[:, 0].tolist() + other[:, 0].tolist()
    assert len({*first}) == 8
    assert min(first) == 800
    assert max(first) == 980
    assert torch.equal(held_out(tmp_path, 4, 0, 2), one)


def test_what_cannot_be_held_out_is_told(run, tmp_path):
    with pytest.raises(ValueError, match="windows = 20: the validation part has 19 of 10 tokens"):
        held_out(tmp_path, 20)
    run["split"] = "100,0,0"
    with pytest.raises(ValueError, match="split = '100,0,0' holds out none of 10 documents"):
        held_out(tmp_path, 4)
    run["data_path"] = ["1", "a", "1", "b"]
    with pytest.raises(ValueError, match="of one data set"):
        held_out(tmp_path, 4)
