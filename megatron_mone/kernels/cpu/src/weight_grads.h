// Entries by neuron (each block of runs transposed in place) and the weight gradients summed over
// them. A block of rows of x stays in the first-level cache, the sums of a tile of neurons in the
// second.
#pragma once

namespace {

// Bins of one block of a tile: its blocks of kGradRows rows, and the neurons of each.
constexpr int64_t kBins = kGradBlocks * kSpan;

// The entries of one block of a tile, in place, from run order to the order of gradients: by block of
// rows, then neuron.
void transpose_block(const MoneShape& s, const MoneRuns& r, int64_t t, int64_t b, float* const* values,
                     int32_t* at, uint8_t* row_K, int32_t* to, LooseFloat* moved) {
    const Tile tile = find_tile(s, t);
    const BlockRuns of = block_runs(s, r, t, tile, b);
    const int64_t rows = tile.end - tile.begin, count = of.end - of.first;
    const uint8_t* neuron = r.neuron_K + of.first;
    std::memset(at, 0, (kBins + 1) * sizeof(int32_t));
    int64_t k = 0;
    for (int64_t i = 0; i < rows; ++i) {
        int32_t* bins = at + of.rows[i] / kGradRows * kSpan;
        for (int64_t end = k + of.lengths[i]; k < end; ++k) ++bins[neuron[k]];
    }
    int32_t begin = 0;
    for (int64_t j = 0; j <= kBins; ++j) {
        const int32_t entries = at[j];
        at[j] = begin;
        begin += entries;
    }
    // each bin's position moves to where the next one began
    k = 0;
    for (int64_t i = 0; i < rows; ++i) {
        int32_t* bins = at + of.rows[i] / kGradRows * kSpan;
        const uint8_t row = static_cast<uint8_t>(of.rows[i] % kGradRows);
        for (int64_t end = k + of.lengths[i]; k < end; ++k) {
            to[k] = bins[neuron[k]]++;
            row_K[of.first + to[k]] = row;
        }
    }
    std::memmove(at + 1, at, kBins * sizeof(int32_t));
    at[0] = 0;
    for (int v = 0; v < 3; ++v) {
        if (!values[v]) continue;
        for (int64_t i = 0; i < count; ++i) moved[to[i]] = values[v][of.first + i];
        std::memcpy(values[v] + of.first, moved, count * sizeof(float));
    }
}

void transpose_runs(const MoneShape& s, const MoneRuns& r, float* const* values, int32_t* at_B,
                    uint8_t* row_K, int32_t* work) {
    const int64_t tasks = total_tiles(s) * spans_of(s);
#pragma omp parallel for schedule(dynamic) num_threads(s.threads)
    for (int64_t t = 0; t < tasks; ++t) {
        int32_t* to = work + element(omp_get_thread_num(), 2 * kTile * kSpan, 0);
        transpose_block(s, r, t / spans_of(s), t % spans_of(s), values, at_B + element(t, kBins + 1, 0),
                        row_K, to, reinterpret_cast<LooseFloat*>(to + kTile * kSpan));
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
    constexpr int Sets = Terms * V < 8 ? 2 : 1;  // few vectors: entries take turns in chains of sums
    Vec sum[Sets][Terms][V] = {};
#pragma GCC unroll 2
    for (int o = 0; o < Terms; ++o)
#pragma GCC unroll 8
        for (int i = 0; i < V; ++i) sum[0][o][i] = load(sums[o] + i * kLanes);
    auto add = [&](int64_t k, Vec(&to_sum)[Terms][V]) {
        const float* row = x + values.row_K[k] * kGradWidth;
        Vec value[Terms];
#pragma GCC unroll 2
        for (int o = 0; o < Terms; ++o) value[o] = splat(values.v_K[o][k]);
#pragma GCC unroll 8
        for (int i = 0; i < V; ++i) {
            const Vec part = Terms > 1 ? in_register(load(row + i * kLanes)) : load(row + i * kLanes);
#pragma GCC unroll 2
            for (int o = 0; o < Terms; ++o) to_sum[o][i] += value[o] * part;
        }
    };
    int64_t k = from;
    for (; k + Sets <= to; k += Sets)
#pragma GCC unroll 2
        for (int set = 0; set < Sets; ++set) add(k + set, sum[set]);
    if (Sets == 2 && k < to) add(k, sum[0]);
#pragma GCC unroll 2
    for (int o = 0; o < Terms; ++o)
#pragma GCC unroll 8
        for (int i = 0; i < V; ++i)
            store(sums[o] + i * kLanes, Sets == 2 ? sum[0][o][i] + sum[Sets - 1][o][i] : sum[0][o][i]);
}

// Vectors of each of `Terms` sums that fit in registers together.
template <int Terms>
constexpr int grad_vecs() {
    constexpr int all = kGradWidth / kLanes, fit = kRegisters == 32 ? 8 : 8 / Terms;
    return all < fit ? all : fit;
}

// A tile of neurons of expert e, columns from `start`; the expert's first tile of rows is number t.
template <int Terms>
void grad_tile(const MoneShape& s, const MoneRuns& r, const int32_t* at_B, const GradValues& values,
               const MoneMatrix& x, int64_t e, int64_t t, int64_t neuron, int64_t start,
               GradScratch<Terms>& g) {
    constexpr int V = grad_vecs<Terms>();
    const int64_t length = at_most(kGradWidth, s.hidden - start);
    const int64_t count = at_most(kTile, s.neurons - neuron), used = blocks(length, V * kLanes);
    for (int o = 0; o < Terms; ++o) std::memset(g.sums[o], 0, count * kGradWidth * sizeof(float));
    for (int64_t base = s.row_start[e]; base < s.row_start[e + 1]; base += kGradRows) {
        const int64_t tile = t + (base - s.row_start[e]) / kTile;
        const int64_t bins = (base - s.row_start[e]) % kTile / kGradRows * kSpan;
        load_block(x, element(base, x.row_stride, 0), at_most(kGradRows, s.row_start[e + 1] - base),
                   start, length, kGradWidth, g.x);
        // everything is read in order, so that the processor fetches ahead by itself
        for (int64_t j = 0; j < count; j += kSpan) {
            const int64_t b = (neuron + j) / kSpan;
            const int64_t first = r.starts[element(tile, spans_of(s) + 1, b)];
            const int32_t* at = at_B + element(element(tile, spans_of(s), b), kBins + 1, bins);
            for (int64_t i = 0; i < at_most(kSpan, count - j); ++i)
                for (int64_t part = 0; part < used; ++part) {
                    float* sums[Terms];
                    for (int o = 0; o < Terms; ++o)
                        sums[o] = g.sums[o] + (j + i) * kGradWidth + part * V * kLanes;
                    add_entries<Terms, V>(g.x + part * V * kLanes, values, first + at[i],
                                          first + at[i + 1], sums);
                }
        }
    }
}

template <int Terms>
void sum_weight_grads(const MoneShape& s, const MoneRuns& r, const int32_t* at_B,
                      const GradValues& values, const MoneMatrix& x, MoneMatrix* const* outs) {
    const int64_t across = blocks(s.hidden, kGradWidth), down = blocks(s.neurons, kTile);
#pragma omp parallel for schedule(dynamic) num_threads(s.threads)
    for (int64_t t = 0; t < s.experts * across * down; ++t) {
        GradScratch<Terms> g;
        const int64_t e = t / (across * down), tile = t / across % down * kTile;
        const int64_t start = t % across * kGradWidth;
        int64_t before = 0;
        for (int64_t i = 0; i < e; ++i) before += tiles_of(s, i);
        grad_tile(s, r, at_B, values, x, e, before, tile, start, g);
        for (int o = 0; o < Terms; ++o)
            write_block(g.sums[o], kGradWidth, at_most(kTile, s.neurons - tile),
                        e * outs[o]->expert_stride + element(tile, outs[o]->row_stride, start),
                        at_most(kGradWidth, s.hidden - start), *outs[o], past_caches(s));
    }
}

}  // namespace
