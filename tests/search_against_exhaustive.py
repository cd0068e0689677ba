"""The best layout that a search finds against the best there is, every layout planned.

    python -m tests.search_against_exhaustive [--pairs 2 5] [--allow precision,offload] [--out DIR]

Pairs of a small model on some GPUs are drawn from a fixed seed. All layouts of the search's own
axes are priced from composed traces, without Megatron's word on each; the fastest that fits and
that Megatron does not refuse is the best there is. More recomputation is priced where a layout does
not fit for what it keeps for backward: it adds operators and takes none away, so that elsewhere it
is never faster. So is offloading of activations. With --allow every layout is priced in every state
allowed, the optimizer on the host too, where a search leaves that out of layouts that fit. Prints a
table; exit status 1 where a search ends more than 3% above the best. Rows and traces are kept in
--out, so that a run that was stopped goes on.
"""

import argparse
import hashlib
import json
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from megatron_mone.common.files import write_json
from megatron_mone.common.places import CONFIG_ROOT, PACKAGE
from megatron_mone.common.progress import progress_bar
from megatron_mone.planning.bounds import Bounds
from megatron_mone.planning.composed import Composer, Unit, scaled_traces
from megatron_mone.planning.cost.efficiency import efficiency_of
from megatron_mone.planning.cost.hardware import load_cluster
from megatron_mone.planning.cost.prediction import Prediction, predict
from megatron_mone.planning.job import ON_HOST, JobSpec, job_spec, short_layout
from megatron_mone.planning.layout_axes import Pipeline, Shards, all_shards, all_stages, sized
from megatron_mone.planning.layout_model import Model, unit_of
from megatron_mone.planning.planner import Planner
from megatron_mone.planning.question import BEST, LIMIT
from megatron_mone.planning.search import LowerBounds, prepared, search
from megatron_mone.planning.stage_split import split_stages
from megatron_mone.planning.tracing.trace_cache import TraceCache
from megatron_mone.planning.tracing.trace_server import Tracer

SEED, PAIRS = 21, 20
WORST = 1.03  # the search's step over the best one
KINDS = ((4, 8192), (0, 4096), (4, 4096), (0, 16384), (0, 2048))
"""Experts and sequence length of each model, which is asked about on several clusters."""
CLUSTERS = ("a100-hdr", "h100-ndr", "h200-ndr", "b200-ndr", "gb200-nvl72", "mi300x-ndr")


@dataclass(frozen=True)
class Pair:
    """One question: a model on so many GPUs of a cluster."""

    job: JobSpec
    words: str
    gpus: int
    cluster: str


@dataclass(frozen=True)
class Row:
    """What came of it: seconds of a step, infinite where nothing fits."""

    pair: str
    layouts: int
    best: float
    best_layout: str
    found: float
    found_layout: str
    planned: int
    exhaustive_seconds: float
    search_seconds: float

    @property
    def ratio(self) -> float:
        """Of the search's step to the best one; 1 where neither has any."""
        return 1.0 if self.found == self.best else self.found / self.best

    @property
    def text(self) -> str:
        """A row of Markdown."""
        return (
            f"| {self.pair} | {self.layouts:,} | {self.best:.3f} | {self.best_layout} "
            f"| {self.found:.3f} | {self.ratio:.4f} | {self.planned} "
            f"| {self.exhaustive_seconds:.0f} | {self.search_seconds:.0f} |"
        )


HEAD = (
    "| pair | layouts | best, s a step | layout | found, s a step | ratio | planned "
    "| CPU s, all | CPU s, search |\n"
    "| --- | --: | --: | --- | --: | --: | --: | --: | --: |"
)


def drawn_pairs() -> Iterator[Pair]:
    """The same ones in every run."""
    draw = random.Random(SEED)
    models = [_drawn_model(draw, *kind) for kind in KINDS]
    each = PAIRS // len(models)
    places = [draw.sample(list(product((8, 16), CLUSTERS)), each) for _ in models]
    for round_ in range(each):
        for (job, words), of_model in zip(models, places, strict=True):
            gpus, cluster = of_model[round_]
            yield Pair(job, f"{words}; {gpus} x {cluster}", gpus, cluster)


def _drawn_model(draw: random.Random, experts: int, length: int) -> tuple[JobSpec, str]:
    hidden, layers = draw.choice((6144, 8192, 10240)), draw.choice((8, 10, 12, 15, 18))
    heads = hidden // 128
    model: dict[str, Any] = {
        "num_layers": layers, "hidden_size": hidden, "num_attention_heads": heads,
        "ffn_hidden_size": draw.choice((3, 4)) * hidden, "group_query_attention": True,
        "num_query_groups": 8, "swiglu": True, "add_bias_linear": False,
        "normalization": "RMSNorm", "position_embedding_type": "rope", "attention_dropout": 0.0,
        "hidden_dropout": 0.0, "max_position_embeddings": 32768, "vocab_size": 32000,
        "untie_embeddings_and_output_weights": draw.random() < 0.7,
    }  # fmt: skip
    if experts:
        model |= {
            "num_experts": experts, "moe_router_topk": 2,
            "moe_ffn_hidden_size": draw.choice((1, 2, 3)) * hidden,
            "moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.01,
        }  # fmt: skip
        if draw.random() < 0.5:
            model["moe_layer_freq"] = f"([0]*1+[1]*{layers - 1})"
    plain = job_spec("moe-30b-a3b")
    batch = draw.choice((32, 64))
    train = {**plain.train, "seq_length": length, "global_batch_size": batch}
    words = f"{layers} layers of {hidden}, {experts or 'no'} experts, {batch} x {length}"
    return JobSpec("drawn", model, {}, plain.cluster, train), words


@dataclass
class Priced:
    """Every layout of a pair, by what the planner would say of it."""

    planner: Planner
    model: Model
    bounds: LowerBounds
    composer: Composer
    allowed: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._units: dict[Shards, Unit | None] = {}

    def all(self) -> Iterator[tuple[Shards, Pipeline, Prediction]]:
        """All layouts but those whose sharding Megatron refuses."""
        model, states = self.model, self.bounds.axes(self.allowed).states
        for plain in all_shards(model.facts, model.gpus, self.planner.cluster.domain.devices):
            for pp, vpp in all_stages(plain, model.facts, model.gpus):
                for pipeline in self.bounds.pipelines(plain, pp, vpp):
                    for state in states:
                        yield from self._with_less(replace(plain, state=state), pipeline)

    def _with_less(
        self, plain: Shards, pipeline: Pipeline
    ) -> Iterator[tuple[Shards, Pipeline, Prediction]]:
        """A layout, and those that keep less for backward where it does not fit for that."""
        priced = self.price(plain, pipeline)
        if priced is None:
            return
        yield plain, pipeline, priced
        if priced.fits or self._is_full_of_state(priced):
            return
        axes = self.bounds.axes(self.allowed)
        smaller = [replace(plain, recompute=recompute) for recompute in axes.recomputes[1:]]
        smaller += [replace(plain, offload=offload) for offload in axes.offloads[1:]]
        for shards in smaller:
            again = self.price(shards, pipeline)
            if again is not None:
                yield shards, pipeline, again

    def _is_full_of_state(self, one: Prediction) -> bool:
        """Whether what stays from step to step passes the device: recomputation is of no use."""
        held = max(m.weights + m.gradients + m.optimizer + m.context for m in one.memory_P)
        return held > self.planner.cluster.device.memory_bytes

    def price(self, shards: Shards, pipeline: Pipeline) -> Prediction | None:
        """Of one layout; None where Megatron refuses its sharding."""
        model, planner = self.model, self.planner
        if shards not in self._units:
            try:
                self._units[shards] = unit_of(self.composer, model, shards)
            except ValueError:
                self._units[shards] = None
        unit = self._units[shards]
        if unit is None:
            return None
        on_host = shards.state == ON_HOST or model.facts.overlap_host_copies
        facts = sized(model.facts, shards, pipeline, model.gpus)
        facts = replace(facts, overlap_host_copies=on_host)
        stages = split_stages(pipeline.split, model.kinds, model.mtp)
        known = {key: unit.trace(key, model.gpus, pipeline.pp) for key in {s.key for s in stages}}
        places = {(s % pipeline.pp, s // pipeline.pp): one.key for s, one in enumerate(stages)}
        traces = {place: known[key] for place, key in places.items()}
        traces = scaled_traces(traces, unit.facts, model.gpus // pipeline.pp)
        return predict(traces, facts, planner.cluster, planner.efficiency)

    def job(self, shards: Shards, pipeline: Pipeline) -> JobSpec:
        """As a user would state it."""
        fields = {**shards.fields, **pipeline.fields(self.model.mtp)}
        return self.model.job.with_layout(fields)

    def best(self, fitting: list[tuple[float, Shards, Pipeline]]) -> tuple[float, str]:
        """The fastest that Megatron takes; its price must be the planner's own."""
        for seconds, shards, pipeline in sorted(fitting):
            job = self.job(shards, pipeline)
            try:
                planned = self.composer.plan(job, self.model.gpus).prediction.seconds
            except ValueError:
                continue
            assert abs(planned / seconds - 1) < 1e-6, (short_layout(job.values()), planned, seconds)
            return planned, short_layout(job.values())
        return float("inf"), "none fits"


def compared(pair: Pair, cache: TraceCache, limit: int, allowed: tuple[str, ...], say: Any) -> Row:
    """One pair: all layouts, then the search, both with the axes allowed."""
    cluster = load_cluster(pair.cluster)
    with Tracer(cache) as tracer:
        planner = Planner(tracer, cluster, efficiency_of(cluster.name))
        began = time.process_time()
        priced = Priced(planner, *prepared(planner, pair.job, pair.gpus), allowed)
        assert isinstance(priced.bounds, Bounds)
        fitting, count = [], 0
        for shards, pipeline, one in priced.all():
            count += 1
            say(count, None, f"{pair.words}: layouts")
            if one.fits:
                fitting.append((one.seconds, shards, pipeline))
        best, layout = priced.best(fitting)
        middle = time.process_time()
        found = search(planner, pair.job, pair.gpus, limit, BEST, lambda done, most, name: say(
            done, most, f"{pair.words}: search"), allowed)  # fmt: skip
        seconds, name = float("inf"), "none fits"
        for one in found.fitting[:1]:
            # From composed traces, as all the others; a search plans its best from whole ones.
            seconds = priced.composer.plan(one.planned.job, pair.gpus).prediction.seconds
            name = one.layout
        return Row(
            pair.words, count, best, layout, seconds, name, len(found.candidates),
            middle - began, time.process_time() - middle,
        )  # fmt: skip


def _digest(*asked: Any) -> str:
    """Of all that a row follows from."""
    found = hashlib.sha256(repr(asked).encode() + Path(__file__).read_bytes())
    for path in sorted((PACKAGE / "planning").rglob("*.py")) + sorted(
        (CONFIG_ROOT / "cluster").rglob("*.*")
    ):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def main() -> int:
    """All pairs, one after another; what `sys.exit` takes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, nargs="+", help="their numbers, from 1; all if none")
    parser.add_argument("--limit", type=int, default=LIMIT, help="of a search")
    parser.add_argument("--out", type=Path, default=Path("out/search-against-exhaustive"))
    parser.add_argument("--allow", default="", help="axes beside, by comma, as of a search")
    asked = parser.parse_args()
    allowed = tuple(name for name in asked.allow.split(",") if name)
    cache = TraceCache(asked.out / "traces")
    rows = []
    print(HEAD, flush=True)
    with progress_bar() as say:
        for number, pair in enumerate(drawn_pairs(), 1):
            if asked.pairs and number not in asked.pairs:
                continue
            path = asked.out / f"{_digest(pair, asked.limit, allowed)}.json"
            if not path.is_file():
                write_json(path, vars(compared(pair, cache, asked.limit, allowed, say)))
            rows.append(Row(**json.loads(path.read_text())))
            print(rows[-1].text, flush=True)
    worst = max(row.ratio for row in rows)
    print(f"\n{len(rows)} pairs, worst ratio {worst:.4f}, allowed {WORST}")
    return int(worst > WORST)


if __name__ == "__main__":
    sys.exit(main())
