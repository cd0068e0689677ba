// Accumulation into token rows for a mask of whole blocks: out[n] += values[kBlock] weight[kBlock, :]
// for the rows that keep a block, a group of them at a time. A row's blocks are added in ascending
// order whatever its group, so that the sum depends on nothing but the row's own entries.
#pragma once

namespace {

constexpr int kPanelVecs = 2;  // beside kRowGroup rows: 12 sums, 2 weights, 1 value
constexpr int kPanelWidth = kPanelVecs * kLanes;

struct BlockSumScratch {
    alignas(64) float sums[kTile * kBlockWidth];
    alignas(64) float weights[2][kBlock * kBlockWidth];
};

// sums[r] += values[r] weights, columns [part, part + kPanelWidth) of kBlockWidth.
template <int R>
inline void add_panel(const float* const* values, const float* weights, float* const* sums,
                      int64_t part) {
    Vec acc[R][kPanelVecs];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < kPanelVecs; ++v) acc[r][v] = load(sums[r] + part + v * kLanes);
#pragma GCC unroll 4
    for (int64_t j = 0; j < kBlock; ++j) {
        Vec w[kPanelVecs];
        for (int v = 0; v < kPanelVecs; ++v)
            w[v] = in_register(load(weights + j * kBlockWidth + part + v * kLanes));
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const Vec value = in_register(splat(values[r][j]));
            for (int v = 0; v < kPanelVecs; ++v) acc[r][v] += value * w[v];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < kPanelVecs; ++v) store(sums[r] + part + v * kLanes, acc[r][v]);
}

template <int R>
inline void add_group(const float* const* values, const float* weights, float* const* sums) {
    for (int64_t part = 0; part < kBlockWidth; part += kPanelWidth)
        add_panel<R>(values, weights, sums, part);
}

inline void add_rows(const float* const* values, int64_t count, const float* weights,
                     float* const* sums) {
    switch (count) {
        case 1: return add_group<1>(values, weights, sums);
        case 2: return add_group<2>(values, weights, sums);
        case 3: return add_group<3>(values, weights, sums);
        case 4: return add_group<4>(values, weights, sums);
        case 5: return add_group<5>(values, weights, sums);
        case 6: return add_group<6>(values, weights, sums);
    }
}

// All blocks of a tile of rows, columns from `start`.
inline void add_blocks(const MoneShape& s, const MoneMask& m, const BlockLists& lists,
                       const float* const* values_K, const MoneMatrix* const* weights,
                       const Tile& tile, int64_t start, BlockSumScratch& scratch) {
    const int64_t length = at_most(kBlockWidth, s.hidden - start);
    for (int64_t b = 0; b < blocks_of(s); ++b) {
        const int64_t count = lists.count(b);
        if (!count) continue;
        for (int term = 0; term < 2 && weights[term]; ++term) {
            const MoneMatrix& w = *weights[term];
            load_block(w, tile.expert * w.expert_stride + element(b * kBlock, w.row_stride, 0),
                       kBlock, start, length, kBlockWidth, scratch.weights[term]);
            const int64_t after = (b + 1) * kBlock, left = at_most(kBlock, s.neurons - after);
            NextBlock{w, tile.expert * w.expert_stride + element(after, w.row_stride, 0), left, start,
                      length, 1}.step();
        }
        for (int64_t i = 0; i < count; i += kRowGroup) {
            const int64_t size = at_most(kRowGroup, count - i);
            const float* values[kRowGroup];
            float* sums[kRowGroup];
            for (int term = 0; term < 2 && weights[term]; ++term) {
                for (int64_t r = 0; r < size; ++r) {
                    const MoneBlockEntry entry = lists.list(b)[i + r];
                    values[r] = values_K[term] + position(m, tile, entry);
                    sums[r] = scratch.sums + entry.row * kBlockWidth;
                    prefetch_values(s, m, tile, lists, lists.starts[b] + i + r + 2 * kRowGroup,
                                    values_K[term]);
                }
                add_rows(values, size, scratch.weights[term], sums);
            }
        }
    }
}

void accumulate_blocks(const MoneShape& s, const MoneMask& m, const MoneBlocks& lists,
                       const float* value0_K, const MoneMatrix& weight0, const float* value1_K,
                       const MoneMatrix* weight1, MoneMatrix& out) {
    const int64_t across = blocks(s.hidden, kBlockWidth), tasks = across * total_tiles(s);
    const float* const values[2] = {value0_K, value1_K};
    const MoneMatrix* const weights[2] = {&weight0, weight1};
#pragma omp parallel for schedule(dynamic) num_threads(s.threads)
    for (int64_t t = 0; t < tasks; ++t) {
        BlockSumScratch scratch;
        const Tile tile = find_tile(s, t / across);
        const int64_t start = t % across * kBlockWidth, rows = tile.end - tile.begin;
        std::memset(scratch.sums, 0, rows * kBlockWidth * sizeof(float));
        add_blocks(s, m, lists_of(s, m, lists, t / across, tile), values, weights, tile, start,
                   scratch);
        write_block(scratch.sums, kBlockWidth, rows, element(tile.begin, out.row_stride, start),
                    at_most(kBlockWidth, s.hidden - start), out);
    }
}

}  // namespace
