"""The routed experts of one rank: weights, checkpoint keys, and the call into the kernels.

May touch: Megatron's MLP (to initialise exactly as it does), its sharded tensors, `kernels/`.
Weights are neuron-major: a neuron is three H-vectors, so that a kernel gathers whole rows.
Symbols: E_l experts on this rank, F_l neurons of an expert on this rank (F / ETP), H hidden
(`expert_hidden`: the latent width where there is one).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import (
    ReplicaId,
    ShardedObject,
    ShardedStateDict,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.enums import Fp8Recipe
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_tensor_model_parallel_attributes,
)
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_object_for_checkpoint
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_mone.config import (
    MoNEConfig,
    chosen_by_rule,
    expert_hidden,
    is_mone,
    needs_all_gates,
    neurons_per_token,
    selection_bounds,
)
from megatron_mone.kernels import (
    BiasedRule,
    Choose,
    GroupedMLPOutput,
    Selection,
    grouped_mlp_with_gates,
    resolve_backend,
)
from megatron_mone.kernels.neuron_mask import NeuronMask
from megatron_mone.kernels.neuron_selection import NeuronSelector
from megatron_mone.kernels.te.delayed import DelayedScales
from megatron_mone.kernels.te.operand_names import OPERANDS
from megatron_mone.kernels.weight_views import add_later, kept_for_backward, weight_views
from megatron_mone.moe import matrix_stack
from megatron_mone.moe.activation_offload import offloaded_modules, with_offloading
from megatron_mone.moe.stored_choice import CHOICE, STOPS, check_choice, choice_of, our_key

EXTRA_STATE = "._extra_state"


class MoNEExperts(MegatronModule):
    """E_l experts whose neurons are chosen per routed row.

    Parameters are seen through `w_gate_EFH`, `w_up_EFH`, `w_down_EFH`, each [E_l, F_l, H]. Gate and
    up share one parameter, as Megatron's linear_fc1 does. Checkpoints hold the stock layouts,
    `experts.mone_linear_fc1.weight` [E, 2F, H] and `experts.mone_linear_fc2.weight` [E, H, F]; the
    stock keys with mone_plain_checkpoint (stored_choice.py).

    Args:
        num_local_experts: E_l.
        config: with mone_* fields.
        pg_collection: `expt_tp`, `ep` and `expt_dp` are used.
        name: of the module, as Megatron passes it down; unused.
    """

    config: MoNEConfig

    def __init__(
        self,
        num_local_experts: int,
        config: MoNEConfig,
        *,
        pg_collection: ProcessGroupCollection,
        name: str | None = None,
    ) -> None:
        del name
        super().__init__(config=config)
        self.neuron_bias: Tensor | None  # added to |g| for choosing; ng loss type "bias"
        self.ng_weights: Tensor | None  # of the balance loss, from the last step; global_batch
        self.fp8_amax: Tensor  # of the operands in past steps; None without delayed scaling
        self._delayed: list = []  # makers of weight gradients, in the order of backward passes
        self.num_local_experts = num_local_experts
        self.ep_group = pg_collection.ep
        self.etp_group = pg_collection.expt_tp
        self.dp_group = pg_collection.expt_dp
        self.all_gates = needs_all_gates(config)
        self.offloaded = offloaded_modules(config)
        backend_of(config)  # here, so that one that cannot run stops before the first step
        low, high = selection_bounds(config)
        self.select = NeuronSelector(
            rule=config.mone_selection,
            min_neurons=low,
            max_neurons=high,
            threshold=config.mone_threshold,
            groups=config.mone_neuron_groups,
            block=config.mone_neuron_block,
            etp_group=self.etp_group,
        )
        self.linear_fc1, self.linear_fc2 = stock_weights(config, num_local_experts, self.etp_group)
        has_bias = config.mone_ng_loss_type == "bias"
        lagged = config.mone_ng_loss_scope == "global_batch" and config.mone_ng_loss_coeff > 0
        self.register_buffer("neuron_bias", self._per_neuron() if has_bias else None)
        self.register_buffer("ng_weights", self._per_neuron() if lagged and not has_bias else None)
        history, self.fp8_scales = None, None
        if config.fp8 and config.fp8_recipe == Fp8Recipe.delayed:
            size = num_local_experts, len(OPERANDS), config.fp8_amax_history_len
            history = torch.zeros(size, dtype=torch.float32, device=self.linear_fc1.device)
            self.fp8_scales = DelayedScales(lambda: self.fp8_amax)
        self.register_buffer("fp8_amax", history)

    def _per_neuron(self) -> Tensor:
        """[E_l, F_l] float32 zeros."""
        shape = self.w_gate_EFH.shape[:2]
        return torch.zeros(shape, dtype=torch.float32, device=self.linear_fc1.device)

    @property
    def w_gate_EFH(self) -> Tensor:
        """[E_l, F_l, H] gate vectors."""
        return self.linear_fc1[:, 0]

    @property
    def w_up_EFH(self) -> Tensor:
        """[E_l, F_l, H] up vectors."""
        return self.linear_fc1[:, 1]

    @property
    def w_down_EFH(self) -> Tensor:
        """[E_l, F_l, H] down vectors."""
        return self.linear_fc2

    def forward(
        self,
        x_NH: Tensor,
        tokens_per_expert: Tensor,
        probs_N: Tensor,
        neuron_mask: NeuronMask | None = None,
        rows_ER: Tensor | None = None,
    ) -> GroupedMLPOutput:
        """Compute the selected neurons of every routed row.

        Args:
            x_NH: [N, H] rows grouped by local expert.
            tokens_per_expert: [E_l] rows per local expert, on x's device.
            probs_N: [N] router probabilities.
            neuron_mask: the neurons to compute, of this rank's F_l; chosen here when None.
            rows_ER: [E_l, R] the same rows by source, for a balance loss by micro-batch.
        """
        self._keep_float32()
        choose = self._choice(tokens_per_expert) if neuron_mask is None else neuron_mask
        later = self._later(x_NH)
        weights: Any = weight_views(self.linear_fc1, self.linear_fc2, self._fuses, later)
        weights[0].fp8_scales = self.fp8_scales
        compute = partial(
            grouped_mlp_with_gates,
            probs_N=probs_N,
            tokens_per_expert=tokens_per_expert if rows_ER is None else rows_ER,
            w_gate_EFH=weights[0],
            w_up_EFH=weights[1],
            w_down_EFH=weights[2],
            choose=choose,
            activation=self.config.mone_activation,
            etp_group=self.etp_group,
            all_gates=self.all_gates,
            backend=self.config.mone_backend,
        )
        if self.offloaded:
            return with_offloading(
                self.offloaded, x_NH, (self.linear_fc1, self.linear_fc2), compute,
                delay=self.config.delay_offload_until_cuda_graph,
            )  # fmt: skip
        with kept_for_backward(self.linear_fc1, self.linear_fc2):
            return compute(x_NH)

    def _choice(self, tokens_per_expert: Tensor) -> Choose:
        """The rule in a form that kernels run themselves, where it needs no other rank or bias."""
        own = self.select.local_selection() if self.neuron_bias is None else None
        if own is not None:
            return Selection(*own)
        return BiasedRule(self.select, self.neuron_bias, tokens_per_expert)

    def _keep_float32(self) -> None:
        """Float16Module casts buffers with the weights; steps of 1e-3 vanish in bf16, so keep fp32
        as Megatron's router keeps its expert bias."""
        for buffer in (self.neuron_bias, self.ng_weights, self.fp8_amax):
            if buffer is not None and buffer.dtype != torch.float32:
                buffer.data = buffer.data.float()

    @property
    def _fuses(self) -> bool:
        """Megatron FSDP makes a `main_grad` when it takes a gradient, and has none before."""
        makes_later = hasattr(self.linear_fc1, "get_main_grad")
        return bool(self.config.gradient_accumulation_fusion) and not makes_later

    def _later(self, x_NH: Tensor) -> list | None:
        """Where weight gradients wait for `backward_dw`, which nobody calls below rows that need no
        gradient."""
        config = self.config
        put_off = config.delay_wgrad_compute or config.overlap_dispatch_backward_with_experts_wgrad
        return self._delayed if put_off and x_NH.requires_grad else None

    def end_step(self) -> None:
        """After the optimizer step, on every rank of the experts' groups."""
        if self.fp8_scales is not None:
            self._keep_float32()
            self.fp8_scales.end_step((self.etp_group, self.dp_group))

    def backward_dw(self) -> None:
        """Make the weight gradients that backward passes put off; Megatron calls it, once for each,
        with delay_wgrad_compute or overlap_dispatch_backward_with_experts_wgrad."""
        add_later(self.linear_fc1, self.linear_fc2, self._fuses, self._delayed)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """The shapes and splits of stock experts, so that checkpoints go both ways, under keys that
        stock models do not ask for, and the choice; see stored_choice.py."""
        self._keep_float32()
        singleton = (metadata or {}).get("singleton_local_shards", False)
        layout = _ExpertLayout(
            prefix=f"{prefix}experts.",
            offsets=tuple(sharded_offsets),
            first_expert=self.ep_group.rank() * self.num_local_experts,
            num_experts=self.ep_group.size() * self.num_local_experts,
            etp_rank=self.etp_group.rank(),
            etp_size=self.etp_group.size(),
            singleton=singleton,
        )
        replica = (0, 0, self.dp_group.rank())
        of_all_parts = (0, self.etp_group.rank(), self.dp_group.rank())
        parts: tuple[tuple[str, str, Any, Any, ReplicaId], ...] = (
            ("linear_fc1", "linear_fc1.weight", layout.build_fc1, layout.merge_fc1, replica),
            ("linear_fc2", "linear_fc2.weight", layout.build_fc2, layout.merge_fc2, replica),
            ("neuron_bias", "neuron_bias", layout.build_per_neuron, torch.stack, replica),
            ("ng_weights", "ng_weights", layout.build_per_neuron, torch.stack, replica),
            ("fp8_amax", "fp8_amax", layout.build_per_expert, torch.stack, of_all_parts),
        )
        state: dict[str, Any] = {
            f"{prefix}{name}": ShardedTensorFactory(
                f"{prefix}experts.{key}", getattr(self, name), build, merge, whose
            )
            for name, key, build, merge, whose in parts
            if getattr(self, name) is not None
        }
        # Stock linears save an empty extra state per expert (for TE's fp8) and ask for it on load.
        for linear in ("linear_fc1", "linear_fc2"):
            for e in range(self.num_local_experts):
                state[f"{prefix}local_experts.{e}.{linear}{EXTRA_STATE}"] = layout.extra_state(
                    linear, e, of_all_parts
                )
        if self.config.mone_plain_checkpoint:
            return state
        for leaf in state.values():
            leaf.key = our_key(leaf.key)
        state[f"{prefix}{CHOICE}"] = make_sharded_object_for_checkpoint(
            choice_of(self.config), f"{prefix}experts.{CHOICE}", sharded_offsets,
            (self.ep_group.rank(), self.etp_group.rank(), self.dp_group.rank()),
        )  # fmt: skip
        return state

    def _save_to_state_dict(self, *args: Any) -> None:
        self._keep_float32()
        super()._save_to_state_dict(*args)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self._keep_float32()
        for name in STOPS:
            state_dict.pop(prefix + name, None)
        choice = state_dict.pop(f"{prefix}{CHOICE}", None)
        if choice is not None:
            check_choice(choice, self.config, f"the checkpoint of {prefix.removesuffix('.')}")
        for key in [k for k in state_dict if k.startswith(prefix) and k.endswith(EXTRA_STATE)]:
            del state_dict[key]
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.fp8_scales is not None:
            self.fp8_scales.forget()


@dataclass(frozen=True, kw_only=True)
class _ExpertLayout:
    """Cuts [E_l, ...] neuron-major tensors into the pieces stock experts save, and joins them.

    Used for weights and, by Megatron's optimizers, for optimizer state of the same shape.
    """

    prefix: str
    offsets: tuple
    first_expert: int
    num_experts: int
    etp_rank: int
    etp_size: int
    singleton: bool

    def _placed(self, key: str, e: int) -> tuple[str, tuple]:
        """Key and offsets of one expert: its number is in the key, or an axis in front."""
        expert = self.first_expert + e
        if self.singleton:
            return key.replace(self.prefix, f"{self.prefix}{expert}.", 1), self.offsets
        return key, (*self.offsets, (len(self.offsets), expert, self.num_experts))

    def _piece(
        self, key: str, data: Tensor, e: int, replica: ReplicaId, axis: int, fragment: int,
        fragments: int,
    ) -> ShardedTensor:  # fmt: skip
        """One expert's tensor, split in `fragments` along `axis`, with the expert axis in front."""
        key, offsets = self._placed(key, e)
        return ShardedTensor.from_rank_offsets(
            key,
            data,
            *offsets,
            (axis + len(offsets), fragment, fragments),
            replica_id=replica,
            prepend_axis_num=len(offsets),
        )

    def extra_state(self, linear: str, e: int, replica: ReplicaId) -> ShardedObject:
        """The (empty) extra state of one expert's linear under its stock key."""
        key, offsets = self._placed(f"{self.prefix}{linear}{EXTRA_STATE}", e)
        return make_sharded_object_for_checkpoint(None, key, offsets, replica)

    @torch.no_grad()
    def build_fc1(
        self, key: str, t: Tensor, replica: ReplicaId, flattened_range: slice | None
    ) -> list[ShardedTensor]:
        """[E_l, 2, F_l, H] -> gate and up pieces of [E, 2F, H], as apply_swiglu_sharded_factory."""
        assert flattened_range is None
        pieces = []
        for e in range(t.shape[0]):
            for half in range(2):
                suffix = ("_w", "_v")[half] if self.singleton else ""
                start = 0 if self.singleton else half * self.etp_size
                fragments = self.etp_size * (1 if self.singleton else 2)
                pieces.append(
                    self._piece(
                        key + suffix, t[e, half], e, replica, 0, start + self.etp_rank, fragments
                    )
                )
        return pieces

    @staticmethod
    def merge_fc1(pieces: list[Tensor]) -> Tensor:
        """Inverse of build_fc1."""
        stacked = torch.stack(pieces)
        return stacked.view(-1, 2, *stacked.shape[1:])

    @torch.no_grad()
    def build_fc2(
        self, key: str, t: Tensor, replica: ReplicaId, flattened_range: slice | None
    ) -> list[ShardedTensor]:
        """[E_l, F_l, H] -> pieces of [E, H, F]."""
        assert flattened_range is None
        return [
            self._piece(key, t[e].t().contiguous(), e, replica, 1, self.etp_rank, self.etp_size)
            for e in range(t.shape[0])
        ]

    @staticmethod
    def merge_fc2(pieces: list[Tensor]) -> Tensor:
        """Inverse of build_fc2."""
        return torch.stack([piece.t() for piece in pieces])

    @torch.no_grad()
    def build_per_neuron(
        self, key: str, t: Tensor, replica: ReplicaId, flattened_range: slice | None
    ) -> list[ShardedTensor]:
        """[E_l, F_l] -> pieces of [E, F]."""
        assert flattened_range is None
        return [
            self._piece(key, t[e], e, replica, 0, self.etp_rank, self.etp_size)
            for e in range(t.shape[0])
        ]

    @torch.no_grad()
    def build_per_expert(
        self, key: str, t: Tensor, replica: ReplicaId, flattened_range: slice | None
    ) -> list[ShardedTensor]:
        """[E_l, ...] -> pieces of [E, ...], the same on all expert-tensor ranks."""
        assert flattened_range is None
        return [self._piece(key, t[e], e, replica, 0, 0, 1) for e in range(t.shape[0])]


def stock_weights(
    config: TransformerConfig, num_local_experts: int, etp_group: ProcessGroup
) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
    """Neuron-major weights of stock experts, fc1 [E_l, 2, F_l, H] (gate, up) and fc2 [E_l, F_l, H].

    Stock experts are built one at a time and their weights moved, so that initial values,
    consumption of random numbers and parameter attributes are Megatron's own.

    Args:
        config: of the model.
        num_local_experts: E_l.
        etp_group: over which an expert's neurons are split.
    """
    for e in range(num_local_experts):
        expert: Any = _stock_expert(config, etp_group)
        stock_fc1, stock_fc2 = expert.linear_fc1.weight, expert.linear_fc2.weight
        hidden, width = stock_fc2.shape
        if e == 0:
            fc1 = _like(stock_fc1, (num_local_experts, 2, width, hidden), fc1_matrices)
            fc2 = _like(stock_fc2, (num_local_experts, width, hidden), fc2_matrices)
        if config.perform_initialization:
            fc1.data[e].copy_(stock_fc1.data.view(2, width, hidden))
            fc2.data[e].copy_(stock_fc2.data.t())
    return fc1, fc2


def _stock_expert(config: TransformerConfig, etp_group: ProcessGroup) -> MLP:
    # SequentialMLP sets ffn_hidden_size the same way: RowParallelLinear reads it from the config.
    saved = config.ffn_hidden_size
    config.ffn_hidden_size = config.moe_ffn_hidden_size
    try:
        return MLP(
            config,
            MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
            ffn_hidden_size=config.moe_ffn_hidden_size,
            is_expert=True,
            tp_group=etp_group,
        )
    finally:
        config.ffn_hidden_size = saved


def fc1_matrices(t: Tensor) -> list[Tensor]:
    """[E_l, 2, F_l, H] -> views [2F_l, H], an expert's linear_fc1 in stock Megatron."""
    return [expert.flatten(0, 1) for expert in t]


def fc2_matrices(t: Tensor) -> list[Tensor]:
    """[E_l, F_l, H] -> views [H, F_l], an expert's linear_fc2 in stock Megatron."""
    return [expert.t() for expert in t]


def _like(
    weight: Any, shape: tuple[int, ...], matrices: Callable[[Tensor], list[Tensor]]
) -> torch.nn.Parameter:
    """An empty parameter that Megatron's optimizers and gradient clipping treat as `weight`s."""
    parameter: Any = torch.nn.Parameter(
        torch.empty(shape, dtype=weight.dtype, device=weight.device)
    )
    copy_tensor_model_parallel_attributes(parameter, weight)
    parameter.allreduce = weight.allreduce  # False: reduced over expert replicas, not over DP
    matrix_stack.declare(parameter, matrices)
    return parameter


def backend_of(config: Any) -> str:
    """The backend that the experts of this model run on here, or would if it were MoNE's.

    Args:
        config: a config, or Megatron's arguments, where sizes may not be known yet.

    Raises:
        ValueError: mone_backend names one that cannot run this model here; says why.
    """
    neurons, kept_share = config.moe_ffn_hidden_size, None
    if neurons is not None and is_mone(config):
        kept_share = neurons_per_token(config) / neurons
    return resolve_backend(
        config.mone_backend,
        activation=config.mone_activation,
        dtype=config.params_dtype,
        device="cuda" if torch.cuda.is_available() else "cpu",
        all_gates=needs_all_gates(config),
        by_rule=chosen_by_rule(config),
        block=config.mone_neuron_block,
        groups=config.mone_neuron_groups,
        neurons=neurons,
        kept_share=kept_share,
        hidden=expert_hidden(config),
    )
