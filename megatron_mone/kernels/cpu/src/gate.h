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

// `count` (at most kLanes) floats; the rest zero.
inline Vec load_some(const float* p, int64_t count) {
    if (count >= kLanes) return load(p);
    float lanes[kLanes] = {};
    for (int64_t i = 0; i < count; ++i) lanes[i] = p[i];
    return load(lanes);
}

inline void store_some(float* p, Vec v, int64_t count) {
    if (count >= kLanes) return store(p, v);
    float lanes[kLanes];
    store(lanes, v);
    for (int64_t i = 0; i < count; ++i) p[i] = lanes[i];
}

// h = p g u, the forward pass; G is float or the bits of a bfloat16.
template <class G>
void gated_rows(const MoneShape& s, const MoneMask& m, const float* probs, const G* g_K,
                const float* u_K, float* h_K) {
#pragma omp parallel for schedule(dynamic, kRowGrain) num_threads(s.threads)
    for (int64_t n = 0; n < s.rows; ++n)
        for (int64_t k = m.offsets[n]; k < m.offsets[n + 1]; ++k)
            h_K[k] = probs[n] * u_K[k] * wide(g_K[k]);
}

template <int A>
void gate_rows(const MoneShape& s, const MoneMask& m, const float* a_K, const float* u_K,
               const float* probs, const float* dgate_K, float* da_K, float* du_K, float* h_K,
               float* dprobs) {
#pragma omp parallel for schedule(dynamic, kRowGrain) num_threads(s.threads)
    for (int64_t n = 0; n < s.rows; ++n) {
        const Vec p = splat(probs[n]);
        Vec total = {};
        for (int64_t k = m.offsets[n], left = m.offsets[n + 1] - k; left > 0;
             k += kLanes, left -= kLanes) {
            Vec u = load_some(u_K + k, left), v = load_some(da_K + k, left), g, slope;
            activate<A>(load_some(a_K + k, left), g, slope);
            Vec dg = p * v * u, gu = g * u;
            if (dgate_K) dg += load_some(dgate_K + k, left);
            total += v * gu;
            store_some(h_K + k, p * gu, left);
            store_some(du_K + k, p * v * g, left);
            store_some(da_K + k, dg * slope, left);
        }
        dprobs[n] = lane_sum(total);
    }
}

}  // namespace
