// A linear with bf16 weights for few tokens, written once and built for each instruction set: in fp32,
// or where there are products of bf16 by those, whose sums are fp32 as well.
#include "linear.h"
#include "products.h"

namespace octavo {
namespace {

constexpr int64_t LINE = 32;                            // numbers of a cache line
constexpr int SIDE = 4;                                 // rows side by side, at most
constexpr int MOST_TOKENS = W == 16 ? 16 : 6;           // that a weight meets when it is read
constexpr int64_t BLOCK_BYTES = W == 16 ? 2048 : 4096;  // of inputs: all tokens' stay in the first-level cache
constexpr int64_t PREFETCH_WEIGHTS = 512;  // numbers ahead, of rows that are read from end to end,
constexpr int64_t PREFETCH_ROWS = 8;       // and rows ahead, of those that are read in blocks

// sums[token][row] of a tile and ROWS rows, `apart` after one another, grow by the products of n inputs: the
// first vector of each token is x, and of each row `weight`. The order of the additions is the same whatever
// the tile.
template <class Dot, int ROWS, int TOKENS, typename X>
__attribute__((noinline)) void dot_tile(
    const X* x, const uint16_t* weight, int64_t K, int64_t apart, int64_t n, int64_t ahead, float* sums,
    int64_t n_sums
) {
    constexpr int64_t STEP = W * Dot::N;  // inputs of a vector
    constexpr int ALL = ROWS * TOKENS, VECTORS = (ALL + W - 1) / W;
    const int64_t step = apart * K;
    Vec own[VECTORS * W];  // beyond ALL none is used
    repeat<ALL>(OCTAVO_EACH(i) { own[i] = Vec{}; });
    const auto add = [&](int64_t k) __attribute__((always_inline)) {
        IntVec words[ROWS];
        repeat<ROWS>(OCTAVO_EACH(r) { words[r] = Dot::words(weight + r * step + k, STEP); });
        repeat<TOKENS>(OCTAVO_EACH(t) {
            const IntVec inputs = Dot::words(x + k * TOKENS + t * STEP, STEP);
            repeat<ROWS>(OCTAVO_EACH(r) {
                own[r * TOKENS + t] = Dot::add(own[r * TOKENS + t], words[r], inputs);
            });
        });
    };
    int64_t k = 0;
    for (; k + LINE <= n; k += LINE) {
        for (int r = 0; r < ROWS; r++) {
            const uint16_t* const next = weight + r * step + k + ahead;
            ahead == PREFETCH_WEIGHTS ? fetch_line(next) : fetch_line_early(next);
        }
        for (int64_t i = 0; i < LINE; i += STEP) add(k + i);
    }
    for (; k < n; k += STEP) add(k);
    float all[VECTORS * W];
    repeat<VECTORS>(OCTAVO_EACH(v) {
        Vec each[W];
        repeat<W>(OCTAVO_EACH(i) { each[i] = v * W + i < ALL ? own[v * W + i] : Vec{}; });
        sum_each<1>(each);
        store(all + v * W, each[0]);
    });
    for (int t = 0; t < TOKENS; t++)
        for (int r = 0; r < ROWS; r++) sums[t * n_sums + r * apart] += all[r * TOKENS + t];
}

// sums[token][row] of a tile and the rows first…stop-1. Of few tokens weights are read from end to end, as several
// runs of memory side by side, see w8a8_kernel.h. Of more they are read in blocks of rows that follow each other:
// inputs would not stay in the first-level cache.
template <class Dot, int TOKENS, typename X>
void sum_products(const BF16Call& call, const X* x, int64_t first, int64_t stop, float* sums) {
    constexpr int ROWS = IN_REGISTERS / TOKENS >= SIDE ? SIDE : IN_REGISTERS / TOKENS >= 2 ? 2 : 1;
    constexpr int64_t DEPTH = BLOCK_BYTES / int64_t(sizeof(X));
    const int64_t n = stop - first, K = call.n_inputs, groups = n / ROWS;
    const auto add = [&](auto rows, int64_t row, int64_t apart, int64_t k, int64_t ahead) {
        dot_tile<Dot, rows, TOKENS>(
            x + k * TOKENS, call.weight + (first + row) * K + k, K, apart, least(DEPTH, K - k), ahead, sums + row, n
        );
    };
    if (ROWS == SIDE)
        for (int64_t row = 0; row < groups; row++)
            for (int64_t k = 0; k < K; k += DEPTH) add(Number<ROWS>(), row, groups, k, PREFETCH_WEIGHTS);
    else
        for (int64_t k = 0; k < K; k += DEPTH)
            for (int64_t i = 0; i < groups; i++) add(Number<ROWS>(), i * ROWS, 1, k, PREFETCH_ROWS * K);
    for (int64_t row = groups * ROWS; row < n; row++)
        for (int64_t k = 0; k < K; k += DEPTH) add(Number<1>(), row, 1, k, PREFETCH_WEIGHTS);
}

// The same of all tokens.
template <class Dot, typename X>
void sum_tiles(const BF16Call& call, const X* inputs, int64_t first, int64_t stop, float* sums) {
    const int64_t n = stop - first;
    memset(sums, 0, n * call.n_tokens * sizeof(float));
    const Tiles tiles(call.n_tokens, MOST_TOKENS);
    for (int64_t i = 0; i < tiles.n; i++) {
        const int64_t token = tiles.first(i);
        with_number<MOST_TOKENS>(tiles.size(i), [&](auto tokens) {
            sum_products<Dot, tokens>(call, inputs + token * call.n_inputs, first, stop, sums + token * n);
        });
    }
}

bool multiplies_halves(const BF16Call& call) {
    return OCTAVO_HAS_HALVES && call.n_inputs % (2 * W) == 0;
}

// A tile's inputs are [K / step][tokens][step], a step being a vector's: in the order in which they are read.
void take_inputs(const BF16Call& call, float* inputs) {
    const int64_t K = call.n_inputs, step = multiplies_halves(call) ? 2 * W : W;
    const Tiles tiles(call.n_tokens, MOST_TOKENS);
    for (int64_t i = 0; i < tiles.n; i++) {
        const int64_t first = tiles.first(i), n = tiles.size(i);
        for (int64_t t = 0; t < n; t++)
            for (int64_t k = 0; k < K; k += step) {
                const uint16_t* const from = call.x + (first + t) * K + k;
                const int64_t to = first * K + k * n + t * step;
                if (step == W) store(inputs + to, load(from));
                else memcpy((uint16_t*)inputs + to, from, 4 * W);
            }
    }
}

void run_bf16(
    const BF16Call& call, const float* inputs, int64_t first, int64_t stop, float* sums
) {
    if (multiplies_halves(call))
        sum_tiles<Halves>(call, (const uint16_t*)inputs, first, stop, sums);
    else sum_tiles<Singles>(call, inputs, first, stop, sums);
    const int64_t n = stop - first;
    for (int64_t t = 0; t < call.n_tokens; t++)
        for (int64_t i = 0; i < n; i += W) {
            uint16_t numbers[W];
            store(numbers, load(sums + t * n + i));
            memcpy(call.out + t * call.n_outputs + first + i, numbers, least(W, n - i) * sizeof *numbers);
        }
}

}  // namespace
}  // namespace octavo
