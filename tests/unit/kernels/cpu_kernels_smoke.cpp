// Every native kernel against plain loops on exactly sized heap buffers, for a sanitizer to watch.
// Built by test_cpu_sanitizers.py together with kernels.cpp; prints the first difference.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "kernels.h"

extern "C" const MoneKernels MONE_TABLE;

namespace {

float noise() { return static_cast<float>(rand()) / RAND_MAX - 0.5f; }

std::vector<float> noises(int64_t count) {
    std::vector<float> values(count);
    for (float& value : values) value = noise();
    return values;
}

int failures = 0;

void near(const char* name, double got, double wanted) {
    if (std::fabs(got - wanted) <= 1e-4 * (1.0 + std::fabs(wanted))) return;
    if (++failures < 10) std::printf("%s: %g, expected %g\n", name, got, wanted);
}

template <class Index>
void check(std::vector<int64_t> counts, int64_t H, int64_t F, int64_t kept, int64_t threads) {
    const MoneKernels& k = MONE_TABLE;
    const int64_t E = counts.size();
    std::vector<int64_t> start(1, 0), offsets(1, 0), expert_of;
    for (int64_t e = 0; e < E; ++e) {
        start.push_back(start.back() + counts[e]);
        expert_of.insert(expert_of.end(), counts[e], e);
    }
    const int64_t N = start.back(), K = N * kept;
    for (int64_t n = 0; n < N; ++n) offsets.push_back((n + 1) * kept);
    MoneShape shape{start.data(), E, N, F, H, threads};

    auto gate = noises(N * F), x = noises(N * H), dy = noises(N * H), probs = noises(N);
    auto w0 = noises(E * F * H), w1 = noises(E * F * H);
    std::vector<int32_t> bits(N * F), keys(threads * 2 * ((F + 15) / 16 * 16));
    for (int64_t i = 0; i < N * F; ++i) std::memcpy(&bits[i], &gate[i], 4);
    std::vector<Index> idx(K);
    k.select(&shape, bits.data(), 4, kept, 1, 1, idx.data(), sizeof(Index), keys.data());
    MoneMask mask{idx.data(), offsets.data(), sizeof(Index)};
    auto rows = [&](std::vector<float>& m) { return MoneMatrix{m.data(), 0, H, 0, 0}; };
    auto weights = [&](std::vector<float>& m) { return MoneMatrix{m.data(), F * H, H, 0, 0}; };
    MoneMatrix X = rows(x), DY = rows(dy), W0 = weights(w0), W1 = weights(w1);

    int64_t tiles = 0;
    for (int64_t count : counts) tiles += (count + kTile - 1) / kTile;
    const int64_t spans = (F + k.span - 1) / k.span;
    std::vector<int32_t> from((spans + 1) * N);
    std::vector<int64_t> starts(tiles * (spans + 1));
    std::vector<uint16_t> run_rows(spans * N);
    std::vector<uint8_t> lengths(spans * N), neuron_K(K);
    MoneRuns runs{from.data(), starts.data(), run_rows.data(), lengths.data(), neuron_K.data()};
    k.runs(&shape, &mask, &runs);

    std::vector<float> a(K), u(K), da(K), du(K), h(K), dp(N), y(N * H);
    std::vector<float> run_a(K), run_u(K), run_h(K), shares_of_p(spans * N);  // in run order
    k.gather(&shape, &mask, gate.data(), a.data(), 4);
    k.sampled(&shape, &runs, &X, &W0, run_u.data());
    k.mask_order(&shape, &mask, &runs, run_u.data(), u.data());
    // a in run order: where gated finds it with u and p of 1
    std::vector<float> ones(K, 1.0f), whole(N, 1.0f);
    k.gated(&shape, &mask, &runs, whole.data(), a.data(), 4, ones.data(), run_a.data());
    MoneMatrix Y = rows(y);
    k.accumulate(&shape, &runs, run_a.data(), &W0, run_u.data(), &W1, &Y);
    std::vector<float> run_da = run_a, run_du(K);
    k.gate_backward(&shape, &mask, &runs, kSilu, a.data(), run_u.data(), probs.data(), nullptr,
                    run_da.data(), run_du.data(), run_h.data(), shares_of_p.data(), dp.data());
    k.mask_order(&shape, &mask, &runs, run_da.data(), da.data());
    k.mask_order(&shape, &mask, &runs, run_du.data(), du.data());
    k.mask_order(&shape, &mask, &runs, run_h.data(), h.data());

    // The balance loss: blocks are the experts; share[b][j] sums |a| / total over the block's rows.
    std::vector<float> total(N), loss(N), share(E * F), slope(K);
    std::vector<int64_t> kept_counts(E * F);
    k.row_sums(&shape, &mask, a.data(), 4, expert_of.data(), nullptr, total.data());
    k.share_sums(&shape, &mask, a.data(), 4, expert_of.data(), E, total.data(), share.data(),
                 kept_counts.data());
    k.row_sums(&shape, &mask, a.data(), 4, expert_of.data(), share.data(), loss.data());
    k.share_slopes(&shape, &mask, a.data(), 4, expert_of.data(), share.data(), total.data(),
                   loss.data(), slope.data());
    double shares = 0, rows_with_shares = 0, entries_counted = 0;
    for (float value : share) shares += value;
    for (float value : total) rows_with_shares += value > 0;
    for (int64_t count : kept_counts) entries_counted += count;
    near("shares", shares, rows_with_shares);
    near("counts", entries_counted, K);

    std::vector<int32_t> at(tiles * spans * (k.bins + 1)), work(threads * 2 * kTile * k.span);
    std::vector<uint8_t> row_K(K);
    std::vector<float> g0(E * F * H), g1(E * F * H), g2(E * F * H, 1.0f);
    MoneMatrix G0 = weights(g0), G1 = weights(g1), G2 = weights(g2);
    G2.adds = 1;
    k.transpose(&shape, &runs, run_a.data(), run_u.data(), run_h.data(), at.data(), row_K.data(),
                work.data());
    k.weight_grads(&shape, &runs, at.data(), row_K.data(), run_a.data(), run_u.data(), &X, &G0, &G1);
    k.weight_grads(&shape, &runs, at.data(), row_K.data(), run_h.data(), nullptr, &DY, &G2, nullptr);

    std::vector<double> y_plain(N * H), g0_plain(E * F * H), g2_plain(E * F * H), dp_plain(N);
    for (int64_t n = 0; n < N; ++n) {
        for (int64_t i = offsets[n]; i < offsets[n + 1]; ++i) {
            const int64_t w = (expert_of[n] * F + idx[i]) * H;
            double dot = 0;
            for (int64_t c = 0; c < H; ++c) {
                dot += double(x[n * H + c]) * w0[w + c];
                y_plain[n * H + c] += double(a[i]) * w0[w + c] + double(u[i]) * w1[w + c];
                g0_plain[w + c] += double(a[i]) * x[n * H + c];
                g2_plain[w + c] += double(h[i]) * dy[n * H + c];
            }
            const double s = 1 / (1 + std::exp(-double(a[i]))), g = a[i] * s;
            near("sampled", u[i], dot);
            near("h", h[i], probs[n] * g * u[i]);
            near("du", du[i], probs[n] * double(a[i]) * g);
            near("da", da[i], probs[n] * double(a[i]) * u[i] * s * (1 + a[i] * (1 - s)));
            dp_plain[n] += double(a[i]) * g * u[i];
        }
        near("dp", dp[n], dp_plain[n]);
    }
    for (int64_t i = 0; i < N * H; ++i) near("accumulate", y[i], y_plain[i]);
    for (int64_t i = 0; i < E * F * H; ++i) near("gate gradient", g0[i], g0_plain[i]);
    for (int64_t i = 0; i < E * F * H; ++i) near("down gradient", g2[i], 1 + g2_plain[i]);
}

std::vector<uint16_t> halves(std::vector<float>& values) {
    std::vector<uint16_t> out;
    for (float& value : values) {
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        bits &= 0xffff0000u;
        std::memcpy(&value, &bits, 4);
        out.push_back(bits >> 16);
    }
    return out;
}

// The kernels of masks of whole blocks and of few rows, with float32 or bfloat16 matrices.
template <class Index>
void check_blocks(std::vector<int64_t> counts, int64_t H, int64_t F, int64_t kept, int64_t block,
                  bool half, int64_t threads) {
    const MoneKernels& k = MONE_TABLE;
    const int64_t E = counts.size();
    std::vector<int64_t> start(1, 0), offsets(1, 0), expert_of;
    int64_t tiles = 0;
    for (int64_t e = 0; e < E; ++e) {
        start.push_back(start.back() + counts[e]);
        expert_of.insert(expert_of.end(), counts[e], e);
        tiles += (counts[e] + kTile - 1) / kTile;
    }
    const int64_t N = start.back(), K = N * kept;
    for (int64_t n = 0; n < N; ++n) offsets.push_back((n + 1) * kept);
    MoneShape shape{start.data(), E, N, F, H, threads};
    auto gate = noises(N * F), x = noises(N * H), w0 = noises(E * F * H), w1 = noises(E * F * H);
    auto probs = noises(N);
    auto gate_half = halves(gate), x_half = halves(x), w0_half = halves(w0), w1_half = halves(w1);
    auto data = [&](std::vector<float>& wide, std::vector<uint16_t>& narrow) {
        return half ? static_cast<void*>(narrow.data()) : static_cast<void*>(wide.data());
    };
    MoneMatrix X{data(x, x_half), 0, H, half, 0};
    MoneMatrix W0{data(w0, w0_half), F * H, H, half, 0}, W1{data(w1, w1_half), F * H, H, half, 0};

    std::vector<Index> idx(K);
    std::vector<int32_t> keys(threads * 2 * ((F + 15) / 16 * 16));
    k.select(&shape, data(gate, gate_half), half ? 2 : 4, kept, 1, block, idx.data(), sizeof(Index),
             keys.data());
    for (int64_t i = 0; i < K; ++i) near("block", idx[i], idx[i / block * block] + i % block);
    MoneMask mask{idx.data(), offsets.data(), sizeof(Index)};
    const int64_t width = (H + 15) / 16 * 16;
    std::vector<float> rows(N * width);
    k.widen(&shape, &X, rows.data(), width);

    std::vector<int32_t> starts(tiles * (F / kBlock + 1));
    std::vector<MoneBlockEntry> entries(K / kBlock);
    MoneBlocks lists{starts.data(), entries.data()};
    std::vector<float> a(K), u(K), h(K), dense(N * F), y(N * H), few_u(K), few_y(N * H);
    MoneMatrix D{dense.data(), 0, F, 0, 0}, Y{y.data(), 0, H, 0, 0};
    MoneMatrix FY{few_y.data(), 0, H, 0, 0};
    k.block_lists(&shape, &mask, &lists);
    k.dense(&shape, rows.data(), width, &W0, &D);
    k.gather(&shape, &mask, data(gate, gate_half), h.data(), half ? 2 : 4);
    k.block_sampled(&shape, &mask, &lists, rows.data(), width, &W0, a.data());
    k.few_sampled(&shape, &mask, rows.data(), width, &W1, few_u.data());
    k.gated(&shape, &mask, nullptr, probs.data(), h.data(), half ? 2 : 4, a.data(), u.data());
    k.block_accumulate(&shape, &mask, &lists, a.data(), &W0, u.data(), &W1, &Y);
    k.few_accumulate(&shape, &mask, a.data(), &W0, u.data(), &W1, &FY);
    std::vector<float> g0(E * F * H), g1(E * F * H, 1.0f), g2(E * F * H);
    MoneMatrix G0{g0.data(), F * H, H, 0, 0}, G1{g1.data(), F * H, H, 0, 1};
    MoneMatrix G2{g2.data(), F * H, H, 0, 0};
    k.block_grads(&shape, &mask, &lists, a.data(), u.data(), &X, &G0, &G1);
    k.block_grads(&shape, &mask, &lists, u.data(), nullptr, &X, &G2, nullptr);

    const bool few = *std::max_element(counts.begin(), counts.end()) <= kFewRows;
    std::vector<float> few_g1(E * F * H, 1.0f), few_g2(E * F * H);
    std::vector<uint16_t> few_g0(E * F * H);
    MoneMatrix FG0{few_g0.data(), F * H, H, 1, 0}, FG1{few_g1.data(), F * H, H, 0, 1};
    MoneMatrix FG2{few_g2.data(), F * H, H, 0, 0};
    if (few) {
        k.few_grads(&shape, &mask, a.data(), u.data(), x.data(), H, &FG0, &FG1);
        k.few_grads(&shape, &mask, u.data(), nullptr, x.data(), H, &FG2, nullptr);
        FG0.adds = 1;
        k.few_grads(&shape, &mask, a.data(), nullptr, x.data(), H, &FG0, nullptr);
    }

    std::vector<double> y_plain(N * H), g0_plain(E * F * H), g2_plain(E * F * H);
    for (int64_t n = 0; n < N; ++n) {
        for (int64_t i = offsets[n]; i < offsets[n + 1]; ++i) {
            const int64_t w = (expert_of[n] * F + idx[i]) * H;
            double dot0 = 0, dot1 = 0;
            for (int64_t c = 0; c < H; ++c) {
                dot0 += double(x[n * H + c]) * w0[w + c];
                dot1 += double(x[n * H + c]) * w1[w + c];
                y_plain[n * H + c] += double(a[i]) * w0[w + c] + double(u[i]) * w1[w + c];
                g0_plain[w + c] += double(a[i]) * x[n * H + c];
                g2_plain[w + c] += double(u[i]) * x[n * H + c];
            }
            near("block sampled", a[i], dot0);
            near("dense", dense[n * F + idx[i]], dot0);
            near("few sampled", few_u[i], dot1);
            near("gated", u[i], double(probs[n]) * gate[n * F + idx[i]] * a[i]);
        }
    }
    for (int64_t i = 0; i < N * H; ++i) near("block accumulate", y[i], y_plain[i]);
    for (int64_t i = 0; i < N * H; ++i) near("few accumulate", few_y[i], y_plain[i]);
    for (int64_t i = 0; i < E * F * H; ++i) near("block gate gradient", g0[i], g0_plain[i]);
    for (int64_t i = 0; i < E * F * H; ++i) near("block down gradient", g2[i], g2_plain[i]);
    for (int64_t i = 0; i < E * F * H; ++i) near("block added gradient", g1[i], 1 + g2_plain[i]);
    for (int64_t i = 0; few && i < E * F * H; ++i) near("few added", few_g1[i], 1 + g2_plain[i]);
    for (int64_t i = 0; few && i < E * F * H; ++i) near("few gradient", few_g2[i], g2_plain[i]);
}

// A block's sum as neuron_selection.block_scores defines it.
float block_sum(std::vector<float> values) {
    size_t size = 1;
    while (size < values.size()) size *= 2;
    values.resize(size);
    for (size_t half = size / 2; half; half /= 2)
        for (size_t i = 0; i < half; ++i) values[i] += values[half + i];
    return values[0];
}

// The choice of `kept` neurons of each group of rows of noise, by blocks of any size.
template <class Index>
void check_choice(int64_t N, int64_t F, int64_t kept, int64_t groups, int64_t block,
                  int64_t threads) {
    const MoneKernels& k = MONE_TABLE;
    const std::vector<int64_t> start{0, N};
    MoneShape shape{start.data(), 1, N, F, 0, threads};
    auto gate = noises(N * F);
    std::vector<Index> idx(N * kept * groups);
    std::vector<int32_t> keys(threads * 2 * ((F + 15) / 16 * 16));
    k.select(&shape, gate.data(), 4, kept, groups, block, idx.data(), sizeof(Index), keys.data());
    // the same choice from pre-activations: relu of magnitudes leaves them
    std::vector<float> a(N * F), a_K(N * kept * groups), g_K(N * kept * groups);
    std::transform(gate.begin(), gate.end(), a.begin(), [](float value) { return std::fabs(value); });
    std::vector<Index> idx_of_a(N * kept * groups);
    std::vector<int32_t> work(threads * 3 * ((F + 15) / 16 * 16));
    k.choose(&shape, a.data(), kRelu, kept, groups, block, idx_of_a.data(), sizeof(Index), work.data(),
             4, a_K.data(), g_K.data());
    for (int64_t i = 0; i < N * kept * groups; ++i) {
        const double value = a[i / (kept * groups) * F + idx[i]];
        near("choice of a", idx_of_a[i], idx[i]);
        near("chosen a", a_K[i], value);
        near("chosen gate", g_K[i], value);
    }
    const int64_t width = F / groups / block;
    for (int64_t part = 0; part < N * groups; ++part) {
        std::vector<std::pair<float, int64_t>> order;  // largest sum first, then the lower block
        for (int64_t b = part * width; b < (part + 1) * width; ++b) {
            std::vector<float> values(gate.begin() + b * block, gate.begin() + (b + 1) * block);
            for (float& value : values) value = std::fabs(value);
            order.push_back({-block_sum(values), b});
        }
        std::sort(order.begin(), order.end());
        std::vector<int64_t> chosen;
        for (int64_t i = 0; i < kept / block; ++i) chosen.push_back(order[i].second);
        std::sort(chosen.begin(), chosen.end());
        for (int64_t i = 0; i < kept; ++i)
            near("choice", idx[part * kept + i],
                 chosen[i / block] * block + i % block - part / groups * F);
    }
}

}  // namespace

int main() {
    for (int64_t threads = 1; threads <= 2; ++threads) {
        check<int16_t>({5, 0, 1}, 7, 3, 1, threads);
        check<int16_t>({0}, 7, 3, 2, threads);
        check<int32_t>({130, 40}, 70, 130, 33, threads);
        check<int16_t>({520, 3}, 131, 65, 17, threads);
        check<int16_t>({9}, 64, 600, 599, threads);
        check<int16_t>({30, 7}, 2 * 256 + 80, 65, 17, threads);
        for (bool half : {false, true}) {
            check_blocks<int16_t>({5, 0, 1}, 7, 48, 16, 16, half, threads);
            check_blocks<int16_t>({0}, 7, 32, 16, 16, half, threads);
            check_blocks<int32_t>({520, 3}, 70, 192, 64, 32, half, threads);
            check_blocks<int16_t>({9}, 600, 576, 576, 64, half, threads);
            check_blocks<int16_t>({14, 2}, 528, 256, 128, 128, half, threads);
            check_blocks<int16_t>({9, 4}, 40, 288, 96, 48, half, threads);
            check_blocks<int32_t>({3}, 24, 1408, 352, 352, half, threads);
        }
        for (int64_t block : {1, 2, 3, 5, 11, 16, 22, 24, 44, 64, 88, 352}) {
            check_choice<int16_t>(7, 12 * block, 2 * block, 3, block, threads);
            check_choice<int32_t>(3, block, block, 1, block, threads);
        }
    }
    std::printf("%d failures\n", failures);
    return failures != 0;
}
