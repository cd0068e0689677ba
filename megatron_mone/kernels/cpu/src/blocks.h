// Rows of a tile by the block of kBlock neurons that they keep: a mask of whole blocks, transposed.
#pragma once

namespace {

// The lists of one tile: entries[starts[b] .. starts[b + 1]) keep block b, ascending in row.
struct BlockLists {
    const int32_t* starts;
    const MoneBlockEntry* entries;

    int64_t count(int64_t b) const { return starts[b + 1] - starts[b]; }
    const MoneBlockEntry* list(int64_t b) const { return entries + starts[b]; }
};

inline int64_t blocks_of(const MoneShape& s) { return s.neurons / kBlock; }

inline BlockLists lists_of(const MoneShape& s, const MoneMask& m, const MoneBlocks& blocks,
                           int64_t tile_index, const Tile& tile) {
    return {blocks.starts + element(tile_index, blocks_of(s) + 1, 0),
            blocks.entries + m.offsets[tile.begin] / kBlock};
}

// First kept entry of the block, among all K.
inline int64_t position(const MoneMask& m, const Tile& tile, MoneBlockEntry entry) {
    return m.offsets[tile.begin + entry.row] + element(entry.rank, kBlock, 0);
}

// Asks for the values of the tile's list entry number `at`, if there is one: the values of a list are
// as far apart as its rows, where no prefetcher looks.
inline void prefetch_values(const MoneShape& s, const MoneMask& m, const Tile& tile,
                            const BlockLists& lists, int64_t at, const float* values_K) {
    if (at < lists.starts[blocks_of(s)])
        prefetch(values_K + position(m, tile, lists.entries[at]), kBlock * sizeof(float));
}

template <class Index>
void list_tile(const MoneShape& s, const MoneMask& m, const Tile& tile, int32_t* starts,
               MoneBlockEntry* entries) {
    const Index* idx = static_cast<const Index*>(m.idx);
    const int64_t count = blocks_of(s);
    std::memset(starts, 0, (count + 1) * sizeof(int32_t));
    for (int64_t n = tile.begin; n < tile.end; ++n)
        for (int64_t k = m.offsets[n]; k < m.offsets[n + 1]; k += kBlock)
            ++starts[idx[k] / kBlock];
    for (int64_t b = 0, begin = 0; b <= count; ++b) {
        const int64_t size = b < count ? starts[b] : 0;
        starts[b] = static_cast<int32_t>(begin);
        begin += size;
    }
    for (int64_t n = tile.begin; n < tile.end; ++n) {
        const Index* row = idx + m.offsets[n];
        for (int64_t i = 0; i * kBlock < m.offsets[n + 1] - m.offsets[n]; ++i)
            entries[starts[row[i * kBlock] / kBlock]++] = {static_cast<int32_t>(n - tile.begin),
                                                           static_cast<int32_t>(i)};
    }
    // starts[b] has moved to where block b + 1 begins
    std::memmove(starts + 1, starts, count * sizeof(int32_t));
    starts[0] = 0;
}

template <class Index>
void list_blocks(const MoneShape& s, const MoneMask& m, MoneBlocks& out) {
#pragma omp parallel for schedule(dynamic) num_threads(s.threads)
    for (int64_t t = 0; t < total_tiles(s); ++t) {
        const Tile tile = find_tile(s, t);
        list_tile<Index>(s, m, tile, out.starts + element(t, blocks_of(s) + 1, 0),
                         out.entries + m.offsets[tile.begin] / kBlock);
    }
}

}  // namespace
