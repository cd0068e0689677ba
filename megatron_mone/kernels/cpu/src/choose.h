// The choice straight from pre-activations: a row's gates are made, chosen from and left again in the
// first-level cache.
#pragma once

namespace {

// Rounded to Value, as to_bf16 rounds.
inline Vec rounded(Vec v, float) { return v; }
inline Vec rounded(Vec v, uint16_t) {
    const VecInt bits = (VecInt)v, up = bits + 0x7fff + ((bits >> 16) & 1);
    return (Vec)((v == v ? up : bits | 0x400000) & -0x10000);
}
inline void put(float* out, float value) { *out = value; }
inline void put(uint16_t* out, float value) { *out = to_bf16(value); }

// Pre-activations [rows, F] in float32, and a row of gates for each thread; both are rounded to Value,
// in which the chosen ones are written.
template <int A, class Value>
struct ActivationRows {
    float* a;
    float* gates_of_threads;
    int64_t neurons, padded, kept;
    Value *a_K, *g_K;

    float* gates() const {
        return gates_of_threads + element(omp_get_thread_num(), padded, 0);
    }

    void magnitudes(int64_t n, int64_t first, int64_t width, int32_t* keys) const {
        float *row = a + element(n, neurons, first), *gate = gates() + first;
        for (int64_t j = 0; j < width; j += kLanes) {
            const int64_t left = width - j;
            const Vec value = rounded(load_some(row + j, left), Value{});
            Vec g, slope;
            activate<A>(value, g, slope);
            if (sizeof(Value) == 2) store_some(row + j, value, left);
            store_some(gate + j, rounded(g, Value{}), left);
        }
        ::magnitudes(gate, 0, 4, width, keys);
    }

    template <class Index>
    void chosen(int64_t n, const Index* idx) const {
        const float *row = a + element(n, neurons, 0), *gate = gates();
        const int64_t first = element(n, kept, 0);
        for (int64_t i = 0; i < kept; ++i) {
            put(a_K + first + i, row[idx[i]]);
            put(g_K + first + i, gate[idx[i]]);
        }
    }
};

}  // namespace
