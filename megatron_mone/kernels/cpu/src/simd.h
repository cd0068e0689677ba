// Vectors of kLanes floats (GCC vector extension) and the few operations the kernels need.
// Included into an anonymous namespace once per instruction set; kLanes comes from the build.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace {

constexpr int kLanes = MONE_LANES;
#if MONE_LANES == 16 || defined(__aarch64__)
constexpr int kRegisters = 32;  // vector registers
#else
constexpr int kRegisters = 16;
#endif
typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t VecInt __attribute__((vector_size(kLanes * 4)));
typedef float Vec4 __attribute__((vector_size(16)));
typedef Vec VecLoose __attribute__((aligned(4), may_alias));
typedef Vec4 Vec4Loose __attribute__((aligned(4), may_alias));

inline Vec load(const float* p) { return *reinterpret_cast<const VecLoose*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<VecLoose*>(p) = v; }
inline Vec splat(float s) { return s - Vec{}; }  // folds to a broadcast: x - 0 is x

// Keeps a value that several products share in a register: GCC would load it again for each.
inline Vec in_register(Vec v) {
#if defined(__aarch64__)
    asm("" : "+w"(v));
#elif MONE_LANES == 16 && defined(__AVX512F__)
    asm("" : "+v"(v));
#elif MONE_LANES < 16
    asm("" : "+x"(v));
#endif
    return v;
}

// lane_sums: the sums of the lanes of four vectors.
#if defined(__aarch64__)
inline Vec4 lane_sums(Vec a, Vec b, Vec c, Vec d) {
    return (Vec4)vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d));
}
#elif MONE_LANES == 4
inline Vec4 lane_sums(Vec a, Vec b, Vec c, Vec d) {
    Vec4 ab = __builtin_shufflevector(a, b, 0, 4, 1, 5) + __builtin_shufflevector(a, b, 2, 6, 3, 7);
    Vec4 cd = __builtin_shufflevector(c, d, 0, 4, 1, 5) + __builtin_shufflevector(c, d, 2, 6, 3, 7);
    return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
}
#else
typedef float Vec8 __attribute__((vector_size(32)));

inline Vec4 lane_sums8(Vec8 a, Vec8 b, Vec8 c, Vec8 d) {
    Vec8 ab = __builtin_shufflevector(a, b, 0, 8, 1, 9, 4, 12, 5, 13) +
              __builtin_shufflevector(a, b, 2, 10, 3, 11, 6, 14, 7, 15);
    Vec8 cd = __builtin_shufflevector(c, d, 0, 8, 1, 9, 4, 12, 5, 13) +
              __builtin_shufflevector(c, d, 2, 10, 3, 11, 6, 14, 7, 15);
    Vec8 s = __builtin_shufflevector(ab, cd, 0, 1, 8, 9, 4, 5, 12, 13) +
             __builtin_shufflevector(ab, cd, 2, 3, 10, 11, 6, 7, 14, 15);
    return __builtin_shufflevector(s, s, 0, 1, 2, 3) + __builtin_shufflevector(s, s, 4, 5, 6, 7);
}
#if MONE_LANES == 8
inline Vec4 lane_sums(Vec a, Vec b, Vec c, Vec d) { return lane_sums8(a, b, c, d); }
#else
// Halves of a and c, then quarters of all, side by side: a shuffle, a blend and a sum each.
inline Vec4 lane_sums(Vec a, Vec b, Vec c, Vec d) {
#define MONE_PICK(p, q, i, j, k, l)                                                              \
    __builtin_shufflevector(p, q, i, i + 1, i + 2, i + 3, j, j + 1, j + 2, j + 3, k, k + 1, k + 2, \
                            k + 3, l, l + 1, l + 2, l + 3)
    const Vec ab = MONE_PICK(a, b, 8, 12, 16, 20) + MONE_PICK(a, b, 0, 4, 24, 28);
    const Vec cd = MONE_PICK(c, d, 8, 12, 16, 20) + MONE_PICK(c, d, 0, 4, 24, 28);
    Vec s = MONE_PICK(ab, cd, 4, 16, 12, 24) + MONE_PICK(ab, cd, 0, 20, 8, 28);
#undef MONE_PICK
    s += __builtin_shufflevector(s, s, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    s += __builtin_shufflevector(s, s, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
    return __builtin_shufflevector(s, s, 0, 8, 4, 12);
}
#endif
#endif

inline float lane_sum(Vec v) {
    float lanes[kLanes], sum = 0.0f;
    store(lanes, v);
    for (int i = 0; i < kLanes; ++i) sum += lanes[i];
    return sum;
}

// Asks for the cache lines of `bytes` bytes from p; rows of a mask start where no prefetcher looks.
inline void prefetch(const void* p, int64_t bytes) {
    const char* line = static_cast<const char*>(p);
    for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(line + b);
}

// e^x to 2 ulp: x = n ln 2 + r, a polynomial in r (Cephes expf), n into the exponent. NaN stays.
inline Vec exponential(Vec x) {
    const Vec low = splat(-87.33654f), high = splat(88.72283f);
    x = x < low ? low : x;
    x = x > high ? high : x;
    const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    Vec n = (x * 1.44269504f + magic) - magic;
    n = n > 127.0f ? splat(127.0f) : n;
    Vec r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    Vec p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    VecInt bits = (__builtin_convertvector(n, VecInt) + 127) << 23;
    return p * (Vec)bits;
}

inline int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t blocks(int64_t size, int64_t width) { return (size + width - 1) / width; }

// Threads take what comes next, never a fixed share: another process may slow any of them. Rows go by
// as many as have a cache line of results of one float each.
constexpr int64_t kRowGrain = 16;

// Neighbours among `tasks` write to the same cache lines: a thread takes so many in a row.
inline int64_t run_of(int64_t tasks, int64_t threads) {
    return tasks > 16 * threads ? tasks / (16 * threads) : 1;
}

// Calls run with the smallest of 1, 2, 4 and 8 that is at least `count`, or 8, as a constant.
template <class Run>
inline void with_vecs(int64_t count, Run run) {
    if (count > 4) return run(std::integral_constant<int, 8>{});
    if (count > 2) return run(std::integral_constant<int, 4>{});
    if (count > 1) return run(std::integral_constant<int, 2>{});
    run(std::integral_constant<int, 1>{});
}

inline float from_bf16(uint16_t half) {
    uint32_t bits = static_cast<uint32_t>(half) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// Round to nearest, ties to even; NaN stays NaN.
inline uint16_t to_bf16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 64);
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

// `count` floats of `source` from element `first`, into `out` padded with zeros to `width`.
inline void copy_row(const MoneMatrix& m, int64_t first, int64_t count, int64_t width, float* out) {
    if (m.is_bf16) {
        const uint16_t* from = static_cast<const uint16_t*>(m.data) + first;
        for (int64_t i = 0; i < count; ++i) out[i] = from_bf16(from[i]);
    } else {
        std::memcpy(out, static_cast<const float*>(m.data) + first, count * sizeof(float));
    }
    for (int64_t i = count; i < width; ++i) out[i] = 0.0f;
}

// `rows` rows of a matrix from element `base`, columns [start, start + length), `width` apart.
// Rows that `used` rules out (null: none) are not read.
inline void load_block(const MoneMatrix& m, int64_t base, int64_t rows, int64_t start,
                       int64_t length, int64_t width, float* block, const bool* used = nullptr) {
    for (int64_t i = 0; i < rows; ++i)
        if (!used || used[i])
            copy_row(m, base + element(i, m.row_stride, start), length, width, block + i * width);
}

// Brings the next block into the second-level cache, a line at a time over the `steps` of the current
// one's loop: more at once would keep that loop's own loads waiting.
struct NextBlock {
    const char* line;
    int64_t lines, stride, due, steps, of_row = 0, passed = 0;

    NextBlock(const MoneMatrix& m, int64_t base, int64_t rows, int64_t start, int64_t length,
              int64_t steps_)
        : steps(steps_) {
        const int64_t bytes = m.is_bf16 ? 2 : 4;
        line = static_cast<const char*>(m.data) + (base + start) * bytes;
        lines = blocks(length * bytes, 64);
        stride = m.row_stride * bytes;
        due = rows * lines;
    }

    void step() {
        for (passed += due; passed >= steps; passed -= steps) {
            __builtin_prefetch(line + of_row * 64, 0, 2);
            if (++of_row == lines) of_row = 0, line += stride;
        }
    }
};

inline void write_row(MoneMatrix& m, int64_t first, int64_t count, const float* from) {
    if (m.is_bf16) {
        uint16_t* out = static_cast<uint16_t*>(m.data) + first;
        for (int64_t i = 0; i < count; ++i)
            out[i] = to_bf16(m.adds ? from_bf16(out[i]) + from[i] : from[i]);
    } else if (m.adds) {
        float* out = static_cast<float*>(m.data) + first;
        for (int64_t i = 0; i < count; ++i) out[i] += from[i];
    } else {
        std::memcpy(static_cast<float*>(m.data) + first, from, count * sizeof(float));
    }
}

// Gradients of so many floats do not wait in the caches for who reads them: storing past the caches
// saves reading their lines first.
constexpr int64_t kPastCaches = 1 << 21;

inline bool past_caches(const MoneShape& s) {
    return s.experts * s.neurons * s.hidden >= kPastCaches;
}

// write_row past the caches where whole lines of float32 are replaced.
inline void stream_row(MoneMatrix& m, int64_t first, int64_t count, const float* from) {
#if defined(__x86_64__)
    float* out = static_cast<float*>(m.data) + first;
    if (!m.is_bf16 && !m.adds && count % 16 == 0 && reinterpret_cast<uintptr_t>(out) % 64 == 0) {
        for (int64_t i = 0; i < count; i += 4) _mm_stream_ps(out + i, _mm_loadu_ps(from + i));
        return;
    }
#endif
    write_row(m, first, count, from);
}

// `rows` rows of sums, `width` apart, into a matrix from element `base`.
inline void write_block(const float* sums, int64_t width, int64_t rows, int64_t base,
                        int64_t length, MoneMatrix& out, bool streams = false) {
    for (int64_t i = 0; i < rows; ++i) {
        const int64_t at = base + element(i, out.row_stride, 0);
        streams ? stream_row(out, at, length, sums + i * width)
                : write_row(out, at, length, sums + i * width);
    }
#if defined(__x86_64__)
    if (streams) _mm_sfence();  // other threads see such stores in no order before it
#endif
}

inline int64_t rows_of(const MoneShape& s, int64_t e) { return s.row_start[e + 1] - s.row_start[e]; }

}  // namespace
