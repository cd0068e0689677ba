"""The models and layouts of the parity suite. Names say the parallel sizes; what is not named is 1.

Expert tensor parallelism follows TP where it is not named, as in Megatron.
"""

from dataclasses import dataclass

from tests.training_cases import MOCK, MONE, TINY

# An Adam update is g / (|g| + eps) in size: where |g| is no larger than another layout's rounding
# (1e-7 of the largest), rounding moves a parameter by the whole learning rate. Gradients that agree
# to 3e-7 then leave parameters 1e-4 apart after three steps, and flip a choice of neurons. A larger
# eps compares the layouts and not the noise.
TRAIN = (*TINY, *MONE, *MOCK, "--adam-eps", "1e-3")
# The norm that clips is summed over parameters of other shapes (one tensor an expert in stock
# Megatron, one for all here) and may differ in the last bit; without clipping nothing may.
STOCK = (*TINY, *MOCK, "--clip-grad", "0")
KEEP_ALL = (*STOCK, "--mone-neuron-ratio", "1.0", "--mone-ng-loss-coeff", "0",
            "--mone-backend", "reference")  # fmt: skip

PLAIN = "--mone-plain-checkpoint"  # for stock Megatron to start from

EP2 = ("--expert-model-parallel-size", "2")
EP4 = ("--expert-model-parallel-size", "4")
PP2 = ("--pipeline-model-parallel-size", "2")
CP2 = ("--context-parallel-size", "2")
TP2 = ("--tensor-model-parallel-size", "2", "--sequence-parallel")
TP4 = ("--tensor-model-parallel-size", "4", "--sequence-parallel")
ETP1 = ("--expert-tensor-parallel-size", "1")
ETP2 = ("--expert-tensor-parallel-size", "2")
VPP2 = ("--num-layers-per-virtual-pipeline-stage", "1")
DISTRIBUTED_OPTIMIZER = ("--use-distributed-optimizer",)
ALLGATHER = ("--moe-token-dispatcher-type", "allgather")
OVERLAP = ("--moe-shared-expert-overlap",)
FULL_RECOMPUTE = (
    *("--recompute-granularity", "full", "--recompute-method", "uniform"),
    *("--recompute-num-layers", "1"),
)
MOE_RECOMPUTE = ("--recompute-granularity", "selective", "--recompute-modules", "moe")

# The model, or what is summed into its loss: each variant has its own one-rank run.
VARIANTS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "four layers": ("--num-layers", "4"),
    "groups 2": ("--mone-neuron-groups", "2"),
    "blocks of 4": ("--mone-neuron-block", "4"),
    "blocks of 11": ("--moe-ffn-hidden-size", "88", "--mone-neuron-block", "11"),
    "one block of 22": ("--moe-ffn-hidden-size", "88", "--mone-neuron-block", "22"),
    "shared experts": ("--moe-shared-expert-intermediate-size", "32"),
    "latent experts": ("--moe-latent-size", "16"),
    "per-token loss": ("--calculate-per-token-loss",),
    "token dropping": ("--moe-expert-capacity-factor", "1.0"),
    "padding to capacity": (
        *("--moe-expert-capacity-factor", "1.0"),
        "--moe-pad-expert-input-to-capacity",
    ),
    "entropy loss": ("--mone-ng-loss-type", "entropy"),
    "normalized loss": ("--mone-ng-loss-type", "normalized"),
    "bias": ("--mone-ng-loss-type", "bias"),
    "reference backend": ("--mone-backend", "reference"),
    "global batch": ("--mone-ng-loss-scope", "global_batch"),
    "softmax gate": ("--mone-activation", "softmax"),
    "threshold": ("--mone-selection", "threshold", "--mone-threshold", "0.3"),
    "norms over all heads": (
        *("--qk-layernorm", "--mone-qk-norm-all-heads"),
        *("--group-query-attention", "--num-query-groups", "2"),
    ),
}
# Variants that change nothing in a model that keeps every neuron and has no balance loss.
STOCK_VARIANTS = ("plain", "four layers", "shared experts", "latent experts", "per-token loss",
                  "token dropping", "padding to capacity")  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """How a variant is laid out over ranks.

    Attributes:
        ranks: of the whole job; what the parallel sizes leave is data parallel.
        variant: of VARIANTS.
        flags: beside the variant's.
    """

    ranks: int
    variant: str
    flags: tuple[str, ...]


_BOTH_DISPATCHERS = {
    "DP2": Layout(2, "plain", ()),
    "DP2 distributed optimizer": Layout(2, "plain", DISTRIBUTED_OPTIMIZER),
    "EP2": Layout(2, "plain", EP2),
    "EP4": Layout(4, "plain", EP4),
    "PP2": Layout(2, "plain", PP2),
    "PP2 VPP2": Layout(2, "four layers", (*PP2, *VPP2)),
    "CP2": Layout(2, "plain", CP2),
    "TP2 ETP2": Layout(2, "plain", TP2),
    "TP2 ETP2, groups 2": Layout(2, "groups 2", TP2),
    "TP2 ETP1": Layout(2, "plain", (*TP2, *ETP1)),
    "TP2 ETP1 EP2": Layout(2, "plain", (*TP2, *ETP1, *EP2)),
    "TP2 ETP2 EP2": Layout(4, "plain", (*TP2, *EP2)),
    "ETP2 EP2": Layout(4, "plain", (*ETP2, *EP2)),
    "EP2 PP2": Layout(4, "plain", (*EP2, *PP2)),
    "CP2 EP2": Layout(4, "plain", (*CP2, *EP2)),
    "TP2 ETP2 EP2 PP2": Layout(8, "plain", (*TP2, *EP2, *PP2)),
}
_ONE_DISPATCHER = {
    "EP2, full recompute": Layout(2, "plain", (*EP2, *FULL_RECOMPUTE)),
    "EP2, selective recompute": Layout(2, "plain", (*EP2, *MOE_RECOMPUTE)),
    "TP2 ETP2, full recompute": Layout(2, "plain", (*TP2, *FULL_RECOMPUTE)),
    "EP2, shared experts": Layout(2, "shared experts", EP2),
    "TP2 ETP2, shared experts": Layout(2, "shared experts", TP2),
    "EP2, shared experts overlapped": Layout(2, "shared experts", (*EP2, *OVERLAP)),
    "TP2 ETP2, shared experts overlapped": Layout(2, "shared experts", (*TP2, *OVERLAP)),
    "EP2, latent experts": Layout(2, "latent experts", EP2),
    "TP2 ETP1, latent experts": Layout(2, "latent experts", (*TP2, *ETP1)),
    "TP2 ETP2, latent experts": Layout(2, "latent experts", TP2),
    "EP2 PP2, latent experts": Layout(4, "latent experts", (*EP2, *PP2)),
    "EP2, per-token loss": Layout(2, "per-token loss", EP2),
    "CP2, per-token loss": Layout(2, "per-token loss", CP2),
    "EP2, token dropping": Layout(2, "token dropping", EP2),
    "EP2, padding to capacity": Layout(2, "padding to capacity", EP2),
    "TP2 ETP2, entropy loss": Layout(2, "entropy loss", TP2),
    "TP2 ETP2, normalized loss": Layout(2, "normalized loss", TP2),
    "TP2 ETP2, bias": Layout(2, "bias", TP2),
    "EP2, reference backend": Layout(2, "reference backend", EP2),
    "TP2 ETP2, reference backend": Layout(2, "reference backend", TP2),
    "EP2, global batch": Layout(2, "global batch", EP2),
    "TP2 ETP1, global batch": Layout(2, "global batch", (*TP2, *ETP1)),
    "TP2 ETP2, softmax gate": Layout(2, "softmax gate", TP2),
    "TP2 ETP2, threshold": Layout(2, "threshold", TP2),
    "TP2 ETP2, blocks of 4": Layout(2, "blocks of 4", TP2),
    "TP2 ETP2, blocks of 11": Layout(2, "blocks of 11", TP2),
    "EP2, blocks of 11, selective recompute": Layout(2, "blocks of 11", (*EP2, *MOE_RECOMPUTE)),
    "TP2 ETP2, one block of 22": Layout(2, "one block of 22", TP2),
    "TP2 ETP2, norms over all heads": Layout(2, "norms over all heads", TP2),
    "TP4 ETP1, norms over all heads": Layout(4, "norms over all heads", (*TP4, *ETP1)),
}
LAYOUTS: dict[str, Layout] = {
    **_BOTH_DISPATCHERS,
    **{
        f"{name}, allgather": Layout(x.ranks, x.variant, (*x.flags, *ALLGATHER))
        for name, x in _BOTH_DISPATCHERS.items()
    },
    **_ONE_DISPATCHER,
}
# Where stock Megatron and a MoNE model that keeps every neuron are run as well.
KEEP_ALL_LAYOUTS = {
    name: layout for name, layout in LAYOUTS.items() if layout.variant in STOCK_VARIANTS
}
# Optimizers that work on matrices, of which stock experts have one a linear and expert. Muon (in
# bf16) and Lion (a sign) turn another layout's rounding into steps: compared with stock alone.
OPTIMIZERS = {
    f"{layout}, {optimizer}": Layout(ranks, "plain", (*flags, "--optimizer", optimizer.lower()))
    for optimizer in ("Muon", "SOAP", "Lion")
    for layout, ranks, flags in (
        *(("one rank", 1, ()), ("EP2", 2, EP2)),
        *(("TP2 ETP2", 2, TP2), ("ETP2 EP2", 4, (*ETP2, *EP2))),
    )
}
KEEP_ALL_LAYOUTS |= OPTIMIZERS
