// A linear with bf16 weights for few tokens, in fp32, written once and built for each instruction set.
#include "linear.h"
#include "simd.h"

namespace octavo {
namespace {

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
            const Vec w = load(weight + r * K + k);
            for (int t = 0; t < TOKENS; t++) sums[r][t] += w * inputs[t];
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int t = 0; t < TOKENS; t++)
            narrow(sum(sums[r][t]), call.out + (token + t) * call.n_outputs + row + r);
}

template <int ROWS>
void dot_rows(const BF16Call& call, int64_t row) {
    int64_t token = 0;
    for (; token + 3 <= call.n_tokens; token += 3) dot_tile<ROWS, 3>(call, row, token);
    for (; token < call.n_tokens; token++) dot_tile<ROWS, 1>(call, row, token);
}

void run_bf16(const BF16Call& call, int64_t first, int64_t stop) {
    int64_t row = first;
    for (; row + 4 <= stop; row += 4) dot_rows<4>(call, row);
    for (; row < stop; row++) dot_rows<1>(call, row);
}

}  // namespace
}  // namespace octavo
