"""A mistake is one line, before training starts, that names the field or file, value and fix."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mone.model.arguments import parse_arguments, reading
from megatron_mone.model.config_builder import build_model_config
from tests.training_cases import MOCK, MONE, ROOT, TINY

pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small prepared dataset, its folder."""
    from megatron_mone.data.plan import PrepareConfig
    from megatron_mone.data.prepare import prepare

    folder = tmp_path_factory.mktemp("data")
    (folder / "a.txt").write_text("To be, or not to be, that is the question.\n" * 200)
    for name, tokenizer in (("bytes", "byte"), ("pieces", "bpe:300")):
        prepare(PrepareConfig((folder / "a.txt",), folder / name, tokenizer=tokenizer))
    return folder


def data_flags(data: Path, prefix: str = "bytes", tokenizer: str = "bytes") -> list[str]:
    return [
        *("--data-path", f"{data}/{prefix}_text_document", "--split", "90,10,0"),
        *("--tokenizer-type", "HuggingFaceTokenizer"),
        *("--tokenizer-model", f"{data}/{tokenizer}.tokenizer", "--num-workers", "0"),
    ]


def gap_in_masks(folder: Path) -> Path:
    """A mask folder with steps 2 and 4."""
    for step in (2, 4):
        (folder / f"step-{step:07d}").mkdir()
    return folder


def run_file(folder: Path, **parts) -> str:
    path = folder / "run.yaml"
    path.write_text(json.dumps(parts))
    return str(path)


def truncated(data: Path, folder: Path) -> list[str]:
    for end in ("_text_document.bin", "_text_document.idx", ".manifest.json"):
        shutil.copy(f"{data}/bytes{end}", folder / f"short{end}")
    with (folder / "short_text_document.bin").open("r+b") as file:
        file.truncate(100)
    return ["--data-path", f"{folder}/short_text_document", *data_flags(data)[2:]]


def listed(folder: Path, words: str) -> str:
    """A file for --data-args-path."""
    (folder / "list").write_text(words)
    return str(folder / "list")


def other_model(folder: Path) -> list[str]:
    """A checkpoint folder whose manifest says hidden_size 64."""
    from argparse import Namespace

    from megatron_mone.checkpoint.model_file import write_model_file

    write_model_file(folder, Namespace(num_layers=2, hidden_size=64))
    (folder / "latest_checkpointed_iteration.txt").write_text("3")
    return ["--load", str(folder)]


def checkpoints(folder: Path, tracker: str) -> Path:
    """Iterations 2, 4 and 6 as a save leaves them, small files in place of shards."""
    from megatron_mone.checkpoint.integrity import sum_files, write_sums

    names = ("__0_0.distcp", "__1_0.distcp", ".metadata", "metadata.json")
    for iteration in (2, 4, 6):
        part = folder / f"iter_{iteration:07d}"
        part.mkdir()
        for name in names:
            (part / name).write_bytes(name.encode() * (100 + iteration))
        (part / ".metadata").write_bytes(pickle.dumps({"a": iteration}))
        write_sums(part, sum_files(part, names))
    (folder / "latest_checkpointed_iteration.txt").write_text(tracker)
    return folder


def half_written(folder: Path) -> Path:
    checkpoints(folder, "6")
    for name in ("metadata.json", "integrity.json"):
        (folder / "iter_0000006" / name).unlink()
    return folder


def file_in_the_way(folder: Path) -> str:
    (folder / "file").write_text("")
    return str(folder / "file" / "save")


CASES = {
    "unknown YAML key": (
        lambda data, tmp: ["--config", run_file(tmp, model={"hiden_size": 32})],
        r"unknown key 'hiden_size' \(did you mean 'hidden_size'\?\)",
    ),
    "unknown part": (
        lambda data, tmp: ["--config", run_file(tmp, modle={})],
        r"unknown key 'modle' \(did you mean 'model'\?\)",
    ),
    "unknown choice": (
        lambda data, tmp: ["--config", run_file(tmp, model="demo-moan")],
        r"model = 'demo-moan' .* \(did you mean 'demo-mone'\?\)",
    ),
    "same key twice": (
        lambda data, tmp: ["--config", run_file(tmp, model={"lr": 1}, train={"lr": 2})],
        "'lr' is set by both model and train",
    ),
    "not a boolean": (
        lambda data, tmp: ["--config", run_file(tmp, model={"swiglu": 3})],
        "swiglu = 3 must be true or false",
    ),
    "no run file": (lambda data, tmp: ["--config", "none.yaml"], "none.yaml cannot be read"),
    "unknown flag": (
        lambda data, tmp: [*MOCK, "--mone-neuron-ration", "0.1"],
        r"--mone-neuron-ration 0.1 \(did you mean '--mone-neuron-ratio'\?\)",
    ),
    "warm-up as long as training": (
        lambda data, tmp: [*TINY, *MOCK, "--lr-decay-iters", "4", "--lr-warmup-iters", "4"],
        r"lr_warmup_iters = 4 must be fewer than lr_decay_iters = 4: lower it \(--lr-warmup",
    ),
    "S over F": (
        lambda data, tmp: [*TINY, *MOCK, "--mone-neurons-per-token", "49"],
        "mone_neurons_per_token = 49 .* 1 to moe_ffn_hidden_size = 48",
    ),
    "groups do not divide F": (
        lambda data, tmp: [*TINY, *MONE, *MOCK, "--mone-neuron-groups", "5"],
        "mone_neuron_groups = 5 .* divisor of moe_ffn_hidden_size = 48",
    ),
    "more experts a token than there are": (
        lambda data, tmp: [*TINY, *MOCK, "--moe-router-topk", "5"],
        "moe_router_topk = 5 .* num_experts = 4",
    ),
    "no data": (lambda data, tmp: TINY, "data_path is not set"),
    "missing data": (
        lambda data, tmp: [*TINY, *data_flags(data, prefix="none")],
        r"none_text_document\.(idx|bin)",
    ),
    "a blend in one string": (
        lambda data, tmp: [*TINY, "--data-path", "0.5 A 0.5 B", *data_flags(data)[2:]],
        r"data_path = '0.5 A 0.5 B': this is one word",
    ),
    "a dataset's .bin": (
        lambda data, tmp: [
            *(*TINY, "--data-path", f"{data}/bytes_text_document.bin", *data_flags(data)[2:]),
        ],
        r"data_path = .*: Megatron adds \.bin and \.idx itself: give .*/bytes_text_document$",
    ),
    "a broken dataset in a list": (
        lambda data, tmp: [
            *(*TINY, "--data-args-path", listed(tmp, "none"), *data_flags(data)[2:]),
        ],
        r"none\.idx: no such file",
    ),
    "no list of datasets": (
        lambda data, tmp: [*TINY, "--data-args-path", "none", *data_flags(data)[2:]],
        "data_args_path = 'none': no such file",
    ),
    "truncated .bin": (
        lambda data, tmp: [*TINY, *truncated(data, tmp)],
        r"short_text_document\.bin",
    ),
    "tokenizer of other data": (
        lambda data, tmp: [*TINY, *data_flags(data, "pieces", "bytes")],
        r"tokenizer",
    ),
    "no tokenizer": (
        lambda data, tmp: [*TINY, *data_flags(data, tokenizer="none")],
        "tokenizer_model = .*none.tokenizer' holds no tokenizer.json",
    ),
    "checkpoint of another shape": (
        lambda data, tmp: [*TINY, *MOCK, *other_model(tmp)],
        "holds a model with hidden_size = 64, this run has hidden_size = 32",
    ),
    "empty tracker file": (
        lambda data, tmp: [*TINY, *MOCK, "--load", str(checkpoints(tmp, ""))],
        r"latest_checkpointed_iteration\.txt holds '', not an iteration number: write 6 into it",
    ),
    "tracker of a missing iteration": (
        lambda data, tmp: [*TINY, *MOCK, "--load", str(checkpoints(tmp, "8"))],
        r"iter_0000008 is missing though latest_check.*iteration 6 in .* pass --ckpt-step 6",
    ),
    "--ckpt-step of a missing iteration": (
        lambda data, tmp: [*TINY, *MOCK, "--load", str(checkpoints(tmp, "6")), "--ckpt-step", "3"],
        r"iter_0000003 is missing though --ckpt-step names it: iteration 6 in .* pass --ckpt-step",
    ),
    "half-written checkpoint": (
        lambda data, tmp: [*TINY, *MOCK, "--load", str(half_written(tmp))],
        r"iter_0000006/metadata\.json is missing: iteration 4 in .* pass --ckpt-step 4",
    ),
    "async save on CPU ranks": (
        lambda data, tmp: [*TINY, *MOCK, "--async-save"],
        "async_save = True is not available on CPU ranks.*drop --async-save",
    ),
    "output folder not writable": (
        lambda data, tmp: [*TINY, *MOCK, "--save", file_in_the_way(tmp)],
        "save = .* is not writable",
    ),
    "DeepEP absent": (
        lambda data, tmp: [*TINY, *MONE, *MOCK, "--moe-token-dispatcher-type", "flex"],
        "moe_flex_dispatcher_backend = 'deepep' .*deep_ep, from https://github.com",
    ),
    "a backend that lacks the activation": (
        lambda data, tmp: [
            *(*TINY, *MONE, *MOCK, "--mone-backend", "cpu", "--mone-activation", "softmax"),
        ],
        "backend = 'cpu' cannot run here: activation = 'softmax' is not one of .*; use 'reference'",
    ),
    "no recorded masks": (
        lambda data, tmp: [*TINY, *MONE, *MOCK, "--mone-replay-masks", str(tmp)],
        "mone_replay_masks = .* holds no recorded steps: name the folder that mone_record_masks",
    ),
    "a recorded step is missing": (
        lambda data, tmp: [*TINY, *MONE, *MOCK, "--mone-replay-masks", str(gap_in_masks(tmp))],
        "mone_replay_masks = .* lacks step 3 between 2 and 4: record it again",
    ),
    "steps to record": (
        lambda data, tmp: [
            *(*TINY, *MONE, *MOCK, "--mone-record-masks", str(tmp)),
            *("--mone-record-mask-steps", "8-5"),
        ],
        "mone_record_mask_steps = '8-5' is not allowed: .* e.g. 5 or 5-8",
    ),
    "mask folder not writable": (
        lambda data, tmp: [*TINY, *MONE, *MOCK, "--mone-record-masks", file_in_the_way(tmp)],
        "mone_record_masks = .* is not writable",
    ),
    "Transformer Engine absent": (
        lambda data, tmp: [*TINY, *MOCK, "--transformer-impl", "transformer_engine"],
        r"transformer-engine: pip install 'megatron-mone\[te\]'",
    ),
    "Megatron's own refusal": (
        lambda data, tmp: [*TINY, *MOCK, "--global-batch-size", "7"],
        r"Megatron refuses the arguments: .*global_batch_size \(7\) must be divisible",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_one_line(name, data, tmp_path):
    from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator
    from megatron.training import global_vars

    flags, pattern = CASES[name]
    steps = ["--train-iters", "1"]
    try:
        with pytest.raises((ValueError, SystemExit)) as caught:
            build_model_config(parse_arguments([*flags(data, tmp_path), *steps]))
        message = " ".join(str(caught.value).split())
        print(f"| {name} | {message} |")
        assert re.search(pattern, message), message
    finally:
        global_vars.destroy_global_vars()
        destroy_num_microbatches_calculator()


def truncate(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(5)


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["__1_0.distcp", ".metadata", "metadata.json", "integrity.json"])
@pytest.mark.parametrize("harm", [truncate, flip_bit, Path.unlink])
def test_damaged_checkpoint(name, harm, tmp_path):
    """The file is named and the newest whole iteration before it is offered: 4 is damaged too."""
    from argparse import Namespace

    from megatron_mone.checkpoint.verify import verify_load

    load = checkpoints(tmp_path, "6")
    fields = {"load": str(load), "ckpt_step": None, "pretrained_checkpoint": None}
    args = Namespace(**fields, ckpt_format="torch_dist", ckpt_verify="checksums")
    verify_load(args)
    flip_bit(load / "iter_0000004" / "__0_0.distcp")
    harm(load / "iter_0000006" / name)
    if harm is Path.unlink and name == "integrity.json":
        return verify_load(args)  # a checkpoint without sums is loaded with no opinion
    with pytest.raises(ValueError) as caught:
        verify_load(args)
    message = str(caught.value)
    assert f"checkpoint file {load}/iter_0000006/{name} is " in message
    assert f"iteration 2 in {load} is whole: pass --ckpt-step 2" in message
    if name != ".metadata":
        args.ckpt_verify = "off"
        verify_load(args)


def test_metadata_that_would_run_code(tmp_path):
    """Whoever can write the file can write its sums, so it is looked at whatever they say."""
    from argparse import Namespace

    from megatron_mone.checkpoint.verify import verify_load

    class Runs:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    folder = checkpoints(tmp_path, "6") / "iter_0000006"
    (folder / ".metadata").write_bytes(pickle.dumps(Runs()))
    (folder / "integrity.json").unlink()
    fields = {"load": str(tmp_path), "ckpt_step": None, "pretrained_checkpoint": None}
    with pytest.raises(ValueError, match=r"\.metadata is not plain metadata \(it names"):
        verify_load(Namespace(**fields, ckpt_format="torch_dist", ckpt_verify="checksums"))
    assert not (tmp_path / "ran").exists()


def test_good_data_passes_every_check(data):
    """The table above would prove nothing if the unbroken run were refused too."""
    from megatron.training import arguments

    from megatron_mone.model.checks import check_run

    check_run(arguments.parse_args(reading([*TINY, *data_flags(data)])))


def test_exit_status_and_stderr():
    """As a user sees it: one line, exit status 2, no traceback."""
    done = subprocess.run(
        [sys.executable, "-m", "megatron_mone.pretrain", *TINY, *MOCK, "--mone-neuron-ratio", "2"],
        cwd=ROOT,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    lines = [x for x in done.stderr.splitlines() if x.startswith("megatron-mone: error:")]
    assert lines == [
        "megatron-mone: error: mone_neuron_ratio = 2.0 is not allowed: it must be 0 < ratio <= 1"
    ]
