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

// The largest floor that at least `kept` keys reach, by bisection; `reach` is how many reach it.
// It stops early at a floor that exactly `kept` keys reach. The first probes are around `guess`,
// the floor of another row, in steps of about 6% that double; they only save time.
inline int32_t find_floor(const int32_t* keys, int64_t width, int64_t kept, int32_t top,
                          int32_t guess, int64_t& reach) {
    int32_t low = 0, high = top;  // low is reached by enough keys; the answer is in [low, high]
    int64_t step = 1 << 19, probe = guess;
    bool up = false, down = false;
    reach = width;
    while (low < high && reach != kept) {
        const bool near = !(up && down) && low < probe && probe <= high;
        int32_t middle = near ? static_cast<int32_t>(probe) : low + (high - low) / 2 + 1;
        int64_t count = count_from(keys, width, middle);
        if (count >= kept) {
            low = middle;
            reach = count;
            up = true;
            probe = middle + step;
        } else {
            high = middle - 1;
            down = true;
            probe = middle - step;
        }
        step *= 2;
    }
    return low;
}

template <class Index>
inline void compact(const int32_t* keys, int64_t width, int64_t kept, int32_t floor, int64_t reach,
                    int64_t first, Index* idx) {
    int64_t count = 0;
    if (reach == kept) {
        for (int64_t j = 0; count < kept; ++j) {
            idx[count] = static_cast<Index>(first + j);
            count += keys[j] >= floor;
        }
        return;
    }
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

template <class Index>
void select_rows(const MoneShape& s, const void* gate, int64_t gate_bytes, int64_t kept,
                 int64_t groups, int64_t block, Index* idx, int32_t* keys_of_threads) {
    const int64_t width = s.neurons / groups, blocks = width / block;
    int32_t guess = 0;
#pragma omp parallel for schedule(static) num_threads(s.threads) firstprivate(guess)
    for (int64_t n = 0; n < s.rows; ++n) {
        int32_t* keys = keys_of_threads + element(omp_get_thread_num(), 2 * s.neurons, 0);
        for (int64_t g = 0; g < groups; ++g) {
            int64_t reach;
            Index* out = idx + element(n, kept * groups, g * kept);
            magnitudes(gate, element(n, s.neurons, g * width), gate_bytes, width, keys);
            if (block > 1) sum_blocks(keys, width, block);
            const int32_t top = order_keys(blocks, keys);
            guess = find_floor(keys, blocks, kept / block, top, guess, reach);
            if (block == 1) {
                compact(keys, width, kept, guess, reach, g * width, out);
            } else {
                int32_t* chosen = keys + s.neurons;
                compact(keys, blocks, kept / block, guess, reach, g * blocks, chosen);
                expand(chosen, kept / block, block, out);
            }
        }
    }
}

template <class Index, class Value>
void gather_rows(const MoneShape& s, const MoneMask& m, const Value* dense, Value* out_K) {
    const Index* idx = static_cast<const Index*>(m.idx);
#pragma omp parallel for schedule(static) num_threads(s.threads)
    for (int64_t n = 0; n < s.rows; ++n) {
        const Value* row = dense + element(n, s.neurons, 0);
        for (int64_t k = m.offsets[n]; k < m.offsets[n + 1]; ++k) out_K[k] = row[idx[k]];
    }
}

template <class Index>
void scatter_rows(const MoneShape& s, const MoneMask& m, const float* values_K, MoneMatrix& dense) {
    const Index* idx = static_cast<const Index*>(m.idx);
#pragma omp parallel for schedule(static) num_threads(s.threads)
    for (int64_t n = 0; n < s.rows; ++n) {
        for (int64_t k = m.offsets[n]; k < m.offsets[n + 1]; ++k)
            write_row(dense, element(n, dense.row_stride, idx[k]), 1, values_K + k);
    }
}

}  // namespace
