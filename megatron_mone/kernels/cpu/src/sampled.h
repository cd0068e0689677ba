// Sampled products: <x_n, weight_j> for kept (n, j) alone, in run order.
// A block of kSpan neurons, kDotVecs vectors of each, stays in the first-level cache while the rows of
// a tile pass it; their pieces are packed, for rows a power of two apart would meet in few of its sets.
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

// out[i] (+)= <x, row at[i] of the block> for G neurons, V vectors long; the first piece overwrites.
template <int V, int G>
inline void dot_group(const float* x, const float* block, const uint8_t* at, bool overwrite,
                      float* out) {
    const float* w[G];
    Vec acc[(G + 3) / 4 * 4] = {};
    for (int i = 0; i < G; ++i) w[i] = block + int64_t{at[i]} * (V * kLanes);
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
template <int V>
inline void dots(const float* x, const float* block, const uint8_t* at, int count, bool overwrite,
                 float* out) {
    for (int groups = (count + kGroup - 1) / kGroup; groups > 0; --groups) {
        const int size = (count + groups - 1) / groups;
        switch (size) {
            case 1: dot_group<V, 1>(x, block, at, overwrite, out); break;
            case 2: dot_group<V, 2>(x, block, at, overwrite, out); break;
            case 3: dot_group<V, 3>(x, block, at, overwrite, out); break;
            case 4: dot_group<V, 4>(x, block, at, overwrite, out); break;
            case 5: dot_group<V, 5>(x, block, at, overwrite, out); break;
            case 6: dot_group<V, 6>(x, block, at, overwrite, out); break;
            case 7: dot_group<V, 7>(x, block, at, overwrite, out); break;
            case 8: dot_group<V, 8>(x, block, at, overwrite, out); break;
        }
        count -= size, at += size, out += size;
    }
}

// The packed rows of a tile and a block of weights, one piece of H of each.
struct PieceScratch {
    alignas(64) float x[kTile * kDotVecs * kLanes];
    alignas(64) float block[kSpan * kDotVecs * kLanes];
};

// Columns [start, start + V vectors) of a tile's rows against blocks [b, end) of its expert's neurons.
template <int V>
void sample_piece(const MoneShape& s, const MoneRuns& r, const MoneMatrix& x, const MoneMatrix& weight,
                  int64_t t, int64_t b, int64_t end, int64_t start, PieceScratch& scratch,
                  float* out_K) {
    constexpr int64_t width = V * kLanes;
    const Tile tile = find_tile(s, t);
    const int64_t rows = tile.end - tile.begin, length = at_most(width, s.hidden - start);
    load_block(x, element(tile.begin, x.row_stride, 0), rows, start, length, width, scratch.x);
    for (; b < end; ++b) {
        const int64_t first = b * kSpan, after = at_most(first + kSpan, s.neurons);
        const int64_t base = tile.expert * weight.expert_stride;
        const BlockRuns of = block_runs(s, r, t, tile, b);
        bool flags[kSpan];
        const bool* used = used_neurons(tile, r, of, flags);
        load_block(weight, base + first * weight.row_stride, after - first, start, length, width,
                   scratch.block, used);
        NextBlock ahead{weight, base + after * weight.row_stride,
                        used || b + 1 == end ? 0 : at_most(kSpan, s.neurons - after), start, length,
                        rows};
        int64_t k = of.first;
        for (int64_t i = 0; i < rows; ++i) {
            ahead.step();
            const int count = of.lengths[i];
            dots<V>(scratch.x + of.rows[i] * width, scratch.block, r.neuron_K + k, count, start == 0,
                    out_K + k);
            k += count;
        }
    }
}

// Blocks of one task: as few tasks as keep the threads busy, for each packs the rows of its tile anew.
inline int64_t blocks_of_task(const MoneShape& s) {
    const int64_t wanted = blocks(8 * s.threads, total_tiles(s));
    return blocks(spans_of(s), at_most(wanted, spans_of(s)));
}

void sample(const MoneShape& s, const MoneRuns& r, const MoneMatrix& x, const MoneMatrix& weight,
            float* out_K) {
    if (total_tiles(s) == 0) return;
    const int64_t size = blocks_of_task(s), across = blocks(spans_of(s), size);
#pragma omp parallel for schedule(dynamic) num_threads(s.threads)
    for (int64_t task = 0; task < across * total_tiles(s); ++task) {
        PieceScratch scratch;
        const int64_t t = task / across, b = task % across * size, end = at_most(b + size, spans_of(s));
        for (int64_t start = 0; start < s.hidden;) {
            const int64_t vecs = blocks(s.hidden - start, kLanes);
            auto piece = [&](auto run, int64_t taken) {
                run(s, r, x, weight, t, b, end, start, scratch, out_K);
                start += taken * kLanes;
            };
            if (vecs >= kDotVecs)
                piece(sample_piece<kDotVecs>, kDotVecs);
            else if (vecs >= 8)
                piece(sample_piece<8>, 8);
            else if (vecs >= 4)
                piece(sample_piece<4>, 4);
            else if (vecs >= 2)
                piece(sample_piece<2>, 2);
            else
                piece(sample_piece<1>, 1);
        }
    }
}

}  // namespace
