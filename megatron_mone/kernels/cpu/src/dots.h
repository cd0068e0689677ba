// Dot products of many rows of x with a block of kBlock neurons: out = x weight^T, for all rows (the
// gate) or those of a list (block_sampled.h). Both operands are contiguous along H, so that nothing
// is packed: a tile of rows by neurons is summed lane by lane and its lanes added at the end.
#pragma once

namespace {

constexpr int64_t kChunk = 512;  // floats of H between two sums of lanes: a block is 32 KB of them
constexpr int kRowGroup = 6;     // rows of x per tile

inline int64_t padded(int64_t length) { return blocks(length, kLanes) * kLanes; }

// Neurons of a tile beside R rows: the sums and one operand fill the registers.
template <int R>
constexpr int neurons_beside() {
    return R == 1 ? 8 : kRegisters == 32 || R <= 3 ? 4 : 2;
}

// The kBlock neurons of a block, `length` floats of each; float32, `stride` apart, zeros after.
struct Weights {
    const float* data;
    int64_t stride;
};

// sums[r][kBlock] (+)= <x[r], every neuron>.
template <int R>
inline void dot_tile(const float* const* x, Weights w, int64_t length, bool overwrite,
                     float* sums) {
    constexpr int C = neurons_beside<R>();
    for (int64_t j = 0; j < kBlock; j += C) {
        const float* rows = w.data + j * w.stride;
        Vec acc[R * C + 3] = {};
        for (int64_t k = 0; k < length; k += kLanes) {
            Vec part[C];
#pragma GCC unroll 8
            for (int c = 0; c < C; ++c) part[c] = in_register(load(rows + c * w.stride + k));
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                const Vec value = in_register(load(x[r] + k));
#pragma GCC unroll 8
                for (int c = 0; c < C; ++c) acc[r * C + c] += value * part[c];
            }
        }
        float flat[R * C + 3];
#pragma GCC unroll 16
        for (int i = 0; i < R * C; i += 4)
            *reinterpret_cast<Vec4Loose*>(flat + i) =
                lane_sums(acc[i], acc[i + 1], acc[i + 2], acc[i + 3]);
        for (int r = 0; r < R; ++r) {
            float* out = sums + r * kBlock + j;
            for (int c = 0; c < C; ++c) out[c] = (overwrite ? 0.0f : out[c]) + flat[r * C + c];
        }
    }
}

inline void dot_rows(const float* const* x, int64_t count, Weights w, int64_t length,
                     bool overwrite, float* sums) {
    switch (count) {
        case 1: return dot_tile<1>(x, w, length, overwrite, sums);
        case 2: return dot_tile<2>(x, w, length, overwrite, sums);
        case 3: return dot_tile<3>(x, w, length, overwrite, sums);
        case 4: return dot_tile<4>(x, w, length, overwrite, sums);
        case 5: return dot_tile<5>(x, w, length, overwrite, sums);
        case 6: return dot_tile<6>(x, w, length, overwrite, sums);
    }
}

// Work space of one task: a converted block, and the sums of up to kTile rows with it.
struct DotScratch {
    alignas(64) float block[kBlock * kChunk];
    alignas(64) float sums[kTile * kBlock];
};

// Columns [start, start + length) of the block's `neurons` weight rows from element `base`, read in
// place where they are whole vectors of float32, else copied.
inline Weights dot_weights(const MoneMatrix& weight, int64_t base, int64_t neurons, int64_t start,
                           int64_t length, DotScratch& scratch) {
    if (!weight.is_bf16 && neurons == kBlock && length % kLanes == 0)
        return {static_cast<const float*>(weight.data) + base + start, weight.row_stride};
    const int64_t width = padded(length);
    load_block(weight, base, neurons, start, length, width, scratch.block);
    std::memset(scratch.block + neurons * width, 0, (kBlock - neurons) * width * sizeof(float));
    return {scratch.block, width};
}

// scratch.sums[i] = <x row_at(i), the block's neurons> for i < count <= kTile. x is float32 rows,
// x_stride apart, that are whole vectors (zeros after H).
template <class RowAt>
inline void dot_block(const float* x, int64_t x_stride, RowAt row_at, int64_t count,
                      const MoneMatrix& weight, int64_t base, int64_t neurons, int64_t hidden,
                      DotScratch& scratch) {
    for (int64_t start = 0; start < hidden; start += kChunk) {
        const int64_t length = at_most(kChunk, hidden - start);
        const Weights w = dot_weights(weight, base, neurons, start, length, scratch);
        for (int64_t i = 0; i < count; i += kRowGroup) {
            const int64_t size = at_most(kRowGroup, count - i);
            const float* rows[kRowGroup];
            for (int64_t r = 0; r < size; ++r) rows[r] = x + element(row_at(i + r), x_stride, start);
            dot_rows(rows, size, w, padded(length), start == 0, scratch.sums + i * kBlock);
        }
    }
}

// float32 rows of whole vectors, from any matrix.
void widen_rows(const MoneShape& s, const MoneMatrix& from, float* to, int64_t stride) {
#pragma omp parallel for schedule(dynamic, kRowGrain) num_threads(s.threads)
    for (int64_t n = 0; n < s.rows; ++n)
        copy_row(from, element(n, from.row_stride, 0), s.hidden, stride, to + element(n, stride, 0));
}

// scratch.sums of a block for rows so few that converting its bfloat16 weights beforehand would cost
// more than loading them again for each row.
constexpr int64_t kLoneRows = 2;

inline void dot_lone_rows(const float* x, int64_t x_stride, int64_t rows, const MoneMatrix& weight,
                          int64_t base, int64_t hidden, DotScratch& scratch) {
    const uint16_t* w[kBlock];
    for (int64_t j = 0; j < kBlock; ++j)
        w[j] = static_cast<const uint16_t*>(weight.data) + base + element(j, weight.row_stride, 0);
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t j = 0; j < kBlock; j += 8)
            dot_few<8>(x + element(r, x_stride, 0), w + j, hidden, scratch.sums + r * kBlock + j);
}

// out[n, j] = <x_n, weight_j> for every neuron of the row's expert.
void dense_products(const MoneShape& s, const float* x, int64_t x_stride, const MoneMatrix& weight,
                    MoneMatrix& out) {
    const int64_t across = blocks(s.neurons, kBlock), tasks = across * total_tiles(s);
#pragma omp parallel for schedule(dynamic, run_of(tasks, s.threads)) num_threads(s.threads)
    for (int64_t t = 0; t < tasks; ++t) {
        DotScratch scratch;
        const Tile tile = find_tile(s, t / across);
        const int64_t first = t % across * kBlock, neurons = at_most(kBlock, s.neurons - first);
        const int64_t base =
            tile.expert * weight.expert_stride + element(first, weight.row_stride, 0);
        const int64_t rows = tile.end - tile.begin;
        if (weight.is_bf16 && rows <= kLoneRows && neurons == kBlock)
            dot_lone_rows(x + element(tile.begin, x_stride, 0), x_stride, rows, weight, base, s.hidden,
                          scratch);
        else
            dot_block(x, x_stride, [&](int64_t i) { return tile.begin + i; }, rows, weight, base,
                      neurons, s.hidden, scratch);
        write_block(scratch.sums, kBlock, rows, element(tile.begin, out.row_stride, first), neurons,
                    out);
    }
}

}  // namespace
