"""Device functions: a row's mask as 32-bit words, and where its kept entries stand.

Neuron j is bit j % 32 of word j // 32, lowest first. A kept entry's place among its row's is the
base of its word, which is the number of bits set before it, plus the bits below it in the word.
Plain arithmetic for the popcount: libdevice's does not run in the interpreter.
"""

import triton
import triton.language as tl


@triton.jit
def popcount(word):
    """Bits set in each int32."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return (word + (word >> 8) + (word >> 16) + (word >> 24)) & 0x3F


@triton.jit
def bits_of(word, lane):
    """Whether bit `lane` is set, as int32 0 or 1."""
    return (word >> lane) & 1


@triton.jit
def rank_of(word, lane):
    """Bits set below bit `lane`."""
    return popcount(word & ((1 << lane) - 1))


@triton.jit
def pack(keep, WORDS: tl.constexpr):
    """[WORDS * 32] int32 0 or 1 -> [WORDS] int32."""
    lane = tl.arange(0, 32)[None, :]
    return tl.sum(keep.reshape(WORDS, 32) << lane, axis=1)


@triton.jit
def word_bases(words, WORDS: tl.constexpr):
    """[WORDS] bits set before each word of a row."""
    counts = popcount(words)
    return tl.cumsum(counts, axis=0) - counts
