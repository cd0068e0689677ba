// Sampled products: <x_n, weight_j> for kept (n, j) alone.
// A block of kDotNeurons neurons, kDotVecs vectors of each, stays in the first-level cache while the
// rows of a tile pass it: a row's piece is held in registers and meets the neurons that the row keeps.
#pragma once

namespace {

inline void add_sums(Vec4 sum, int count, bool overwrite, float* out) {
    if (count == 4) {
        Vec4Loose* four = reinterpret_cast<Vec4Loose*>(out);
        *four = overwrite ? sum : *four + sum;
        return;
    }
    for (int i = 0; i < count; ++i) out[i] = overwrite ? sum[i] : out[i] + sum[i];
}

constexpr int kGroup = 8;  // chains of sums: as many as the units have steps; more would spill

// out[i] (+)= <x, row at[i] - base of the block> for G neurons, V vectors long; the first piece
// overwrites.
template <int V, int G, class Index>
inline void dot_group(const float* x, const float* block, int64_t base, const Index* at,
                      bool overwrite, float* out) {
    const float* w[G];
    Vec acc[(G + 3) / 4 * 4] = {};
    for (int i = 0; i < G; ++i) w[i] = block + (at[i] - base) * (V * kLanes);
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
        const Vec part = in_register(load(x + v * kLanes));
#pragma GCC unroll 8
        for (int i = 0; i < G; ++i) acc[i] += part * load(w[i] + v * kLanes);
    }
#pragma GCC unroll 2
    for (int i = 0; i < G; i += 4) {
        Vec4 sum = lane_sums(acc[i], acc[i + 1], acc[i + 2], acc[i + 3]);
        add_sums(sum, G - i < 4 ? G - i : 4, overwrite, out + i);
    }
}

// Any number of neurons, in groups of nearly equal size.
template <int V, class Index>
inline void dots(const float* x, const float* block, int64_t base, const Index* at, int count,
                 bool overwrite, float* out) {
    for (int groups = (count + kGroup - 1) / kGroup; groups > 0; --groups) {
        const int size = (count + groups - 1) / groups;
        switch (size) {
            case 1: dot_group<V, 1>(x, block, base, at, overwrite, out); break;
            case 2: dot_group<V, 2>(x, block, base, at, overwrite, out); break;
            case 3: dot_group<V, 3>(x, block, base, at, overwrite, out); break;
            case 4: dot_group<V, 4>(x, block, base, at, overwrite, out); break;
            case 5: dot_group<V, 5>(x, block, base, at, overwrite, out); break;
            case 6: dot_group<V, 6>(x, block, base, at, overwrite, out); break;
            case 7: dot_group<V, 7>(x, block, base, at, overwrite, out); break;
            case 8: dot_group<V, 8>(x, block, base, at, overwrite, out); break;
        }
        count -= size, at += size, out += size;
    }
}

// One tile of rows against one block of its expert's neurons, columns from `start`.
template <int V, class Index>
void sample_piece(const MoneShape& s, const MoneMask& m, const MoneCuts& cuts, const float* x,
                  int64_t x_stride, const MoneMatrix& weight, const Tile& tile, int64_t b,
                  const bool* used, int64_t start, float* block, float* out_K) {
    const int64_t first = b * kDotNeurons, rows = tile.end - tile.begin, after = start + V * kLanes;
    const Index* idx = static_cast<const Index*>(m.idx);
    const int32_t *from = cuts.at + element(b, s.rows, tile.begin), *to = from + s.rows;
    const uint16_t* order = cuts.order + element(b, s.rows, tile.begin);
    const int64_t base = tile.expert * weight.expert_stride + first * weight.row_stride;
    const int64_t neurons = at_most(kDotNeurons, s.neurons - first);
    load_block(weight, base, neurons, start, at_most(V * kLanes, s.hidden - start), V * kLanes, block,
               used);
    NextBlock ahead{weight, base, used || after >= s.hidden ? 0 : neurons, after,
                    at_most(V * kLanes, s.hidden - after), rows};
    x += element(tile.begin, x_stride, start);
    for (int64_t i = 0; i < rows; ++i) {
        ahead.step();
        const int64_t next = order[at_most(i + kAhead, rows - 1)];
        const int64_t l = m.offsets[tile.begin + next] + from[next];
        prefetch(idx + l, 64);
        prefetch(out_K + l, 64);
        prefetch(x + next * x_stride, V * kLanes * 4);
        const int64_t n = order[i], k = m.offsets[tile.begin + n] + from[n];
        dots<V>(x + n * x_stride, block, first, idx + k, to[n] - from[n], start == 0, out_K + k);
    }
}

template <class Index>
void sample_block(const MoneShape& s, const MoneMask& m, const MoneCuts& cuts, const float* x,
                  int64_t x_stride, const MoneMatrix& weight, const Tile& tile, int64_t b,
                  float* out_K) {
    alignas(64) float block[kDotNeurons * kDotVecs * kLanes];
    bool flags[kLongestRun];
    const bool* used = used_neurons<Index>(s, m, cuts, tile, b, b * kDotNeurons, flags);
    for (int64_t start = 0; start < s.hidden;) {
        const int64_t vecs = blocks(s.hidden - start, kLanes);
        auto piece = [&](auto run, int64_t taken) {
            run(s, m, cuts, x, x_stride, weight, tile, b, used, start, block, out_K);
            start += taken * kLanes;
        };
        if (vecs >= kDotVecs)
            piece(sample_piece<kDotVecs, Index>, kDotVecs);
        else if (vecs >= 8)
            piece(sample_piece<8, Index>, 8);
        else if (vecs >= 4)
            piece(sample_piece<4, Index>, 4);
        else if (vecs >= 2)
            piece(sample_piece<2, Index>, 2);
        else
            piece(sample_piece<1, Index>, 1);
    }
}

template <class Index>
void sample(const MoneShape& s, const MoneMask& m, const MoneCuts& cuts, const float* x,
            int64_t x_stride, const MoneMatrix& weight, float* out_K) {
    const int64_t across = blocks(s.neurons, kDotNeurons), tasks = across * total_tiles(s);
#pragma omp parallel for schedule(dynamic, run_of(tasks, s.threads)) num_threads(s.threads)
    for (int64_t t = 0; t < tasks; ++t)
        sample_block<Index>(s, m, cuts, x, x_stride, weight, find_tile(s, t / across), t % across,
                            out_K);
}

}  // namespace
