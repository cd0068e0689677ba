// Exact top-S of |gate| per row and group, and moving kept entries in and out of dense rows.
#pragma once

namespace {

constexpr int32_t kInfinity = 0x7f800000;

// |gate| as ordered integers: the bits without the sign; NaN becomes infinity. Returns the largest.
inline int32_t ordered_keys(const int32_t* bits, int64_t width, int32_t* keys) {
    int32_t top = 0;
    for (int64_t j = 0; j < width; ++j) {
        int32_t key = bits[j] & 0x7fffffff;
        key = key > kInfinity ? kInfinity : key;
        keys[j] = key;
        top = key > top ? key : top;
    }
    return top;
}

inline int64_t count_from(const int32_t* keys, int64_t width, int32_t floor) {
    int32_t count = 0;
    for (int64_t j = 0; j < width; ++j) count += keys[j] >= floor;
    return count;
}

// The largest floor that at least `kept` keys reach, by bisection; `reach` is how many reach it.
// It stops early at a floor that exactly `kept` keys reach. The first probes are around `guess`,
// the floor of another row, in steps of about 6% that double; they only save time.
inline int32_t find_floor(const int32_t* keys, int64_t width, int64_t kept, int32_t top,
                          int32_t guess, int64_t& reach) {
    int32_t low = 0, high = top;  // low is reached by enough keys; the answer is in [low, high]
    int64_t step = 1 << 19, probe = guess;
    bool up = false, down = false;
    reach = width;
    while (low < high && reach != kept) {
        const bool near = !(up && down) && low < probe && probe <= high;
        int32_t middle = near ? static_cast<int32_t>(probe) : low + (high - low) / 2 + 1;
        int64_t count = count_from(keys, width, middle);
        if (count >= kept) {
            low = middle;
            reach = count;
            up = true;
            probe = middle + step;
        } else {
            high = middle - 1;
            down = true;
            probe = middle - step;
        }
        step *= 2;
    }
    return low;
}

template <class Index>
inline void compact(const int32_t* keys, int64_t width, int64_t kept, int32_t floor, int64_t reach,
                    int64_t first, Index* idx) {
    int64_t count = 0;
    if (reach == kept) {
        for (int64_t j = 0; count < kept; ++j) {
            idx[count] = static_cast<Index>(first + j);
            count += keys[j] >= floor;
        }
        return;
    }
    int64_t room = kept - count_from(keys, width, floor + 1);  // ties kept, from the lower index
    for (int64_t j = 0; count < kept; ++j) {
        bool tie = keys[j] == floor && room > 0;
        room -= tie;
        idx[count] = static_cast<Index>(first + j);
        count += tie || keys[j] > floor;
    }
}

template <class Index>
void select_rows(const MoneShape& s, const int32_t* gate, int64_t kept, int64_t groups, Index* idx,
                 int32_t* keys_of_threads) {
    const int64_t width = s.neurons / groups;
    int32_t guess = 0;
#pragma omp parallel for schedule(static) num_threads(s.threads) firstprivate(guess)
    for (int64_t n = 0; n < s.rows; ++n) {
        int32_t* keys = keys_of_threads + element(omp_get_thread_num(), width, 0);
        for (int64_t g = 0; g < groups; ++g) {
            int64_t reach;
            int32_t top = ordered_keys(gate + element(n, s.neurons, g * width), width, keys);
            guess = find_floor(keys, width, kept, top, guess, reach);
            compact(keys, width, kept, guess, reach, g * width,
                    idx + element(n, kept * groups, g * kept));
        }
    }
}

template <class Index, class Value>
void gather_rows(const MoneShape& s, const MoneMask& m, const Value* dense, Value* out_K) {
    const Index* idx = static_cast<const Index*>(m.idx);
#pragma omp parallel for schedule(static) num_threads(s.threads)
    for (int64_t n = 0; n < s.rows; ++n) {
        const Value* row = dense + element(n, s.neurons, 0);
        for (int64_t k = m.offsets[n]; k < m.offsets[n + 1]; ++k) out_K[k] = row[idx[k]];
    }
}

template <class Index>
void scatter_rows(const MoneShape& s, const MoneMask& m, const float* values_K, MoneMatrix& dense) {
    const Index* idx = static_cast<const Index*>(m.idx);
#pragma omp parallel for schedule(static) num_threads(s.threads)
    for (int64_t n = 0; n < s.rows; ++n) {
        for (int64_t k = m.offsets[n]; k < m.offsets[n + 1]; ++k)
            write_row(dense, element(n, dense.row_stride, idx[k]), 1, values_K + k);
    }
}

}  // namespace
