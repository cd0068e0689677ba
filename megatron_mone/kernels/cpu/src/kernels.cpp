// One instruction set's kernels. Compiled once per set with MONE_TABLE, MONE_LANES and -m flags;
// everything but the table has internal linkage, so that no set's code is shared with another's.
#include "kernels.h"

#include <math.h>
#include <omp.h>

#include "simd.h"
#include "selection.h"
#include "cuts.h"
#include "sampled.h"
#include "accumulate.h"
#include "weight_grads.h"
#include "gate.h"

namespace {

void select_any(const MoneShape* s, const int32_t* gate, int64_t kept, int64_t groups, void* idx,
                int64_t idx_bytes, int32_t* keys) {
    if (idx_bytes == 2)
        select_rows(*s, gate, kept, groups, static_cast<int16_t*>(idx), keys);
    else
        select_rows(*s, gate, kept, groups, static_cast<int32_t*>(idx), keys);
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

void cuts_any(const MoneShape* s, const MoneMask* m, int64_t width, MoneCuts* cuts) {
    if (m->idx_bytes == 2)
        cut_rows<int16_t>(*s, *m, width, *cuts);
    else
        cut_rows<int32_t>(*s, *m, width, *cuts);
}

void panels_any(const MoneShape* s, const MoneMatrix* x, float* panels) {
    make_panels(*s, *x, panels);
}

void sampled_any(const MoneShape* s, const MoneMask* m, const MoneCuts* cuts, const float* panels,
                 const MoneMatrix* weight, float* out) {
    if (m->idx_bytes == 2)
        sample<int16_t>(*s, *m, *cuts, panels, *weight, out);
    else
        sample<int32_t>(*s, *m, *cuts, panels, *weight, out);
}

void accumulate_any(const MoneShape* s, const MoneMask* m, const MoneCuts* cuts, const float* value0,
                    const MoneMatrix* weight0, const float* value1, const MoneMatrix* weight1,
                    MoneMatrix* out) {
    if (m->idx_bytes == 2)
        accumulate_rows<int16_t>(*s, *m, *cuts, value0, *weight0, value1, weight1, *out);
    else
        accumulate_rows<int32_t>(*s, *m, *cuts, value0, *weight0, value1, weight1, *out);
}

void gate_any(const MoneShape* s, const MoneMask* m, int64_t activation, const float* a,
              const float* u, const float* probs, const float* dgate, float* da, float* du,
              float* h, float* dprobs) {
    auto run = activation == kSilu      ? gate_rows<kSilu>
               : activation == kSigmoid ? gate_rows<kSigmoid>
               : activation == kGelu    ? gate_rows<kGelu>
                                        : gate_rows<kRelu>;
    run(*s, *m, a, u, probs, dgate, da, du, h, dprobs);
}

void transpose_any(const MoneShape* s, const MoneMask* m, const float* v0, const float* v1,
                   const float* v2, int64_t* starts, MoneCuts* cuts, MoneEntry* entries) {
    if (m->idx_bytes == 2)
        transpose_mask<int16_t>(*s, *m, v0, v1, v2, starts, *cuts, entries);
    else
        transpose_mask<int32_t>(*s, *m, v0, v1, v2, starts, *cuts, entries);
}

void weight_grads_any(const MoneShape* s, const int64_t* starts, const MoneCuts* cuts,
                      const MoneEntry* entries, const MoneMatrix* x, const MoneMatrix* dy,
                      MoneMatrix* gate, MoneMatrix* up, MoneMatrix* down) {
    MoneMatrix* const outs[3] = {gate, up, down};
    sum_weight_grads(*s, starts, *cuts, entries, *x, *dy, outs);
}

}  // namespace

extern "C" const MoneKernels MONE_TABLE = {
    select_any, gather_any, scatter_any, cuts_any, panels_any, sampled_any,
    accumulate_any, gate_any, transpose_any, weight_grads_any,
};
