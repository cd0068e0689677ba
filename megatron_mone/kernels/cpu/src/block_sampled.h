// Sampled products of a mask of whole blocks: gathered rows times kBlock neurons (dots.h).
#pragma once

namespace {

void sample_blocks(const MoneShape& s, const MoneMask& m, const MoneBlocks& lists, const float* x,
                   int64_t x_stride, const MoneMatrix& weight, float* out_K) {
    const int64_t across = blocks_of(s), tasks = across * total_tiles(s);
#pragma omp parallel for schedule(dynamic) num_threads(s.threads)
    for (int64_t t = 0; t < tasks; ++t) {
        DotScratch scratch;
        const Tile tile = find_tile(s, t / across);
        const BlockLists blocks = lists_of(s, m, lists, t / across, tile);
        const int64_t b = t % across, count = blocks.count(b);
        if (!count) continue;
        const MoneBlockEntry* list = blocks.list(b);
        const int64_t base =
            tile.expert * weight.expert_stride + element(b * kBlock, weight.row_stride, 0);
        dot_block(x, x_stride, [&](int64_t i) { return tile.begin + list[i].row; }, count, weight,
                  base, kBlock, s.hidden, scratch);
        for (int64_t i = 0; i < count; ++i)
            std::memcpy(out_K + position(m, tile, list[i]), scratch.sums + i * kBlock,
                        kBlock * sizeof(float));
    }
}

}  // namespace
