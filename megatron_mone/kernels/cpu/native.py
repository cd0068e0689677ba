"""The native kernels seen from Python: C structures, the loaded library, tensors as arguments.

Every pointer handed over comes from a tensor whose dtype, shape and strides were checked by the
caller in `products.py` and `backend.py`. Calls release the interpreter lock.
"""

import ctypes
import os
import platform
from collections.abc import Sequence
from ctypes import POINTER, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from megatron_mone.common.places import IS_CHECKOUT, user_cache
from megatron_mone.kernels.cpu import build

INTERFACE_VERSION = 11
INSTRUCTION_SETS = tuple(build.VARIANTS.get(platform.machine(), ()))
SET_ENV = "MONE_KERNEL_SET"
"""Names the instruction set that runs instead of the best one: avx2 on a processor with AVX-512."""
# kernels.h
BLOCK, TILE = 16, 512  # neurons of a block of a mask of blocks, rows of a tile of its lists
FEW_ROWS = 64  # most rows of an expert in the kernels for few rows
WIDEST_VECTOR = 16  # floats, as many as a cache line has
ACTIVATION_CODES = {"silu": 0, "sigmoid": 1, "gelu": 2, "relu": 3, "squared_relu": 4}


def padded(floats: int) -> int:
    """So many floats rounded up to whole vectors, and so to cache lines, which no threads share."""
    return -(-floats // WIDEST_VECTOR) * WIDEST_VECTOR


class _Shape(ctypes.Structure):
    _fields_ = (
        ("row_start", c_void_p),
        ("experts", c_int64),
        ("rows", c_int64),
        ("neurons", c_int64),
        ("hidden", c_int64),
        ("threads", c_int64),
    )


class _Mask(ctypes.Structure):
    _fields_ = (("idx", c_void_p), ("offsets", c_void_p), ("idx_bytes", c_int64))


class _Matrix(ctypes.Structure):
    _fields_ = (
        ("data", c_void_p),
        ("expert_stride", c_int64),
        ("row_stride", c_int64),
        ("is_bf16", c_int64),
        ("adds", c_int64),
    )


class _Runs(ctypes.Structure):
    _fields_ = tuple((name, c_void_p) for name in ("from", "starts", "rows", "lengths", "neuron_K"))


class _Blocks(ctypes.Structure):
    _fields_ = (("starts", c_void_p), ("entries", c_void_p))


_S, _K, _X, _P, _I = POINTER(_Shape), POINTER(_Mask), POINTER(_Matrix), c_void_p, c_int64
_R, _B = POINTER(_Runs), POINTER(_Blocks)
_SIGNATURES = (
    ("select", (_S, _P, _I, _I, _I, _I, _P, _I, _P)),
    ("choose", (_S, _P, _I, _I, _I, _I, _P, _I, _P, _I, _P, _P)),
    ("gather", (_S, _K, _P, _P, _I)),
    ("scatter", (_S, _K, _P, _X)),
    ("runs", (_S, _K, _R)),
    ("mask_order", (_S, _K, _R, _P, _P)),
    ("sampled", (_S, _R, _X, _X, _P)),
    ("accumulate", (_S, _R, _P, _X, _P, _X, _X)),
    ("gated", (_S, _K, _R, _P, _P, _I, _P, _P)),
    ("gate_backward", (_S, _K, _R, _I, _P, _P, _P, _P, _P, _P, _P, _P, _P)),
    ("transpose", (_S, _R, _P, _P, _P, _P, _P, _P)),
    ("weight_grads", (_S, _R, _P, _P, _P, _P, _X, _X, _X)),
    ("widen", (_S, _X, _P, _I)),
    ("dense", (_S, _P, _I, _X, _X)),
    ("block_lists", (_S, _K, _B)),
    ("block_sampled", (_S, _K, _B, _P, _I, _X, _P)),
    ("block_accumulate", (_S, _K, _B, _P, _X, _P, _X, _X)),
    ("block_grads", (_S, _K, _B, _P, _P, _X, _X, _X)),
    ("few_sampled", (_S, _K, _P, _I, _X, _P)),
    ("few_accumulate", (_S, _K, _P, _X, _P, _X, _X)),
    ("few_grads", (_S, _K, _P, _P, _P, _I, _X, _X)),
    ("row_sums", (_S, _K, _P, _I, _P, _P, _P)),
    ("share_sums", (_S, _K, _P, _I, _P, _I, _P, _P, _P)),
    ("share_slopes", (_S, _K, _P, _I, _P, _P, _P, _P, _P)),
)


class Kernels(ctypes.Structure):
    """The function table of one instruction set (MoneKernels of kernels.h)."""

    _fields_ = (
        ("span", c_int64),
        ("bins", c_int64),
        *((name, ctypes.CFUNCTYPE(None, *types)) for name, types in _SIGNATURES),
    )


@cache
def load() -> ctypes.CDLL:
    """The library, built first where it is missing.

    Raises:
        build.BuildError: no library can be had here; the message says why.
    """
    path = build.build(folder=_folder())
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise build.BuildError(f"{path.name} does not load: {error}") from error
    library.mone_kernels.restype = POINTER(Kernels)
    if library.mone_interface_version() != INTERFACE_VERSION:
        raise build.BuildError(f"{path.name} has another interface than {__name__}: rebuild it")
    return library


def _folder() -> Path:
    """Where a library is kept that must be built."""
    if IS_CHECKOUT and os.access(build.FOLDER, os.W_OK):
        return build.FOLDER
    return user_cache("kernels")


@cache
def kernels(instruction_set: str | None = None) -> Kernels:
    """The kernels of one of INSTRUCTION_SETS, by default of `default_set`.

    Raises:
        ValueError: this processor cannot run that set.
        build.BuildError: as `load`.
    """
    wanted = default_set() if instruction_set is None else instruction_set
    return load().mone_kernels(_number(wanted, "instruction_set")).contents


def default_set() -> str:
    """The set that SET_ENV names, else the best that this processor runs.

    Raises:
        ValueError: SET_ENV names no set, or one that this processor cannot run.
        build.BuildError: as `load`.
    """
    named = os.environ.get(SET_ENV)
    return INSTRUCTION_SETS[_number(named, SET_ENV) if named else load().mone_best_set()]


def _number(name: str, given_as: str) -> int:
    """A set's place in INSTRUCTION_SETS, checked against the processor."""
    sets = INSTRUCTION_SETS[: load().mone_best_set() + 1]
    if name not in sets:
        raise ValueError(f"{given_as} = {name!r}: this processor runs {', '.join(sets)}")
    return sets.index(name)


@dataclass(frozen=True)
class Layout:
    """Sizes of one call and the first row of each expert."""

    counts: tuple[int, ...]
    neurons: int
    hidden: int
    threads: int

    @property
    def rows(self) -> int:
        """N."""
        return sum(self.counts)

    @lru_cache(maxsize=64)  # noqa: B019 asked for six times a call; layouts are small
    def shape(self, first: int = 0, end: int | None = None) -> _Shape:
        """Experts [first, end) for a kernel, all by default; keeps its own copy of the row starts
        alive. Kernels only read it, so that calls may share one."""
        bounds = list(accumulate(self.counts, initial=0))[first : None if end is None else end + 1]
        starts = (c_int64 * len(bounds))(*bounds)
        shape = _Shape(
            ctypes.addressof(starts),
            len(bounds) - 1,
            self.rows,
            self.neurons,
            self.hidden,
            self.threads,
        )
        shape.keep = starts
        return shape


def layout(counts: Sequence[int], neurons: int, hidden: int) -> Layout:
    """Layout on torch's own number of threads."""
    return Layout(tuple(counts), neurons, hidden, max(1, torch.get_num_threads()))


def mask(indices_K: Tensor, offsets_N1: Tensor) -> _Mask:
    """A CSR mask as an argument."""
    return _Mask(indices_K.data_ptr(), offsets_N1.data_ptr(), indices_K.element_size())


def matrix(tensor: Tensor, adds: bool = False) -> _Matrix:
    """[rows, H] or [E, rows, H] with unit last stride, as an argument; `adds` to what it holds."""
    expert_stride = tensor.stride(0) if tensor.dim() == 3 else 0
    return _Matrix(
        tensor.data_ptr(), expert_stride, tensor.stride(-2), tensor.dtype == torch.bfloat16, adds
    )


def runs(*tables: Tensor) -> _Runs:
    """The tables of MoneRuns as an argument, in its order."""
    return _Runs(*(table.data_ptr() for table in tables))


def blocks(starts: Tensor, entries: Tensor) -> _Blocks:
    """Block lists as an argument: [tiles, F / BLOCK + 1] and [K / BLOCK, 2], int32."""
    return _Blocks(starts.data_ptr(), entries.data_ptr())


def address(tensor: Tensor | None) -> int | None:
    """Pointer of a contiguous tensor; None stays null."""
    assert tensor is None or tensor.is_contiguous()
    return None if tensor is None else tensor.data_ptr()


def element(row: int, stride: int, column: int) -> int:
    """Offset of an element as the kernels compute it, in 64 bits."""
    function = load().mone_element
    function.argtypes, function.restype = (c_int64,) * 3, c_int64
    return function(row, stride, column)
