// The library's kernels on arm64, each against its definition in loops; gives back how many are wrong.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "attention.h"
#include "isa.h"
#include "linear.h"
#include "rows.h"

using namespace octavo;

extern "C" {
int octavo_attention(const AttentionCall* call, int isa);
int octavo_pack_w8(
    const int8_t* weight, int64_t n_outputs, int64_t n_inputs, int8_t* packed, int64_t n_threads,
    int64_t isa
);
int64_t octavo_w8a8_laid_out_bytes(const W8A8Calls* calls, int isa);
int octavo_linears_w8a8(const W8A8Calls* calls, int isa);
int octavo_linear_bf16(const BF16Call* call, int isa);
int octavo_rows(const RowsCall* call, int isa);
}

namespace {

int n_wrong = 0;

void check(const char* what, int isa, double error, double limit) {
    const bool is_right = error <= limit;  // so that a NaN is wrong
    std::printf("%s, instructions %d: %g %s\n", what, isa, error, is_right ? "" : "WRONG");
    n_wrong += !is_right;
}

float random_float() { return float(std::rand()) / RAND_MAX * 2 - 1; }
int8_t random_byte() { return int8_t(std::rand() % 256 - 128); }
uint16_t random_half() {
    const float x = random_float();
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return uint16_t(bits >> 16);
}
float widen(uint16_t half) {
    const uint32_t bits = uint32_t(half) << 16;
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

template <typename T>
std::vector<T> filled(int64_t n, T (*one)()) {
    std::vector<T> all(n);
    for (T& each : all) each = one();
    return all;
}

void check_w8a8(int isa, int64_t T, int64_t N, int64_t K) {
    const auto q = filled(T * K, random_byte), weight = filled(N * K, random_byte);
    const auto scale = filled(T, random_float), weight_scale = filled(N, random_float);
    std::vector<int8_t> packed((N + PANEL - 1) / PANEL * PANEL * K);
    std::vector<float> out(T * N);
    octavo_pack_w8(weight.data(), N, K, packed.data(), 2, isa);
    const W8A8Call call{q.data(), scale.data(), packed.data(), weight_scale.data(), out.data(), T, N, K, 2, 0};
    W8A8Calls calls{&call, 1, nullptr};
    std::vector<int8_t> laid_out(octavo_w8a8_laid_out_bytes(&calls, isa));
    calls.laid_out = laid_out.data();
    int wrong = octavo_linears_w8a8(&calls, isa) ? 1 : 0;
    for (int64_t t = 0; t < T; t++)
        for (int64_t n = 0; n < N; n++) {
            int32_t sum = 0;
            for (int64_t k = 0; k < K; k++) sum += q[t * K + k] * weight[n * K + k];
            wrong += out[t * N + n] != float(sum) * scale[t] * weight_scale[n];
        }
    check("W8A8", isa, wrong, 0);
}

void check_bf16(int isa, int64_t T, int64_t N, int64_t K) {
    const auto x = filled(T * K, random_half), weight = filled(N * K, random_half);
    std::vector<uint16_t> out(T * N);
    const BF16Call call{x.data(), weight.data(), out.data(), T, N, K, 2};
    double worst = octavo_linear_bf16(&call, isa) ? 1 : 0;
    for (int64_t t = 0; t < T; t++)
        for (int64_t n = 0; n < N; n++) {
            double sum = 0;
            for (int64_t k = 0; k < K; k++) sum += widen(x[t * K + k]) * widen(weight[n * K + k]);
            worst = std::fmax(worst, std::fabs(widen(out[t * N + n]) - sum) / std::sqrt(double(K)));
        }
    check("bf16 linear", isa, worst, 0.01);
}

void check_attention(int isa, int64_t kv_dtype, int64_t n_queries, int64_t window, double limit) {
    constexpr int64_t H = 8, KV = 2, D = 64, P = 16, N = 100, PAGES = 7;
    constexpr int64_t SLOTS = PAGES * KV * P;
    const auto q = filled(n_queries * H * D, random_float);
    std::vector<float> out(q.size()), keys[2];  // keys and values, as they are and in fp32
    std::vector<uint16_t> halves[2], scales[2];
    std::vector<int8_t> bytes[2];
    const void* kept[2];
    for (int i = 0; i < 2; i++) {
        keys[i] = filled(SLOTS * D, random_float);
        halves[i] = filled(SLOTS * D, random_half);
        bytes[i] = filled(SLOTS * D, random_byte);
        scales[i].assign(SLOTS, 0x3C24);  // 0.01
        for (int64_t j = 0; j < SLOTS * D; j++)
            if (kv_dtype == BF16) keys[i][j] = widen(halves[i][j]);
            else if (kv_dtype == INT8) keys[i][j] = bytes[i][j] * widen(scales[i][j / D]);
        kept[i] = kv_dtype == FP32   ? (const void*)keys[i].data()
                  : kv_dtype == BF16 ? (const void*)halves[i].data()
                                     : bytes[i].data();
    }
    const int64_t table[PAGES] = {3, 0, 6, 2, 5, 1, 4}, n_keys = N;
    const AttentionCall call{
        q.data(), out.data(), kept[0], kept[1], scales[0].data(), scales[1].data(), table, &n_queries,
        &n_keys, 1, PAGES, H, KV, D, P, window, 2, FP32, kv_dtype
    };
    if (octavo_attention(&call, isa)) out.assign(out.size(), 0);
    double squares = 0, all = 0;
    for (int64_t row = 0; row < n_queries * H; row++) {
        const int64_t position = N - n_queries + row / H;
        double weights = 0, sums[D] = {};
        for (int64_t j = window ? std::max<int64_t>(0, position - window + 1) : 0; j <= position; j++) {
            const int64_t at = ((table[j / P] * KV + row % H / (H / KV)) * P + j % P) * D;
            double score = 0;
            for (int64_t d = 0; d < D; d++) score += q[row * D + d] * keys[0][at + d];
            const double weight = std::exp(score / std::sqrt(double(D)));
            weights += weight;
            for (int64_t d = 0; d < D; d++) sums[d] += weight * keys[1][at + d];
        }
        for (int64_t d = 0; d < D; d++) {
            squares += std::pow(out[row * D + d] - sums[d] / weights, 2);
            all += std::pow(sums[d] / weights, 2);
        }
    }
    check("attention", isa, std::sqrt(squares / all), limit);
}

void check_rows(int isa, int64_t T, int64_t K) {
    const auto x = filled(T * K, random_float), y = filled(T * K, random_float);
    const auto weight = filled(K, random_float);
    std::vector<float> total(T * K), out(T * K);
    const RowsCall call{
        x.data(), y.data(), total.data(), weight.data(), out.data(), nullptr, T, K, RMS_NORM, 2, 0, 1e-5
    };
    double worst = octavo_rows(&call, isa) ? 1 : 0;
    for (int64_t t = 0; t < T; t++) {
        double mean = 0;
        for (int64_t k = 0; k < K; k++) mean += std::pow(x[t * K + k] + y[t * K + k], 2) / K;
        for (int64_t k = 0; k < K; k++) {
            const double sum = x[t * K + k] + y[t * K + k];
            worst = std::fmax(worst, std::fabs(out[t * K + k] - sum / std::sqrt(mean + 1e-5) * weight[k]));
        }
    }
    check("added and normed rows", isa, worst, 1e-5);
}

}  // namespace

int main() {
    for (const int isa : {int(PORTABLE), int(DOTPROD)}) {
        if (!runs(isa)) return std::printf("no instructions %d here\n", isa), 1;
        for (const int64_t n_tokens : {1, 3, 4, 7, 130})
            for (const int64_t n_inputs : {16, 204, 4200}) check_w8a8(isa, n_tokens, 37, n_inputs);
        for (const int64_t n_tokens : {1, 5, 17}) check_bf16(isa, n_tokens, 37, 272);
        for (const int64_t n_queries : {1, 3, 40})
            for (const int64_t window : {0, 9}) {
                check_attention(isa, FP32, n_queries, window, 1e-5);
                check_attention(isa, BF16, n_queries, window, 1e-5);
                check_attention(isa, INT8, n_queries, window, 1e-3);
            }
        check_rows(isa, 3, 96);
    }
    return n_wrong;
}
