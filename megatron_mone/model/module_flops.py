"""Operations of one optimizer step on one rank, phase by phase, and the bytes its experts move.

Counted are the matrix products, two operations for a multiply-add; a product takes its forward
operations twice again in the backward pass. Norms, softmax, embedding, selection and the balance
loss have no products and count nothing. Conventions:
- `executed` is what the modules and the backend run, recompute included; `active` is what the
  model needs: kept neurons alone, nothing twice. num_floating_point_operations is neither.
- Core attention counts all s x s scores, in both: Megatron's local core attention computes them and
  masks half afterwards. Fused causal kernels skip most of that half, and the figure of Megatron
  halves it; what it executes cannot be seen from outside, and the full count is the same for all.
  Of packed documents `active` counts those of each document with itself, and so does `executed`
  where attention is Transformer Engine's; the local one computes those of a whole micro-batch.
- A product counts in the phase that its time falls in. `gate GEMM` is the product of W_gate that
  neurons are chosen by; the gate's gradients are made in one with up's, in `up/down GEMM`, and so
  is the whole gate of the reference backend. Projections of multi-token prediction are in `loss`.
- What is not known is left out rather than guessed: the attention phase of an experimental variant.
  A mask that is replayed (mone_replay_masks) saves the native backend part of the gate, which is
  not taken off.
`flop_counter.py` counts the same from what really ran. May touch: config, the backends' own rules.
Symbols as in docs/MODEL.md: E_l experts and F_l neurons of this rank, H hidden, N rows, S kept.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from megatron_mone.common.phases import (
    ATTENTION,
    DENSE_MLP,
    GATE_GEMM,
    LATENT,
    LOSS,
    MAMBA,
    PHASES,
    ROUTER,
    SHARED_EXPERTS,
    UP_DOWN_GEMM,
)
from megatron_mone.config import chosen_by_rule, expert_hidden, needs_all_gates
from megatron_mone.model.wrappers import unwrapped

Kind = Literal["dense", "moe", "mone", "attention", "mamba"]
WHOLE_LAYER = frozenset(("attention", "mlp", "moe", "mtp"))
"""What `repeats` holds where the whole layer is recomputed."""


@dataclass(frozen=True)
class LayerShare:
    """This rank's part of one layer in one step.

    Attributes:
        kind: dense MLP, stock experts, or experts that choose neurons; of hybrid models also
            attention or Mamba's mixer, and nothing beside.
        rows: routed rows that this rank's experts took, over all micro-batches.
        kept: neurons of this rank computed for those rows, summed; None: every one of them.
        repeats: what runs forward again in the backward pass: Megatron's recompute_modules
            (core_attn, mla_up_proj, mlp, moe, shared_experts), "attention" for all of it, "mtp".
        mtp: whether it is the layer of a multi-token-prediction block, behind a projection of 2 H.
        computed: rows that stock experts compute where they are padded (DeepSpeed's layer); None:
            `rows`.
        attends: whether attention stands before the MLP or the experts, as in GPT models.
        nested: whether what is repeated is so twice, in a checkpoint inside a checkpoint.
    """

    kind: Kind
    rows: float = 0
    kept: float | None = None
    repeats: frozenset[str] = frozenset()
    mtp: bool = False
    computed: float | None = None
    attends: bool = True
    nested: bool = False


@dataclass(frozen=True)
class RankShare:
    """What of a step is computed on one rank.

    Attributes:
        layers: of this rank's pipeline stage, over its virtual stages.
        output_uses: how often a micro-batch passes the output layer here: 1 and one for each
            multi-token-prediction depth, 0 on earlier stages.
        micro_batches: of a step.
        tokens: micro-batches x micro-batch size x sequence length / CP.
        sequence_length: whole, in tokens; of packed documents all samples of a micro-batch.
        tp, etp: ranks that a layer's, and an expert's, products are split over.
        vocabulary: padded, of all TP ranks.
        local_experts: E_l.
        attended: tokens of its own document that a query finds, on average; None: all.
    """

    layers: tuple[LayerShare, ...]
    output_uses: int
    micro_batches: int
    tokens: int
    sequence_length: int
    tp: int
    etp: int
    vocabulary: int
    local_experts: int
    attended: float | None = None


@dataclass(frozen=True)
class Work:
    """Operations, executed and active."""

    executed: float = 0.0
    active: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.executed + other.executed, self.active + other.active)


def module_flops(config: Any, share: RankShare) -> dict[str, dict[str, float]]:
    """{phase: {"executed", "active"}} of one optimizer step on one rank, phases with products only.

    Args:
        config: the transformer config; with mone_* fields for a MoNE model.
        share: this rank's part.
    """
    works: dict[str, Work] = defaultdict(Work)
    for layer in share.layers:
        found = _layer(config, share, layer)
        once = _layer(config, share, replace(layer, repeats=frozenset())) if layer.nested else {}
        for phase, work in found.items():
            works[phase] += work
            if phase in once and phase != LOSS:  # a projection before them is in the outer alone
                works[phase] += Work(work.executed - once[phase].executed)
    if share.output_uses:
        forward = 2.0 * share.tokens * config.hidden_size * share.vocabulary / share.tp
        works[LOSS] += _product(forward * share.output_uses)
    return {
        phase: {"executed": works[phase].executed, "active": works[phase].active}
        for phase in PHASES
        if phase in works
    }


def _product(forward: float, times_again: int = 0) -> Work:
    """Of products with `forward` operations: those, both gradients, and recomputed forwards."""
    return Work((3.0 + times_again) * forward, 3.0 * forward)


def _layer(config: Any, share: RankShare, layer: LayerShare) -> dict[str, Work]:
    hidden, tokens, again = config.hidden_size, share.tokens, layer.repeats
    works: dict[str, Work] = {}
    if layer.kind == "mamba":
        return {MAMBA: _mamba(config, share, again)}
    if layer.attends and getattr(config, "experimental_attention_variant", None) is None:
        works[ATTENTION] = _attention(config, share, again)
    if layer.mtp:
        forward = 2.0 * tokens * 2 * hidden * hidden / share.tp
        works[LOSS] = _product(forward, "mtp" in again)  # where GPTModel._postprocess runs it
    if layer.kind == "attention":
        return works
    if layer.kind == "dense":
        width = _matrices(config) * config.ffn_hidden_size
        works[DENSE_MLP] = _product(2.0 * tokens * hidden * width / share.tp, "mlp" in again)
        return works
    own = tokens / share.tp if config.sequence_parallel else tokens
    works[ROUTER] = _product(2.0 * own * hidden * config.num_moe_experts, "moe" in again)
    if config.moe_latent_size:  # down and up, of the tokens that this rank routes
        both = 2.0 * own * 2 * hidden * config.moe_latent_size
        works[LATENT] = _product(both, "moe" in again)
    if config.moe_shared_expert_intermediate_size:
        width = _matrices(config) * config.moe_shared_expert_intermediate_size
        forward = 2.0 * tokens * hidden * width / share.tp
        if config.moe_shared_expert_gate:
            forward += 2.0 * own * hidden
        # a checkpoint inside a checkpoint runs forward a third time
        works[SHARED_EXPERTS] = _product(forward, ("moe" in again) + ("shared_experts" in again))
    return works | expert_work(config, share, layer)


def _matrices(config: Any) -> int:
    return 3 if config.gated_linear_unit else 2


def _attention(config: Any, share: RankShare, again: frozenset[str]) -> Work:
    """Projections, and the products of the core with all keys, or those of its own document."""
    heads, hidden, whole = config.num_attention_heads, config.hidden_size, "attention" in again
    if config.multi_latent_attention:
        key, value = config.qk_head_dim + config.qk_pos_emb_head_dim, config.v_head_dim
        rank = config.q_lora_rank
        up = config.kv_lora_rank * heads * (config.qk_head_dim + value)
        down = hidden * (config.kv_lora_rank + config.qk_pos_emb_head_dim)
        up += (rank or 0) * heads * key
        down += hidden * (rank or heads * key)
    else:
        key = value = config.kv_channels
        queries = 2 * heads if config.attention_output_gate else heads
        up, down = 0, hidden * key * (queries + 2 * config.num_query_groups)
    scale = 2.0 * share.tokens / share.tp
    needed: float = share.sequence_length
    computed = needed
    if share.attended is not None:
        needed = share.attended
        computed = computed if config.transformer_impl == "local" else needed
    of_a_key, repeated = scale * heads * (key + value), whole or "core_attn" in again
    core = Work(
        _product(of_a_key * computed, repeated).executed, _product(of_a_key * needed).active
    )
    parts = (
        (down + heads * value * hidden, whole),
        (up, whole or "mla_up_proj" in again),
    )
    return sum((_product(scale * size, repeated) for size, repeated in parts), core)


MAMBA_CHUNK = 128
"""Positions that mamba-ssm's scan takes as one product: Megatron's MambaMixer asks for so many."""


def mamba_width(config: Any) -> tuple[int, int]:
    """(heads, channels of all of them) of a Mamba mixer, as Megatron's has them."""
    size = config.mamba_head_dim
    heads = config.mamba_num_heads or 2 * config.hidden_size // size
    return heads, heads * size


def _mamba(config: Any, share: RankShare, again: frozenset[str]) -> Work:
    """Projections, and the scan by chunks: scores of positions within one, their products with the
    inputs, and the states that chunks hand on. On CPU ranks the scan is one chunk, of scores for
    each head."""
    import torch

    heads, width = mamba_width(config)
    state, groups = config.mamba_state_dim, config.mamba_num_groups
    projections = config.hidden_size * (3 * width + 2 * groups * state + heads)
    chunk = min(MAMBA_CHUNK, share.sequence_length)
    needed = chunk * (groups * state + width) + 2 * width * state
    run = needed if torch.cuda.is_available() else share.sequence_length * (heads * state + width)
    scale, times = 2.0 * share.tokens / share.tp, "attention" in again
    executed, active = (_product(scale * (projections + scan), times) for scan in (run, needed))
    return Work(executed.executed, active.active)


def expert_work(config: Any, share: RankShare, layer: LayerShare) -> dict[str, Work]:
    """Routed experts of one layer: {phase: operations}.

    In units of 2 H, by entries of [N, F_l]: a stock expert takes 3 of all entries forward (2
    without a gated unit) and twice that backward; MoNE the gate of all and up and down of the kept,
    then 6 of the kept.
    """
    dense, kept = _entries(config, share, layer)
    unit, again = 2.0 * expert_hidden(config), int("moe" in layer.repeats)
    if layer.kind == "moe":
        needed = _product(unit * _matrices(config) * dense, again)
        if layer.computed is None:
            return {UP_DOWN_GEMM: needed}
        of_rows = needed.executed / max(1.0, layer.rows)
        return {UP_DOWN_GEMM: Work(of_rows * layer.computed, needed.active)}
    route = _route(config, share, layer)
    computed = kept if route.sparse else dense
    gates = dense * (1 + again * (route.mask_reader == GATE_GEMM))
    products = (2 + again * (2 if route.mask_reader == GATE_GEMM else 3) + 6) * computed
    if route.two_four:
        products -= (3 + again) * (dense - kept)
    # softmax, and a loss over all gates, have a gradient at every gate
    all_learn = config.mone_activation == "softmax" or needs_all_gates(config)
    gate = Work(unit * gates, unit * dense)
    rest = Work(unit * products, unit * (6.0 * kept + 2.0 * (dense if all_learn else kept)))
    return {UP_DOWN_GEMM: gate + rest} if route.one_gemm else {GATE_GEMM: gate, UP_DOWN_GEMM: rest}


def _entries(config: Any, share: RankShare, layer: LayerShare) -> tuple[float, float]:
    """(all, kept) neurons of this rank for the layer's rows."""
    dense = layer.rows * config.moe_ffn_hidden_size / share.etp
    return dense, dense if layer.kept is None else layer.kept


class _Route(NamedTuple):
    """How a backend computes a MoNE layer."""

    sparse: bool = False
    """Products at kept neurons alone, but for the gate that they are chosen by."""
    mask_reader: str = GATE_GEMM
    """Phase that computes the gate when a recompute brings the mask: the dense gate product, or
    one at kept neurons among up and down."""
    one_gemm: bool = False
    """Gate and up are one product."""
    two_four: bool = False
    """Of the dense products down and dx, the latter of two terms, skip what is not kept."""


def _route(config: Any, share: RankShare, layer: LayerShare) -> _Route:
    """By the rules of the backend that runs a mean micro-batch of training."""
    import torch

    from megatron_mone.kernels.cpu.route import computes_all
    from megatron_mone.kernels.registry import Call, choose_backend
    from megatron_mone.kernels.triton.segments import takes_segments

    dense, kept = _entries(config, share, layer)
    kept_share, neurons = kept / max(1.0, dense), config.moe_ffn_hidden_size // share.etp
    call = Call(
        device="cuda" if torch.cuda.is_available() else "cpu",
        dtype=config.params_dtype,
        activation=config.mone_activation,
        all_gates=needs_all_gates(config),
        by_rule=chosen_by_rule(config),
        block=config.mone_neuron_block,
        groups=config.mone_neuron_groups // share.etp or 1,
        rows=round(layer.rows / share.micro_batches),
        experts=share.local_experts,
        neurons=neurons,
        hidden=expert_hidden(config),
        kept_share=kept_share,
    )
    name = choose_backend(config.mone_backend, call).backend.name
    if name == "reference":
        return _Route(one_gemm=True)
    if name == "cpu":
        sparse = not computes_all(kept_share, config.params_dtype)
        return _Route(sparse, mask_reader=UP_DOWN_GEMM)
    if name == "sparse24":
        return _Route(two_four=True)
    if name == "triton":
        return _Route(takes_segments(call.block, round(kept_share * neurons)))
    return _Route()


def expert_bytes(config: Any, share: RankShare) -> dict[str, float]:
    """{phase: bytes} that the routed experts' products move at least, in a step on this rank.

    Each pass of a micro-batch reads the weights once (with enough rows every neuron is kept by
    one), rows come in and go out, and what the backward pass needs of the kept neurons is written
    and read: gate, up and index. A weight's gradient is written once a micro-batch. For the
    roofline: of the algorithm, whatever the backend.
    """
    moved: dict[str, float] = defaultdict(float)
    size = config.params_dtype.itemsize
    index = 2 if config.moe_ffn_hidden_size <= 32767 else 4
    weight = share.local_experts * config.moe_ffn_hidden_size / share.etp * expert_hidden(config)
    weight *= size * share.micro_batches
    for layer in share.layers:
        if not layer.rows:
            continue
        passes = 1 + ("moe" in layer.repeats) * (1 + layer.nested)
        rows = layer.rows * expert_hidden(config) * size
        _, kept = _entries(config, share, layer)
        if layer.kind == "mone":
            apart = UP_DOWN_GEMM if _route(config, share, layer).one_gemm else GATE_GEMM
            entry = kept * (size + index)
            moved[apart] += passes * (weight + rows + entry)
            forward = 2 * weight + 2 * rows + entry + kept * size
            backward = 6 * weight + 3 * rows + entry + kept * size
        else:
            matrices = _matrices(config)
            saved = (matrices - 1) * kept * size
            forward = matrices * weight + 2 * rows + saved
            backward = 2 * matrices * weight + 3 * rows + saved
        moved[UP_DOWN_GEMM] += passes * forward + backward
    return dict(moved)


def rank_share(
    args: Any,
    config: Any,
    model_chunks: Sequence[Any],
    *,
    micro_batches: int,
    rows: Mapping[int, float],
    kept: Mapping[int, float] | None = None,
    computed: Mapping[int, float] | None = None,
    document_tokens: float | None = None,
) -> RankShare:
    """This rank's part of a Megatron run's step.

    Args:
        args: Megatron's arguments, validated.
        config: the transformer config.
        model_chunks: of this rank, as setup_model_and_optimizer returns them.
        micro_batches: of a step, get_num_microbatches().
        rows: 1-based layer number, MTP layers after the decoder's -> routed rows that this rank's
            experts took in the step.
        kept: the same -> neurons of this rank kept for those rows; a layer that is missing keeps
            every one.
        computed: the same -> rows computed, of layers that pad them.
        document_tokens: of packed documents, tokens of its own document that a token finds on
            average, the sum of squares over the sum; None: samples are whole.
    """
    models = [unwrapped(chunk) for chunk in model_chunks]
    layers: list[LayerShare] = []
    for module, number, repeats, mtp, nested, uses in (
        found for m in models for found in _modules(config, m)
    ):
        of_kept = kept[number] / uses if kept is not None and number in kept else None
        layer = LayerShare(
            _kind(module), rows.get(number, 0) / uses, of_kept, repeats, mtp,
            (computed or {}).get(number), _attends(module), nested,
        )  # fmt: skip
        layers += [layer] * uses
    output = any(model.post_process for model in models)
    tokens = micro_batches * args.micro_batch_size * args.seq_length
    samples = 1 if document_tokens is None else args.micro_batch_size
    return RankShare(
        layers=tuple(layers),
        output_uses=1 + (config.mtp_num_layers or 0) if output else 0,
        micro_batches=micro_batches,
        tokens=tokens // config.context_parallel_size,
        sequence_length=samples * args.seq_length,
        attended=document_tokens,
        tp=config.tensor_model_parallel_size,
        etp=config.expert_tensor_parallel_size or config.tensor_model_parallel_size,
        vocabulary=args.padded_vocab_size,
        local_experts=(config.num_moe_experts or 0) // config.expert_model_parallel_size,
    )


def _modules(config: Any, model: Any) -> Iterator[tuple[Any, int, frozenset[str], bool, bool, int]]:
    """(layer, number, what is repeated, whether the first of a depth of MTP, whether it is repeated
    twice, uses) in a model chunk."""
    full, blocks = config.recompute_granularity == "full", config.recompute_method == "block"
    selective = config.recompute_granularity == "selective"
    selected = frozenset(config.recompute_modules or ()) if selective else frozenset()
    for place, layer in enumerate(model.decoder.layers):
        whole = full and (not blocks or place < config.recompute_num_layers)
        yield layer, layer.layer_number, WHOLE_LAYER if whole else selected, False, False, 1
    prediction = getattr(model, "mtp", None)
    for layer in () if prediction is None else prediction.layers:
        # Megatron skips these where recompute_method is "block", and says so in a warning
        repeats = WHOLE_LAYER if full and not blocks else selected
        # one module may stand for every depth
        uses = config.mtp_num_layers if config.mtp_use_repeated_layer else 1
        stack = getattr(layer.mtp_model_layer, "layers", None)  # of a hybrid model
        nested = stack is not None and repeats is WHOLE_LAYER
        for place, one in enumerate(stack or [layer.mtp_model_layer]):
            yield one, config.num_layers + layer.layer_number, repeats, place == 0, nested, uses


def _attends(layer: Any) -> bool:
    from megatron.core.transformer.identity_op import IdentityOp

    return not isinstance(getattr(layer, "self_attention", None), IdentityOp)


def _kind(layer: Any) -> Kind:
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.moe.moe_layer import MoELayer

    from megatron_mone.moe.layer import MoNELayer

    mlp = getattr(layer, "mlp", None)
    if mlp is None:
        return "mamba"
    if isinstance(mlp, IdentityOp):
        return "attention"
    if isinstance(mlp, MoNELayer):
        return "mone"
    return "moe" if isinstance(mlp, MoELayer) else "dense"
