"""What share of an expert's neurons is needed, and against which dense models that holds.

Activated parameters of an expert of F neurons are F (1 + 2r) / 3 of its three projections: all
gates are computed, up and down of those that are kept.
"""

from collections.abc import Sequence
from fractions import Fraction

from megatron_mone.studies.catalogue import large, small
from megatron_mone.studies.document import StudyResults
from megatron_mone.studies.findings import compared
from megatron_mone.studies.study import Cell, Preset, Study, Values

RATIOS = tuple(Fraction(1, n) for n in (1, 2, 4, 8, 16))
MAIN = Fraction(1, 4)
"""The ratio whose controls are trained."""
TOTAL, ACTIVE = "MoE, equal total", "MoE, equal active"
DENSE, ONE = "dense GLU, equal active", "MoNE, one expert, equal active"
_DENSE_MOE = dict.fromkeys(small.MONE)


def mone(ratio: Fraction) -> str:
    """The name of the cell with a ratio."""
    return f"MoNE, r = {ratio}"


def cells(values: Values) -> Sequence[Cell]:
    """A cell a ratio, and four controls."""
    width, topk = values["moe_ffn_hidden_size"], values["moe_router_topk"]
    share = (1 + 2 * MAIN) / 3
    active = int(width * share)
    alone = int(topk * active / share)
    no_experts = [name for name in values if name.startswith(("moe_", "expert_", "num_experts"))]
    one_rank = (
        {"expert_model_parallel_size": None} if "expert_model_parallel_size" in values else {}
    )
    return [
        *(Cell(mone(one), "of each expert's neurons kept", {"mone_neuron_ratio": float(one)})
          for one in RATIOS),
        Cell(TOTAL, "every neuron of the same experts", _DENSE_MOE),
        Cell(ACTIVE, f"experts of {active} neurons: what r = {MAIN} activates",
             {**_DENSE_MOE, "moe_ffn_hidden_size": active}),
        Cell(DENSE, f"no experts, {topk * active} neurons: what r = {MAIN} activates",
             {**_DENSE_MOE, **dict.fromkeys(no_experts), "ffn_hidden_size": topk * active}),
        Cell(ONE, f"one expert of {alone} neurons, r = {MAIN}: activates the same",
             {"num_experts": 1, "moe_router_topk": 1, "moe_router_pre_softmax": True,
              "moe_ffn_hidden_size": alone, "mone_neuron_ratio": float(MAIN),
              "moe_router_load_balancing_type": "none", "moe_aux_loss_coeff": None, **one_rank}),
    ]  # fmt: skip


def findings(results: StudyResults) -> list[str]:
    """Each ratio against the dense MoE of equal total, then the main ratio against its controls."""
    pairs = [(mone(one), TOTAL) for one in RATIOS]
    pairs += [(mone(MAIN), other) for other in (ACTIVE, DENSE, ONE)]
    return [compared(results, *pair) for pair in pairs if results.has(*pair)]


STUDY = Study(
    name="ratio",
    question="How few of each expert's neurons can be kept in training, at what loss, and is it "
    "MoNE or the size that gives it?",
    presets={
        "tiny": Preset(small.training(small.TINY_STEPS), seeds=2, only=(mone(MAIN), TOTAL)),
        "cpu": Preset(small.training(small.CPU_STEPS)),
        **large.PRESETS,
        **large.largest(mone(MAIN), TOTAL, ACTIVE),
    },
    cells=cells,
    reference=TOTAL,
    findings=findings,
    limits=(
        "Models of 2 layers and under a million tokens: what holds here need not hold at size.",
        "Equal tokens, not equal time or equal operations: cells differ in both, see the table.",
        "One learning rate for all cells, chosen for none of them.",
    ),
)
