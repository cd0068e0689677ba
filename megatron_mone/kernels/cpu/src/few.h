// Products of experts that have few rows (decoding): weights are read once, in place, by the rows
// that keep them, without tables or copies: the time is that of reading the kept weights.
#pragma once

namespace {

constexpr int64_t kRangeBytes = 1 << 17;  // weights that the rows of an expert pass in turn
typedef uint16_t VecHalf __attribute__((vector_size(kLanes * 2)));
typedef VecHalf VecHalfLoose __attribute__((aligned(2), may_alias));

inline Vec load_wide(const float* p) { return load(p); }
inline Vec load_wide(const uint16_t* p) {
    const VecHalf half = *reinterpret_cast<const VecHalfLoose*>(p);
    return (Vec)(__builtin_convertvector(half, VecInt) << 16);
}
inline float wide(float value) { return value; }
inline float wide(uint16_t value) { return from_bf16(value); }

// out[i] = <x, w[i]> over `hidden` elements, for G neurons.
template <int G, class Weight>
inline void dot_few(const float* x, const Weight* const* w, int64_t hidden, float* out) {
    static_assert(G == 1 || G % 4 == 0, "lanes of four sums are added together");
    Vec acc[G < 4 ? 4 : G] = {};
    int64_t k = 0;
    for (; k + kLanes <= hidden; k += kLanes) {
        const Vec part = in_register(load(x + k));
#pragma GCC unroll 8
        for (int i = 0; i < G; ++i) acc[i] += part * load_wide(w[i] + k);
    }
    for (int i = 0; i < G; i += 4) {
        if (G - i < 4)
            out[i] = lane_sum(acc[i]);
        else
            *reinterpret_cast<Vec4Loose*>(out + i) =
                lane_sums(acc[i], acc[i + 1], acc[i + 2], acc[i + 3]);
    }
    for (int64_t r = k; r < hidden; ++r)
        for (int i = 0; i < G; ++i) out[i] += x[r] * wide(w[i][r]);
}

// sums += values[i] * w[i] over `length` elements, for G neurons in order.
template <int G, class Weight>
inline void add_few(const float* values, const Weight* const* w, int64_t length, float* sums) {
    Vec scale[G];
    for (int i = 0; i < G; ++i) scale[i] = splat(values[i]);
    int64_t k = 0;
    for (; k + kLanes <= length; k += kLanes) {
        Vec sum = load(sums + k);
#pragma GCC unroll 4
        for (int i = 0; i < G; ++i) sum += scale[i] * load_wide(w[i] + k);
        store(sums + k, sum);
    }
    for (; k < length; ++k)
        for (int i = 0; i < G; ++i) sums[k] += values[i] * wide(w[i][k]);
}

// Neurons of one range: rows of an expert take turns while its weights are in the cache.
inline int64_t range_of(const MoneShape& s, const MoneMatrix& weight) {
    const int64_t bytes = (weight.is_bf16 ? 2 : 4) * s.hidden + 1;  // hidden may be 0
    return kRangeBytes / bytes > 16 ? kRangeBytes / bytes : 16;
}

// First entry of row n at or after k whose neuron is at least `neuron`.
template <class Index>
inline int64_t entry_from(const MoneMask& m, int64_t n, int64_t k, int64_t neuron) {
    const Index* idx = static_cast<const Index*>(m.idx);
    for (int64_t end = m.offsets[n + 1]; k < end;) {
        const int64_t middle = k + (end - k) / 2;
        if (idx[middle] < neuron)
            k = middle + 1;
        else
            end = middle;
    }
    return k;
}

template <int G, class Index, class Weight>
inline void rows_at(const Index* idx, const Weight* base, int64_t stride, const Weight** w) {
    for (int i = 0; i < G; ++i) w[i] = base + element(idx[i], stride, 0);
}

// Asks for the beginnings of the rows of entries [k, end), up to `most` of them: a row is long enough
// for the prefetchers to follow, once they have seen it begin.
template <class Index, class Weight>
inline void prefetch_rows(const Index* idx, int64_t k, int64_t end, int64_t most,
                          const Weight* base, int64_t stride, int64_t length) {
    const int64_t bytes = at_most(length * static_cast<int64_t>(sizeof(Weight)), 512);
    for (int64_t i = k; i < at_most(k + most, end); ++i)
        prefetch(base + element(idx[i], stride, 0), bytes);
}

template <class Index, class Weight>
void sample_few(const MoneShape& s, const MoneMask& m, const float* x, int64_t x_stride,
                const MoneMatrix& weight, float* out_K) {
    const Index* idx = static_cast<const Index*>(m.idx);
    const int64_t range = range_of(s, weight), across = blocks(s.neurons, range);
#pragma omp parallel for schedule(dynamic) num_threads(s.threads)
    for (int64_t t = 0; t < s.experts * across; ++t) {
        const int64_t e = t / across, first = t % across * range;
        const Weight* base = static_cast<const Weight*>(weight.data) + e * weight.expert_stride;
        const Weight* w[8];
        for (int64_t n = s.row_start[e]; n < s.row_start[e + 1]; ++n) {
            const float* row = x + element(n, x_stride, 0);
            int64_t k = entry_from<Index>(m, n, m.offsets[n], first);
            const int64_t end = entry_from<Index>(m, n, k, first + range);
            for (; k + 8 <= end; k += 8) {
                rows_at<8>(idx + k, base, weight.row_stride, w);
                prefetch_rows(idx, k + 8, end, 8, base, weight.row_stride, s.hidden);
                dot_few<8>(row, w, s.hidden, out_K + k);
            }
            for (; k < end; ++k) {
                rows_at<1>(idx + k, base, weight.row_stride, w);
                dot_few<1>(row, w, s.hidden, out_K + k);
            }
        }
    }
}

// One term of y or dx for the rows of expert e, columns [start, start + length); sums are `kFewWidth`
// apart.
constexpr int64_t kFewWidth = 512;

template <class Index, class Weight>
void add_term_few(const MoneShape& s, const MoneMask& m, const float* values_K,
                  const MoneMatrix& weight, int64_t e, int64_t begin, int64_t end, int64_t start,
                  int64_t length, float* sums) {
    const Index* idx = static_cast<const Index*>(m.idx);
    const Weight* base = static_cast<const Weight*>(weight.data) + e * weight.expert_stride + start;
    const int64_t range = range_of(s, weight);
    const Weight* w[4];
    for (int64_t first = 0; first < s.neurons; first += range) {
        for (int64_t n = begin; n < end; ++n) {
            float* row = sums + (n - begin) * kFewWidth;
            int64_t k = entry_from<Index>(m, n, m.offsets[n], first);
            const int64_t last = entry_from<Index>(m, n, k, first + range);
            for (; k + 4 <= last; k += 4) {
                rows_at<4>(idx + k, base, weight.row_stride, w);
                prefetch_rows(idx, k + 4, last, 4, base, weight.row_stride, length);
                add_few<4>(values_K + k, w, length, row);
            }
            for (; k < last; ++k) {
                rows_at<1>(idx + k, base, weight.row_stride, w);
                add_few<1>(values_K + k, w, length, row);
            }
        }
    }
}

template <class Index, class Weight>
void accumulate_few(const MoneShape& s, const MoneMask& m, const float* value0_K,
                    const MoneMatrix& weight0, const float* value1_K, const MoneMatrix* weight1,
                    MoneMatrix& out) {
    if (!s.experts || !s.hidden) return;
    // columns are split no finer than the threads need: rows are then read in longer pieces
    const int64_t pieces = blocks(4 * s.threads, s.experts);
    const int64_t even = blocks(blocks(s.hidden, pieces), 64) * 64;
    const int64_t width = at_most(even, kFewWidth), across = blocks(s.hidden, width);
#pragma omp parallel for schedule(dynamic) num_threads(s.threads)
    for (int64_t t = 0; t < s.experts * across; ++t) {
        alignas(64) float sums[kFewRows * kFewWidth];
        const int64_t e = t / across, start = t % across * width;
        const int64_t length = at_most(width, s.hidden - start);
        for (int64_t n = s.row_start[e]; n < s.row_start[e + 1]; n += kFewRows) {
            const int64_t end = at_most(n + kFewRows, s.row_start[e + 1]);
            std::memset(sums, 0, (end - n) * kFewWidth * sizeof(float));
            add_term_few<Index, Weight>(s, m, value0_K, weight0, e, n, end, start, length, sums);
            if (weight1)
                add_term_few<Index, Weight>(s, m, value1_K, *weight1, e, n, end, start, length, sums);
            write_block(sums, kFewWidth, end - n, element(n, out.row_stride, start), length, out);
        }
    }
}

}  // namespace
