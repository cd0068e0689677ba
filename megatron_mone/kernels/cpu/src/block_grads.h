// Weight gradients of a mask of whole blocks: grad[kBlock, :] = values[rows, kBlock]^T x[rows, :]
// over the rows that keep the block. Strips of x and dy stay in the second-level cache; the sums of
// a few neurons stay in registers while the rows pass.
#pragma once

namespace {

constexpr int64_t kGradTile = 128;  // neurons whose sums are written out together

struct BlockGradScratch {
    alignas(64) float sums[2][kGradTile * kBlockWidth];
    alignas(64) float rows[kTile * kBlockWidth];  // of x or dy
    int64_t at[kTile];   // of the rows of one list: their first kept entry ...
    int64_t row[kTile];  // ... and their strip
};

// R neurons from `values`, kPanelWidth columns: sums += values^T rows over `count` rows.
template <int R>
inline void grad_panel(const BlockGradScratch& g, int64_t count, const float* values,
                       const float* rows, float* sums) {
    Vec acc[R][kPanelVecs];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < kPanelVecs; ++v) acc[r][v] = load(sums + r * kBlockWidth + v * kLanes);
    for (int64_t i = 0; i < count; ++i) {
        const float *row = rows + g.row[i], *value = values + g.at[i];
        Vec x[kPanelVecs];
        for (int v = 0; v < kPanelVecs; ++v) x[v] = in_register(load(row + v * kLanes));
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const Vec scale = in_register(splat(value[r]));
            for (int v = 0; v < kPanelVecs; ++v) acc[r][v] += scale * x[v];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < kPanelVecs; ++v) store(sums + r * kBlockWidth + v * kLanes, acc[r][v]);
}

// The kBlock neurons as 6 + 5 + 5, to fill the registers with sums.
inline void grad_block(const BlockGradScratch& g, int64_t count, const float* values_K,
                       const float* rows, float* sums) {
    static_assert(kBlock == 16, "neurons of a block are taken as 6 + 5 + 5");
    for (int64_t part = 0; part < kBlockWidth; part += kPanelWidth) {
        grad_panel<6>(g, count, values_K, rows + part, sums + part);
        grad_panel<5>(g, count, values_K + 6, rows + part, sums + 6 * kBlockWidth + part);
        grad_panel<5>(g, count, values_K + 11, rows + part, sums + 11 * kBlockWidth + part);
    }
}

// One or two gradients that share their rows (gate and up share x): values and where they go.
struct GradTerms {
    const float* values_K[2];
    MoneMatrix* outs[2];
    const MoneMatrix* rows;
    int count;
};

// Neurons [first, end) of one expert, columns from `start`, over its tiles of rows. `loaded` is the
// tile whose strip is in the scratch: a lone tile is loaded once.
inline void grad_blocks(const MoneShape& s, const MoneMask& m, const MoneBlocks& lists,
                        const GradTerms& terms, int64_t e, int64_t first, int64_t end,
                        int64_t start, int64_t& loaded, BlockGradScratch& g) {
    const int64_t length = at_most(kBlockWidth, s.hidden - start);
    int64_t index = 0;
    for (int64_t before = 0; before < e; ++before) index += tiles_of(s, before);
    for (int64_t row = s.row_start[e]; row < s.row_start[e + 1]; row += kTile, ++index) {
        const Tile tile = {e, row, at_most(row + kTile, s.row_start[e + 1])};
        const BlockLists blocks = lists_of(s, m, lists, index, tile);
        if (index != loaded)
            load_block(*terms.rows, element(row, terms.rows->row_stride, 0), tile.end - tile.begin,
                       start, length, kBlockWidth, g.rows);
        loaded = index;
        for (int64_t j = first; j < end; j += kBlock) {
            const int64_t count = blocks.count(j / kBlock), next = blocks.starts[j / kBlock + 1];
            const MoneBlockEntry* list = blocks.list(j / kBlock);
            for (int64_t i = 0; i < count; ++i) {
                g.at[i] = position(m, tile, list[i]);
                g.row[i] = list[i].row * kBlockWidth;
                for (int v = 0; v < terms.count; ++v)
                    prefetch_values(s, m, tile, blocks, next + i, terms.values_K[v]);
            }
            for (int v = 0; v < terms.count && count; ++v)
                grad_block(g, count, terms.values_K[v], g.rows,
                           g.sums[v] + (j - first) * kBlockWidth);
        }
    }
}

// Neurons [first, last) of one expert, columns from `start`.
inline void grad_strip(const MoneShape& s, const MoneMask& m, const MoneBlocks& lists,
                       const GradTerms& terms, int64_t e, int64_t first, int64_t last,
                       int64_t start, BlockGradScratch& g) {
    int64_t loaded = -1;
    for (; first < last; first += kGradTile) {
        const int64_t end = at_most(first + kGradTile, last);
        for (int v = 0; v < terms.count; ++v)
            std::memset(g.sums[v], 0, (end - first) * kBlockWidth * sizeof(float));
        grad_blocks(s, m, lists, terms, e, first, end, start, loaded, g);
        for (int v = 0; v < terms.count; ++v) {
            MoneMatrix& out = *terms.outs[v];
            const int64_t base = e * out.expert_stride + element(first, out.row_stride, start);
            write_block(g.sums[v], kBlockWidth, end - first, base,
                        at_most(kBlockWidth, s.hidden - start), out, past_caches(s));
        }
    }
}

void sum_block_grads(const MoneShape& s, const MoneMask& m, const MoneBlocks& lists,
                     const GradTerms& terms) {
    const int64_t across = blocks(s.hidden, kBlockWidth), down = blocks(s.neurons, kGradTile);
    if (!s.experts || !across || !down || !terms.count) return;
    // as few tasks as keep the threads busy: each loads its strip of rows again
    const int64_t wanted = blocks(4 * s.threads, s.experts * across);
    const int64_t share = blocks(down, at_most(wanted, down)), parts = blocks(down, share);
#pragma omp parallel for schedule(dynamic) num_threads(s.threads)
    for (int64_t t = 0; t < s.experts * across * parts; ++t) {
        BlockGradScratch g;
        const int64_t e = t / (across * parts), start = t / parts % across * kBlockWidth;
        const int64_t first = t % parts * share * kGradTile;
        grad_strip(s, m, lists, terms, e, first, at_most(first + share * kGradTile, s.neurons),
                   start, g);
    }
}

}  // namespace
