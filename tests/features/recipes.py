"""Published recipes at toy width: their parts together, as rows alone cannot show.

Sources: the models' reports and configuration files. Widths and numbers of experts are small; what
is switched on is theirs, but for what MoNE's experts are (SwiGLU without bias).
"""

from tests.features.model import MLA
from tests.features.row import Example

EIGHT = "--num-experts 8 --moe-router-topk 4"
GQA = "--group-query-attention --num-query-groups 2"
BIASED = (
    "--moe-router-score-function sigmoid --moe-router-enable-expert-bias "
    "--moe-router-bias-update-rate 0.001"
)
SHARED = "--moe-shared-expert-intermediate-size 48"
DENSE_FIRST = "--num-layers 4 --moe-layer-freq ([0]+[1]*3)"
MTP = "--mtp-num-layers 1 --mtp-loss-scaling-factor 0.3"

DEEPSEEK_V3 = (
    f"{EIGHT} {MLA} {MTP} {BIASED} {SHARED} {DENSE_FIRST} --moe-router-num-groups 4 "
    "--moe-router-group-topk 2 --moe-router-topk-scaling-factor 2.5 "
    "--moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 0.0001"
)
KIMI_K2 = (
    f"{EIGHT} {MLA} {BIASED} {SHARED} {DENSE_FIRST} --moe-router-topk-scaling-factor 2.827 "
    "--moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 0.001"
)
RECIPES = {
    "DeepSeek-V3": Example(flags=DEEPSEEK_V3, layouts=("EP2", "EP2 PP2")),
    "Qwen3-MoE": Example(
        flags=f"{EIGHT} {GQA} --qk-layernorm --kv-channels 16 --rotary-base 1000000 "
        "--moe-aux-loss-coeff 0.001",
        layouts=("EP2", "TP2 EP2 ETP1"),
    ),
    "Mixtral": Example(
        flags=f"--num-experts 8 --moe-router-topk 2 {GQA} --rotary-base 1000000 "
        "--moe-aux-loss-coeff 0.02",
        layouts=("EP2", "TP2 ETP2"),
    ),
    "Kimi-K2": Example(flags=KIMI_K2, layouts=("EP2", "EP2 PP2")),
    "Kimi-K2, Muon": Example(flags=f"{KIMI_K2} --optimizer muon", layouts=()),
    "GLM-4.5": Example(
        flags=f"{EIGHT} {GQA} {BIASED} {SHARED} {DENSE_FIRST} {MTP} --qk-layernorm "
        "--add-qkv-bias --rotary-percent 0.5 --moe-router-topk-scaling-factor 2.5",
        layouts=("EP2", "EP2 PP2"),
    ),
    "gpt-oss": Example(
        flags=f"{EIGHT} {GQA} --softmax-type learnable --window-size 8,0 "
        "--window-attn-skip-freq 2 --rotary-base 150000",
        layouts=("EP2", "TP2 EP2 ETP1"),
    ),
}
"""Model -> what is trained in its style."""
