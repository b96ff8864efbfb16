// A linear with bf16 weights for few tokens, in fp32, written once and built for each instruction set.
#include "linear.h"
#include "vectors.h"

namespace octavo {
namespace {

constexpr int64_t PREFETCH_WEIGHTS = 256;  // numbers ahead, of each row
constexpr int SIDE = 4;                    // rows side by side
constexpr int64_t LINE = 32;               // numbers of a cache line
constexpr int64_t BLOCK_DEPTH = 1024;      // inputs; six tokens' stay in the first-level cache

// sums[row][token] of ROWS rows, each `apart` after the one before, and TOKENS tokens grow by the
// inputs first…stop-1. The order of the additions is the same whatever the tile.
template <int ROWS, int TOKENS>
void dot_tile(
    const BF16Call& call, int64_t row, int64_t apart, int64_t token, int64_t first, int64_t stop,
    float* sums
) {
    const int64_t K = call.n_inputs, step = apart * K;
    const uint16_t* weight = call.weight + row * K;
    const float* x = call.x + token * K;
    Vec own[ROWS][TOKENS] = {};
    const auto add = [&](int64_t k) __attribute__((always_inline)) {
        Vec inputs[TOKENS];
        for (int t = 0; t < TOKENS; t++) inputs[t] = load(x + t * K + k);
        for (int r = 0; r < ROWS; r++) {
            const Vec w = load(weight + r * step + k);
            for (int t = 0; t < TOKENS; t++) own[r][t] += w * inputs[t];
        }
    };
    int64_t k = first;
    for (; k + LINE <= stop; k += LINE) {
        for (int r = 0; r < ROWS; r++) __builtin_prefetch(weight + r * step + k + PREFETCH_WEIGHTS);
        for (int64_t i = 0; i < LINE; i += W) add(k + i);
    }
    for (; k < stop; k += W) add(k);
    for (int r = 0; r < ROWS; r++)
        for (int t = 0; t < TOKENS; t++) sums[r * apart * call.n_tokens + token + t] += sum(own[r][t]);
}

template <int ROWS>
void dot_rows(
    const BF16Call& call, int64_t row, int64_t apart, int64_t token, int64_t n_tokens, int64_t first,
    int64_t stop, float* sums
) {
    switch (n_tokens) {
        case 1: return dot_tile<ROWS, 1>(call, row, apart, token, first, stop, sums);
        case 2: return dot_tile<ROWS, 2>(call, row, apart, token, first, stop, sums);
        case 3: return dot_tile<ROWS, 3>(call, row, apart, token, first, stop, sums);
        case 4: return dot_tile<ROWS, 4>(call, row, apart, token, first, stop, sums);
        case 5: return dot_tile<ROWS, 5>(call, row, apart, token, first, stop, sums);
        default: return dot_tile<ROWS, 6>(call, row, apart, token, first, stop, sums);
    }
}

// ROWS rows and all tokens, by tiles of about the same size.
template <int ROWS>
void dot_tokens(
    const BF16Call& call, int64_t row, int64_t apart, int64_t first, int64_t stop, float* sums
) {
    const int64_t most = 12 / ROWS > 6 ? 6 : 12 / ROWS;  // twelve sums stay in registers
    int64_t token = 0;
    for (int64_t tiles = (call.n_tokens + most - 1) / most; tiles > 0; tiles--) {
        const int64_t n = (call.n_tokens - token + tiles - 1) / tiles;
        dot_rows<ROWS>(call, row, apart, token, n, first, stop, sums);
        token += n;
    }
}

void run_bf16(const BF16Call& call, int64_t first, int64_t stop, float* sums) {
    const int64_t n = stop - first, T = call.n_tokens, K = call.n_inputs;
    memset(sums, 0, n * T * sizeof(float));
    int64_t row = 0;
    if (T <= 3) {
        // A weight that is used once is read as several runs of memory side by side, see w8a8_kernel.h.
        const int64_t apart = n / SIDE;
        for (; row < apart; row++)
            for (int64_t k = 0; k < K; k += BLOCK_DEPTH)
                dot_tokens<SIDE>(call, first + row, apart, k, least(k + BLOCK_DEPTH, K), sums + row * T);
        for (row = SIDE * apart; row < n; row++)
            for (int64_t k = 0; k < K; k += BLOCK_DEPTH)
                dot_tokens<1>(call, first + row, 1, k, least(k + BLOCK_DEPTH, K), sums + row * T);
    } else {
        for (int64_t k = 0; k < K; k += BLOCK_DEPTH) {
            const int64_t k_stop = least(k + BLOCK_DEPTH, K);
            for (row = 0; row + 2 <= n; row += 2)
                dot_tokens<2>(call, first + row, 1, k, k_stop, sums + row * T);
            if (row < n) dot_tokens<1>(call, first + row, 1, k, k_stop, sums + row * T);
        }
    }
    for (row = 0; row < n; row++)
        for (int64_t t = 0; t < T; t++) {
            uint16_t numbers[W];
            store(numbers, splat(sums[row * T + t]));
            call.out[t * call.n_outputs + first + row] = numbers[0];
        }
}

}  // namespace
}  // namespace octavo
