// Sparse accumulation into token rows: out[n] = sum of value * weight[j] over kept (n, j): y and dx.
// A block of kSumInputs x kSumWidth weights stays in the first-level cache; the sums of a tile of
// rows stay in the second and are written out once.
#pragma once

namespace {

struct SumScratch {
    alignas(64) float sums[kTile * kSumWidth];
    alignas(64) float block[kSumInputs * kSumWidth];
};

// sums += value[k] * row idx[k] - base of the block, V vectors.
template <int V, class Index>
inline void add_run(const float* block, int64_t base, const Index* idx, const float* value,
                    int64_t count, float* sums) {
    Vec acc[V];
#pragma GCC unroll 8
    for (int i = 0; i < V; ++i) acc[i] = load(sums + i * kLanes);
    for (int64_t k = 0; k < count; ++k) {
        const float* row = block + (idx[k] - base) * (V * kLanes);
        const Vec scale = splat(value[k]);
#pragma GCC unroll 8
        for (int i = 0; i < V; ++i) acc[i] += scale * load(row + i * kLanes);
    }
#pragma GCC unroll 8
    for (int i = 0; i < V; ++i) store(sums + i * kLanes, acc[i]);
}

// One term of y or dx for a tile of rows, V vectors of columns from `start`.
template <int V, class Index>
void add_term(const MoneShape& s, const MoneMask& m, const MoneCuts& cuts, const float* value_K,
              const MoneMatrix& weight, const Tile& tile, int64_t start, SumScratch& scratch) {
    constexpr int64_t width = V * kLanes;
    const int64_t length = at_most(width, s.hidden - start), rows = tile.end - tile.begin;
    const Index* idx = static_cast<const Index*>(m.idx);
    for (int64_t b = 0; b * kSumInputs < s.neurons; ++b) {
        const int64_t first = b * kSumInputs;
        bool flags[kLongestRun];
        const bool* used = used_neurons<Index>(s, m, cuts, tile, b, first, flags);
        load_block(weight, tile.expert * weight.expert_stride + first * weight.row_stride,
                   at_most(kSumInputs, s.neurons - first), start, length, width, scratch.block, used);
        const int32_t *from = cuts.at + element(b, s.rows, tile.begin), *to = from + s.rows;
        const uint16_t* order = cuts.order + element(b, s.rows, tile.begin);
        const int64_t after = at_most(first + kSumInputs, s.neurons);
        NextBlock ahead{weight, tile.expert * weight.expert_stride + after * weight.row_stride,
                        used ? 0 : at_most(kSumInputs, s.neurons - after), start, length, rows};
        for (int64_t i = 0; i < rows; ++i) {
            ahead.step();
            const int64_t next = order[at_most(i + kAhead, rows - 1)];
            const int64_t l = m.offsets[tile.begin + next] + from[next];
            prefetch(value_K + l, 2 * 64);
            prefetch(idx + l, 64);
            prefetch(scratch.sums + next * width, width * 4);
            const int64_t n = order[i], k = m.offsets[tile.begin + n] + from[n];
            add_run<V>(scratch.block, first, idx + k, value_K + k, to[n] - from[n],
                       scratch.sums + n * width);
        }
    }
}

template <int V, class Index>
void accumulate_tile(const MoneShape& s, const MoneMask& m, const MoneCuts& cuts,
                     const float* value0_K, const MoneMatrix& weight0, const float* value1_K,
                     const MoneMatrix* weight1, const Tile& tile, int64_t start, MoneMatrix& out) {
    constexpr int64_t width = V * kLanes;
    SumScratch scratch;
    const int64_t rows = tile.end - tile.begin;
    std::memset(scratch.sums, 0, rows * width * sizeof(float));
    add_term<V, Index>(s, m, cuts, value0_K, weight0, tile, start, scratch);
    if (weight1) add_term<V, Index>(s, m, cuts, value1_K, *weight1, tile, start, scratch);
    write_block(scratch.sums, width, rows, element(tile.begin, out.row_stride, start),
                at_most(width, s.hidden - start), out);
}

template <class Index>
void accumulate_rows(const MoneShape& s, const MoneMask& m, const MoneCuts& cuts,
                     const float* value0_K, const MoneMatrix& weight0, const float* value1_K,
                     const MoneMatrix* weight1, MoneMatrix& out) {
    int64_t most = kSumVecs;  // fewer where many threads would find nothing to do
    while (most > 1 && blocks(s.hidden, most * kLanes) * total_tiles(s) < 2 * s.threads) most /= 2;
    const int64_t across = blocks(s.hidden, most * kLanes), tasks = across * total_tiles(s);
#pragma omp parallel for schedule(dynamic) num_threads(s.threads)
    for (int64_t t = 0; t < tasks; ++t) {
        const int64_t start = t % across * most * kLanes;
        with_vecs(at_most(most, blocks(s.hidden - start, kLanes)), [&](auto vecs) {
            accumulate_tile<vecs(), Index>(s, m, cuts, value0_K, weight0, value1_K, weight1,
                                           find_tile(s, t / across), start, out);
        });
    }
}

}  // namespace
