// Exact top-S of |gate| per row and group, and moving kept entries in and out of dense rows.
#pragma once

namespace {

constexpr int32_t kInfinity = 0x7f800000;

// |gate| of one row as float32 bits: the bits without the sign.
inline void magnitudes(const void* gate, int64_t first, int64_t bytes, int64_t width,
                       int32_t* keys) {
    if (bytes == 2) {
        const uint16_t* half = static_cast<const uint16_t*>(gate) + first;
        for (int64_t j = 0; j < width; ++j) keys[j] = (half[j] & 0x7fff) << 16;
    } else {
        const int32_t* bits = static_cast<const int32_t*>(gate) + first;
        for (int64_t j = 0; j < width; ++j) keys[j] = bits[j] & 0x7fffffff;
    }
}

typedef float __attribute__((may_alias)) LooseFloat;

// Adds the halves of each block of 2 W floats; out[b][i] = in[b][i] + in[b][W + i], in place.
template <int64_t W>
inline void add_halves(LooseFloat* values, int64_t count) {
    for (int64_t b = 0; b < count; ++b) {
        float sums[W];
        for (int64_t i = 0; i < W; ++i) sums[i] = values[2 * W * b + i] + values[2 * W * b + W + i];
        std::memcpy(values + W * b, sums, sizeof sums);
    }
}

// The first step where `block` is no power of two: block b becomes `half` values, the largest power
// of two below it, as if zeros filled its second half up.
inline void add_padded_halves(LooseFloat* values, int64_t count, int64_t block, int64_t half) {
    for (int64_t b = 0; b < count; ++b) {
        for (int64_t i = 0; i < block - half; ++i)
            values[half * b + i] = values[block * b + i] + values[block * b + half + i];
        for (int64_t i = block - half; i < half; ++i)
            values[half * b + i] = values[block * b + i];
    }
}

// Sums of adjacent blocks of magnitudes, halves first: the order is part of the definition
// (block_scores of neuron_selection.py).
inline void sum_blocks(int32_t* keys, int64_t width, int64_t block) {
    LooseFloat* values = reinterpret_cast<LooseFloat*>(keys);
    const int64_t count = width / block;
    int64_t below = 1;  // the largest power of two below `block`
    while (2 * below < block) below *= 2;
    if (2 * below != block) {
        add_padded_halves(values, count, block, below);
        block = below;
    }
    for (int64_t half = block / 2; half >= 16; half /= 2)
        for (int64_t b = 0; b < count; ++b)
            for (int64_t i = 0; i < half; ++i)
                values[half * b + i] = values[2 * half * b + i] + values[2 * half * b + half + i];
    if (block >= 16) add_halves<8>(values, count);
    if (block >= 8) add_halves<4>(values, count);
    if (block >= 4) add_halves<2>(values, count);
    add_halves<1>(values, count);
}

// NaN becomes infinity; returns the largest.
inline int32_t order_keys(int64_t width, int32_t* keys) {
    int32_t top = 0;
    for (int64_t j = 0; j < width; ++j) {
        keys[j] = keys[j] > kInfinity ? kInfinity : keys[j];
        top = keys[j] > top ? keys[j] : top;
    }
    return top;
}

inline int64_t count_from(const int32_t* keys, int64_t width, int32_t floor) {
    int32_t count = 0;
    for (int64_t j = 0; j < width; ++j) count += keys[j] >= floor;
    return count;
}

// The largest floor that at least `kept` keys reach; `reach` is how many reach it. It stops early at a
// floor that exactly `kept` keys reach. Probes start at `guess`, the floor of another row, go on in
// steps of about 6% that double until the floor lies between two, and then where a straight line
// between their counts says, every third time in the middle. Probes only save time.
inline int32_t find_floor(const int32_t* keys, int64_t width, int64_t kept, int32_t top,
                          int32_t guess, int64_t& reach) {
    int32_t low = 0, high = top;         // low is reached by enough keys; the answer is in [low, high]
    int64_t beyond = 0;                  // keys above high, by the last probe that said so
    int64_t step = 1 << 19, probe = guess;
    bool up = false, down = false;
    reach = width;
    for (int turn = 0; low < high && reach != kept; ++turn) {
        if (up && down && turn % 3) {
            const double share = static_cast<double>(reach - kept) / static_cast<double>(reach - beyond);
            probe = low + 1 + static_cast<int64_t>(share * (high - low));
        }
        const bool near = low < probe && probe <= high && !(up && down && turn % 3 == 0);
        const int32_t middle = near ? static_cast<int32_t>(probe) : low + (high - low) / 2 + 1;
        const int64_t count = count_from(keys, width, middle);
        if (count >= kept) {
            low = middle;
            reach = count;
            up = true;
            probe = middle + step;
        } else {
            high = middle - 1;
            beyond = count;
            down = true;
            probe = middle - step;
        }
        step *= 2;
    }
    return low;
}

#if MONE_LANES == 16 && defined(__AVX512F__)
// The first `room` of 16 values, or all of them.
inline void store_indices(int16_t* out, int64_t room, __m512i values) {
    const __m256i halves = _mm512_cvtepi32_epi16(values);
    if (room >= 16) return _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), halves);
    _mm256_mask_storeu_epi16(out, static_cast<__mmask16>((1 << room) - 1), halves);
}
inline void store_indices(int32_t* out, int64_t room, __m512i values) {
    if (room >= 16) return _mm512_storeu_si512(out, values);
    _mm512_mask_storeu_epi32(out, static_cast<__mmask16>((1 << room) - 1), values);
}

// The neurons whose keys reach `floor`, of a row without ties at it.
template <class Index>
inline void compact_all(const int32_t* keys, int64_t width, int64_t kept, int32_t floor,
                        int64_t first, Index* idx) {
    const __m512i least = _mm512_set1_epi32(floor);
    __m512i at = _mm512_add_epi32(
        _mm512_set1_epi32(static_cast<int>(first)),
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    for (int64_t j = 0; kept > 0; j += 16, at = _mm512_add_epi32(at, _mm512_set1_epi32(16))) {
        const __mmask16 row = static_cast<__mmask16>(width - j >= 16 ? 0xffff : (1 << (width - j)) - 1);
        const __mmask16 lanes =
            _mm512_mask_cmpge_epi32_mask(row, _mm512_maskz_loadu_epi32(row, keys + j), least);
        store_indices(idx, kept, _mm512_maskz_compress_epi32(lanes, at));
        idx += __builtin_popcount(lanes);
        kept -= __builtin_popcount(lanes);
    }
}
#else
template <class Index>
inline void compact_all(const int32_t* keys, int64_t width, int64_t kept, int32_t floor,
                        int64_t first, Index* idx) {
    int64_t count = 0;
    for (int64_t j = 0; count < kept; ++j) {
        idx[count] = static_cast<Index>(first + j);
        count += keys[j] >= floor;
    }
}
#endif

template <class Index>
inline void compact(const int32_t* keys, int64_t width, int64_t kept, int32_t floor, int64_t reach,
                    int64_t first, Index* idx) {
    if (reach == kept) return compact_all(keys, width, kept, floor, first, idx);
    int64_t count = 0;
    int64_t room = kept - count_from(keys, width, floor + 1);  // ties kept, from the lower index
    for (int64_t j = 0; count < kept; ++j) {
        bool tie = keys[j] == floor && room > 0;
        room -= tie;
        idx[count] = static_cast<Index>(first + j);
        count += tie || keys[j] > floor;
    }
}

// Chosen blocks as their neurons.
template <class Index>
inline void expand(const int32_t* chosen, int64_t count, int64_t block, Index* idx) {
    for (int64_t i = 0; i < count; ++i)
        for (int64_t j = 0; j < block; ++j) *idx++ = static_cast<Index>(chosen[i] * block + j);
}

// What is chosen of each row: `kept` of each of `groups` equal groups, in blocks of `block`.
struct Choice {
    int64_t kept, groups, block;
};

// Keys of a row in work space: no threads share a line of them.
inline int64_t padded_neurons(const MoneShape& s) { return blocks(s.neurons, kRowGrain) * kRowGrain; }

// idx of each row's choice. Rows give magnitudes(n, first, width, keys) of neurons [first, first +
// width) of row n, and are told chosen(n, idx of the row) while the row is near; keys is work space of
// [threads, 2 F], F up to a multiple of kRowGrain.
template <class Index, class Rows>
void choose_rows(const MoneShape& s, const Choice& of, const Rows& rows, Index* idx,
                 int32_t* keys_of_threads) {
    const int64_t width = s.neurons / of.groups, blocks = width / of.block;
    int32_t guess = 0;
#pragma omp parallel for schedule(dynamic, kRowGrain) num_threads(s.threads) firstprivate(guess)
    for (int64_t n = 0; n < s.rows; ++n) {
        int32_t* keys = keys_of_threads + element(omp_get_thread_num(), 2 * padded_neurons(s), 0);
        Index* row = idx + element(n, of.kept * of.groups, 0);
        for (int64_t g = 0; g < of.groups; ++g) {
            int64_t reach;
            Index* out = row + g * of.kept;
            rows.magnitudes(n, g * width, width, keys);
            if (of.block > 1) sum_blocks(keys, width, of.block);
            const int32_t top = order_keys(blocks, keys);
            guess = find_floor(keys, blocks, of.kept / of.block, top, guess, reach);
            if (of.block == 1) {
                compact(keys, width, of.kept, guess, reach, g * width, out);
            } else {
                int32_t* chosen = keys + s.neurons;
                compact(keys, blocks, of.kept / of.block, guess, reach, g * blocks, chosen);
                expand(chosen, of.kept / of.block, of.block, out);
            }
        }
        rows.chosen(n, row);
    }
}

// Gates that are there: [rows, F] of `bytes` an element.
struct GateRows {
    const void* gate;
    int64_t bytes, neurons;

    void magnitudes(int64_t n, int64_t first, int64_t width, int32_t* keys) const {
        ::magnitudes(gate, element(n, neurons, first), bytes, width, keys);
    }
    template <class Index>
    void chosen(int64_t, const Index*) const {}
};

template <class Index, class Value>
void gather_rows(const MoneShape& s, const MoneMask& m, const Value* dense, Value* out_K) {
    const Index* idx = static_cast<const Index*>(m.idx);
#pragma omp parallel for schedule(dynamic, kRowGrain) num_threads(s.threads)
    for (int64_t n = 0; n < s.rows; ++n) {
        const Value* row = dense + element(n, s.neurons, 0);
        for (int64_t k = m.offsets[n]; k < m.offsets[n + 1]; ++k) out_K[k] = row[idx[k]];
    }
}

template <class Index>
void scatter_rows(const MoneShape& s, const MoneMask& m, const float* values_K, MoneMatrix& dense) {
    const Index* idx = static_cast<const Index*>(m.idx);
#pragma omp parallel for schedule(dynamic, kRowGrain) num_threads(s.threads)
    for (int64_t n = 0; n < s.rows; ++n) {
        for (int64_t k = m.offsets[n]; k < m.offsets[n + 1]; ++k)
            write_row(dense, element(n, dense.row_stride, idx[k]), 1, values_K + k);
    }
}

}  // namespace
