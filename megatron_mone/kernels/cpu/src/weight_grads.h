// Entries by neuron (the mask transposed) and the weight gradients summed over them.
#pragma once

namespace {

// Row blocks of expert e begin at this row of the [blocks, F] cuts; each expert has one row more.
inline int64_t cut_base(const MoneShape& s, int64_t e) {
    int64_t base = 0;
    for (int64_t i = 0; i < e; ++i) base += blocks(rows_of(s, i), kSumInputs) + 1;
    return base;
}

// One expert. Entries of a neuron ascend in row because rows are walked in order.
template <class Index, int Terms>
void transpose_expert(const MoneShape& s, const MoneMask& m, int64_t e, const float* const* values,
                      int64_t* starts, int32_t* cuts, MoneEntry<Terms>* entries) {
    const Index* idx = static_cast<const Index*>(m.idx);
    const int64_t first = s.row_start[e], last = s.row_start[e + 1], F = s.neurons;
    int64_t begin = m.offsets[first] - m.offsets[s.row_start[0]];
    for (int64_t j = 0; j <= F; ++j) starts[j] = 0;
    for (int64_t k = m.offsets[first]; k < m.offsets[last]; ++k) ++starts[idx[k]];
    for (int64_t j = 0; j < F; ++j) {
        int64_t count = starts[j];
        starts[j] = begin;
        begin += count;
    }
    starts[F] = begin;
    int32_t* seen = cuts;  // counts up through the rows; one row of cuts per block is its snapshot
    for (int64_t j = 0; j < F; ++j) seen[j] = 0;
    for (int64_t n = first; n < last; ++n) {
        const int32_t row = static_cast<int32_t>(n - first);
        for (int64_t k = m.offsets[n]; k < m.offsets[n + 1]; ++k) {
            MoneEntry<Terms>& entry = entries[starts[idx[k]] + seen[idx[k]]++];
            for (int i = 0; i < Terms; ++i) entry.value[i] = values[i][k];
            entry.row = row;
        }
        if ((row + 1) % kSumInputs == 0 || n + 1 == last) {
            std::memcpy(seen + F, seen, F * sizeof(int32_t));
            seen += F;
        }
    }
    // Now cuts[b] holds the counts up to the end of block b, twice for the last: shift by one.
    for (int32_t* row = seen; row > cuts; row -= F) std::memcpy(row, row - F, F * sizeof(int32_t));
    std::memset(cuts, 0, F * sizeof(int32_t));
}

void order_neurons(const MoneShape& s, int64_t e, const int32_t* at, uint16_t* order) {
    for (int64_t b = 0; b * kSumInputs < rows_of(s, e); ++b) {
        for (int64_t j = 0; j < s.neurons; j += kTile) {
            const int32_t* from = at + element(b, s.neurons, j);
            order_by_length(from, from + s.neurons, at_most(kTile, s.neurons - j), kSumInputs,
                            order + element(b, s.neurons, j));
        }
    }
}

template <class Index, int Terms>
void transpose_mask(const MoneShape& s, const MoneMask& m, const float* v0, const float* v1,
                    int64_t* starts, MoneCuts& cuts, MoneEntry<Terms>* entries) {
    const float* values[2] = {v0, v1};
#pragma omp parallel for schedule(dynamic) num_threads(s.threads)
    for (int64_t e = 0; e < s.experts; ++e) {
        const int64_t base = element(cut_base(s, e), s.neurons, 0);
        transpose_expert<Index>(s, m, e, values, starts + element(e, s.neurons + 1, 0),
                                cuts.at + base, entries);
        order_neurons(s, e, cuts.at + base, cuts.order + base);
    }
}

// Vectors of each of `Terms` sums in registers, and the floats they span.
template <int Terms>
constexpr int grad_vecs() {
    return kGradWidth / kLanes < 8 / Terms ? kGradWidth / kLanes : 8 / Terms;
}

template <int Terms>
struct GradScratch {
    alignas(64) float sums[Terms][kTile * kGradWidth];
    alignas(64) float x[kSumInputs * kGradWidth];
};

// All sums of neuron j, over its entries in one block of rows that starts at row `base`.
template <int Terms>
inline void add_entries(GradScratch<Terms>& g, int64_t base, const MoneEntry<Terms>* entry,
                        int64_t count, int64_t j) {
    constexpr int V = grad_vecs<Terms>();
    for (int64_t part = 0; part < kGradWidth; part += V * kLanes) {
        const int64_t at = j * kGradWidth + part;
        Vec sum[Terms][V];
#pragma GCC unroll 2
        for (int o = 0; o < Terms; ++o)
#pragma GCC unroll 8
            for (int i = 0; i < V; ++i) sum[o][i] = load(g.sums[o] + at + i * kLanes);
        for (int64_t k = 0; k < count; ++k) {
            const float* row = g.x + (entry[k].row - base) * kGradWidth + part;
            Vec value[Terms];
            for (int o = 0; o < Terms; ++o) value[o] = splat(entry[k].value[o]);
#pragma GCC unroll 8
            for (int i = 0; i < V; ++i) {
                const Vec x = Terms > 1 ? in_register(load(row + i * kLanes)) : load(row + i * kLanes);
#pragma GCC unroll 2
                for (int o = 0; o < Terms; ++o) sum[o][i] += value[o] * x;
            }
        }
#pragma GCC unroll 2
        for (int o = 0; o < Terms; ++o)
#pragma GCC unroll 8
            for (int i = 0; i < V; ++i) store(g.sums[o] + at + i * kLanes, sum[o][i]);
    }
}

// A tile of neurons of expert e, columns from `start`.
template <int Terms>
void grad_tile(const MoneShape& s, const int64_t* starts, const MoneCuts& cuts,
               const MoneEntry<Terms>* entries, const MoneMatrix& x, int64_t e, int64_t tile,
               int64_t start, GradScratch<Terms>& g) {
    const int64_t length = at_most(kGradWidth, s.hidden - start), rows = rows_of(s, e);
    const int64_t count = at_most(kTile, s.neurons - tile);
    starts += element(e, s.neurons + 1, tile);
    for (int o = 0; o < Terms; ++o) std::memset(g.sums[o], 0, count * kGradWidth * sizeof(float));
    for (int64_t b = 0; b * kSumInputs < rows; ++b) {
        const int64_t base = b * kSumInputs, size = at_most(kSumInputs, rows - base);
        load_block(x, element(s.row_start[e] + base, x.row_stride, 0), size, start, length,
                   kGradWidth, g.x);
        const int64_t at = element(cut_base(s, e) + b, s.neurons, tile);
        const int32_t *from = cuts.at + at, *to = from + s.neurons;
        const uint16_t* order = cuts.order + at;
        const int64_t after = at_most(base + kSumInputs, rows);
        NextBlock ahead{x, element(s.row_start[e] + after, x.row_stride, 0),
                        at_most(kSumInputs, rows - after), start, length, count};
        for (int64_t i = 0; i < count; ++i) {
            ahead.step();
            const int64_t next = order[at_most(i + kAhead, count - 1)], j = order[i];
            prefetch(entries + starts[next] + from[next], Terms * 4 * 64);
            for (int o = 0; o < Terms; ++o)
                prefetch(g.sums[o] + next * kGradWidth, kGradWidth * sizeof(float));
            add_entries(g, base, entries + starts[j] + from[j], to[j] - from[j], j);
        }
    }
}

template <int Terms>
void sum_weight_grads(const MoneShape& s, const int64_t* starts, const MoneCuts& cuts,
                      const MoneEntry<Terms>* entries, const MoneMatrix& x,
                      MoneMatrix* const* outs) {
    const int64_t across = blocks(s.hidden, kGradWidth), down = blocks(s.neurons, kTile);
#pragma omp parallel for schedule(dynamic) num_threads(s.threads)
    for (int64_t t = 0; t < s.experts * across * down; ++t) {
        GradScratch<Terms> g;
        const int64_t e = t / (across * down), tile = t / across % down * kTile;
        const int64_t start = t % across * kGradWidth;
        grad_tile(s, starts, cuts, entries, x, e, tile, start, g);
        for (int o = 0; o < Terms; ++o)
            write_block(g.sums[o], kGradWidth, at_most(kTile, s.neurons - tile),
                        e * outs[o]->expert_stride + element(tile, outs[o]->row_stride, start),
                        at_most(kGradWidth, s.hidden - start), *outs[o]);
    }
}

}  // namespace
