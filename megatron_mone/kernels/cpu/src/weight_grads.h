// Entries by neuron (each block of rows transposed in place) and the weight gradients summed over
// them. A block of rows of x stays in the first-level cache, the sums of a tile of neurons in the
// second.
#pragma once

namespace {

// Blocks of rows of the experts before e.
inline int64_t grad_blocks_before(const MoneShape& s, int64_t e) {
    int64_t count = 0;
    for (int64_t i = 0; i < e; ++i) count += blocks(rows_of(s, i), kGradRows);
    return count;
}

// Rows [begin, end) of one expert.
struct RowBlock {
    int64_t begin, end;
};

inline RowBlock find_block(const MoneShape& s, int64_t b) {
    int64_t e = 0;
    for (; b >= blocks(rows_of(s, e), kGradRows); ++e) b -= blocks(rows_of(s, e), kGradRows);
    const int64_t begin = s.row_start[e] + b * kGradRows;
    return {begin, at_most(begin + kGradRows, s.row_start[e + 1])};
}

template <class Index>
void transpose_block(const MoneShape& s, const MoneMask& m, const RowBlock& rows,
                     float* const* values, int32_t* at, uint8_t* row_K, int32_t* to, float* moved) {
    const int64_t F = s.neurons, first = m.offsets[rows.begin], count = m.offsets[rows.end] - first;
    const Index* idx = static_cast<const Index*>(m.idx) + first;
    std::memset(at, 0, (F + 1) * sizeof(int32_t));
    for (int64_t k = 0; k < count; ++k) ++at[idx[k]];
    int32_t begin = 0;
    for (int64_t j = 0; j <= F; ++j) {
        const int32_t entries = at[j];
        at[j] = begin;
        begin += entries;
    }
    // each neuron's position moves to where the next one began
    for (int64_t n = rows.begin; n < rows.end; ++n)
        for (int64_t k = m.offsets[n] - first; k < m.offsets[n + 1] - first; ++k) {
            to[k] = at[idx[k]]++;
            row_K[first + to[k]] = static_cast<uint8_t>(n - rows.begin);
        }
    std::memmove(at + 1, at, F * sizeof(int32_t));
    at[0] = 0;
    for (int i = 0; i < 3; ++i) {
        if (!values[i]) continue;
        for (int64_t k = 0; k < count; ++k) moved[to[k]] = values[i][first + k];
        std::memcpy(values[i] + first, moved, count * sizeof(float));
    }
}

template <class Index>
void transpose_mask(const MoneShape& s, const MoneMask& m, float* const* values, int32_t* at_B,
                    uint8_t* row_K, int32_t* work, int64_t most) {
    const int64_t F = s.neurons, count = grad_blocks_before(s, s.experts);
#pragma omp parallel for schedule(dynamic) num_threads(s.threads)
    for (int64_t b = 0; b < count; ++b) {
        int32_t* to = work + element(omp_get_thread_num(), 2 * most, 0);
        transpose_block<Index>(s, m, find_block(s, b), values, at_B + element(b, F + 1, 0), row_K,
                               to, reinterpret_cast<LooseFloat*>(to + most));
    }
}

template <int Terms>
struct GradScratch {
    alignas(64) float sums[Terms][kTile * kGradWidth];
    alignas(64) float x[kGradRows * kGradWidth];
};

// Up to two values of entries, by neuron.
struct GradValues {
    const uint8_t* row_K;
    const float* v_K[2];
};

// The sums of one neuron, V vectors, over its entries [from, to) in one block of rows.
template <int Terms, int V>
inline void add_entries(const float* x, const GradValues& values, int64_t from, int64_t to,
                        float* const* sums) {
    Vec sum[Terms][V];
#pragma GCC unroll 2
    for (int o = 0; o < Terms; ++o)
#pragma GCC unroll 8
        for (int i = 0; i < V; ++i) sum[o][i] = load(sums[o] + i * kLanes);
    for (int64_t k = from; k < to; ++k) {
        const float* row = x + values.row_K[k] * kGradWidth;
        Vec value[Terms];
#pragma GCC unroll 2
        for (int o = 0; o < Terms; ++o) value[o] = splat(values.v_K[o][k]);
#pragma GCC unroll 8
        for (int i = 0; i < V; ++i) {
            const Vec part = Terms > 1 ? in_register(load(row + i * kLanes)) : load(row + i * kLanes);
#pragma GCC unroll 2
            for (int o = 0; o < Terms; ++o) sum[o][i] += value[o] * part;
        }
    }
#pragma GCC unroll 2
    for (int o = 0; o < Terms; ++o)
#pragma GCC unroll 8
        for (int i = 0; i < V; ++i) store(sums[o] + i * kLanes, sum[o][i]);
}

// Vectors of each of `Terms` sums that fit in registers together.
template <int Terms>
constexpr int grad_vecs() {
    return kRegisters == 32 ? 8 : 8 / Terms;
}

// A tile of neurons of expert e, columns from `start`.
template <int Terms>
void grad_tile(const MoneShape& s, const MoneMask& m, const int32_t* at_B,
               const GradValues& values, const MoneMatrix& x, int64_t e, int64_t tile, int64_t start,
               GradScratch<Terms>& g) {
    constexpr int V = grad_vecs<Terms>();
    const int64_t length = at_most(kGradWidth, s.hidden - start), rows = rows_of(s, e);
    const int64_t count = at_most(kTile, s.neurons - tile), used = blocks(length, V * kLanes);
    for (int o = 0; o < Terms; ++o) std::memset(g.sums[o], 0, count * kGradWidth * sizeof(float));
    for (int64_t b = 0; b * kGradRows < rows; ++b) {
        const int64_t base = s.row_start[e] + b * kGradRows, index = grad_blocks_before(s, e) + b;
        load_block(x, element(base, x.row_stride, 0), at_most(kGradRows, rows - b * kGradRows), start,
                   length, kGradWidth, g.x);
        const int32_t* at = at_B + element(index, s.neurons + 1, tile);
        const int64_t first = m.offsets[base];
        // everything is read in order, so that the processor fetches ahead by itself
        for (int64_t j = 0; j < count; ++j)
            for (int64_t part = 0; part < used; ++part) {
                float* sums[Terms];
                for (int o = 0; o < Terms; ++o)
                    sums[o] = g.sums[o] + j * kGradWidth + part * V * kLanes;
                add_entries<Terms, V>(g.x + part * V * kLanes, values, first + at[j],
                                      first + at[j + 1], sums);
            }
    }
}

template <int Terms>
void sum_weight_grads(const MoneShape& s, const MoneMask& m, const int32_t* at_B,
                      const GradValues& values, const MoneMatrix& x, MoneMatrix* const* outs) {
    const int64_t across = blocks(s.hidden, kGradWidth), down = blocks(s.neurons, kTile);
#pragma omp parallel for schedule(dynamic) num_threads(s.threads)
    for (int64_t t = 0; t < s.experts * across * down; ++t) {
        GradScratch<Terms> g;
        const int64_t e = t / (across * down), tile = t / across % down * kTile;
        const int64_t start = t % across * kGradWidth;
        grad_tile(s, m, at_B, values, x, e, tile, start, g);
        for (int o = 0; o < Terms; ++o)
            write_block(g.sums[o], kGradWidth, at_most(kTile, s.neurons - tile),
                        e * outs[o]->expert_stride + element(tile, outs[o]->row_stride, start),
                        at_most(kGradWidth, s.hidden - start), *outs[o], past_caches(s));
    }
}

}  // namespace
