"""The virtual stages of a pipeline: what each holds, which are alike, and a job to trace one in.

Virtual stage (p, v) of P pipeline stages with V chunks each is stage s = p + v P of a pipeline of
P V stages without interleaving, in a job of W V ranks: pipelines are the outermost dimension of
Megatron's ranks, so every group inside a stage stays what it was. `stage_flags` writes that job's
flags, `in_job` puts its trace back into the job that was asked for. Touches nothing.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from types import SimpleNamespace
from typing import Any

from megatron_mone.common.patch import Replaced
from megatron_mone.planning.tracing.trace import Collective, Trace

Place = tuple[int, int]
"""(p, v): 0-based pipeline stage and its chunk."""

KINDS = ("dense", "moe", "mone")
_LETTERS = {"M": "mamba", "*": "attention", "+": "latent attention", "-": "mlp"}
"""Of a hybrid pattern -> kind; E is of KINDS."""

# Flags of the stage's own job, or of interleaving, which it does not have. The order in which
# passes of two micro-batches interleave is not of one micro-batch's trace either, nor is who
# launches its kernels.
_REPLACED = (
    "pipeline_model_parallel_size", "pipeline_model_parallel_layout",
    "num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank",
    "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers",
    "account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split",
    "microbatch_group_size_per_vp_stage", "overlap_p2p_comm", "overlap_p2p_comm_warmup_flush",
    "overlap_moe_expert_parallel_comm", "delay_wgrad_compute",
    "ep_overlap_early_attn_memory_release", "overlap_dispatch_backward_with_experts_wgrad",
    "overlap_param_gather_with_optimizer_step", "cuda_graph_impl", "cuda_graph_modules",
    "cuda_graph_warmup_steps", "enable_cuda_graph", "external_cuda_graph",
)  # fmt: skip
# What says nothing about one step of one stage: how many steps and micro-batches there are, on
# which data, at which learning rate, and what is written down.
_IRRELEVANT = (
    "global_batch_size", "rampup_batch_size", "train_iters", "train_samples", "exit_interval",
    "exit_duration_in_mins", "lr", "min_lr", "lr_decay_style", "lr_decay_iters",
    "lr_decay_samples", "lr_warmup_fraction", "lr_warmup_iters", "lr_warmup_samples",
    "lr_warmup_init", "lr_wsd_decay_style", "lr_wsd_decay_iters", "lr_wsd_decay_samples",
    "seed", "data_path", "train_data_path", "valid_data_path", "test_data_path", "data_args_path",
    "per_split_data_args_path", "data_cache_path", "split", "mock_data", "num_workers",
    "eval_iters", "eval_interval", "save", "load", "save_interval", "log_interval",
    "log_throughput", "timing_log_level", "tensorboard_dir", "tensorboard_log_interval",
    "wandb_project", "wandb_exp_name", "wandb_save_dir", "wandb_entity", "mlflow_experiment",
    "mlflow_run_name", "mlflow_tracking_uri", "mone_profile_steps", "mone_profile_dir",
)  # fmt: skip
# What a job needs in place of those; no value of theirs is in a trace.
_FIXED = {"--mock-data": (), "--lr": ("1e-4",)}
# What may differ between layers of one kind by their number alone.
_BY_NUMBER = (
    "no_rope_freq", "window_size", "linear_attention_freq", "experimental_attention_variant",
    "first_last_layers_bf16", "heterogeneous_block_specs",
)  # fmt: skip
# Groups whose ranks are of several pipeline stages.
_THROUGH_STAGES = ("pp", "mp", "tp-ep-pp", "intra_distributed_optimizer_instance_group", "world")


@dataclass(frozen=True)
class VirtualStage:
    """What one chunk of one pipeline stage holds.

    Attributes:
        first_layer: number of its first decoder layer, 1-based; of the next one if it has none.
        kinds: of its decoder layers in order, of KINDS; of a hybrid model of _LETTERS too.
        embedding, head: whether it is the first, and the last, virtual stage.
        final_norm: whether it holds the decoder's last norm.
        mtp: multi-token-prediction layers.
        by_number: whether equal kinds may still differ by their number.
        letters: its part of hybrid_layer_pattern; None: of a GPT model.
    """

    first_layer: int
    kinds: tuple[str, ...]
    embedding: bool
    head: bool
    final_norm: bool
    mtp: int
    by_number: bool
    letters: str | None = None

    @property
    def key(self) -> str:
        """Text that is equal where traces of one job are, but for the numbers of their layers."""
        runs = [(kind, len(list(run))) for kind, run in groupby(self.kinds)]
        parts = [f"{kind}*{count}" for kind, count in runs] or ["no layer"]
        if self.by_number:
            parts.append(f"from layer {self.first_layer}")
        if self.embedding:
            parts.insert(0, "embedding")
        if self.final_norm:
            parts.append("norm")
        if self.mtp:
            parts.append(f"mtp*{self.mtp}")
        if self.head:
            parts.append("head")
        return ", ".join(parts)

    @property
    def layout(self) -> str:
        """The stage in the notation of --pipeline-model-parallel-layout."""
        decoder = f"t*{len(self.kinds)}" if self.kinds else ""
        return "E" * self.embedding + decoder + "m" * self.mtp + "L" * self.head


def virtual_stages(args: Namespace, config: Any) -> dict[Place, VirtualStage]:
    """All P x V virtual stages, in the order in which a micro-batch goes through them.

    Args:
        args: Megatron's, validated.
        config: the transformer config.

    Raises:
        ValueError: a model or an order of ranks that cannot be traced stage by stage, or a split
            into stages that Megatron refuses.
    """
    if args.use_tp_pp_dp_mapping:
        raise ValueError(
            "use_tp_pp_dp_mapping = True cannot be planned: its pipelines are not the outermost "
            "dimension of ranks; drop --use-tp-pp-dp-mapping"
        )
    stages, chunks = config.pipeline_model_parallel_size, _chunks(config)
    pattern = args.hybrid_layer_pattern
    kinds, by_number = _kinds(config, pattern), _is_by_number(config)
    found: dict[Place, VirtualStage] = {}
    layer = 0
    for place in ((p, v) for v in range(chunks) for p in range(stages)):
        try:
            first, count, mtp = _held(config, pattern, *place)
        except AssertionError as error:
            raise ValueError(f"Megatron refuses the pipeline's layers: {error}") from error
        assert first == layer or not count, (place, first, layer)
        head = place == (stages - 1, chunks - 1)
        # TransformerBlock.has_final_layernorm_in_this_stage
        ends = count > 0 and layer + count == config.num_layers
        found[place] = VirtualStage(
            first_layer=layer + 1,
            kinds=tuple(kinds[layer : layer + count]),
            embedding=place == (0, 0),
            head=head,
            final_norm=head if config.mtp_num_layers is None else ends,
            mtp=mtp,
            by_number=by_number,
            letters=None if pattern is None else _main(pattern).replace("|", "")[first:][:count],
        )
        layer += count
    assert layer == config.num_layers, (layer, config.num_layers)
    return found


def stage_flags(
    flags: Sequence[str], parser: ArgumentParser, stages: Mapping[Place, VirtualStage]
) -> tuple[str, ...]:
    """Flags of the job that has every virtual stage as a stage of its own, one form for all equal.

    Args:
        flags: of a job that Megatron accepts, a run file's written out.
        parser: that knows them.
        stages: of that job.
    """
    options = _by_destination(flags, parser)
    for name in (*_REPLACED, *_IRRELEVANT):
        options.pop(name, None)
    written: dict[str, tuple[str, ...]] = {**dict(options.values()), **_FIXED}
    if len(stages) > 1:
        written["--pipeline-model-parallel-size"] = (str(len(stages)),)
        letters = [stage.letters for stage in stages.values() if stage.letters is not None]
        if letters:
            written["--hybrid-layer-pattern"] = ("|".join(letters),)
        else:
            layout = "|".join(stage.layout for stage in stages.values())
            written["--pipeline-model-parallel-layout"] = (layout,)
    return tuple(word for name in sorted(written) for word in _words(name, written[name]))


def _words(name: str, values: tuple[str, ...]) -> tuple[str, ...]:
    """A flag and its values; with it a lone one that looks like a flag, as a pattern may."""
    if len(values) == 1 and values[0].startswith("-"):
        return (f"{name}={values[0]}",)
    return (name, *values)


def stage_job(world_size: int, p: int, v: int, stages: int, chunks: int) -> tuple[int, int]:
    """(W V, rank): the size of the job of `stage_flags`, and its first rank that holds (p, v).

    Args:
        world_size: W.
        p, v: the virtual stage.
        stages, chunks: P and V.
    """
    return world_size * chunks, (p + v * stages) * (world_size // stages)


def in_job(
    trace: Trace, place: Place, stages: int, chunks: int, world_size: int, layers_on: int = 0
) -> Trace:
    """A trace made in the job of `stage_flags`, as of the job that was asked for.

    Groups through the pipeline get back their ranks and the embeddings' group its stride. What a
    rank does once a step, whatever its chunks (norm of the gradients), is in each chunk's trace.

    Args:
        trace: of a virtual stage with the same key.
        place: (p, v).
        stages, chunks: P and V.
        world_size: W.
        layers_on: how many layers after those of the traced stage this one's are.
    """
    each = world_size // stages

    def group_of(one: Collective) -> Collective:
        if one.group in _THROUGH_STAGES:
            return replace(one, ranks=one.ranks // chunks)
        if one.group == "embedding":
            return replace(one, stride=(stages - 1) * each)
        return one

    return replace(
        trace,
        world_size=world_size,
        rank=place[0] * each,
        rows={layer + layers_on: rows for layer, rows in trace.rows.items()},
        collectives=tuple(group_of(one) for one in trace.collectives),
    )


def _chunks(config: Any) -> int:
    return config.virtual_pipeline_model_parallel_size or 1


def _main(pattern: str) -> str:
    """Of a hybrid pattern, the decoder's layers."""
    return pattern.partition("/")[0]


def _kinds(config: Any, pattern: str | None) -> list[str]:
    """Of every decoder layer."""
    from megatron_mone.config import layer_pattern

    if pattern is not None:
        letters = _main(pattern).replace("|", "")
        ours = getattr(config, "mone_enabled", False)
        chosen = layer_pattern(config) if ours else [1] * len(letters)
        return [_LETTERS.get(a, KINDS[kind]) for a, kind in zip(letters, chosen, strict=True)]
    if config.num_moe_experts is None:
        return [KINDS[0]] * config.num_layers
    if not getattr(config, "mone_enabled", False):
        config = SimpleNamespace(
            num_layers=config.num_layers, moe_layer_freq=config.moe_layer_freq,
            mone_layer_freq=[0] * config.num_layers,
        )  # fmt: skip
    return [KINDS[kind] for kind in layer_pattern(config)]


def _is_by_number(config: Any) -> bool:
    """Whether something is set that Megatron looks up by a layer's number."""
    is_listed = isinstance(config.cp_comm_type, list)
    return is_listed or any(getattr(config, name, None) for name in _BY_NUMBER)


def _held(config: Any, pattern: str | None, p: int, v: int) -> tuple[int, int, int]:
    """(first decoder layer from 0, how many, MTP layers), by Megatron's own functions."""
    if pattern is not None:
        return *_segment(config, _main(pattern), p, v), 0
    from megatron.core import parallel_state
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    chunks = config.virtual_pipeline_model_parallel_size
    vp_stage = None if chunks is None else v
    layout = config.pipeline_model_parallel_layout
    # A layout asks for the rank and the chunks of the running job, which there is none of.
    with (
        Replaced(parallel_state, "get_pipeline_model_parallel_rank", lambda: p),
        Replaced(parallel_state, "get_virtual_pipeline_model_parallel_world_size", lambda: chunks),
    ):
        count = get_num_layers_to_build(config, vp_stage, p)
        first = get_transformer_layer_offset(config, vp_stage, p)
        if layout is not None:
            return first, count, layout.get_num_layers_to_build(LayerType.mtp, vp_stage, p)
    is_last = (p, v) == (config.pipeline_model_parallel_size - 1, (chunks or 1) - 1)
    return first, count, (config.mtp_num_layers or 0) * is_last


def _segment(config: Any, pattern: str, p: int, v: int) -> tuple[int, int]:
    """(first layer from 0, how many) of a hybrid model's chunk."""
    import torch
    from megatron.core.models.hybrid import hybrid_layer_allocation as allocation

    group: Any = "pp"  # which is asked for nothing but these
    with (
        Replaced(torch.distributed, "get_rank", lambda _group=None: p),
        Replaced(torch.distributed, "get_world_size",
                 lambda _group=None: config.pipeline_model_parallel_size),
        Replaced(allocation, "log_on_each_pipeline_stage", lambda *_said, **_groups: None),
    ):  # fmt: skip
        letters, first = allocation.select_pipeline_segment(
            pattern, group, v if _chunks(config) > 1 else None,
            config.num_layers_in_first_pipeline_stage, config.num_layers_in_last_pipeline_stage,
        )  # fmt: skip
    return first, len(letters)


def _by_destination(
    flags: Sequence[str], parser: ArgumentParser
) -> dict[str, tuple[str, tuple[str, ...]]]:
    """{argument: (flag, its values)}; of a flag given twice, the last, as argparse reads them."""
    actions = {name: action for action in parser._actions for name in action.option_strings}
    found: dict[str, tuple[str, tuple[str, ...]]] = {}
    destination = ""
    for word in flags:
        name, equals, value = word.partition("=")
        if word.startswith("--"):
            action = actions[name]
            destination = action.dest
            found[destination] = (name, (value,) if equals else ())
        else:
            name, values = found[destination]
            found[destination] = (name, (*values, word))
    return found
