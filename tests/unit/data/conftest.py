"""Helpers of the data tests: run `prepare`, and read a dataset back the way training does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_mone.data.merge import OutputPaths
from megatron_mone.data.plan import PrepareConfig
from megatron_mone.data.prepare import prepare
from megatron_mone.data.tokenizers import Encoder, parse_spec, write_tokenizer

Documents = Callable[[Path], list[str]]


@pytest.fixture(scope="session")
def read_back() -> Documents:
    """The documents of a prepared prefix, decoded, without their end token (asserted)."""

    def read(prefix: Path) -> list[str]:
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        outputs = OutputPaths(prefix)
        encoder = Encoder(outputs.tokenizer)
        dataset = IndexedDataset(str(outputs.data))
        texts = []
        for index in range(len(dataset)):
            ids = dataset[index].tolist()
            assert ids[-1] == encoder.eod_id
            assert encoder.eod_id not in ids[:-1]
            texts.append(encoder.decode(ids[:-1]))
        return texts

    return read


@pytest.fixture(scope="session")
def run_prepare() -> Callable[..., Any]:
    """prepare(PrepareConfig(inputs, prefix, **options))."""

    def run(inputs: list[Path], prefix: Path, **options: Any) -> Any:
        return prepare(PrepareConfig(tuple(inputs), prefix, **options))

    return run


@pytest.fixture(scope="session")
def local_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Hugging Face folder: a BPE of 300 pieces."""
    folder = tmp_path_factory.mktemp("hf") / "tokenizer"
    write_tokenizer(parse_spec("bpe:300"), folder, iter(["the cat sat on the mat. " * 50]))
    return folder
