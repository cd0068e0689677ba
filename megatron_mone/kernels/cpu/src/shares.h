// What the balance loss asks of every kept entry: sums of |gate| by row and by (block, neuron), and
// the gradient that it sends back to the gates. gate is float32 or bfloat16 (gate_bytes 4 or 2).
#pragma once

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
        const float* w = weight ? weight + element(block[n], s.neurons, 0) : nullptr;
        float total = 0.0f;
        for (int64_t k = m.offsets[n]; k < m.offsets[n + 1]; ++k) {
            const float size = fabsf(gate_value(gate, k));
            total += w ? w[idx[k]] * size : size;
        }
        out[n] = total;
    }
}

// share[b][j] = sum over the rows of block b that keep j of |gate| / total[n] (total null: 1), and
// counts[b][j] = their number. A task has some neurons of every block, whole cache lines of them.
template <class Index, class Gate>
void sum_shares(const MoneShape& s, const MoneMask& m, const Gate* gate, const int64_t* block,
                int64_t blocks, const float* total, float* share, int64_t* counts) {
    const Index* idx = static_cast<const Index*>(m.idx);
    const int64_t width = (s.neurons / (4 * s.threads) / 16 + 1) * 16;
#pragma omp parallel for schedule(dynamic) num_threads(s.threads)
    for (int64_t low = 0; low < s.neurons; low += width) {
        const int64_t high = at_most(low + width, s.neurons);
        for (int64_t b = 0; b < blocks; ++b)
            for (int64_t j = low; j < high; ++j)
                share[element(b, s.neurons, j)] = 0.0f, counts[element(b, s.neurons, j)] = 0;
        for (int64_t n = 0; n < s.rows; ++n) {
            const Index *first = idx + m.offsets[n], *last = idx + m.offsets[n + 1];
            const float inverse = total && total[n] != 0.0f ? 1.0f / total[n] : 1.0f;
            float* out = share + element(block[n], s.neurons, 0);
            int64_t* count = counts + element(block[n], s.neurons, 0);
            for (const Index* i = std::lower_bound(first, last, low); i < last && *i < high; ++i) {
                out[*i] += fabsf(gate_value(gate, i - idx)) * inverse;
                ++count[*i];
            }
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
        for (int64_t k = m.offsets[n]; k < m.offsets[n + 1]; ++k) {
            const float g = gate_value(gate, k), slope = (w[idx[k]] - loss) * inverse;
            out_K[k] = slope * ((g > 0.0f) - (g < 0.0f));  // a branch on the sign is mispredicted
        }
    }
}

}  // namespace
