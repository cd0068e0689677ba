// What the balance loss asks of every kept entry: sums of |gate| by row and by (block, neuron), and
// the gradient that it sends back to the gates. gate is float32 or bfloat16 (gate_bytes 4 or 2).
#pragma once
#include <vector>

namespace {

inline float gate_value(const float* gate, int64_t k) { return gate[k]; }
inline float gate_value(const uint16_t* gate, int64_t k) {
    uint32_t bits = static_cast<uint32_t>(gate[k]) << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

// out[n] = sum over kept j of |gate|, times weight[block[n]][j] where there is a weight.
template <class Index, class Gate>
void sum_rows(const MoneShape& s, const MoneMask& m, const Gate* gate, const int64_t* block,
              const float* weight, float* out) {
    const Index* idx = static_cast<const Index*>(m.idx);
#pragma omp parallel for schedule(dynamic, kRowGrain) num_threads(s.threads)
    for (int64_t n = 0; n < s.rows; ++n) {
        const int64_t first = m.offsets[n], last = m.offsets[n + 1];
        float total = 0.0f;
        if (weight) {
            const float* w = weight + element(block[n], s.neurons, 0);
#pragma omp simd reduction(+ : total)
            for (int64_t k = first; k < last; ++k) total += w[idx[k]] * fabsf(gate_value(gate, k));
        } else {
#pragma omp simd reduction(+ : total)
            for (int64_t k = first; k < last; ++k) total += fabsf(gate_value(gate, k));
        }
        out[n] = total;
    }
}

// The rows of each block lie in [first, end), most of the time they alone.
struct RowRange {
    int64_t first, end;
};

inline std::vector<RowRange> block_ranges(int64_t rows, const int64_t* block, int64_t blocks) {
    std::vector<RowRange> ranges(blocks, RowRange{rows, 0});
    for (int64_t n = 0; n < rows; ++n) {
        RowRange& range = ranges[block[n]];
        range.first = at_most(range.first, n);
        range.end = n + 1;
    }
    return ranges;
}

// share[b][j] = sum over the rows of block b that keep j of |gate| / total[n] (total null: 1), and
// counts[b][j] = their number. A task has the neurons of a block, or of few blocks a part of them.
template <class Index, class Gate>
void sum_shares(const MoneShape& s, const MoneMask& m, const Gate* gate, const int64_t* block,
                int64_t blocks, const float* total, float* share, int64_t* counts) {
    struct Sum {
        float share;
        int32_t count;
    };
    const Index* idx = static_cast<const Index*>(m.idx);
    const std::vector<RowRange> ranges = block_ranges(s.rows, block, blocks);
    const int64_t parts = blocks < 4 * s.threads ? 4 * s.threads / blocks : 1;
    const int64_t width = parts == 1 ? s.neurons : (s.neurons / parts / 16 + 1) * 16;
    const int64_t cuts = (s.neurons + width - 1) / width;
#pragma omp parallel for schedule(dynamic) num_threads(s.threads)
    for (int64_t task = 0; task < blocks * cuts; ++task) {
        const int64_t b = task / cuts, low = task % cuts * width;
        const int64_t high = at_most(low + width, s.neurons);
        std::vector<Sum> sums(high - low, Sum{});
        for (int64_t n = ranges[b].first; n < ranges[b].end; ++n) {
            if (block[n] != b) continue;
            const Index *first = idx + m.offsets[n], *last = idx + m.offsets[n + 1];
            if (cuts > 1) {
                first = std::lower_bound(first, last, low);
                last = std::lower_bound(first, last, high);
            }
            const float inverse = total && total[n] != 0.0f ? 1.0f / total[n] : 1.0f;
            for (const Index* i = first; i < last; ++i) {
                Sum& sum = sums[*i - low];
                sum.share += fabsf(gate_value(gate, i - idx)) * inverse;
                ++sum.count;
            }
        }
        for (int64_t j = low; j < high; ++j) {
            share[element(b, s.neurons, j)] = sums[j - low].share;
            counts[element(b, s.neurons, j)] = sums[j - low].count;
        }
    }
}

// out_K = sign(gate) * (weight[block[n]][j] - row_loss[n]) / total[n]; row_loss and total are null
// together, for 0 and 1.
template <class Index, class Gate>
void share_slopes(const MoneShape& s, const MoneMask& m, const Gate* gate, const int64_t* block,
                  const float* weight, const float* total, const float* row_loss, float* out_K) {
    const Index* idx = static_cast<const Index*>(m.idx);
#pragma omp parallel for schedule(dynamic, kRowGrain) num_threads(s.threads)
    for (int64_t n = 0; n < s.rows; ++n) {
        const float* w = weight + element(block[n], s.neurons, 0);
        const float inverse = total && total[n] != 0.0f ? 1.0f / total[n] : 1.0f;
        const float loss = row_loss ? row_loss[n] : 0.0f;
        const int64_t last = m.offsets[n + 1];
#pragma omp simd
        for (int64_t k = m.offsets[n]; k < last; ++k) {
            const float g = gate_value(gate, k), slope = (w[idx[k]] - loss) * inverse;
            out_K[k] = slope * ((g > 0.0f) - (g < 0.0f));  // a branch on the sign is mispredicted
        }
    }
}

}  // namespace
