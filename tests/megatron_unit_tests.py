"""Run Megatron-LM's own MoE unit tests on CPU ranks: with its layer, then with ours in its place.

    git clone -b core_r0.19.0 https://github.com/NVIDIA/Megatron-LM CHECKOUT
    python tools/megatron_unit_tests.py CHECKOUT [FILE ...] [--ranks 8] [--out out/unit-tests]

A test passes where it passes on every rank. Ours is a MoNELayer that keeps every neuron, with our
experts; both layers are built gated and without bias, which MoNE needs. The exit status is 0 when
ours passes every test that stock passes. The Megatron under test is the installed one; of the
checkout only the tests are used. Ranks print into OUT/KIND.log.
"""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from megatron_mone.common.command_line import OneLineParser, fail
from megatron_mone.common.files import write_json
from tests import forked_ranks

FOLDER = Path("tests/unit_tests/transformer/moe")
KINDS = ("stock", "mone")
SECONDS = 3600  # for all tests of one kind


def main() -> int:
    """Run both kinds, print the table, write OUT/results.json."""
    parser = OneLineParser(__doc__)
    parser.add_argument("checkout", type=Path, help="of Megatron-LM, at the installed version")
    parser.add_argument("files", nargs="*", help="of its MoE tests; all by default")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("out/unit-tests"))
    options = parser.parse_args()
    try:
        files = _files(options.checkout, options.files)
        options.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        return fail(error)
    results = {
        kind: _run(kind, options.checkout.resolve(), files, options.ranks, options.out.resolve())
        for kind in KINDS
    }
    return _report(results, options.out)


def _files(checkout: Path, files: list[str]) -> list[str]:
    """The names of the test files; all by default."""
    folder = checkout / FOLDER
    files = files or sorted(path.name for path in folder.glob("test_*.py"))
    absent = [name for name in files if not (folder / name).is_file()]
    if absent or not files:
        raise ValueError(f"{folder}: no {', '.join(absent) or 'test_*.py'} there: name a checkout")
    return files


def _run(
    kind: str, checkout: Path, files: list[str], ranks: int, out: Path
) -> dict[str, dict[str, Any]]:
    """{test: {outcome, layers, why}} over all ranks."""
    for old in out.glob(f"{kind}-*.jsonl"):
        old.unlink()
    log = out / f"{kind}.log"
    arguments = (kind, str(checkout), files, str(out))
    job = forked_ranks.start(ranks, run_rank, arguments, log)
    try:
        job.wait(SECONDS)
    except subprocess.TimeoutExpired:
        print(f"{kind}: not over after {SECONDS} s; what ran until then counts", file=sys.stderr)
    finally:
        job.kill()
    found: dict[str, list[dict[str, Any]]] = {}
    for path in out.glob(f"{kind}-*.jsonl"):
        for line in path.read_text().splitlines():
            one = json.loads(line)
            found.setdefault(one.pop("test"), []).append(one)
    return {test: _over_ranks(of_ranks, ranks) for test, of_ranks in found.items()}


def _over_ranks(of_ranks: list[dict[str, Any]], ranks: int) -> dict[str, Any]:
    outcomes = [one["outcome"] for one in of_ranks]
    outcome = "failed" if len(outcomes) < ranks or "failed" in outcomes else max(outcomes)
    why = next((one["why"] for one in of_ranks if one["outcome"] == "failed"), "")
    return {"outcome": outcome, "layers": max(one["layers"] for one in of_ranks), "why": why}


def _report(results: dict[str, dict[str, dict[str, Any]]], out: Path) -> int:
    stock, mone = (results[kind] for kind in KINDS)
    write_json(out / "results.json", results)
    missing = {"outcome": "did not run", "layers": 0, "why": ""}
    lost = [
        test for test, one in stock.items()
        if one["outcome"] == "passed" and mone.get(test, missing)["outcome"] != "passed"
    ]  # fmt: skip
    print("| file | tests | stock passes | MoNE passes | of these with a MoNE layer |")
    print("| --- | --: | --: | --: | --: |")
    by_file = Counter(test.partition("::")[0] for test in stock)
    for name in sorted(by_file):
        own = [test for test in stock if test.startswith(f"{name}::")]
        passed = [
            [t for t in own if r.get(t, missing)["outcome"] == "passed"] for r in results.values()
        ]
        layers = sum(mone[test]["layers"] > 0 for test in passed[1])
        print(
            f"| {Path(name).name} | {len(own)} | {len(passed[0])} | {len(passed[1])} | {layers} |"
        )
    for test in lost:
        print(f"passes with stock alone: {test}: {mone.get(test, missing)['why']}")
    return 1 if lost or not stock else 0


def run_rank(kind: str, checkout: str, files: list[str], out: str) -> None:
    """One rank: pytest over the files, outcomes into OUT/KIND-RANK.jsonl."""
    import os
    import types

    import pytest
    import torch

    import tests
    from megatron_mone import cpu_emulation

    cpu_emulation.install()
    tests.__path__.append(f"{checkout}/tests")  # Megatron's package has the name of ours
    torch.cuda.device_count = lambda: int(os.environ["WORLD_SIZE"])  # as ranks of a node have
    download: Any = types.ModuleType("download")  # the data of other tests, from the network
    download.download_and_extract_asset = lambda assets_dir: None
    sys.modules["tests.test_utils.python_scripts.download_unit_tests_dataset"] = download
    recorder = _Recorder(kind, Path(out, f"{kind}-{os.environ['RANK']}.jsonl"))
    os.chdir(checkout)
    paths = [str(FOLDER / name) for name in files]
    options = [
        "-q",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        checkout,
        "--tb",
        "line",
        "-W",
        "ignore",
    ]
    pytest.main([*paths, *options], plugins=[recorder])


class _Recorder:
    """A pytest plugin: puts the layers in place, and writes each test's outcome as it ends."""

    def __init__(self, kind: str, path: Path) -> None:
        from megatron.core.models.gpt import moe_module_specs
        from megatron.core.transformer.moe.moe_layer import MoELayer

        self.stock, self.path = MoELayer, path
        self.layer = _counted(MoELayer) if kind == "stock" else _keep_all()
        _make_gated()
        moe_module_specs.MoELayer = self.layer
        self.groups = _Groups()

    def pytest_collection(self) -> None:
        """Tests that skip themselves where there is no CUDA run on what stands for it."""
        import torch

        torch.cuda.is_available, self.is_available = lambda: True, torch.cuda.is_available

    def pytest_collection_finish(self) -> None:
        """CPU ranks have no CUDA device; the code under test may ask."""
        import torch

        torch.cuda.is_available = self.is_available

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Test modules hold the layer's class under its name."""
        for item in items:
            if getattr(item.module, "MoELayer", None) is self.stock:
                item.module.MoELayer = self.layer

    def pytest_runtest_setup(self) -> None:
        """A test begins."""
        self.layer.built = 0
        self.groups.used.clear()

    def pytest_runtest_logreport(self, report: Any) -> None:
        """A phase of a test has ended: the call, or one that kept it from running."""
        if report.when != "call" and report.outcome == "passed":
            return
        crash = getattr(report.longrepr, "reprcrash", None)
        why = " ".join(str(getattr(crash, "message", report.longrepr or "")).split())[:300]
        one = {
            "test": report.nodeid,
            "outcome": report.outcome,
            "layers": self.layer.built,
            "why": why,
        }
        with self.path.open("a") as file:
            file.write(json.dumps(one) + "\n")


class _Groups:
    """Process groups that serve again in the next test: a gloo group costs milliseconds to make.

    A group is that of an earlier test with the same ranks, type and place among its like.
    """

    def __init__(self) -> None:
        import torch

        self.new = torch.distributed.new_group
        self.destroy = torch.distributed.destroy_process_group
        self.kept: dict[tuple, Any] = {}
        self.used: Counter = Counter()
        torch.distributed.new_group = self.find
        torch.distributed.destroy_process_group = self.end

    def find(
        self, ranks: Any = None, timeout: Any = None, backend: Any = None, **others: Any
    ) -> Any:
        """As torch.distributed.new_group."""
        kind = (tuple(ranks) if ranks is not None else None, str(backend))
        key = (*kind, self.used[kind])
        self.used[kind] += 1
        if key not in self.kept:
            self.kept[key] = self.new(ranks, timeout, backend, **others)
        return self.kept[key]

    def end(self, group: Any = None) -> None:
        """As torch.distributed.destroy_process_group; a group lives as long as the job."""
        if group is None:
            self.kept.clear()
            self.destroy()


def _make_gated() -> None:
    """Models with experts: a neuron is a gate, an up and a down vector, for both kinds alike."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    check = TransformerConfig.__post_init__

    def gated(self: Any) -> None:
        if self.num_moe_experts is not None:
            self.gated_linear_unit, self.add_bias_linear = True, False
            self.bias_activation_fusion = False
        check(self)

    TransformerConfig.__post_init__ = gated


def _counted(stock: Any) -> Any:
    class CountedMoELayer(stock):
        built = 0

        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            type(self).built += 1

    return CountedMoELayer


def _keep_all() -> Any:
    from dataclasses import replace

    import torch

    from megatron_mone.config import attach_fields
    from megatron_mone.moe.experts import MoNEExperts
    from megatron_mone.moe.layer import MoNELayer

    names = {torch.nn.functional.silu: "silu", torch.nn.functional.gelu: "gelu"}

    class KeepAllLayer(MoNELayer):
        built = 0

        def __init__(
            self, config: Any, submodules: Any = None, *arguments: Any, **named: Any
        ) -> None:
            attach_fields(config, {
                "mone_neuron_ratio": 1.0, "mone_ng_loss_coeff": 0.0, "mone_backend": "reference",
                "mone_activation": names[config.activation_func],
            })  # fmt: skip
            super().__init__(config, replace(submodules, experts=MoNEExperts), *arguments, **named)
            type(self).built += 1

    return KeepAllLayer
