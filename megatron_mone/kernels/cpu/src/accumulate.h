// Sparse accumulation into token rows: out[n] = sum of value * weight[j] over kept (n, j): y and dx.
// A block of kSumInputs x kSumWidth weights stays in the first-level cache; the sums of a tile of
// rows stay in the second and are written out once.
#pragma once

namespace {

constexpr int kVecs = kSumWidth / kLanes < 8 ? kSumWidth / kLanes : 8;  // sums in registers
constexpr int kPart = kVecs * kLanes;                                   // floats they span

struct SumScratch {
    alignas(64) float sums[kTile * kSumWidth];
    alignas(64) float block[kSumInputs * kSumWidth];
};

// sums += value[k] * row idx[k] - base of the block, kSumWidth floats.
template <class Index>
inline void add_run(const float* block, int64_t base, const Index* idx, const float* value,
                    int64_t count, float* sums) {
    for (int64_t part = 0; part < kSumWidth; part += kPart, block += kPart, sums += kPart) {
        Vec acc[kVecs];
#pragma GCC unroll 8
        for (int i = 0; i < kVecs; ++i) acc[i] = load(sums + i * kLanes);
        for (int64_t k = 0; k < count; ++k) {
            const float* row = block + (idx[k] - base) * kSumWidth;
            Vec scale = splat(value[k]);
#pragma GCC unroll 8
            for (int i = 0; i < kVecs; ++i) acc[i] += scale * load(row + i * kLanes);
        }
#pragma GCC unroll 8
        for (int i = 0; i < kVecs; ++i) store(sums + i * kLanes, acc[i]);
    }
}

// One term of y or dx for a tile of rows, columns from `start`.
template <class Index>
void add_term(const MoneShape& s, const MoneMask& m, const MoneCuts& cuts, const float* value_K,
              const MoneMatrix& weight, const Tile& tile, int64_t start, SumScratch& scratch) {
    const int64_t length = at_most(kSumWidth, s.hidden - start), rows = tile.end - tile.begin;
    const Index* idx = static_cast<const Index*>(m.idx);
    for (int64_t b = 0; b * kSumInputs < s.neurons; ++b) {
        const int64_t first = b * kSumInputs;
        bool flags[kSumInputs];
        const bool* used = used_neurons<Index>(s, m, cuts, tile, b, first, flags);
        load_block(weight, tile.expert * weight.expert_stride + first * weight.row_stride,
                   at_most(kSumInputs, s.neurons - first), start, length, kSumWidth,
                   scratch.block, used);
        const int32_t *from = cuts.at + element(b, s.rows, tile.begin), *to = from + s.rows;
        const uint16_t* order = cuts.order + element(b, s.rows, tile.begin);
        const int64_t after = at_most(first + kSumInputs, s.neurons);
        NextBlock ahead{weight, tile.expert * weight.expert_stride + after * weight.row_stride,
                        used ? 0 : at_most(kSumInputs, s.neurons - after), start, length, rows};
        for (int64_t i = 0; i < rows; ++i) {
            ahead.step();
            const int64_t next = order[at_most(i + kAhead, rows - 1)];
            const int64_t l = m.offsets[tile.begin + next] + from[next];
            prefetch(value_K + l, 2 * 64);
            prefetch(idx + l, 64);
            prefetch(scratch.sums + next * kSumWidth, kSumWidth * 4);
            const int64_t n = order[i], k = m.offsets[tile.begin + n] + from[n];
            add_run(scratch.block, first, idx + k, value_K + k, to[n] - from[n],
                    scratch.sums + n * kSumWidth);
        }
    }
}

template <class Index>
void accumulate_rows(const MoneShape& s, const MoneMask& m, const MoneCuts& cuts,
                     const float* value0_K, const MoneMatrix& weight0, const float* value1_K,
                     const MoneMatrix* weight1, MoneMatrix& out) {
    const int64_t across = blocks(s.hidden, kSumWidth), tasks = across * total_tiles(s);
#pragma omp parallel for schedule(dynamic) num_threads(s.threads)
    for (int64_t t = 0; t < tasks; ++t) {
        SumScratch scratch;
        const Tile tile = find_tile(s, t / across);
        const int64_t start = t % across * kSumWidth, rows = tile.end - tile.begin;
        std::memset(scratch.sums, 0, rows * kSumWidth * sizeof(float));
        add_term<Index>(s, m, cuts, value0_K, weight0, tile, start, scratch);
        if (weight1) add_term<Index>(s, m, cuts, value1_K, *weight1, tile, start, scratch);
        write_block(scratch.sums, kSumWidth, rows, element(tile.begin, out.row_stride, start),
                    at_most(kSumWidth, s.hidden - start), out);
    }
}

}  // namespace
