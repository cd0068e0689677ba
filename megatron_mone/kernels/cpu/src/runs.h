// Kept entries in run order, in which the sparse kernels walk them: by tile of rows, block of kSpan
// neurons, then row, a row's entries in one block being a run (MoneRuns). All that a kernel reads or
// writes of entries is then in order.
#pragma once

namespace {

// order = 0 .. count - 1 by length, a stable counting sort; loops of equal length then follow each
// other, which the branch predictor learns. Lengths are at most kSpan.
inline void order_by_length(const int32_t* from, const int32_t* to, int64_t count,
                            uint16_t* order) {
    int32_t first[kSpan + 2] = {};
    for (int64_t i = 0; i < count; ++i) ++first[to[i] - from[i] + 1];
    for (int64_t l = 0; l < kSpan; ++l) first[l + 1] += first[l];
    for (int64_t i = 0; i < count; ++i)
        order[first[to[i] - from[i]]++] = static_cast<uint16_t>(i);
}

constexpr int64_t kCutRows = 16;  // rows cut together: they fill a line of `from`

inline int64_t spans_of(const MoneShape& s) { return blocks(s.neurons, kSpan); }

// `from` of rows [n, end), at most kCutRows. All entries that may lie in a block are compared: a loop
// that ends at its last one would be mispredicted.
template <class Index>
inline void cut_group(const MoneShape& s, const MoneMask& m, int64_t n, int64_t end,
                      int32_t* from) {
    const Index* idx = static_cast<const Index*>(m.idx);
    int32_t cut[kCutRows] = {};
    for (int64_t b = 0; b <= spans_of(s); ++b, from += s.rows) {
        const Index last = static_cast<Index>(at_most(b * kSpan, s.neurons) - 1);
        for (int64_t i = 0; i < end - n; ++i) {
            const Index* next = idx + m.offsets[n + i] + cut[i];
            const int64_t most = at_most(kSpan, idx + m.offsets[n + i + 1] - next);
            Index before = 0;
            for (int64_t l = 0; l < most; ++l) before += next[l] <= last;
            from[n + i] = cut[i] += before;
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

// The runs of one tile in block b: `rows` of the tile and `lengths` of their runs, in order, and the
// first entry of each run order's block.
struct BlockRuns {
    const uint16_t* rows;
    const uint8_t* lengths;
    int64_t first, end;
};

inline BlockRuns block_runs(const MoneShape& s, const MoneRuns& r, int64_t t, const Tile& tile,
                         int64_t b) {
    const int64_t at = element(b, s.rows, tile.begin), start = element(t, spans_of(s) + 1, b);
    return {r.rows + at, r.lengths + at, r.starts[start], r.starts[start + 1]};
}

// Calls run(row, entry in the mask's order, entry in run order, length) for the runs of a block.
template <class Run>
inline void each_run(const MoneShape& s, const MoneMask& m, const MoneRuns& r, int64_t t, int64_t b,
                     Run run) {
    const Tile tile = find_tile(s, t);
    const BlockRuns of = block_runs(s, r, t, tile, b);
    const int32_t* from = r.from + element(b, s.rows, tile.begin);
    int64_t k = of.first;
    for (int64_t i = 0; i < tile.end - tile.begin; k += of.lengths[i], ++i) {
        const int64_t n = tile.begin + of.rows[i];
        run(n, m.offsets[n] + from[of.rows[i]], k, of.lengths[i]);
    }
}

constexpr int64_t kSparseRows = 12;

// Few rows leave most weights unread; then the neurons of the block that they keep are flagged.
inline const bool* used_neurons(const Tile& tile, const MoneRuns& r, const BlockRuns& of, bool* used) {
    if (tile.end - tile.begin > kSparseRows) return nullptr;
    std::memset(used, 0, kSpan);
    for (int64_t k = of.first; k < of.end; ++k) used[r.neuron_K[k]] = true;
    return used;
}

// One block of one tile: its runs by length, and the neurons of their entries.
template <class Index>
void order_runs(const MoneShape& s, const MoneMask& m, const MoneRuns& r, int64_t t, int64_t b) {
    const Tile tile = find_tile(s, t);
    const int64_t rows = tile.end - tile.begin, at = element(b, s.rows, tile.begin);
    const Index* idx = static_cast<const Index*>(m.idx);
    const int32_t *from = r.from + at, *to = from + s.rows;
    order_by_length(from, to, rows, r.rows + at);
    int64_t k = m.offsets[tile.begin];
    for (int64_t i = 0; i < rows; ++i) k += from[i];
    r.starts[element(t, spans_of(s) + 1, b)] = k;
    for (int64_t i = 0; i < rows; ++i) {
        const int64_t n = r.rows[at + i], length = to[n] - from[n];
        const Index* entry = idx + m.offsets[tile.begin + n] + from[n];
        r.lengths[at + i] = static_cast<uint8_t>(length);
        for (int64_t e = 0; e < length; ++e)
            r.neuron_K[k + e] = static_cast<uint8_t>(entry[e] - b * kSpan);
        k += length;
    }
    if (b + 1 == spans_of(s)) r.starts[element(t, spans_of(s) + 1, b + 1)] = k;
}

template <class Index>
void list_runs(const MoneShape& s, const MoneMask& m, const MoneRuns& r) {
    const int64_t tasks = total_tiles(s) * spans_of(s);
#pragma omp parallel num_threads(s.threads)
    {
#pragma omp for schedule(dynamic, kRowGrain / kCutRows)
        for (int64_t n = 0; n < s.rows; n += kCutRows)
            cut_group<Index>(s, m, n, at_most(n + kCutRows, s.rows), r.from);
#pragma omp for schedule(dynamic, kRowGrain)
        for (int64_t t = 0; t < tasks; ++t)
            order_runs<Index>(s, m, r, t / spans_of(s), t % spans_of(s));
    }
}

// to_K = the values of from_K, which are in run order, in the mask's.
void mask_order(const MoneShape& s, const MoneMask& m, const MoneRuns& r, const float* from_K,
                float* to_K) {
    const int64_t tasks = total_tiles(s) * spans_of(s);
#pragma omp parallel for schedule(dynamic) num_threads(s.threads)
    for (int64_t t = 0; t < tasks; ++t)
        each_run(s, m, r, t / spans_of(s), t % spans_of(s),
                 [&](int64_t, int64_t at, int64_t k, int64_t length) {
                     for (int64_t e = 0; e < length; ++e) to_K[at + e] = from_K[k + e];
                 });
}

}  // namespace
