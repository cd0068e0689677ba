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
template <class Index>
void transpose_expert(const MoneShape& s, const MoneMask& m, int64_t e, const float* const* values,
                      int64_t* starts, int32_t* cuts, MoneEntry* entries) {
    const Index* idx = static_cast<const Index*>(m.idx);
    const int64_t first = s.row_start[e], last = s.row_start[e + 1], F = s.neurons;
    int64_t begin = m.offsets[first];
    for (int64_t j = 0; j <= F; ++j) starts[j] = 0;
    for (int64_t k = begin; k < m.offsets[last]; ++k) ++starts[idx[k]];
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
            MoneEntry& entry = entries[starts[idx[k]] + seen[idx[k]]++];
            entry = {{values[0][k], values[1][k], values[2][k]}, row};
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

template <class Index>
void transpose_mask(const MoneShape& s, const MoneMask& m, const float* v0, const float* v1,
                    const float* v2, int64_t* starts, MoneCuts& cuts, MoneEntry* entries) {
    const float* values[3] = {v0, v1, v2};
#pragma omp parallel for schedule(dynamic) num_threads(s.threads)
    for (int64_t e = 0; e < s.experts; ++e) {
        const int64_t base = element(cut_base(s, e), s.neurons, 0);
        transpose_expert<Index>(s, m, e, values, starts + element(e, s.neurons + 1, 0),
                                cuts.at + base, entries);
        order_neurons(s, e, cuts.at + base, cuts.order + base);
    }
}

constexpr int kGradVecs = kGradWidth / kLanes < 4 ? kGradWidth / kLanes : 4;
constexpr int kGradPart = kGradVecs * kLanes;

struct GradScratch {
    alignas(64) float sums[3][kTile * kGradWidth];  // of gate, up, down
    alignas(64) float x[kSumInputs * kGradWidth];
    alignas(64) float dy[kSumInputs * kGradWidth];
};

// All three sums of neuron j, over its entries in one block of rows that starts at row `base`.
inline void add_entries(GradScratch& g, int64_t base, const MoneEntry* entry, int64_t count,
                        int64_t j) {
    for (int64_t part = 0; part < kGradWidth; part += kGradPart) {
        const int64_t at = j * kGradWidth + part;
        Vec gate[kGradVecs], up[kGradVecs], down[kGradVecs];
#pragma GCC unroll 4
        for (int i = 0; i < kGradVecs; ++i) {
            gate[i] = load(g.sums[0] + at + i * kLanes);
            up[i] = load(g.sums[1] + at + i * kLanes);
            down[i] = load(g.sums[2] + at + i * kLanes);
        }
        for (int64_t k = 0; k < count; ++k) {
            const int64_t row = (entry[k].row - base) * kGradWidth + part;
            const Vec da = splat(entry[k].value[0]), du = splat(entry[k].value[1]);
            const Vec h = splat(entry[k].value[2]);
#pragma GCC unroll 4
            for (int i = 0; i < kGradVecs; ++i) {
                const Vec x = in_register(load(g.x + row + i * kLanes));
                gate[i] += da * x;
                up[i] += du * x;
                down[i] += h * load(g.dy + row + i * kLanes);
            }
        }
#pragma GCC unroll 4
        for (int i = 0; i < kGradVecs; ++i) {
            store(g.sums[0] + at + i * kLanes, gate[i]);
            store(g.sums[1] + at + i * kLanes, up[i]);
            store(g.sums[2] + at + i * kLanes, down[i]);
        }
    }
}

// A tile of neurons of expert e, columns from `start`.
void grad_tile(const MoneShape& s, const int64_t* starts, const MoneCuts& cuts,
               const MoneEntry* entries, const MoneMatrix& x, const MoneMatrix& dy, int64_t e,
               int64_t tile, int64_t start, GradScratch& g) {
    const int64_t length = at_most(kGradWidth, s.hidden - start), rows = rows_of(s, e);
    const int64_t count = at_most(kTile, s.neurons - tile);
    starts += element(e, s.neurons + 1, tile);
    for (int i = 0; i < 3; ++i) std::memset(g.sums[i], 0, count * kGradWidth * sizeof(float));
    for (int64_t b = 0; b * kSumInputs < rows; ++b) {
        const int64_t base = b * kSumInputs, size = at_most(kSumInputs, rows - base);
        const int64_t row = s.row_start[e] + base;
        load_block(x, element(row, x.row_stride, 0), size, start, length, kGradWidth, g.x);
        load_block(dy, element(row, dy.row_stride, 0), size, start, length, kGradWidth, g.dy);
        const int64_t at = element(cut_base(s, e) + b, s.neurons, tile);
        const int32_t *from = cuts.at + at, *to = from + s.neurons;
        const uint16_t* order = cuts.order + at;
        const int64_t after = at_most(base + kSumInputs, rows);
        const int64_t left = at_most(kSumInputs, rows - after);
        const int64_t below = s.row_start[e] + after;
        NextBlock x_ahead{x, element(below, x.row_stride, 0), left, start, length, count};
        NextBlock dy_ahead{dy, element(below, dy.row_stride, 0), left, start, length, count};
        for (int64_t i = 0; i < count; ++i) {
            x_ahead.step();
            dy_ahead.step();
            const int64_t next = order[at_most(i + kAhead, count - 1)], j = order[i];
            prefetch(entries + starts[next] + from[next], 7 * 64);
            for (int o = 0; o < 3; ++o)
                prefetch(g.sums[o] + next * kGradWidth, kGradWidth * sizeof(float));
            add_entries(g, base, entries + starts[j] + from[j], to[j] - from[j], j);
        }
    }
}

void sum_weight_grads(const MoneShape& s, const int64_t* starts, const MoneCuts& cuts,
                      const MoneEntry* entries, const MoneMatrix& x, const MoneMatrix& dy,
                      MoneMatrix* const* outs) {
    const int64_t across = blocks(s.hidden, kGradWidth), down = blocks(s.neurons, kTile);
#pragma omp parallel for schedule(dynamic) num_threads(s.threads)
    for (int64_t t = 0; t < s.experts * across * down; ++t) {
        GradScratch g;
        const int64_t e = t / (across * down), tile = t / across % down * kTile;
        const int64_t start = t % across * kGradWidth;
        grad_tile(s, starts, cuts, entries, x, dy, e, tile, start, g);
        for (int i = 0; i < 3; ++i) {
            if (outs[i])
                write_block(g.sums[i], kGradWidth, at_most(kTile, s.neurons - tile),
                            e * outs[i]->expert_stride + element(tile, outs[i]->row_stride, start),
                            at_most(kGradWidth, s.hidden - start), *outs[i]);
        }
    }
}

}  // namespace
