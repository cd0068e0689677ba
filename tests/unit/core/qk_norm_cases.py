"""A norm over all heads on some ranks, each with its part of the heads."""

from pathlib import Path

QUERIES, GROUPS, SIZE = 8, 2, 6


def norm_parts(folder: str) -> None:
    """Of q.pt and k.pt, whole x [S, B, heads, SIZE], weight and the output's gradient: this rank's
    output, gradient of x and of the weight, with the number of its first head, to q-RANK.pt."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_mone import cpu_emulation

    cpu_emulation.install()
    from megatron_mone.model.qk_norm import AllHeadsNorm

    torch.distributed.init_process_group("gloo")
    ranks = torch.distributed.get_world_size()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=ranks)
    rank = torch.distributed.get_rank()
    config = TransformerConfig(
        num_layers=1, hidden_size=QUERIES * SIZE, num_attention_heads=QUERIES,
        num_query_groups=GROUPS, tensor_model_parallel_size=ranks,
    )  # fmt: skip
    for kind, heads in (("q", QUERIES), ("k", GROUPS)):
        norm = AllHeadsNorm(kind, config=config, hidden_size=SIZE, eps=1e-2)
        x, weight, gradient = torch.load(Path(folder) / f"{kind}.pt")
        first, count = rank * heads // ranks, max(1, heads // ranks)
        mine = x[:, :, first : first + count].clone().requires_grad_()
        norm.weight.data.copy_(weight)
        y = norm(mine)
        share = max(1, ranks // heads)  # ranks of the same key each have part of its gradient
        y.backward(gradient[:, :, first : first + count] * (1 + rank % share) / share)
        found = first, y.detach(), mine.grad, norm.weight.grad
        torch.save(found, Path(folder) / f"{kind}-{rank}.pt")
