"""Sequences laid out otherwise: documents packed behind one another, and every kind of context
parallelism. One rank and every layout give the same numbers, keep-all MoNE those of stock.
"""

from pathlib import Path

import numpy
import pytest
import torch

from megatron_mone.moe.masks.trace import mask_file
from tests.parity.conftest import note
from tests.parity.layouts import EP2, MOCK, PLAIN, PP2, TP2, TRAIN
from tests.parity.test_training_layouts import LOSSES, TOLERANCE, worst_error, worst_tensor_error
from tests.training_cases import MONE, TINY, Case, recorded, run_cases, scalars

pytestmark = pytest.mark.slow

PACKED = ("--dataloader-inter-document-masking", "--split", "100,0,0",
          "--tokenizer-type", "NullTokenizer", *MOCK[3:])  # fmt: skip
ONE_A_TIME = ("--micro-batch-size", "1")
BY_SEQUENCE = ("--moe-router-load-balancing-type", "seq_aux_loss")
MTP = ("--mtp-num-layers", "1")
HYBRID = ("--hybrid-layer-pattern", "M*E", "--mamba-state-dim", "16", "--mamba-head-dim", "16",
          "--mamba-num-groups", "2")  # fmt: skip
KEEP = ("--mone-neuron-ratio", "1.0", "--mone-ng-loss-coeff", "0", "--mone-backend", "reference")
# What is packed, and the layouts that its one-rank run is compared with.
VARIANTS: dict[str, tuple[tuple[str, ...], dict[str, tuple[int, tuple[str, ...]]]]] = {
    "packed": ((), {"EP2": (2, EP2), "DP2": (2, ())}),
    "packed, one sample": (ONE_A_TIME, {"TP2": (2, TP2), "PP2": (2, PP2)}),
    "packed, loss by sequence": (BY_SEQUENCE, {"EP2": (2, EP2)}),
    "packed, MTP": (MTP, {"EP2": (2, EP2)}),
    "packed, hybrid": (HYBRID, {"EP2": (2, EP2)}),
}
KINDS = {
    "CP2 a2a": (2, ("--context-parallel-size", "2", "--cp-comm-type", "a2a")),
    "CP2 all_gather": (2, ("--context-parallel-size", "2", "--cp-comm-type", "all_gather")),
    "CP4 a2a+p2p": (4, ("--context-parallel-size", "4", "--cp-comm-type", "a2a+p2p",
                        "--hierarchical-context-parallel-sizes", "2", "2")),
}  # fmt: skip


def write_documents(prefix: Path) -> None:
    """400 documents of 3 to 24 tokens, so that every sample of 32 packs some."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    draw = numpy.random.default_rng(3)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.uint16)
    for length in draw.integers(3, 25, size=400):
        builder.add_document(torch.tensor(draw.integers(0, 127, size=int(length))), [int(length)])
    builder.finalize(f"{prefix}.idx")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sequences")
    write_documents(folder / "documents")
    data = ("--data-path", f"{folder}/documents", *PACKED, "--adam-eps", "1e-3")
    ours, stock = (*TINY, *MONE, *data), (*TINY, *data, "--clip-grad", "0")
    cases: dict[int, list[Case]] = {1: [], 2: [], 4: []}

    def add(ranks, name, start, *words):
        load = ("--load", f"{folder}/start {start}", "--finetune", "--train-iters", "3")
        cases[ranks].append(Case(name, (*words, *load), tensors=True))

    def one_rank(name, *words):
        save = ("--train-iters", "1", "--save", f"{folder}/start {name}", "--save-interval", "1")
        cases[1].append(Case(f"start run {name}", (*words, *save, PLAIN)))
        add(1, name, name, *words, "--mone-record-masks", f"{folder}/{name} masks")

    for name, (flags, layouts) in VARIANTS.items():
        one_rank(name, *ours, *flags)
        for layout, (ranks, its) in layouts.items():
            masks = ("--mone-record-masks", f"{folder}/{name}, {layout} masks")
            add(ranks, f"{name}, {layout}", name, *ours, *flags, *its, *masks)
    plain = [word for word in ours if word != "--dataloader-inter-document-masking"]
    add(1, "unmasked", "packed", *plain)
    add(2, "stock", "packed", *stock, *EP2)
    add(2, "keep-all", "packed", *stock, *KEEP, *EP2)
    one_rank("sequence", *TRAIN)
    for name, (ranks, its) in KINDS.items():
        add(ranks, name, "sequence", *TRAIN, *its)
    for ranks, of_rank_count in cases.items():
        run_cases(of_rank_count, ranks, folder)
    return folder


LAYOUTS = [
    *((name, f"{name}, {layout}") for name, (_, its) in VARIANTS.items() for layout in its),
    *(("sequence", name) for name in KINDS),
]


@pytest.mark.parametrize(("variant", "name"), LAYOUTS)
def test_same_numbers_as_one_rank(runs, variant, name):
    wanted, got = recorded(runs / variant), recorded(runs / name)
    assert len(wanted["lm loss"]) == 3
    metrics = [tag for tag in wanted if tag.startswith("mone/") and "tflops" not in tag]
    errors = {
        "loss": max(worst_error(wanted.get(tag, {}), got.get(tag, {})) for tag in LOSSES),
        "metrics": max(worst_error(wanted[tag], got[tag]) for tag in metrics),
    }
    for column in ("gradients", "parameters"):
        files = [runs / run / f"{column}.pt" for run in (variant, name)]
        errors[column] = worst_tensor_error(*files)
    for column, error in errors.items():
        note(name, column, error)
    assert max(errors.values()) <= TOLERANCE, errors


@pytest.mark.parametrize(
    ("variant", "name"), [pair for pair in LAYOUTS if pair[0].startswith("packed")]
)
def test_masks_are_recorded_by_token(runs, variant, name):
    layer = 3 if variant == "packed, hybrid" else 1
    one, other = (mask_file(runs / f"{run} masks", 1, layer) for run in (variant, name))
    assert one.read_bytes() == other.read_bytes()


def test_keep_all_is_stock(runs):
    assert len(scalars(runs / "stock", "lm loss")) == 3
    assert scalars(runs / "keep-all", "lm loss") == scalars(runs / "stock", "lm loss")
    for file in ("gradients.pt", "parameters.pt"):
        assert worst_tensor_error(runs / "stock" / file, runs / "keep-all" / file) == 0.0
    note("packed, EP2", "keep-all = stock", 0.0)


def test_documents_know_nothing_of_each_other(runs):
    """Which changes the losses, and a sample at a time does not."""
    packed, alone, mixed = (
        scalars(runs / name, "lm loss")[1] for name in ("packed", "packed, one sample", "unmasked")
    )
    assert alone == pytest.approx(packed, rel=TOLERANCE)
    assert abs(mixed - packed) > 1e-3
