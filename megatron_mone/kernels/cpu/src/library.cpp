// The plain C interface: one table of kernels, the best that this processor runs.
#include "kernels.h"

#define PUBLIC __attribute__((visibility("default")))

extern "C" {

// The sets of this processor, numbered as VARIANTS of build.py lists them: the best that it runs.
#if defined(__aarch64__)
extern const MoneKernels mone_neon;
static const MoneKernels* const tables[] = {&mone_neon};

PUBLIC int mone_best_set() { return 0; }
#else
extern const MoneKernels mone_baseline, mone_avx2, mone_avx512;
static const MoneKernels* const tables[] = {&mone_baseline, &mone_avx2, &mone_avx512};

PUBLIC int mone_best_set() {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("fma"))
        return 2;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? 1 : 0;
}
#endif

// The kernels of one set; null for a set that does not exist or that this processor cannot run.
PUBLIC const MoneKernels* mone_kernels(int set) {
    if (set < 0 || set > mone_best_set()) return nullptr;
    return tables[set];
}

// The offset all kernels use, for a test of its width.
PUBLIC int64_t mone_element(int64_t row, int64_t stride, int64_t column) {
    return element(row, stride, column);
}

// Bump with any change of this interface; the Python side refuses another number.
PUBLIC int mone_interface_version() { return 11; }
}
