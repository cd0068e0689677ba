// Sparse accumulation into token rows: out[n] = sum of value * weight[j] over kept (n, j): y and dx;
// values are in run order.
// A block of kSpan weights stays in the first-level cache; the sums of a tile of rows stay in the second
// and are written out once.
#pragma once

namespace {

// Vectors of sums in registers: a block of weights of each term is to fit beside the other's.
template <int Terms>
constexpr int sum_vecs() {
    return kLanes == 16 && Terms == 2 ? kSumVecs / 2 : kSumVecs;
}

template <int Terms>
struct SumScratch {
    static constexpr int64_t kWidth = sum_vecs<Terms>() * kLanes;
    alignas(64) float sums[kTile * kWidth];
    alignas(64) float block[Terms][kSpan * kWidth];
};

// One or two terms: values in run order, and the weights that they scale.
template <int Terms>
struct SumTerms {
    const float* value_K[2];
    const MoneMatrix* weight[2];
};

// sums += value[k] * row at[k] of the block, of each term, V vectors.
template <int V, int Terms>
inline void add_run(const SumScratch<Terms>& scratch, const uint8_t* at, const float* const* value,
                    int64_t count, float* sums) {
    // Few vectors: each term has its own chains of sums, whatever V is, for it depends on the threads.
    constexpr int Sets = sum_vecs<Terms>() <= 4 ? Terms : 1;
    Vec acc[Sets][V] = {};
#pragma GCC unroll 8
    for (int i = 0; i < V; ++i) acc[0][i] = load(sums + i * kLanes);
    for (int64_t k = 0; k < count; ++k) {
        const int64_t row = int64_t{at[k]} * (V * kLanes);
#pragma GCC unroll 2
        for (int o = 0; o < Terms; ++o) {
            const Vec scale = splat(value[o][k]);
#pragma GCC unroll 8
            for (int i = 0; i < V; ++i)
                acc[o % Sets][i] += scale * load(scratch.block[o] + row + i * kLanes);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < V; ++i)
        store(sums + i * kLanes, Sets == 2 ? acc[0][i] + acc[Sets - 1][i] : acc[0][i]);
}

// y or dx of a tile of rows, V vectors of columns from `start`.
template <int V, int Terms>
void accumulate_tile(const MoneShape& s, const MoneRuns& r, const SumTerms<Terms>& terms, int64_t t,
                     int64_t start, MoneMatrix& out) {
    constexpr int64_t width = V * kLanes;
    SumScratch<Terms> scratch;
    const Tile tile = find_tile(s, t);
    const int64_t length = at_most(width, s.hidden - start), rows = tile.end - tile.begin;
    std::memset(scratch.sums, 0, rows * width * sizeof(float));
    for (int64_t b = 0; b < spans_of(s); ++b) {
        const int64_t first = b * kSpan, after = at_most(first + kSpan, s.neurons);
        const BlockRuns of = block_runs(s, r, t, tile, b);
        bool flags[kSpan];
        const bool* used = used_neurons(tile, r, of, flags);
        const int64_t ahead = used ? 0 : at_most(kSpan, s.neurons - after);
        auto base = [&](int o) { return tile.expert * terms.weight[o]->expert_stride; };
        for (int o = 0; o < Terms; ++o)
            load_block(*terms.weight[o], base(o) + first * terms.weight[o]->row_stride, after - first,
                       start, length, width, scratch.block[o], used);
        auto next = [&](int o) {
            const MoneMatrix& w = *terms.weight[o];
            return NextBlock{w, base(o) + after * w.row_stride, ahead, start, length, rows};
        };
        NextBlock next0 = next(0), next1 = next(Terms - 1);
        int64_t k = of.first;
        for (int64_t i = 0; i < rows; ++i) {
            next0.step();
            if (Terms == 2) next1.step();
            const float* values[2] = {terms.value_K[0] + k, terms.value_K[1] + k};
            add_run<V, Terms>(scratch, r.neuron_K + k, values, of.lengths[i],
                              scratch.sums + of.rows[i] * width);
            k += of.lengths[i];
        }
    }
    write_block(scratch.sums, width, rows, element(tile.begin, out.row_stride, start), length, out);
}

template <int Terms>
void accumulate(const MoneShape& s, const MoneRuns& r, const SumTerms<Terms>& terms, MoneMatrix& out) {
    int64_t most = sum_vecs<Terms>();  // fewer where many threads would find nothing to do
    while (most > 1 && blocks(s.hidden, most * kLanes) * total_tiles(s) < 2 * s.threads) most /= 2;
    const int64_t across = blocks(s.hidden, most * kLanes), tasks = across * total_tiles(s);
#pragma omp parallel for schedule(dynamic) num_threads(s.threads)
    for (int64_t task = 0; task < tasks; ++task) {
        const int64_t start = task % across * most * kLanes;
        with_vecs(at_most(most, blocks(s.hidden - start, kLanes)), [&](auto vecs) {
            constexpr int V = vecs() < sum_vecs<Terms>() ? vecs() : sum_vecs<Terms>();
            accumulate_tile<V, Terms>(s, r, terms, task / across, start, out);
        });
    }
}

}  // namespace
