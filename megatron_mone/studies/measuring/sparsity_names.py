"""What the study `sparsity` measures: criteria, shares, and what its measures are called."""

GATE, RANDOM, PRODUCT, WINA, R_SPARSE = "|gate|", "random", "|gate x up|", "WINA", "R-Sparse-like"
CRITERIA = {
    GATE: "|act(gate)|, what MoNE chooses by",
    RANDOM: "drawn evenly for each row",
    PRODUCT: "|act(gate) x up|, what W_down is multiplied by",
    WINA: "|act(gate) x up| times the norm of the neuron's column of W_down, equation 4 of WINA "
    "(arXiv 2505.19427); the paper uses it for the gate and key projections, whose columns it "
    "makes orthogonal, and for W_down |act(gate) x up|; here what goes into gate and up stays "
    "whole, no columns are made orthogonal, and every layer keeps the same share",
    R_SPARSE: "as WINA chooses, half as many; the rest passes W_down's leading singular "
    "components, as many as have the numbers of the other half (R-Sparse, arXiv 2504.19449, by its "
    "code, where a threshold from other text chooses; here every row keeps the same number, its "
    "search for the shares of both in each layer is not done, nor are gate, up and attention)",
}
"""By what neurons are kept."""

SHARES = (1.0, 0.7, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05, 0.02)
"""Of a row's neurons, kept."""
LAYER_SHARES = (0.4, 0.1)
"""Kept in one layer, all others as they are."""
USED = 0.25
"""The share of which the use of neurons is counted."""
USE_QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
OWN, LENGTH, CHANCE = "share kept as it is", "tokens of a block", "right answers by chance"
AS_IT_IS, LAYERS_AS_THEY_ARE = "nats, as it is", "nats of one layer's text, as it is"
LOSS, ONE_LAYER, RIGHT = "nats by {}", "nats, one layer at {:g}", "right answers by {}"
SIZES, MASS, USE = "sizes of |gate|", "mass of the largest by {}", "use of neurons"
ASKED = {"mone_cloze": 0.0, "mone_choice": 0.25}
"""Tasks of this package that are scored in one pass, and what chance answers right of each."""


def parts_of(answers: bool) -> list[str]:
    """What `of_model` measures, a part at a time; `answers` need lm-eval."""
    return [
        "itself",
        *(f"losses:{criterion}" for criterion in CRITERIA),
        *(f"layers:{share}" for share in LAYER_SHARES),
        *(f"answers:{criterion}" for criterion in CRITERIA if answers),
    ]
