// One instruction set's kernels. Compiled once per set with MONE_TABLE, MONE_LANES and -m flags;
// everything but the table has internal linkage, so that no set's code is shared with another's.
#include "kernels.h"

#include <algorithm>
#include <math.h>
#include <omp.h>
#if defined(__aarch64__)
#include <arm_neon.h>
#elif defined(__x86_64__)
#include <immintrin.h>
#endif

#include "simd.h"
#include "widths.h"
#include "selection.h"
#include "runs.h"
#include "sampled.h"
#include "accumulate.h"
#include "weight_grads.h"
#include "few.h"
#include "few_grads.h"
#include "gate.h"
#include "choose.h"
#include "dots.h"
#include "blocks.h"
#include "block_sampled.h"
#include "block_accumulate.h"
#include "block_grads.h"
#include "shares.h"

namespace {

// Calls run with the activation as a constant.
template <class Run>
void with_activation(int64_t activation, Run run) {
    switch (activation) {
        case kSilu: return run(std::integral_constant<int, kSilu>{});
        case kSigmoid: return run(std::integral_constant<int, kSigmoid>{});
        case kGelu: return run(std::integral_constant<int, kGelu>{});
        case kRelu: return run(std::integral_constant<int, kRelu>{});
        default: run(std::integral_constant<int, kSquaredRelu>{});
    }
}

void select_any(const MoneShape* s, const void* gate, int64_t gate_bytes, int64_t kept,
                int64_t groups, int64_t block, void* idx, int64_t idx_bytes, int32_t* keys) {
    const GateRows rows{gate, gate_bytes, s->neurons};
    auto run = [&](auto* out) { choose_rows(*s, {kept, groups, block}, rows, out, keys); };
    idx_bytes == 2 ? run(static_cast<int16_t*>(idx)) : run(static_cast<int32_t*>(idx));
}

template <int A, class Value>
void choose_values(const MoneShape& s, float* a, const Choice& of, void* idx, int64_t idx_bytes,
                   int32_t* work, void* a_K, void* g_K) {
    float* gates = reinterpret_cast<float*>(work + element(s.threads, 2 * padded_neurons(s), 0));
    const ActivationRows<A, Value> rows{a, gates, s.neurons, padded_neurons(s), of.kept * of.groups,
                                        static_cast<Value*>(a_K), static_cast<Value*>(g_K)};
    auto run = [&](auto* out) { choose_rows(s, of, rows, out, work); };
    idx_bytes == 2 ? run(static_cast<int16_t*>(idx)) : run(static_cast<int32_t*>(idx));
}

void choose_any(const MoneShape* s, float* a, int64_t activation, int64_t kept, int64_t groups,
                int64_t block, void* idx, int64_t idx_bytes, int32_t* work, int64_t value_bytes,
                void* a_K, void* g_K) {
    with_activation(activation, [&](auto one) {
        auto run = value_bytes == 2 ? choose_values<one(), uint16_t> : choose_values<one(), float>;
        run(*s, a, {kept, groups, block}, idx, idx_bytes, work, a_K, g_K);
    });
}

template <class Index>
void gather_bytes(const MoneShape& s, const MoneMask& m, const void* dense, void* out,
                  int64_t bytes) {
    if (bytes == 2)
        gather_rows<Index>(s, m, static_cast<const uint16_t*>(dense), static_cast<uint16_t*>(out));
    else
        gather_rows<Index>(s, m, static_cast<const uint32_t*>(dense), static_cast<uint32_t*>(out));
}

void gather_any(const MoneShape* s, const MoneMask* m, const void* dense, void* out,
                int64_t bytes) {
    if (m->idx_bytes == 2)
        gather_bytes<int16_t>(*s, *m, dense, out, bytes);
    else
        gather_bytes<int32_t>(*s, *m, dense, out, bytes);
}

void scatter_any(const MoneShape* s, const MoneMask* m, const float* values, MoneMatrix* dense) {
    if (m->idx_bytes == 2)
        scatter_rows<int16_t>(*s, *m, values, *dense);
    else
        scatter_rows<int32_t>(*s, *m, values, *dense);
}

void runs_any(const MoneShape* s, const MoneMask* m, const MoneRuns* r) {
    if (m->idx_bytes == 2)
        list_runs<int16_t>(*s, *m, *r);
    else
        list_runs<int32_t>(*s, *m, *r);
}

void mask_order_any(const MoneShape* s, const MoneMask* m, const MoneRuns* r, const float* from,
                    float* to) {
    mask_order(*s, *m, *r, from, to);
}

void sampled_any(const MoneShape* s, const MoneRuns* r, const MoneMatrix* x, const MoneMatrix* weight,
                 float* out) {
    sample(*s, *r, *x, *weight, out);
}

void accumulate_any(const MoneShape* s, const MoneRuns* r, const float* value0,
                    const MoneMatrix* weight0, const float* value1, const MoneMatrix* weight1,
                    MoneMatrix* out) {
    if (weight1)
        accumulate<2>(*s, *r, {{value0, value1}, {weight0, weight1}}, *out);
    else
        accumulate<1>(*s, *r, {{value0, nullptr}, {weight0, nullptr}}, *out);
}

void gated_any(const MoneShape* s, const MoneMask* m, const MoneRuns* r, const float* probs,
               const void* g, int64_t g_bytes, const float* u, float* h) {
    if (g_bytes == 2)
        gated_entries(*s, *m, r, probs, static_cast<const uint16_t*>(g), u, h);
    else
        gated_entries(*s, *m, r, probs, static_cast<const float*>(g), u, h);
}

void gate_any(const MoneShape* s, const MoneMask* m, const MoneRuns* r, int64_t activation,
              const float* a, const float* u, const float* probs, const float* dgate, float* da,
              float* du, float* h, float* shares, float* dprobs) {
    with_activation(activation, [&](auto one) {
        gate_entries<one()>(*s, *m, r, {a, u, dgate, da, du, h}, probs, shares, dprobs);
    });
}

void transpose_any(const MoneShape* s, const MoneRuns* r, float* v0, float* v1, float* v2, int32_t* at,
                   uint8_t* rows, int32_t* work) {
    float* const values[3] = {v0, v1, v2};
    transpose_runs(*s, *r, values, at, rows, work);
}

void weight_grads_any(const MoneShape* s, const MoneRuns* r, const int32_t* at, const uint8_t* rows,
                      const float* v0, const float* v1, const MoneMatrix* x, MoneMatrix* out0,
                      MoneMatrix* out1) {
    MoneMatrix* const outs[2] = {out0, out1};
    if (out1)
        sum_weight_grads<2>(*s, *r, at, {rows, {v0, v1}}, *x, outs);
    else
        sum_weight_grads<1>(*s, *r, at, {rows, {v0, nullptr}}, *x, outs);
}

void widen_any(const MoneShape* s, const MoneMatrix* from, float* to, int64_t stride) {
    widen_rows(*s, *from, to, stride);
}

void dense_any(const MoneShape* s, const float* x, int64_t x_stride, const MoneMatrix* weight,
               MoneMatrix* out) {
    dense_products(*s, x, x_stride, *weight, *out);
}

void block_lists_any(const MoneShape* s, const MoneMask* m, MoneBlocks* out) {
    if (m->idx_bytes == 2)
        list_blocks<int16_t>(*s, *m, *out);
    else
        list_blocks<int32_t>(*s, *m, *out);
}

void block_sampled_any(const MoneShape* s, const MoneMask* m, const MoneBlocks* lists,
                       const float* x, int64_t x_stride, const MoneMatrix* weight, float* out) {
    sample_blocks(*s, *m, *lists, x, x_stride, *weight, out);
}

void block_accumulate_any(const MoneShape* s, const MoneMask* m, const MoneBlocks* lists,
                          const float* value0, const MoneMatrix* weight0, const float* value1,
                          const MoneMatrix* weight1, MoneMatrix* out) {
    accumulate_blocks(*s, *m, *lists, value0, *weight0, value1, weight1, *out);
}

void block_grads_any(const MoneShape* s, const MoneMask* m, const MoneBlocks* lists,
                     const float* v0, const float* v1, const MoneMatrix* x, MoneMatrix* out0,
                     MoneMatrix* out1) {
    sum_block_grads(*s, *m, *lists, {{v0, v1}, {out0, out1}, x, out1 ? 2 : 1});
}

void few_sampled_any(const MoneShape* s, const MoneMask* m, const float* x, int64_t x_stride,
                     const MoneMatrix* weight, float* out) {
    auto run = m->idx_bytes == 2 ? weight->is_bf16 ? sample_few<int16_t, uint16_t>
                                                   : sample_few<int16_t, float>
               : weight->is_bf16 ? sample_few<int32_t, uint16_t>
                                 : sample_few<int32_t, float>;
    run(*s, *m, x, x_stride, *weight, out);
}

void few_accumulate_any(const MoneShape* s, const MoneMask* m, const float* value0,
                        const MoneMatrix* weight0, const float* value1, const MoneMatrix* weight1,
                        MoneMatrix* out) {
    auto run = m->idx_bytes == 2  ? weight0->is_bf16 ? accumulate_few<int16_t, uint16_t>
                                                     : accumulate_few<int16_t, float>
               : weight0->is_bf16 ? accumulate_few<int32_t, uint16_t>
                                  : accumulate_few<int32_t, float>;
    run(*s, *m, value0, *weight0, value1, weight1, *out);
}

void few_grads_any(const MoneShape* s, const MoneMask* m, const float* v0, const float* v1,
                   const float* x, int64_t x_stride, MoneMatrix* out0, MoneMatrix* out1) {
    const float* const values[2] = {v0, v1};
    MoneMatrix* const outs[2] = {out0, out1};
    if (m->idx_bytes == 2)
        grads_few<int16_t>(*s, *m, values, x, x_stride, outs);
    else
        grads_few<int32_t>(*s, *m, values, x, x_stride, outs);
}

// Calls run(mask indices, gates) with their element types.
template <class Run>
void with_gate(const MoneMask& m, const void* gate, int64_t gate_bytes, Run run) {
    const auto* half = static_cast<const uint16_t*>(gate);
    const auto* full = static_cast<const float*>(gate);
    if (m.idx_bytes == 2)
        gate_bytes == 2 ? run(int16_t{}, half) : run(int16_t{}, full);
    else
        gate_bytes == 2 ? run(int32_t{}, half) : run(int32_t{}, full);
}

void row_sums_any(const MoneShape* s, const MoneMask* m, const void* gate, int64_t gate_bytes,
                  const int64_t* block, const float* weight, float* out) {
    with_gate(*m, gate, gate_bytes, [&](auto index, const auto* g) {
        sum_rows<decltype(index)>(*s, *m, g, block, weight, out);
    });
}

void share_sums_any(const MoneShape* s, const MoneMask* m, const void* gate, int64_t gate_bytes,
                    const int64_t* block, int64_t blocks, const float* total, float* share,
                    int64_t* counts) {
    with_gate(*m, gate, gate_bytes, [&](auto index, const auto* g) {
        sum_shares<decltype(index)>(*s, *m, g, block, blocks, total, share, counts);
    });
}

void share_slopes_any(const MoneShape* s, const MoneMask* m, const void* gate, int64_t gate_bytes,
                      const int64_t* block, const float* weight, const float* total,
                      const float* row_loss, float* out) {
    with_gate(*m, gate, gate_bytes, [&](auto index, const auto* g) {
        share_slopes<decltype(index)>(*s, *m, g, block, weight, total, row_loss, out);
    });
}

}  // namespace

extern "C" const MoneKernels MONE_TABLE = {
    kSpan, kBins,
    select_any, choose_any, gather_any, scatter_any, runs_any, mask_order_any, sampled_any, accumulate_any,
    gated_any, gate_any, transpose_any, weight_grads_any, widen_any, dense_any,
    block_lists_any, block_sampled_any, block_accumulate_any, block_grads_any,
    few_sampled_any, few_accumulate_any, few_grads_any,
    row_sums_any, share_sums_any, share_slopes_any,
};
