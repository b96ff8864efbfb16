// A linear with bf16 weights for few tokens, in fp32, written once and built for each instruction set.
#include "linear.h"
#include "simd.h"

namespace octavo {
namespace {

constexpr int64_t PREFETCH_WEIGHTS = 512;  // numbers ahead

// ROWS rows of the weight by TOKENS tokens. Each sum is taken in the same order, whatever the tile.
template <int ROWS, int TOKENS>
void dot_tile(const BF16Call& call, int64_t row, int64_t token) {
    const int64_t K = call.n_inputs;
    const uint16_t* weight = call.weight + row * K;
    const float* x = call.x + token * K;
    Vec sums[ROWS][TOKENS] = {};
    for (int64_t k = 0; k < K; k += W) {
        Vec inputs[TOKENS];
        for (int t = 0; t < TOKENS; t++) inputs[t] = load(x + t * K + k);
        for (int r = 0; r < ROWS; r++) {
            __builtin_prefetch(weight + r * K + k + PREFETCH_WEIGHTS);
            const Vec w = load(weight + r * K + k);
            for (int t = 0; t < TOKENS; t++) sums[r][t] += w * inputs[t];
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int t = 0; t < TOKENS; t++)
            narrow(sum(sums[r][t]), call.out + (token + t) * call.n_outputs + row + r);
}

template <int ROWS>
void dot_rows(const BF16Call& call, int64_t row, int64_t token, int64_t n_tokens) {
    switch (n_tokens) {
        case 1: return dot_tile<ROWS, 1>(call, row, token);
        case 2: return dot_tile<ROWS, 2>(call, row, token);
        case 3: return dot_tile<ROWS, 3>(call, row, token);
        case 4: return dot_tile<ROWS, 4>(call, row, token);
        case 5: return dot_tile<ROWS, 5>(call, row, token);
        default: return dot_tile<ROWS, 6>(call, row, token);
    }
}

// Twelve sums stay in registers, of four rows or of two, by tiles of about the same size.
void run_bf16(const BF16Call& call, int64_t first, int64_t stop) {
    const int64_t n_rows = call.n_tokens <= 3 ? 4 : 2, most = 12 / n_rows;
    const int64_t n_tiles = (call.n_tokens + most - 1) / most;
    for (int64_t row = first; row < stop; row += n_rows) {
        int64_t token = 0;
        for (int64_t tiles = n_tiles; tiles > 0; tiles--) {
            const int64_t n = (call.n_tokens - token + tiles - 1) / tiles;
            if (row + n_rows > stop)
                for (int64_t r = row; r < stop; r++) dot_rows<1>(call, r, token, n);
            else if (n_rows == 4) dot_rows<4>(call, row, token, n);
            else dot_rows<2>(call, row, token, n);
            token += n;
        }
    }
}

}  // namespace
}  // namespace octavo
