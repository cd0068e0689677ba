// The elementwise part of the backward pass over kept entries.
#pragma once

namespace {

// g = sigma(a) and sigma'(a).
template <int A>
inline void activate(Vec a, Vec& g, Vec& slope) {
    if (A == kRelu) {
        // torch: relu(NaN) is NaN, its gradient is 0 at and below 0
        g = a < 0.0f ? Vec{} : a;
        slope = a <= 0.0f ? Vec{} : splat(1.0f);
    } else if (A == kSquaredRelu) {
        Vec r = a < 0.0f ? Vec{} : a;
        g = r * r;
        slope = r + r;
    } else if (A == kGelu) {
        float lanes[kLanes], cdf[kLanes];
        store(lanes, a);
        for (int i = 0; i < kLanes; ++i) cdf[i] = 0.5f * (1.0f + erff(lanes[i] * 0.70710678f));
        Vec phi = load(cdf);
        g = a * phi;
        slope = phi + a * exponential(a * a * -0.5f) * 0.39894228f;
    } else {
        Vec s = 1.0f / (1.0f + exponential(-a));
        g = A == kSilu ? a * s : s;
        slope = A == kSilu ? s * (1.0f + a * (1.0f - s)) : s * (1.0f - s);
    }
}

#if MONE_LANES == 16 && defined(__AVX512F__)
inline __mmask16 first_lanes(int64_t count) {
    return static_cast<__mmask16>(count >= kLanes ? 0xffff : (1 << count) - 1);
}
#endif

// `count` (at most kLanes) floats; the rest zero.
inline Vec load_some(const float* p, int64_t count) {
#if MONE_LANES == 16 && defined(__AVX512F__)
    return (Vec)_mm512_maskz_loadu_ps(first_lanes(count), p);
#endif
    if (count >= kLanes) return load(p);
    float lanes[kLanes] = {};
    for (int64_t i = 0; i < count; ++i) lanes[i] = p[i];
    return load(lanes);
}

inline void store_some(float* p, Vec v, int64_t count) {
#if MONE_LANES == 16 && defined(__AVX512F__)
    return _mm512_mask_storeu_ps(p, first_lanes(count), (__m512)v);
#endif
    if (count >= kLanes) return store(p, v);
    float lanes[kLanes];
    store(lanes, v);
    for (int64_t i = 0; i < count; ++i) p[i] = lanes[i];
}

// h = p g u of one row's entries, the forward pass; G is float or the bits of a bfloat16.
template <class G>
inline void gate_run(float prob, const G* g, const float* u, int64_t count, float* h) {
    for (int64_t k = 0; k < count; ++k) h[k] = prob * u[k] * wide(g[k]);
}

// g_K is in the mask's order, u_K and h_K are in run order where there are runs.
template <class G>
void gated_entries(const MoneShape& s, const MoneMask& m, const MoneRuns* r, const float* probs,
                   const G* g_K, const float* u_K, float* h_K) {
    if (!r) {
#pragma omp parallel for schedule(dynamic, kRowGrain) num_threads(s.threads)
        for (int64_t n = 0; n < s.rows; ++n) {
            const int64_t k = m.offsets[n];
            gate_run(probs[n], g_K + k, u_K + k, m.offsets[n + 1] - k, h_K + k);
        }
        return;
    }
    const int64_t tasks = total_tiles(s) * spans_of(s);
#pragma omp parallel for schedule(dynamic) num_threads(s.threads)
    for (int64_t t = 0; t < tasks; ++t)
        each_run(s, m, *r, t / spans_of(s), t % spans_of(s),
                 [&](int64_t n, int64_t at, int64_t k, int64_t count) {
                     gate_run(probs[n], g_K + at, u_K + k, count, h_K + k);
                 });
}

// What a kernel of the backward pass reads and writes of entries; a and dgate (or null) are in the
// mask's order, the others in run order where there are runs. v comes in through da.
struct GateEntries {
    const float *a_K, *u_K, *dgate_K;
    float *da_K, *du_K, *h_K;
};

// Some entries of one row, `at` in the mask's order and `k` in the others'; returns their share of dp.
template <int A>
inline float gate_run_backward(float prob, const GateEntries& of, int64_t at, int64_t k, int64_t left) {
    const Vec p = splat(prob);
    Vec total = {};
    for (; left > 0; at += kLanes, k += kLanes, left -= kLanes) {
        Vec u = load_some(of.u_K + k, left), v = load_some(of.da_K + k, left), g, slope;
        activate<A>(load_some(of.a_K + at, left), g, slope);
        Vec dg = p * v * u, gu = g * u;
        if (of.dgate_K) dg += load_some(of.dgate_K + at, left);
        total += v * gu;
        store_some(of.h_K + k, p * gu, left);
        store_some(of.du_K + k, p * v * g, left);
        store_some(of.da_K + k, dg * slope, left);
    }
    return lane_sum(total);
}

// shares is work space of [blocks, rows] where there are runs: dp of each block, added in their order.
template <int A>
void gate_entries(const MoneShape& s, const MoneMask& m, const MoneRuns* r, const GateEntries& of,
                  const float* probs, float* shares, float* dprobs) {
    if (!r) {
#pragma omp parallel for schedule(dynamic, kRowGrain) num_threads(s.threads)
        for (int64_t n = 0; n < s.rows; ++n) {
            const int64_t k = m.offsets[n];
            dprobs[n] = gate_run_backward<A>(probs[n], of, k, k, m.offsets[n + 1] - k);
        }
        return;
    }
    const int64_t tasks = total_tiles(s) * spans_of(s);
#pragma omp parallel num_threads(s.threads)
    {
#pragma omp for schedule(dynamic)
        for (int64_t t = 0; t < tasks; ++t) {
            const int64_t b = t % spans_of(s);
            each_run(s, m, *r, t / spans_of(s), b,
                     [&](int64_t n, int64_t at, int64_t k, int64_t count) {
                         shares[element(b, s.rows, n)] = gate_run_backward<A>(probs[n], of, at, k, count);
                     });
        }
#pragma omp for schedule(dynamic, kRowGrain)
        for (int64_t n = 0; n < s.rows; ++n) {
            float total = 0.0f;
            for (int64_t b = 0; b < spans_of(s); ++b) total += shares[element(b, s.rows, n)];
            dprobs[n] = total;
        }
    }
}

}  // namespace
