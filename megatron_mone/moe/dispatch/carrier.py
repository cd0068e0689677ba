"""MaskCarrier: a token dispatcher that carries a neuron mask with each routed (token, expert) pair.

A mask given before dispatch arrives at the expert in the row order of the tokens, bit-packed on the
wire, and is cut there to the neurons that this expert-tensor rank holds. A mask chosen by the
experts goes back the same way (`return_mask`), to be recorded. May touch: NeuronMask.

Shapes: N rows, B = ceil(F / 8) bytes of a packed row, F neurons of a whole expert, T tokens of this
rank, E experts in all, E_l of them here, R source ranks of the expert group (ETP x EP).
"""

from collections.abc import Sequence

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_mone.config import MoNEConfig
from megatron_mone.kernels.neuron_bits import pack_bits
from megatron_mone.kernels.neuron_mask import NeuronMask
from megatron_mone.moe.padding import mark_padding


def predicted_mask_bytes(rows: int, num_neurons: int) -> int:
    """Bytes of `rows` packed mask rows over `num_neurons` neurons (F): rows * ceil(F / 8).

    With `rows` the rows a rank sends to other ranks, counted once per receiver, this is what
    `bytes_carried` grows by.
    """
    return rows * ((num_neurons + 7) // 8)


class MaskCarrier(MoETokenDispatcher):
    """What the dispatchers share: the mask on its way, and the count of its bytes.

    Attributes:
        bytes_carried: mask bytes this rank has sent to other ranks since the dispatcher was made;
            a row gathered by P ranks is sent P - 1 times.
    """

    config: MoNEConfig
    tp_rank: int
    tp_size: int
    hidden_shape: torch.Size

    bytes_carried: int = 0
    _bits_NB: Tensor | None = None  # on its way: from set_mask to dispatch_postprocess
    _arrived_NB: Tensor | None = None  # from dispatch_postprocess to take_mask

    def set_mask(self, bits_NB: Tensor | None) -> None:
        """Give the masks of the next dispatch; to be called before `dispatch_preprocess`.

        The mask serves one dispatch. Every rank of the expert group (ETP x EP) sets one, be it of
        no rows, or none does: carrying it is a collective.

        Args:
            bits_NB: [N, ceil(F / 8)] uint8 as `NeuronMask.pack` gives it, over the whole expert's F
                neurons (`moe_ffn_hidden_size`), on the tokens' device, bits beyond neuron F - 1
                being 0, which nothing but a CPU is asked for; None to carry nothing. One
                row per True of this rank's `routing_map` ([T, E]), expert-major and tokens
                ascending: for every expert e in 0..E-1, for every t with routing_map[t, e]. That is
                the order of Megatron's `permute`, and the same for both dispatchers.

        Raises:
            ValueError: a shape or type that is not such rows, or a captured dispatcher. The number
                of rows is checked in `dispatch_preprocess`, where the routing is known.
        """
        self._arrived_NB = None
        self._bits_NB = None
        if bits_NB is None:
            return
        if self.config.cuda_graph_impl != "none":
            raise ValueError(
                f"cuda_graph_impl = {self.config.cuda_graph_impl!r}: a captured dispatcher would "
                "not see a new mask; use 'none' where masks are carried"
            )
        width = predicted_mask_bytes(1, self._num_neurons)
        if bits_NB.dtype != torch.uint8 or bits_NB.dim() != 2 or bits_NB.shape[1] != width:
            raise ValueError(
                f"bits_NB is {bits_NB.dtype} of shape {tuple(bits_NB.shape)}: masks over "
                f"moe_ffn_hidden_size = {self._num_neurons} neurons are packed as "
                f"[N, {width}] torch.uint8"
            )
        self._bits_NB = bits_NB.detach()

    def take_mask(self) -> NeuronMask | None:
        """The mask of the rows this rank's experts got, in row order, and forget it.

        To be called after `dispatch_postprocess`. Neurons count from 0 within this rank's part of
        the expert (F / ETP). Rows that Megatron padded keep no neuron. None where no mask was set.

        Raises:
            ValueError: a bit set beyond neuron F - 1 (of bits on the CPU: a GPU is not waited for),
                or an ETP size that does not divide F.
        """
        bits_NB, self._arrived_NB = self._arrived_NB, None
        if bits_NB is None:
            return None
        return NeuronMask.unpack(bits_NB, self._num_neurons).shard(self.tp_rank, self.tp_size)

    def mark_padding(self, probs: Tensor, padding_T: Tensor) -> Tensor:
        """Mark the tokens of the next dispatch that are padding; see padding.py.

        Args:
            probs: [T, E], for `dispatch_preprocess`.
            padding_T: [T] bool.
        """
        return mark_padding(probs, padding_T)

    def rows_on_device(self, tokens_per_expert: Tensor) -> Tensor:
        """[E_l] int64 rows per local expert on the tokens' device, without waiting for it.

        Args:
            tokens_per_expert: the same, of `dispatch_postprocess`, which Megatron may have brought
                to the host.
        """
        raise NotImplementedError(f"{type(self).__name__} keeps no counts on its device")

    def rows_by_source(self, tokens_per_expert: Tensor) -> Tensor:
        """Where the rows of the last dispatch came from; waits for no device.

        To be called between `dispatch_postprocess` and `combine_preprocess`, for flex by all ranks
        of the expert group.

        Args:
            tokens_per_expert: [E_l] rows per local expert, of `dispatch_postprocess`.

        Returns:
            [E_l, R] int64 on the tokens' device: row blocks in the order they stand in the
            dispatched tensor, expert-major, sources in the order of SourceMap.

        Raises:
            ValueError: a padding whose row layout is not known here.
        """
        raise NotImplementedError(f"{type(self).__name__} does not tell where rows came from")

    def return_mask(self, mask: NeuronMask, routing_map: Tensor) -> Tensor:
        """Bring the masks of this rank's expert rows back to the ranks their tokens came from.

        A collective of the expert group, to be called between `dispatch_postprocess` and
        `token_combine`.

        Args:
            mask: over F / ETP neurons, one row for each row of `dispatch_postprocess`.
            routing_map: [T, E] as it was given to `dispatch_preprocess`.

        Returns:
            [N, ceil(F / 8)] uint8, packed, in the row order of `set_mask`. A pair that a capacity
            dropped keeps no neuron.

        Raises:
            NotImplementedError: a dispatcher that has no such way back.
        """
        raise NotImplementedError(f"{type(self).__name__} does not bring masks back")

    def _pack_whole(self, mask: NeuronMask) -> Tensor:
        """[N, ceil(F / 8)]: the neurons of this expert-tensor rank in place, the others 0."""
        if self.tp_size == 1:
            return mask.pack().contiguous()
        width = mask.num_neurons
        first = self.tp_rank * width
        beyond = self._num_neurons - first - width
        if not width % 8:
            return torch.nn.functional.pad(mask.pack(), (first // 8, beyond // 8))
        return pack_bits(torch.nn.functional.pad(mask.to_bool(), (first, beyond)))

    def _start(self) -> Tensor | None:
        """The mask of the dispatch that begins now."""
        bits_NB, self._bits_NB, self._arrived_NB = self._bits_NB, None, None
        return bits_NB

    @property
    def _num_neurons(self) -> int:
        return self.config.moe_ffn_hidden_size

    def _gather(self, bits_NB: Tensor, group: ProcessGroup, rows_R: Sequence[int]) -> Tensor:
        """The rows of all ranks of `group` in rank order; rank r holds `rows_R[r]` rows."""
        self._count(bits_NB.shape[0] * (group.size() - 1))
        equal = len(set(rows_R)) == 1
        with torch.no_grad():
            return gather_from_sequence_parallel_region(
                bits_NB.contiguous(),
                group=group,
                output_split_sizes=None if equal else list(rows_R),
            )

    def _count(self, rows: int) -> None:
        self.bytes_carried += predicted_mask_bytes(rows, self._num_neurons)


def check_rows(bits_NB: Tensor, routed: int) -> None:
    """Raise a ValueError unless `bits_NB` has a row for each of the `routed` pairs."""
    if bits_NB.shape[0] != routed:
        raise ValueError(
            f"bits_NB has {bits_NB.shape[0]} rows: the routing map holds {routed} routed pairs of "
            "a token and an expert, and each needs a row"
        )
