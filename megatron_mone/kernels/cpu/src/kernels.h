// The native CPU kernels of the masked grouped expert MLP: shapes, arguments, function table.
//
// Symbols: N rows grouped by expert, E experts, F neurons of an expert, H hidden, K kept entries.
// A mask is CSR: row n keeps neurons idx[offsets[n] .. offsets[n + 1]), ascending. Every value array
// over kept entries ("_K") is float32, in that order or in run order (MoneRuns); matrices are float32 or bfloat16.
// No kernel allocates, throws or keeps state; each output element is summed by one thread in a fixed
// order, so results do not depend on the number of threads.
#pragma once
#include <cstdint>

constexpr int64_t kBlock = 16;        // neurons of one block of a mask of whole blocks
constexpr int64_t kBlockWidth = 128;  // floats of H of one strip of y, dx or gradients, by blocks
constexpr int64_t kTile = 512;        // output rows of a task: they stay in the second-level cache
constexpr int64_t kFewRows = 64;      // most rows of an expert in the kernels for few rows

// Element (row, column) of a row-major matrix, in 64 bits.
static inline int64_t element(int64_t row, int64_t stride, int64_t column) {
    return row * stride + column;
}

// Rows, experts and sizes; `row_start` is [E + 1], the first row of each expert.
struct MoneShape {
    const int64_t* row_start;
    int64_t experts, rows, neurons, hidden;
    int64_t threads;
};

// A CSR mask. `idx` holds int16 (idx_bytes 2) or int32 (4).
struct MoneMask {
    const void* idx;
    const int64_t* offsets;
    int64_t idx_bytes;
};

// [E, rows, H] or [N, H] (expert_stride 0); strides in elements, the last one is 1. An output that
// `adds` keeps what it holds and adds the result to it.
struct MoneMatrix {
    void* data;
    int64_t expert_stride, row_stride;
    int64_t is_bf16;
    int64_t adds;
};

// Kept entries in run order: by tile of kTile rows of an expert, block of `span` neurons, and row; the
// rows of a tile by the number of their entries in the block. A row's entries in one block are a run:
// they follow each other in the mask's order too, from[b][n] after the row's first; from is
// [blocks + 1, N]. starts is [tiles, blocks + 1], the first entry of each block of a tile; rows (within
// the tile) and lengths of its runs are [blocks, N], neuron_K is each entry's neuron in its block.
struct MoneRuns {
    int32_t* from;
    int64_t* starts;
    uint16_t* rows;
    uint8_t* lengths;
    uint8_t* neuron_K;
};

// One kept block of a row: the row within its tile of kTile rows of an expert, and which of the row's
// kept blocks it is.
struct MoneBlockEntry {
    int32_t row, rank;
};

// A mask of whole aligned blocks of kBlock neurons, transposed: starts is [tiles, F / kBlock + 1],
// from the first block kept by the tile's first row; entries is [K / kBlock], by tile, block, row.
struct MoneBlocks {
    int32_t* starts;
    MoneBlockEntry* entries;
};

enum MoneActivation { kSilu = 0, kSigmoid = 1, kGelu = 2, kRelu = 3, kSquaredRelu = 4 };

extern "C" {

struct MoneKernels {
    // Neurons of a block of runs, and bins into which `transpose` puts each block of a tile.
    int64_t span, bins;
    // idx of the `kept` largest |gate| of each of `groups` equal groups of each row; ties go to the
    // lower index, NaN counts as infinite. gate is the bits of [rows, F] elements of gate_bytes (2:
    // bfloat16, 4: float32), keys is work space of [threads, 2 F], F up to a multiple of 16. With
    // `block` above 1 (it divides kept and a group) blocks of so many neurons are chosen by their
    // sums, added as halves.
    void (*select)(const MoneShape*, const void* gate, int64_t gate_bytes, int64_t kept,
                   int64_t groups, int64_t block, void* idx, int64_t idx_bytes, int32_t* keys);
    // The same of gate = sigma(a), and a and gate of what is chosen, in its order, as elements of
    // value_bytes to which all are rounded; in `a`, too. work is [threads, 3 F].
    void (*choose)(const MoneShape*, float* a, int64_t activation, int64_t kept, int64_t groups,
                   int64_t block, void* idx, int64_t idx_bytes, int32_t* work, int64_t value_bytes,
                   void* a_K, void* g_K);
    // out_K = dense[n, idx]; dense is [rows, F] of `bytes` (2 or 4) an element. And its inverse.
    void (*gather)(const MoneShape*, const MoneMask*, const void* dense, void* out_K, int64_t bytes);
    void (*scatter)(const MoneShape*, const MoneMask*, const float* values_K, MoneMatrix* dense);
    // Lists the runs; and puts float32 entries from run order into the mask's.
    void (*runs)(const MoneShape*, const MoneMask*, const MoneRuns*);
    void (*mask_order)(const MoneShape*, const MoneMask*, const MoneRuns*, const float* from_K,
                       float* to_K);
    // out_K = <x_n, weight_j> for kept (n, j), in run order.
    void (*sampled)(const MoneShape*, const MoneRuns*, const MoneMatrix* x, const MoneMatrix* weight,
                    float* out_K);
    // out[n] = sum over kept j of value0 * weight0[j] (+ value1 * weight1[j]), values in run order.
    void (*accumulate)(const MoneShape*, const MoneRuns*, const float* value0_K,
                       const MoneMatrix* weight0, const float* value1_K, const MoneMatrix* weight1,
                       MoneMatrix* out);
    // h_K = probs[n] g_K u_K; g is float32 or, with g_bytes 2, bfloat16, in the mask's order; u and h
    // are in run order where there are runs, else in the mask's.
    void (*gated)(const MoneShape*, const MoneMask*, const MoneRuns*, const float* probs,
                  const void* g_K, int64_t g_bytes, const float* u_K, float* h_K);
    // g = sigma(a): h = p g u, du = p v g, da = (p v u + dgate) sigma'(a), dp = sum of v g u.
    // v_K comes in through da_K; dgate_K may be null. a and dgate are in the mask's order, the others
    // in run order where there are runs; `shares` is work space of [blocks of runs, N].
    void (*gate_backward)(const MoneShape*, const MoneMask*, const MoneRuns*, int64_t activation,
                          const float* a_K, const float* u_K, const float* probs,
                          const float* dgate_K, float* da_K, float* du_K, float* h_K, float* shares,
                          float* dprobs);
    // Each block of a tile by block of its rows, then neuron, in place: the entries of up to three v_K
    // (others null) change their order within the block, and row_K tells each one's row in its block
    // of rows. at[t][b][i] entries of block b of tile t lie before bin i, [tiles, blocks, bins + 1].
    // work is [threads, 2 kTile span].
    void (*transpose)(const MoneShape*, const MoneRuns*, float* v0_K, float* v1_K, float* v2_K,
                      int32_t* at, uint8_t* row_K, int32_t* work);
    // out_i[j] = sum over the entries of v_i x[n], all as `transpose` leaves them; v1 and out1 may be
    // null.
    void (*weight_grads)(const MoneShape*, const MoneRuns*, const int32_t* at, const uint8_t* row_K,
                         const float* v0_K, const float* v1_K, const MoneMatrix* x, MoneMatrix* out0,
                         MoneMatrix* out1);
    // float32 copy of a [N, H] matrix, rows `stride` apart, zeros after H.
    void (*widen)(const MoneShape*, const MoneMatrix*, float* to, int64_t stride);
    // out[n, j] = <x_n, weight_j> for every neuron; x as `widen` writes it, whole vectors a row.
    void (*dense)(const MoneShape*, const float* x, int64_t x_stride, const MoneMatrix* weight,
                  MoneMatrix* out);
    // The kernels of masks of whole blocks: their lists; and the products as above.
    void (*block_lists)(const MoneShape*, const MoneMask*, MoneBlocks*);
    void (*block_sampled)(const MoneShape*, const MoneMask*, const MoneBlocks*, const float* x,
                          int64_t x_stride, const MoneMatrix* weight, float* out_K);
    void (*block_accumulate)(const MoneShape*, const MoneMask*, const MoneBlocks*,
                             const float* value0_K, const MoneMatrix* weight0,
                             const float* value1_K, const MoneMatrix* weight1, MoneMatrix* out);
    void (*block_grads)(const MoneShape*, const MoneMask*, const MoneBlocks*, const float* v0_K,
                        const float* v1_K, const MoneMatrix* x, MoneMatrix* out0,
                        MoneMatrix* out1);
    // sampled and accumulate for experts of few rows; any mask, x as for `dense`.
    void (*few_sampled)(const MoneShape*, const MoneMask*, const float* x, int64_t x_stride,
                        const MoneMatrix* weight, float* out_K);
    void (*few_accumulate)(const MoneShape*, const MoneMask*, const float* value0_K,
                           const MoneMatrix* weight0, const float* value1_K,
                           const MoneMatrix* weight1, MoneMatrix* out);
    // The weight gradients, straight from the mask; x float32, rows x_stride apart.
    void (*few_grads)(const MoneShape*, const MoneMask*, const float* v0_K, const float* v1_K,
                      const float* x, int64_t x_stride, MoneMatrix* out0, MoneMatrix* out1);
    // What the balance loss asks of kept entries; gate is [K] of gate_bytes (2: bfloat16, 4: float32),
    // block [N] the block of each row, weight [blocks, F]. See shares.h.
    void (*row_sums)(const MoneShape*, const MoneMask*, const void* gate, int64_t gate_bytes,
                     const int64_t* block, const float* weight, float* out);
    void (*share_sums)(const MoneShape*, const MoneMask*, const void* gate, int64_t gate_bytes,
                       const int64_t* block, int64_t blocks, const float* total, float* share,
                       int64_t* counts);
    void (*share_slopes)(const MoneShape*, const MoneMask*, const void* gate, int64_t gate_bytes,
                         const int64_t* block, const float* weight, const float* total,
                         const float* row_loss, float* out_K);
};
}
