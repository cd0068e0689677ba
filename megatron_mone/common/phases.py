"""The phases of a training step: their names, and the mark by which code says that one begins.

At any moment a step is in exactly one phase, so that the phases of a step add up to it. Code that
the profiler cannot reach from outside (kernels) calls `enter`; while nobody profiles that is one
comparison. May be imported by every room; imports none.
"""

from collections.abc import Callable

DATA = "data"
EMBEDDING = "embedding"
ATTENTION = "attention"
MAMBA = "mamba"
LAYER_NORM = "layer norm"
DENSE_MLP = "dense MLP"
ROUTER = "router"
LATENT = "latent projection"
PERMUTE = "permute"
DISPATCH = "dispatch"
GATE_GEMM = "gate GEMM"
SELECTION = "selection"
UP_DOWN_GEMM = "up/down GEMM"
BALANCE_LOSS = "balance loss"
COMBINE = "combine"
SHARED_EXPERTS = "shared experts"
LOSS = "loss"
GRAD_REDUCE = "grad reduce"
CLIPPING = "clipping"
OPTIMIZER = "optimizer"
PARAMETER_GATHER = "parameter gather"
PIPELINE_BUBBLE = "pipeline bubble"
EXPOSED_COMMUNICATION = "exposed communication"
OTHER = "other"

# In the order in which a report stacks them.
PHASES = {
    DATA: "reading a micro-batch and sharing it over tensor-parallel ranks",
    EMBEDDING: "token and position embedding",
    ATTENTION: "attention with its norm and residual",
    MAMBA: "a Mamba layer with its norm and residual (hybrid models)",
    LAYER_NORM: "norm and residual around the MLP or the experts",
    DENSE_MLP: "the MLP of a layer without experts",
    ROUTER: "logits, top-k, auxiliary losses",
    LATENT: "tokens projected to the width of their experts and back (moe_latent_size)",
    PERMUTE: "sorting rows by expert before and after the exchange",
    DISPATCH: "all-to-all or all-gather of rows to their experts, token counts included",
    GATE_GEMM: "W_gate of every routed row (MoNE; a stock expert has it in up/down GEMM)",
    SELECTION: "choosing neurons of every routed row",
    UP_DOWN_GEMM: "grouped GEMMs of up and down, activation included",
    BALANCE_LOSS: "the neuron-granular balance loss and its counts",
    COMBINE: "bringing rows back and adding them up",
    SHARED_EXPERTS: "shared experts",
    LOSS: "final norm, output layer and cross entropy",
    GRAD_REDUCE: "reducing gradients over replicas",
    CLIPPING: "the norm of all gradients, and scaling them by it",
    OPTIMIZER: "update, copies of gradients and weights for it, zeroing gradients",
    PARAMETER_GATHER: "making sharded parameters whole, and letting go of them (ZeRO 3)",
    PIPELINE_BUBBLE: "waiting for another pipeline stage",
    EXPOSED_COMMUNICATION: "collectives called in any other phase (tensor, context parallel)",
    OTHER: "the schedule, autograd between modules, what no phase claims",
}
COMMUNICATION = (
    DISPATCH, COMBINE, GRAD_REDUCE, PARAMETER_GATHER, PIPELINE_BUBBLE, EXPOSED_COMMUNICATION,
)  # fmt: skip

FORWARD = "forward"
BACKWARD = "backward"
RECOMPUTE = "recompute"
PASSES = (FORWARD, BACKWARD, RECOMPUTE)

_listener: Callable[[str], None] | None = None


def enter(phase: str) -> None:
    """Say that `phase` begins here and lasts until the next one does."""
    if _listener is not None:
        _listener(phase)


def listen(listener: Callable[[str], None] | None) -> None:
    """Let `listener` hear every `enter` of this process; None ends it."""
    global _listener
    _listener = listener
