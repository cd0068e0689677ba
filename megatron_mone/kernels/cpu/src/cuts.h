// Where kept entries cross blocks, and the order in which the kernels walk them (MoneCuts).
#pragma once

namespace {

// order = 0 .. count - 1 by the lengths to[i] - from[i], a stable counting sort; equal lengths then
// follow each other. Lengths are at most kLongestRun.
inline void order_by_length(const int32_t* from, const int32_t* to, int64_t count,
                            uint16_t* order) {
    int32_t first[kLongestRun + 2] = {};
    for (int64_t i = 0; i < count; ++i) ++first[to[i] - from[i] + 1];
    for (int64_t l = 0; l < kLongestRun; ++l) first[l + 1] += first[l];
    for (int64_t i = 0; i < count; ++i)
        order[first[to[i] - from[i]]++] = static_cast<uint16_t>(i);
}

constexpr int64_t kCutRows = 16;  // rows cut together: they fill a line of the table

// Cuts of rows [n, end), at most kCutRows. All entries that may lie in a block are compared: a loop
// that ends at its last one would be mispredicted.
template <class Index>
inline void cut_group(const MoneShape& s, const MoneMask& m, int64_t n, int64_t end, int64_t width,
                      int64_t count, int32_t* at) {
    const Index* idx = static_cast<const Index*>(m.idx);
    int32_t cut[kCutRows] = {};
    for (int64_t b = 0; b <= count; ++b, at += s.rows) {
        const Index last = static_cast<Index>(at_most(b * width, s.neurons) - 1);
        for (int64_t i = 0; i < end - n; ++i) {
            const Index* next = idx + m.offsets[n + i] + cut[i];
            const int64_t most = at_most(width, idx + m.offsets[n + i + 1] - next);
            Index before = 0;
            for (int64_t l = 0; l < most; ++l) before += next[l] <= last;
            at[n + i] = cut[i] += before;
        }
    }
}

// Tasks are the tiles of kTile rows of each expert, as in the kernels that use the table.
inline int64_t tiles_of(const MoneShape& s, int64_t e) { return blocks(rows_of(s, e), kTile); }

inline int64_t total_tiles(const MoneShape& s) {
    int64_t tiles = 0;
    for (int64_t e = 0; e < s.experts; ++e) tiles += tiles_of(s, e);
    return tiles;
}

// A tile's expert and rows [begin, end).
struct Tile {
    int64_t expert, begin, end;
};

inline Tile find_tile(const MoneShape& s, int64_t t) {
    int64_t e = 0;
    for (; t >= tiles_of(s, e); ++e) t -= tiles_of(s, e);
    const int64_t begin = s.row_start[e] + t * kTile;
    return {e, begin, at_most(begin + kTile, s.row_start[e + 1])};
}

constexpr int64_t kSparseRows = 12;

// Few rows leave most weights unread; then the neurons of block b that they keep are listed.
template <class Index>
const bool* used_neurons(const MoneShape& s, const MoneMask& m, const MoneCuts& cuts,
                         const Tile& tile, int64_t b, int64_t first, bool* used) {
    if (tile.end - tile.begin > kSparseRows) return nullptr;
    const int32_t *from = cuts.at + element(b, s.rows, 0), *to = from + s.rows;
    std::memset(used, 0, kLongestRun);
    for (int64_t n = tile.begin; n < tile.end; ++n)
        for (int64_t k = m.offsets[n] + from[n]; k < m.offsets[n] + to[n]; ++k)
            used[static_cast<const Index*>(m.idx)[k] - first] = true;
    return used;
}

template <class Index>
void cut_rows(const MoneShape& s, const MoneMask& m, int64_t width, MoneCuts& cuts) {
    const int64_t count = blocks(s.neurons, width);
#pragma omp parallel num_threads(s.threads)
    {
#pragma omp for schedule(dynamic, kRowGrain / kCutRows)
        for (int64_t n = 0; n < s.rows; n += kCutRows)
            cut_group<Index>(s, m, n, at_most(n + kCutRows, s.rows), width, count, cuts.at);
#pragma omp for schedule(dynamic, kRowGrain)
        for (int64_t t = 0; t < total_tiles(s) * count; ++t) {
            const Tile tile = find_tile(s, t / count);
            const int64_t first = element(t % count, s.rows, tile.begin);
            const int32_t* from = cuts.at + first;
            order_by_length(from, from + s.rows, tile.end - tile.begin, cuts.order + first);
        }
    }
}

}  // namespace
