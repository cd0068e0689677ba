// Sampled products: <x_n, weight_j> for kept (n, j) alone.
// A block of kDotNeurons x kDotLength weights stays in the first-level cache while the rows' panels
// stream past it; up to kGroup dot products share each load of x.
#pragma once

namespace {

constexpr int kGroup = 8;  // more would spill the rows' addresses

inline void add_sums(Vec4 sum, int count, bool overwrite, float* out) {
    if (count == 4) {
        Vec4Loose* four = reinterpret_cast<Vec4Loose*>(out);
        *four = overwrite ? sum : *four + sum;
        return;
    }
    for (int i = 0; i < count; ++i) out[i] = overwrite ? sum[i] : out[i] + sum[i];
}

// out[i] (+)= <x, row at[i] - base of the block> for G neurons; the first panel overwrites.
template <int G, class Index>
inline void dot_group(const float* x, const float* block, int64_t base, const Index* at,
                      bool overwrite, float* out) {
    const float* w[G];
    Vec acc[(G + 3) / 4 * 4] = {};
    for (int i = 0; i < G; ++i) w[i] = block + (at[i] - base) * kDotLength;
#pragma GCC unroll 4
    for (int64_t k = 0; k < kDotLength; k += kLanes) {
        const Vec part = in_register(load(x + k));
#pragma GCC unroll 8
        for (int i = 0; i < G; ++i) acc[i] += part * load(w[i] + k);
    }
#pragma GCC unroll 2
    for (int i = 0; i < G; i += 4) {
        Vec4 sum = lane_sums(acc[i], acc[i + 1], acc[i + 2], acc[i + 3]);
        add_sums(sum, G - i < 4 ? G - i : 4, overwrite, out + i);
    }
}

template <class Index>
inline void dot_some(const float* x, const float* block, int64_t base, const Index* at, int count,
                     bool overwrite, float* out) {
    switch (count) {
        case 1: return dot_group<1>(x, block, base, at, overwrite, out);
        case 2: return dot_group<2>(x, block, base, at, overwrite, out);
        case 3: return dot_group<3>(x, block, base, at, overwrite, out);
        case 4: return dot_group<4>(x, block, base, at, overwrite, out);
        case 5: return dot_group<5>(x, block, base, at, overwrite, out);
        case 6: return dot_group<6>(x, block, base, at, overwrite, out);
        case 7: return dot_group<7>(x, block, base, at, overwrite, out);
        case 8: return dot_group<8>(x, block, base, at, overwrite, out);
    }
}

// Any number of neurons, in groups of nearly equal size.
template <class Index>
inline void dots(const float* x, const float* block, int64_t base, const Index* at, int count,
                 bool overwrite, float* out) {
    for (int groups = (count + kGroup - 1) / kGroup; groups > 0; --groups) {
        const int size = (count + groups - 1) / groups;
        dot_some(x, block, base, at, size, overwrite, out);
        count -= size, at += size, out += size;
    }
}

void make_panels(const MoneShape& s, const MoneMatrix& x, float* panels) {
    const int64_t count = blocks(s.hidden, kDotLength);
#pragma omp parallel for schedule(static) num_threads(s.threads)
    for (int64_t n = 0; n < s.rows; ++n) {
        for (int64_t c = 0; c < count; ++c) {
            int64_t start = c * kDotLength;
            copy_row(x, element(n, x.row_stride, start), at_most(kDotLength, s.hidden - start),
                     kDotLength, panels + element(c * s.rows + n, kDotLength, 0));
        }
    }
}

// One tile of rows against one block of its expert's neurons, over all of H.
template <class Index>
void sample_block(const MoneShape& s, const MoneMask& m, const MoneCuts& cuts, const float* rows_x,
                  int64_t row_stride, int64_t panel_stride, const MoneMatrix& weight,
                  const Tile& tile, int64_t b, float* out_K) {
    alignas(64) float block[kDotNeurons * kDotLength];
    const int64_t first = b * kDotNeurons, rows = tile.end - tile.begin;
    const Index* idx = static_cast<const Index*>(m.idx);
    const int32_t *from = cuts.at + element(b, s.rows, tile.begin), *to = from + s.rows;
    const uint16_t* order = cuts.order + element(b, s.rows, tile.begin);
    const int64_t base = tile.expert * weight.expert_stride + first * weight.row_stride;
    const int64_t neurons = at_most(kDotNeurons, s.neurons - first);
    bool flags[kSumInputs];
    const bool* used = used_neurons<Index>(s, m, cuts, tile, b, first, flags);
    for (int64_t c = 0; c * kDotLength < s.hidden; ++c) {
        const int64_t start = c * kDotLength, after = start + kDotLength;
        load_block(weight, base, neurons, start, at_most(kDotLength, s.hidden - start), kDotLength,
                   block, used);
        NextBlock ahead{weight, base, used ? 0 : neurons, after, at_most(kDotLength, s.hidden - after), rows};
        const float* x = rows_x + element(c, panel_stride, 0) + element(tile.begin, row_stride, 0);
        for (int64_t i = 0; i < rows; ++i) {
            ahead.step();
            const int64_t next = order[at_most(i + kAhead, rows - 1)];
            const int64_t l = m.offsets[tile.begin + next] + from[next];
            prefetch(idx + l, 64);
            prefetch(out_K + l, 64);
            prefetch(x + next * row_stride, kDotLength * 4);
            const int64_t n = order[i], k = m.offsets[tile.begin + n] + from[n];
            dots(x + n * row_stride, block, first, idx + k, to[n] - from[n], c == 0, out_K + k);
        }
    }
}

template <class Index>
void sample(const MoneShape& s, const MoneMask& m, const MoneCuts& cuts, const float* x,
            int64_t row_stride, int64_t panel_stride, const MoneMatrix& weight, float* out_K) {
    const int64_t across = blocks(s.neurons, kDotNeurons), tasks = across * total_tiles(s);
#pragma omp parallel for schedule(dynamic) num_threads(s.threads)
    for (int64_t t = 0; t < tasks; ++t)
        sample_block<Index>(s, m, cuts, x, row_stride, panel_stride, weight,
                            find_tile(s, t / across), t % across, out_K);
}

}  // namespace
