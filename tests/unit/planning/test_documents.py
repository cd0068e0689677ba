"""Packed documents: a trace took a sample for one, attention's products are those of many."""

from dataclasses import replace

import pytest

from megatron_mone.common.phases import ATTENTION, FORWARD
from megatron_mone.planning.composed import scaled_facts
from megatron_mone.planning.cost.documents import in_documents, with_documents
from megatron_mone.planning.cost.prediction import predict
from megatron_mone.planning.cost.roofline import operation
from megatron_mone.planning.tracing.trace import Op
from tests.training_cases import MOCK, TINY
from tests.unit.planning.made_jobs import CLUSTER, EXACT, facts, product, trace
from tests.unit.planning.parsed_jobs import parsed

T, N, D, L = 128, 4, 16, 32
PACKED = facts(document_tokens=L, seq_length=T, score_flops_per_step=1e15)


def attention(tokens, documents=1):
    """Causal, forward: two products of half the pairs of every document."""
    shape = (tokens, documents, N, D)
    pairs = documents * N * tokens * tokens // 2
    return Op("fused.attention", (shape,) * 3, (shape,), "bfloat16", 3 * 4096, 4096,
              2 * 2 * pairs * D, ATTENTION, FORWARD)  # fmt: skip


def test_attention_has_the_pairs_of_every_document_and_moves_what_it_moved():
    whole = trace(attention(T), product(3))
    packed, other = in_documents(whole, PACKED).ops
    assert operation(packed) == operation(attention(L, T // L))
    assert packed.bytes_read == whole.ops[0].bytes_read
    assert other == whole.ops[1]
    assert in_documents(whole, facts(seq_length=T)) is whole
    one = trace(attention(T))
    shorter, longer = (
        predict({(0, 0): one, (1, 0): one}, replace(PACKED, document_tokens=tokens), CLUSTER, EXACT)
        for tokens in (L // 2, L)
    )
    assert longer.executed_flops == pytest.approx(2 * shorter.executed_flops)


def test_another_length_changes_the_models_operations_too():
    found = with_documents(PACKED, 2 * L)
    assert found.document_tokens == 2 * L
    for name in ("model_flops_per_step", "executed_flops_per_step", "active_flops_per_step"):
        assert getattr(found, name) == getattr(PACKED, name) + 1e15 * L / T
    assert with_documents(PACKED, None) is PACKED
    wider = scaled_facts(PACKED, 2 * PACKED.world_size)
    assert wider.score_flops_per_step == 2 * PACKED.score_flops_per_step


@pytest.mark.parametrize(
    ("of", "tokens", "wanted"),
    [
        (facts(), 8, "without packed documents: leave it out"),
        (PACKED, 0, f"must be from 1 to seq_length = {T}"),
        (PACKED, T + 1, f"must be from 1 to seq_length = {T}"),
    ],
)
def test_a_length_that_cannot_be_is_one_line(of, tokens, wanted):
    with pytest.raises(ValueError, match=rf"--document-tokens {tokens} .*{wanted}") as failure:
        with_documents(of, tokens)
    assert "\n" not in str(failure.value)


def test_the_models_operations_are_megatrons_own_of_such_documents(monkeypatch):
    from megatron.training.training import num_floating_point_operations

    from megatron_mone.planning.tracing import job_facts

    monkeypatch.setattr(job_facts, "DOCUMENT_TOKENS", 8)
    flags = [*TINY, *MOCK, "--dataloader-inter-document-masking"]
    args, config = parsed(monkeypatch, flags, 1)
    batch, length = args.global_batch_size, args.seq_length
    for tokens in (8, 16, length):
        found = with_documents(job_facts.job_facts(args, config), tokens)
        expected = num_floating_point_operations(
            args, batch, batch * length * tokens, batch * length
        )
        assert found.model_flops_per_step == pytest.approx(expected, rel=1e-9)
