// A linear with bf16 weights for few tokens, written once and built for each instruction set: in fp32,
// or where there are products of bf16 by those, whose sums are fp32 as well.
#include "linear.h"
#include "products.h"

namespace octavo {
namespace {

constexpr int64_t PREFETCH_WEIGHTS = 256;  // numbers ahead, of each row
constexpr int64_t LINE = 32;               // numbers of a cache line
constexpr int64_t BLOCK_BYTES = 4096;      // of inputs; six tokens' stay in the first-level cache
constexpr int SIDE = 4;                    // rows side by side,
constexpr int MANY = IN_REGISTERS / 6;     // and of four tokens or more, which come by six

// sums[row][token] of ROWS rows, each `apart` after the one before, and TOKENS tokens grow by the
// inputs first…stop-1. The order of the additions is the same whatever the tile.
template <class Dot, int ROWS, int TOKENS, typename X>
__attribute__((noinline)) void dot_tile(
    const BF16Call& call, const X* inputs, int64_t row, int64_t apart, int64_t token, int64_t first,
    int64_t stop, int64_t ahead, float* sums
) {
    constexpr int64_t STEP = W * Dot::N;  // inputs of a vector
    const int64_t K = call.n_inputs, step = apart * K;
    const uint16_t* weight = call.weight + row * K;
    const X* x = inputs + token * call.apart();
    Vec own[ROWS][TOKENS];
    repeat<ROWS * TOKENS>(OCTAVO_EACH(i) { own[i / TOKENS][i % TOKENS] = Vec{}; });
    const auto add = [&](int64_t k) __attribute__((always_inline)) {
        IntVec words[TOKENS];
        repeat<TOKENS>(OCTAVO_EACH(t) { words[t] = Dot::words(x + t * call.apart() + k, STEP); });
        repeat<ROWS>(OCTAVO_EACH(r) {
            const IntVec w = Dot::words(weight + r * step + k, STEP);
            repeat<TOKENS>(OCTAVO_EACH(t) { own[r][t] = Dot::add(own[r][t], w, words[t]); });
        });
    };
    int64_t k = first;
    for (; k + LINE <= stop; k += LINE) {
        for (int r = 0; r < ROWS; r++) fetch_line(weight + r * step + k + ahead);
        for (int64_t i = 0; i < LINE; i += STEP) add(k + i);
    }
    for (; k < stop; k += STEP) add(k);
    repeat<ROWS * TOKENS>(OCTAVO_EACH(i) {
        const int r = i / TOKENS, t = i % TOKENS;
        sums[r * apart * call.n_tokens + token + t] += sum(own[r][t]);
    });
}

// ROWS rows and all tokens, by tiles of about the same size.
template <class Dot, int ROWS, typename X>
void dot_tokens(
    const BF16Call& call, const X* x, int64_t row, int64_t apart, int64_t first, int64_t stop,
    float* sums
) {
    constexpr int MOST = IN_REGISTERS / ROWS < 6 ? IN_REGISTERS / ROWS : 6;
    int64_t token = 0, ahead = PREFETCH_WEIGHTS;
    for (int64_t tiles = (call.n_tokens + MOST - 1) / MOST; tiles > 0; tiles--) {
        const int64_t n = (call.n_tokens - token + tiles - 1) / tiles;
        with_number<MOST>(n, [&](auto tokens) {
            dot_tile<Dot, ROWS, tokens>(call, x, row, apart, token, first, stop, ahead, sums);
        });
        // What was read is here, and what comes after it is fetched meanwhile.
        if (MANY == SIDE) ahead = stop - first;
        token += n;
    }
}

template <class Dot, typename X>
void sum_products(const BF16Call& call, const X* x, int64_t first, int64_t stop, float* sums) {
    constexpr int64_t BLOCK_DEPTH = BLOCK_BYTES / int64_t(sizeof(X));
    const int64_t n = stop - first, T = call.n_tokens, K = call.n_inputs;
    memset(sums, 0, n * T * sizeof(float));
    const auto add = [&](auto rows, int64_t row, int64_t apart, int64_t k) {
        const int64_t k_stop = least(k + BLOCK_DEPTH, K);
        dot_tokens<Dot, rows>(call, x, first + row, apart, k, k_stop, sums + row * T);
    };
    if (T <= 3 || MANY == SIDE) {
        // Weights are read from end to end, as several runs of memory side by side, see w8a8_kernel.h.
        const int64_t apart = n / SIDE;
        for (int64_t row = 0; row < apart; row++)
            for (int64_t k = 0; k < K; k += BLOCK_DEPTH) add(Number<SIDE>(), row, apart, k);
        for (int64_t row = SIDE * apart; row < n; row++)
            for (int64_t k = 0; k < K; k += BLOCK_DEPTH) add(Number<1>(), row, 1, k);
    } else {
        for (int64_t k = 0; k < K; k += BLOCK_DEPTH) {
            int64_t row = 0;
            for (; row + MANY <= n; row += MANY) add(Number<MANY>(), row, 1, k);
            for (; row < n; row++) add(Number<1>(), row, 1, k);
        }
    }
}

bool multiplies_halves(const BF16Call& call) {
    return OCTAVO_HAS_HALVES && call.n_inputs % (2 * W) == 0;
}

void take_inputs(const BF16Call& call, float* inputs) {
    for (int64_t t = 0; t < call.n_tokens; t++) {
        const uint16_t* const row = call.x + t * call.n_inputs;
        if (multiplies_halves(call))
            memcpy((uint16_t*)inputs + t * call.apart(), row, call.n_inputs * sizeof *row);
        else
            for (int64_t k = 0; k < call.n_inputs; k += W)
                store(inputs + t * call.apart() + k, load(row + k));
    }
}

void run_bf16(
    const BF16Call& call, const float* inputs, int64_t first, int64_t stop, float* sums
) {
    if (multiplies_halves(call))
        sum_products<Halves>(call, (const uint16_t*)inputs, first, stop, sums);
    else sum_products<Singles>(call, inputs, first, stop, sums);
    for (int64_t row = 0; row < stop - first; row++)
        for (int64_t t = 0; t < call.n_tokens; t++) {
            uint16_t numbers[W];
            store(numbers, splat(sums[row * call.n_tokens + t]));
            call.out[t * call.n_outputs + first + row] = numbers[0];
        }
}

}  // namespace
}  // namespace octavo
