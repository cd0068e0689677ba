"""Flags that Megatron takes and then fails on, each with the line that a user sees.

A row of docs/REFUSALS.md each; add one to CASES. tests/integration/test_refusals.py provokes them
on one or two ranks and compares the table. In flags and lines DATA stands for a folder of small
datasets (ten: 10 documents, one: 1, a and b: 40 each), RUN for the checkpoints of BASE, saved on
two ranks after two steps, CHOSEN for those of MoNE, and TMP for a folder of the case's own.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass

from tests.training_cases import MOCK, MONE, TINY

LENGTH = ("--train-iters", "2")
BASE = (*TINY, *MOCK, *LENGTH)
TP2 = ("--tensor-model-parallel-size", "2", "--sequence-parallel")
PP2 = ("--pipeline-model-parallel-size", "2")
SHARDED = ("--use-megatron-fsdp", "--ckpt-format", "fsdp_dtensor")
CHECK, LOAD, NET = "check", "load", "net"


@dataclass(frozen=True)
class Refusal:
    """One way to fail.

    Attributes:
        name: of the row.
        says: what Megatron itself says, and where.
        flags: after BASE, of which they take the place.
        line: a part of what our line says.
        by: CHECK: by a check of ours, in `launch submit` and in the planner too; LOAD: at the
            start, from files that may lie on the cluster alone; NET: on a rank, before its first
            step has ended.
        world: ranks that the job is told it has.
        status: that the ranks end with.
        data: real data in place of mock data: words of --data-path.
        prepare: called on each rank before the run; it may patch what cannot be had by flags.
    """

    name: str
    says: str
    flags: tuple[str, ...]
    line: str
    by: str = CHECK
    world: int = 2
    status: int = 2
    data: tuple[str, ...] = ()
    prepare: Callable[[], None] | None = None

    @property
    def ranks(self) -> int:
        """How many are started: a check needs no peer."""
        return 1 if self.by == CHECK else min(self.world, 2)

    def all_flags(self, places: dict[str, str]) -> list[str]:
        """The job's flags, with the folders that words such as DATA stand for."""
        base = (*TINY, *LENGTH, *_reading(self.data)) if self.data else BASE
        found = []
        for flag in (*base, *self.flags):
            for word, place in places.items():
                flag = flag.replace(word, place)
            found.append(flag)
        return found


def _reading(data: tuple[str, ...]) -> tuple[str, ...]:
    return (
        *("--data-path", *data, "--tokenizer-type", "HuggingFaceTokenizer"),
        *("--tokenizer-model", "DATA/ten.tokenizer"),
    )


def _fail_on_rank_1() -> None:
    """Rank 1 alone fails, while rank 0 waits for it in a collective."""
    from megatron.training import training

    def build(*_arguments: object) -> None:
        raise KeyError("of rank 1 alone")

    if os.environ["RANK"] == "1":
        training.get_optimizer_param_scheduler = build


def _flag(name: str, value: object, says: str, line: str = "") -> Refusal:
    """One flag with a value that does not do."""
    flag = f"--{name.replace('_', '-')}"
    return Refusal(
        f"`{flag} {value}`", says, (flag, str(value)), line or f"{name} = {value} is not allowed"
    )


_ZERO = "ZeroDivisionError"
SIZES = (
    _flag("hidden_size", 0, f"attention: {_ZERO}"),
    _flag("num_layers", 0, f"num_floating_point_operations: {_ZERO}"),
    _flag("num_layers", -1, "transformer_config: `math domain error`"),
    _flag("num_attention_heads", 0, f"arguments: {_ZERO}"),
    _flag("kv_channels", 0, f"dot_product_attention: {_ZERO}"),
    _flag("moe_ffn_hidden_size", -48, "torch: `negative dimension`"),
    _flag("seq_length", 0, "gpt_dataset: a signal (SIGFPE)"),
    _flag("micro_batch_size", 0, "arguments: an assertion without words"),
    _flag("global_batch_size", -8, "arguments: an assertion without words"),
    _flag("train_iters", 0, "training: `Exception: either train-iters or ...`"),
    _flag("train_iters", -3, "nothing: no step is trained, exit status 0"),
    _flag("tensor_model_parallel_size", 0, f"arguments: {_ZERO}"),
    _flag("tensor_model_parallel_size", -1, "num_microbatches_calculator, of micro-batches"),
    _flag("expert_model_parallel_size", 0, f"transformer_config: {_ZERO}"),
    _flag("expert_tensor_parallel_size", 0, f"parallel_state: {_ZERO}"),
    _flag("num_layers_per_virtual_pipeline_stage", 0, f"arguments: {_ZERO}"),
    _flag("num_virtual_stages_per_pipeline_rank", 0, "get_model: IndexError"),
    _flag("eval_interval", 0, f"training: {_ZERO}"),
    _flag("log_interval", 0, f"training, after the first step: {_ZERO}"),
    _flag("lr_decay_iters", 0, "optimizer_param_scheduler: `assert self.lr_decay_steps > 0`"),
    _flag("lr", "nan", "arguments: an assertion without words"),
    _flag("min_lr", -1.0, "optimizer_param_scheduler: `assert self.min_lr >= 0.0`"),
    _flag("lr_warmup_fraction", 1.5, "optimizer_param_scheduler: an assertion without words"),
    _flag("weight_decay", -0.1, "torch's Adam: ValueError"),
    _flag("num_workers", -1, "torch's DataLoader: ValueError"),
    _flag("init_method_std", -1.0, "torch: `normal expects std >= 0.0`"),
    _flag("attention_dropout", 2.0, "torch's Dropout: ValueError"),
    _flag("norm_epsilon", -1.0, "a loss of NaN, then a TypeError", "layernorm_epsilon = -1.0 is"),
    _flag("seed", 0, "initialize: ValueError"),
    _flag("vocab_size", 0, "tokenizers: TypeError"),
    _flag("make_vocab_size_divisible_by", 0, f"tokenizers: {_ZERO}"),
    _flag("recompute_num_layers", 0, "transformer_block: recomputes no layer for ever"),
    _flag("check_weight_hash_across_dp_replicas_interval", 0, f"after the first step: {_ZERO}"),
    _flag("distributed_timeout_minutes", 0, "torch.distributed: the store's client times out"),
)

LAYOUT = (
    Refusal(
        "TP 2, EP 2 on 2 ranks", "parallel_state: RuntimeError",
        (*TP2, "--expert-model-parallel-size", "2"),
        "expert_tensor_parallel_size = 2 (tensor_model_parallel_size, where it is not given) x "
        "expert_model_parallel_size = 2 x pipeline_model_parallel_size = 1 must divide the job's 2 "
        "ranks: set expert_tensor_parallel_size: 1",
    ),
    Refusal(
        "TP 4, EP 2 on 4 ranks", "parallel_state: RuntimeError",
        ("--tensor-model-parallel-size", "4", "--sequence-parallel",
         "--expert-model-parallel-size", "2"),
        "set expert_tensor_parallel_size: 1", world=4,
    ),
    Refusal(
        "EP 4 on 2 ranks", "parallel_state: RuntimeError", ("--expert-model-parallel-size", "4"),
        "expert_model_parallel_size = 4 x pipeline_model_parallel_size = 1 must divide the job's 2 "
        "ranks: lower one of them, or give more ranks",
    ),
    Refusal(
        "EP 2, PP 2 on 2 ranks", "parallel_state: RuntimeError",
        (*PP2, "--expert-model-parallel-size", "2"), "must divide the job's 2 ranks: lower one",
    ),
    Refusal(
        "ETP 3 on 2 ranks", "parallel_state: RuntimeError", ("--expert-tensor-parallel-size", "3"),
        "set expert_tensor_parallel_size: 1",
    ),
    Refusal(
        "world size and TP", "arguments: its words", ("--tensor-model-parallel-size", "3"),
        "world size (2) is not divisible by",
    ),
    Refusal(
        "heads and query groups", "attention: a shape is invalid",
        ("--num-query-groups", "3", "--group-query-attention"),
        "num_query_groups = 3 must divide num_attention_heads = 4: give one of 1, 2, 4",
    ),
    Refusal(
        "more query groups than heads", "attention: a shape is invalid",
        ("--num-query-groups", "8", "--group-query-attention"), "num_query_groups = 8 must divide",
    ),
    Refusal(
        "hidden size and heads", "arguments: an assertion without words",
        ("--num-attention-heads", "3"),
        "assert args.hidden_size % args.num_attention_heads == 0, where hidden_size = 32, "
        "num_attention_heads = 3",
    ),
    Refusal(
        "odd rotary channels", "rope_utils: sizes of tensors differ", ("--kv-channels", "7"),
        "kv_channels = 7 makes 7 rotary channels a head, which must be even",
    ),
    Refusal(
        "sequence and TP", "mappings: `First dimension ...`", (*TP2, "--seq-length", "31"),
        "seq_length = 31 must be a multiple of tensor_model_parallel_size = 2 with "
        "sequence_parallel: give 30",
    ),
    Refusal(
        "sequence and CP", "arguments: its words",
        ("--context-parallel-size", "2", "--seq-length", "30"),
        "seq-length should be a multiple of 2 * context-parallel-size",
    ),
    Refusal(
        "expert width and ETP", "tensor_parallel: `47 is not divisible by 2`",
        (*TP2, "--moe-ffn-hidden-size", "47"),
        "moe_ffn_hidden_size = 47 must be a multiple of expert_tensor_parallel_size = 2",
    ),
    Refusal(
        "dense width and TP", "tensor_parallel: `63 is not divisible by 2`",
        (*TP2, "--ffn-hidden-size", "63", "--moe-layer-freq", "2"),
        "ffn_hidden_size = 63 must be a multiple of tensor_model_parallel_size = 2",
    ),
    Refusal(
        "shared expert's width and TP", "tensor_parallel: not divisible",
        (*TP2, "--moe-shared-expert-intermediate-size", "33"),
        "moe_shared_expert_intermediate_size = 33 must be a multiple of",
    ),
    Refusal(
        "experts and EP", "arguments: its words",
        ("--num-experts", "3", "--expert-model-parallel-size", "2"),
        "Number of experts should be a multiple of expert model parallel_size",
    ),
    Refusal(
        "pattern of layers", "gpt_layer_specs: `Invalid length of moe_layer_pattern`",
        ("--moe-layer-freq", "[0,1,1]"),
        "moe_layer_freq has 3 entries, and num_layers = 2: give one for each layer",
    ),
    Refusal(
        "kinds of layers", "gpt_layer_specs: ValueError", ("--moe-layer-freq", "[2,2]"),
        "moe_layer_freq = [2, 2] is not allowed: 1 is a layer of experts, 0 not",
    ),
    Refusal(
        "instances of the distributed optimizer", "parallel_state: an assertion of another name",
        ("--use-distributed-optimizer", "--num-distributed-optimizer-instances", "3"),
        "num_distributed_optimizer_instances = 3 must divide data parallel x context parallel = 2",
    ),
    Refusal(
        "first stage longer than the model", "nothing: a model of 5 layers is trained",
        (*PP2, "--decoder-first-pipeline-num-layers", "5"),
        "num_layers = 2 less decoder_first_pipeline_num_layers = 5 leaves -3 layers for 1 of the "
        "pipeline_model_parallel_size = 2 stages",
    ),
    Refusal(
        "chunks of a stage", "transformer_block: its words",
        (*PP2, "--num-layers", "4", "--num-virtual-stages-per-pipeline-rank", "3"),
        "a stage of 2 layers has no 3 chunks of equal size",
    ),
    Refusal(
        "micro-batches of an interleaved pipeline", "schedules: `The remainder of M ...`",
        (*PP2, "--num-layers", "4", "--num-layers-per-virtual-pipeline-stage", "1",
         "--global-batch-size", "6"),
        "global_batch_size = 6 is 3 micro-batches of micro_batch_size = 2",
    ),
    Refusal(
        "pipeline layout without a loss", "its words",
        (*PP2, "--pipeline-model-parallel-layout", "Ett|"), "The last layer must be loss",
    ),
    Refusal(
        "batch and replicas", "arguments: its words", ("--global-batch-size", "6"),
        "global_batch_size (6) must be divisible by",
    ),
    Refusal(
        "retired flag", "nothing: exit status 0, no step", ("--checkpoint-activations",),
        "checkpoint_activations is no longer read: pass --recompute-activations",
    ),
    Refusal(
        "name of no backend", "argparse lets the KeyError through",
        ("--attention-backend", "fastest"), "--attention-backend: 'fastest' is none of its values",
    ),
)  # fmt: skip

SCHEDULE = (
    Refusal(
        "WSD without its decay",
        "optimizer_param_scheduler: `assert self.wsd_decay_steps is not None`",
        ("--lr-decay-style", "WSD"),
        "lr_decay_style = 'WSD' needs lr_wsd_decay_iters",
    ),
    Refusal(
        "warm-up from above", "optimizer_param_scheduler: `assert self.init_lr <= self.max_lr`",
        ("--lr-warmup-init", "1"), "lr_warmup_init = 1.0 must not be above lr = 0.003",
    ),
    Refusal(
        "rate below its least", "arguments: an assertion without words", ("--lr", "1e-5"),
        "min_lr = 0.0003 must not be above lr = 1e-05",
    ),
    Refusal(
        "warm-up as long as the decay", "optimizer_param_scheduler: an assertion without words",
        ("--lr-warmup-iters", "20"), "lr_warmup_iters = 20 must be fewer than lr_decay_iters = 20",
    ),
    Refusal(
        "weight decay that falls", "optimizer_param_scheduler: `assert self.end_wd >= ...`",
        ("--weight-decay-incr-style", "linear", "--start-weight-decay", "0.1",
         "--end-weight-decay", "0.01"),
        "needs start_weight_decay = 0.1 and a no lower end_weight_decay = 0.01",
    ),
    Refusal(
        "bounds of a constant weight decay", "arguments: an assertion without words",
        ("--start-weight-decay", "0.1"), "start_weight_decay = 0.1 is for weight_decay_incr_style",
    ),
    Refusal(
        "two schedules", "optimizer_param_scheduler: its words",
        ("--use-checkpoint-opt-param-scheduler", "--override-opt-param-scheduler"),
        "use_checkpoint_opt_param_scheduler and override_opt_param_scheduler are both given",
    ),
    Refusal(
        "phases without their end", "training: TypeError", ("--phase-transition-iterations", "1"),
        "phase_transition_iterations = '1' needs train_samples",
    ),
    Refusal(
        "phases in words", "int(): a ValueError without a name",
        ("--phase-transition-iterations", "one,two"),
        "phase_transition_iterations = 'one,two' must be whole numbers with commas between",
    ),
    Refusal(
        "all of validation", "training, after the last step: TypeError", ("--full-validation",),
        "full_validation = True alone fails",
    ),
    Refusal(
        "iterations and samples", "arguments: its words", ("--train-samples", "16"),
        "expected iteration-based training",
    ),
)  # fmt: skip

TEN, ONE = "DATA/ten_text_document", "DATA/one_text_document"
A, B = "DATA/a_text_document", "DATA/b_text_document"
DATASETS = (
    Refusal(
        "validation of no document", "gpt_dataset: counts epochs of no token for ever",
        ("--split", "990,10,0", "--eval-iters", "1"),
        "DATA/ten_text_document has 10 documents, of which split = '990,10,0' leaves none for "
        "validation: give --split 90,10,0, or --eval-iters 0",
        LOAD, data=(TEN,),
    ),
    Refusal(
        "validation of one document's data", "gpt_dataset: counts for ever",
        ("--split", "950,50,0", "--eval-iters", "1"),
        "has 1 document, of which split = '950,50,0' leaves none for validation: give "
        "--eval-iters 0, for there is no validation without two",
        LOAD, data=(ONE,),
    ),
    Refusal(
        "test of no document, Megatron's own split", "gpt_dataset: counts for ever",
        ("--eval-iters", "1"), "leaves none for validation: give --split 90,10,0, or",
        LOAD, data=(TEN,),
    ),
    Refusal(
        "training on no document", "gpt_dataset: counts for ever",
        ("--split", "10,990,0"), "leaves none for training: give --split 90,10,0",
        LOAD, data=(TEN,),
    ),
    Refusal(
        "validation without a share", "training, at the first evaluation: TypeError",
        ("--split", "100,0,0", "--eval-iters", "1"),
        "split = '100,0,0' gives validation no share, and eval_iters = 1: give --split 90,10,0, or "
        "--eval-iters 0",
        LOAD, data=(A,),
    ),
    Refusal(
        "one dataset of a blend without validation", "gpt_dataset: counts for ever",
        ("--split", "950,50,0", "--eval-iters", "1"), "DATA/one_text_document has 1 document",
        LOAD, data=("0.5", A, "0.5", ONE),
    ),
    Refusal(
        "a split of words", "blended_megatron_dataset_config: ZeroDivisionError",
        ("--split", "most,some,none"), "split = 'most,some,none' must be one to three numbers",
        LOAD, data=(A,),
    ),
)  # fmt: skip

RESUMED = ("--load", "RUN", "--train-iters", "4")
CHOSEN = ("--load", "CHOSEN", "--train-iters", "4")
CHECKPOINTS = (
    Refusal(
        "another learning rate", "optimizer: `Could not find parameter group with key ...`",
        (*RESUMED, "--lr", "1e-3"),
        "lr makes 0.001, and the checkpoint was trained with 0.003: pass "
        "--override-opt-param-scheduler to go on by this run's flags, or "
        "--use-checkpoint-opt-param-scheduler to keep the checkpoint's",
        LOAD,
    ),
    Refusal(
        "another least rate", "optimizer: `Could not find parameter group with key ...`",
        (*RESUMED, "--min-lr", "1e-4"), "min_lr makes 0.0001, and the checkpoint was trained with "
        "0.0003: pass --override", LOAD,
    ),
    Refusal(
        "a longer cosine", "optimizer_param_scheduler: `class input value ... do not match`",
        (*RESUMED, "--lr-decay-iters", "40"),
        "lr_decay_iters (train_iters, where it is not given) makes 320 samples (steps x "
        "global_batch_size), and the checkpoint was trained with 160: pass --override",
        LOAD,
    ),
    Refusal(
        "another warm-up", "optimizer_param_scheduler: `class input value ... do not match`",
        (*RESUMED, "--lr-warmup-iters", "1"), "lr_warmup_iters makes 8 samples", LOAD,
    ),
    Refusal(
        "another weight decay", "optimizer_param_scheduler: `class input value ... do not match`",
        (*RESUMED, "--weight-decay", "0.2"),
        "weight_decay makes 0.2, and the checkpoint was trained with 0.1", LOAD,
    ),
    Refusal(
        "another shape of decay", "optimizer_param_scheduler: `class input value ...`",
        (*RESUMED, "--lr-decay-style", "linear"), "lr_decay_style makes linear", LOAD,
    ),
    Refusal(
        "another choice of neurons", "nothing: another model goes on from its weights",
        (*CHOSEN, *MONE, "--mone-neuron-ratio", "0.5"),
        "was trained with mone_neurons_per_token = 12, this run has mone_neurons_per_token = 24: "
        "give what it was trained with, or --mone-change-choice to go on with another choice",
        LOAD,
    ),
    Refusal(
        "no choice where there was one", "by its keys, nothing: a model that keeps every neuron",
        CHOSEN, "holds experts that choose neurons (mone_neurons_per_token = 12), this run has no "
        "mone_* field and would keep every one", LOAD,
    ),
    Refusal(
        "another model", "checkpointing: assertions, or sizes that differ",
        (*RESUMED, "--hidden-size", "64"), "holds a model with hidden_size = 32", LOAD,
    ),
)  # fmt: skip

ON_A_RANK = (
    Refusal(
        "one rank alone fails", "whatever it raises; the others hang in a collective", (),
        "KeyError: no 'of rank 1 alone'", NET, prepare=_fail_on_rank_1,
    ),
    Refusal(
        "no checkpoint where one must be", "nothing: exit status 0, no step",
        ("--load", "TMP/none", "--exit-on-missing-checkpoint"),
        "Megatron ended before the first step: no checkpoint is in load = TMP/none", LOAD,
    ),
    Refusal(
        "fp16 from a scale of 0", "grad_scaler: `assert initial_scale > 0.0`",
        ("--fp16", "--initial-loss-scale", "0"),
        "AssertionError: assert initial_scale > 0.0, where initial_scale = 0.0: most likely", NET,
    ),
    Refusal(
        "coefficients of one balance loss", "router: TypeError",
        ("--moe-aux-loss-coeff", "0.1", "0.2"),
        "'>' not supported between instances of 'list' and 'int': most likely of", NET,
    ),
    Refusal(
        "two dtypes", "arguments: an assertion without words", ("--fp16", "--bf16"),
        "AssertionError: assert not args.bf16, where bf16 = True",
    ),
    Refusal(
        "an external loader", "TypeError", ("--dataloader-type", "external"),
        "dataloader_type = 'external' takes batches from a script of one's own",
    ),
)  # fmt: skip

OPTIONS = (
    Refusal(
        "a fused router without Transformer Engine", "router: ValueError",
        ("--moe-router-fusion",), "transformer-engine", LOAD,
    ),
    Refusal(
        "experts over tensor parallel ranks alone", "moe_layer: ValueError in the forward pass",
        ("--tensor-model-parallel-size", "2", "--expert-tensor-parallel-size", "2"),
        "--sequence-parallel",
    ),
    Refusal(
        "Muon, sharded in fp32", "AttributeError: get_loss_scale",
        ("--optimizer", "muon", "--use-distributed-optimizer"), "--bf16",
    ),
    Refusal(
        "stages under Megatron FSDP", "mcore_fsdp_adapter: EinopsError",
        (*SHARDED, *PP2), "does not go with use_megatron_fsdp = True",
    ),
    Refusal(
        "checkpoints of whole weights under Megatron FSDP",
        "fsdp_dtensor_checkpoint: AttributeError at the first save",
        (*SHARDED, "--data-parallel-sharding-strategy", "no_shard", "--save", "TMP/save"),
        "does not go with data_parallel_sharding_strategy = 'no_shard'",
    ),
    Refusal(
        "checkpoints of FSDP2", "optimizer: KeyError at the first save",
        ("--use-torch-fsdp2", "--save", "TMP/save"), "does not go with use_torch_fsdp2 = True",
        by=LOAD,
    ),
    Refusal(
        "weights alone under Megatron FSDP", "distrib_optimizer: NotImplementedError",
        (*SHARDED, "--bf16", "--load", "RUN", "--finetune"),
        "weights without their optimizer in 16 bits",
    ),
    Refusal(
        "a flag that another script reads", "nothing: it has no effect", ("--sft",),
        "pretrain_gpt.py",
    ),
)  # fmt: skip

CASES: tuple[Refusal, ...] = (
    *SIZES, *LAYOUT, *SCHEDULE, *DATASETS, *CHECKPOINTS, *OPTIONS, *ON_A_RANK,
)  # fmt: skip
