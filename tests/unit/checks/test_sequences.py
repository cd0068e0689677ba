"""Packed documents and the exchanges of context parallelism, refused where they cannot be cut."""

from argparse import Namespace

import pytest
import torch

from megatron_mone.cpu_emulation.attention import document_mask
from megatron_mone.model.checks import layout

FITS = {
    "dataloader_inter_document_masking": False, "context_parallel_size": 2, "num_layers": 2,
    "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "micro_batch_size": 2,
    "cp_comm_type": ["p2p"], "hierarchical_context_parallel_sizes": None,
    "multi_latent_attention": False, "group_query_attention": False, "num_attention_heads": 4,
    "num_query_groups": 4,
}  # fmt: skip


def check(**changed):
    args = Namespace(**{**FITS, **changed})
    layout._check_packing(args)
    layout._check_context_parallel(args)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"dataloader_inter_document_masking": True}, "context_parallel_size = 2 does not go with"),
        (
            {"dataloader_inter_document_masking": True, "context_parallel_size": 1,
             "pipeline_model_parallel_size": 2},
            "micro_batch_size = 2 .* parallel = 2: .* --micro-batch-size 1",
        ),
        ({"cp_comm_type": ["ring"]}, "cp_comm_type = 'ring' must be one of p2p, "),
        ({"cp_comm_type": ["a2a+p2p"]}, "'a2a[+]p2p' needs hierarchical_context_parallel_sizes"),
        (
            {"cp_comm_type": ["a2a"], "group_query_attention": True, "num_query_groups": 1},
            "cp_comm_type = 'a2a' gives heads to ranks: 1 of them",
        ),
        ({"cp_comm_type": ["p2p"] * 3}, "cp_comm_type has 3 entries, and num_layers = 2"),
    ],
)  # fmt: skip
def test_refused_in_a_line(changed, says):
    with pytest.raises(ValueError, match=says) as error:
        check(**changed)
    assert "\n" not in str(error.value)


def test_taken():
    check()
    check(cp_comm_type=["a2a", "all_gather"])
    check(context_parallel_size=4, cp_comm_type=["a2a+p2p"],
          hierarchical_context_parallel_sizes=[2, 2])  # fmt: skip
    packed = {"dataloader_inter_document_masking": True, "context_parallel_size": 1}
    check(**packed)
    check(**packed, micro_batch_size=1, tensor_model_parallel_size=2)


def test_a_query_sees_what_came_before_it_in_its_document():
    seen = ~document_mask(torch.tensor([0, 2, 3]), 5)[0, 0]
    wanted = [[0], [0, 1], [2], [3], [3, 4]]
    assert [row.nonzero().flatten().tolist() for row in seen] == wanted
