// Weight gradients of experts that have few rows: each gradient row is written once, in full, from the
// few rows that keep its neuron; most of the time is that of writing.
#pragma once

namespace {

constexpr int64_t kFewNeurons = 64;  // of one task

struct FewGradScratch {
    // of each neuron: the rows that keep it, and its values there
    const float* rows[kFewNeurons][kFewRows];
    float values[kFewNeurons][kFewRows];
    int count[kFewNeurons];
};

// out[0 .. hidden) (+)= sum of values[i] * rows[i], the rows in order.
template <bool Adds>
inline void few_sum(const float* const* rows, const float* values, int count, int64_t hidden,
                    float* out) {
    int64_t k = 0;
    for (; k + 4 * kLanes <= hidden; k += 4 * kLanes) {
        Vec sum[4] = {};
        for (int i = 0; i < count; ++i) {
            const Vec scale = splat(values[i]);
#pragma GCC unroll 4
            for (int v = 0; v < 4; ++v) sum[v] += scale * load(rows[i] + k + v * kLanes);
        }
        for (int v = 0; v < 4; ++v) {
            float* at = out + k + v * kLanes;
            store(at, Adds ? load(at) + sum[v] : sum[v]);
        }
    }
    for (; k < hidden; ++k) {
        float sum = 0.0f;
        for (int i = 0; i < count; ++i) sum += values[i] * rows[i][k];
        out[k] = Adds ? out[k] + sum : sum;
    }
}

// One gradient of neurons [first, end) of expert e.
template <class Index>
void grad_few(const MoneShape& s, const MoneMask& m, const float* values_K, const float* x,
              int64_t x_stride, MoneMatrix& out, int64_t e, int64_t first, int64_t end,
              FewGradScratch& g) {
    const Index* idx = static_cast<const Index*>(m.idx);
    std::memset(g.count, 0, sizeof g.count);
    for (int64_t n = s.row_start[e]; n < s.row_start[e + 1]; ++n) {
        int64_t k = entry_from<Index>(m, n, m.offsets[n], first);
        for (; k < m.offsets[n + 1] && idx[k] < end; ++k) {
            const int64_t j = idx[k] - first;
            g.rows[j][g.count[j]] = x + element(n, x_stride, 0);
            g.values[j][g.count[j]++] = values_K[k];
        }
    }
    for (int64_t j = first; j < end; ++j) {
        const int64_t at = e * out.expert_stride + element(j, out.row_stride, 0);
        const float* const* rows = g.rows[j - first];
        const float* values = g.values[j - first];
        if (out.adds && !g.count[j - first]) continue;
        if (!out.is_bf16) {
            auto sum = out.adds ? few_sum<true> : few_sum<false>;
            sum(rows, values, g.count[j - first], s.hidden, static_cast<float*>(out.data) + at);
            continue;
        }
        for (int64_t start = 0; start < s.hidden; start += kFewWidth) {
            const int64_t length = at_most(kFewWidth, s.hidden - start);
            const float* parts[kFewRows];
            alignas(64) float sums[kFewWidth];
            for (int i = 0; i < g.count[j - first]; ++i) parts[i] = rows[i] + start;
            few_sum<false>(parts, values, g.count[j - first], length, sums);
            write_row(out, at + start, length, sums);
        }
    }
}

// Experts have at most kFewRows rows.
template <class Index>
void grads_few(const MoneShape& s, const MoneMask& m, const float* const* values_K,
               const float* x, int64_t x_stride, MoneMatrix* const* outs) {
    const int64_t across = blocks(s.neurons, kFewNeurons);
#pragma omp parallel for schedule(dynamic) num_threads(s.threads)
    for (int64_t t = 0; t < s.experts * across; ++t) {
        FewGradScratch g;
        const int64_t e = t / across, first = t % across * kFewNeurons;
        for (int o = 0; o < 2; ++o)
            if (outs[o])
                grad_few<Index>(s, m, values_K[o], x, x_stride, *outs[o], e, first,
                                at_most(first + kFewNeurons, s.neurons), g);
    }
}

}  // namespace
