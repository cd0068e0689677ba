"""Attention over packed documents, of a trace that took each sample for one.

What is kept and moved does not depend on where documents end; which pairs of positions attention
multiplies does: of t positions in documents of L tokens each, t L in place of t t. May touch:
nothing.
"""

from dataclasses import replace

from megatron_mone.planning.tracing.job_facts import JobFacts
from megatron_mone.planning.tracing.trace import Op, Trace


def with_documents(facts: JobFacts, tokens: int | None) -> JobFacts:
    """The facts of a job whose documents are of another length.

    Args:
        facts: of the job.
        tokens: of each document; None: as the facts have it.

    Raises:
        ValueError: documents are not packed, or none so long goes into a sample.
    """
    if tokens is None:
        return facts
    if not facts.document_tokens:
        raise ValueError(
            f"--document-tokens {tokens} says nothing of a job without packed documents: leave it "
            "out, or set dataloader_inter_document_masking: true"
        )
    if not 1 <= tokens <= facts.seq_length:
        raise ValueError(
            f"--document-tokens {tokens} must be from 1 to seq_length = {facts.seq_length}"
        )
    change = facts.score_flops_per_step * (tokens - facts.document_tokens) / facts.seq_length
    names = ("model_flops_per_step", "executed_flops_per_step", "active_flops_per_step")
    flops = {name: getattr(facts, name) + change for name in names}
    return replace(facts, document_tokens=tokens, **flops)


def in_documents(trace: Trace, facts: JobFacts) -> Trace:
    """A trace with the products of attention that its documents have; without packed ones the same.

    Args:
        trace: of one micro-batch.
        facts: of the job.
    """
    if not facts.document_tokens:
        return trace
    return replace(trace, ops=tuple(_in_documents(op, facts.document_tokens) for op in trace.ops))


def _in_documents(op: Op, tokens: int) -> Op:
    if not op.name.startswith("fused.attention"):
        return op
    positions = op.inputs[0][0]
    # What the kernel sees: as many sequences as there are documents.
    each = tuple((tokens, shape[0] * shape[1] // tokens, *shape[2:]) for shape in op.inputs[:3])
    return replace(
        op, inputs=(*each, *op.inputs[3:]), flops=op.flops * tokens // max(tokens, positions)
    )
