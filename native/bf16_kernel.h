// A linear with bf16 weights for few tokens, written once and built for each instruction set: in fp32, unless
// there are products of bf16.
#include "linear.h"
#include "products.h"
#if OCTAVO_WIDTH == 16
#include "bf16_halves.h"
#endif

namespace octavo {
namespace {

constexpr int64_t LINE = 32;                            // numbers of a cache line
constexpr int SIDE = 4;                                 // rows side by side, at most
constexpr int MOST_TOKENS = W == 16 ? 16 : 6;           // that a weight meets when it is read
constexpr int64_t DEPTH = W == 16 ? 512 : 1024;  // inputs at a time: all tokens' stay in the first-level cache
constexpr int64_t PREFETCH_WEIGHTS = 512;  // numbers ahead, of rows that are read from end to end,
constexpr int64_t PREFETCH_ROWS = 8;       // and rows ahead, of those that are read in blocks

// sums[token][row] of a tile and ROWS rows, `apart` after one another, grow by the products of n inputs: the
// first vector of each token is x, and of each row `weight`. The order of the additions is the same whatever
// the tile.
template <int ROWS, int TOKENS>
__attribute__((noinline)) void dot_tile(
    const float* x, const uint16_t* weight, int64_t K, int64_t apart, int64_t n, int64_t ahead, float* sums,
    int64_t n_sums
) {
    constexpr int ALL = ROWS * TOKENS, VECTORS = (ALL + W - 1) / W;
    const int64_t step = apart * K;
    Vec own[VECTORS * W];  // beyond ALL none is used
    repeat<ALL>(OCTAVO_EACH(i) { own[i] = Vec{}; });
    const auto add = [&](int64_t k) __attribute__((always_inline)) {
        Vec weights[ROWS];
        repeat<ROWS>(OCTAVO_EACH(r) { weights[r] = load(weight + r * step + k); });
        repeat<TOKENS>(OCTAVO_EACH(t) {
            const Vec inputs = load(x + k * TOKENS + t * W);
            repeat<ROWS>(OCTAVO_EACH(r) { own[r * TOKENS + t] += weights[r] * inputs; });
        });
    };
    int64_t k = 0;
    for (; k + LINE <= n; k += LINE) {
        for (int r = 0; r < ROWS; r++) {
            const uint16_t* const next = weight + r * step + k + ahead;
            ahead == PREFETCH_WEIGHTS ? fetch_line(next) : fetch_line_early(next);
        }
        for (int64_t i = 0; i < LINE; i += W) add(k + i);
    }
    for (; k < n; k += W) add(k);
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
template <int TOKENS>
void sum_products(const BF16Call& call, const float* x, int64_t first, int64_t stop, float* sums) {
    constexpr int ROWS = IN_REGISTERS / TOKENS >= SIDE ? SIDE : IN_REGISTERS / TOKENS >= 2 ? 2 : 1;
    const int64_t n = stop - first, K = call.n_inputs, groups = n / ROWS;
    const auto add = [&](auto rows, int64_t row, int64_t apart, int64_t k, int64_t ahead) {
        dot_tile<rows, TOKENS>(
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

// A tile's inputs are [K / W][tokens][W]: in the order in which they are read.
void take_singles(const BF16Call& call, float* inputs) {
    const int64_t K = call.n_inputs;
    const Tiles tiles(call.n_tokens, MOST_TOKENS);
    for (int64_t i = 0; i < tiles.n; i++) {
        const int64_t first = tiles.first(i), n = tiles.size(i);
        for (int64_t t = 0; t < n; t++)
            for (int64_t k = 0; k < K; k += W)
                store(inputs + first * K + k * n + t * W, load(call.x + (first + t) * K + k));
    }
}

void run_singles(const BF16Call& call, const float* inputs, int64_t first, int64_t stop, float* sums) {
    const int64_t n = stop - first;
    memset(sums, 0, n * call.n_tokens * sizeof(float));
    const Tiles tiles(call.n_tokens, MOST_TOKENS);
    for (int64_t i = 0; i < tiles.n; i++) {
        const int64_t token = tiles.first(i);
        with_number<MOST_TOKENS>(tiles.size(i), [&](auto tokens) {
            sum_products<tokens>(call, inputs + token * call.n_inputs, first, stop, sums + token * n);
        });
    }
    for (int64_t t = 0; t < call.n_tokens; t++)
        for (int64_t i = 0; i < n; i += W)
            store_first(call.out + t * call.n_outputs + first + i, load(sums + t * n + i), n - i);
}

#if OCTAVO_WIDTH == 16
void take_inputs(const BF16Call& call, float* inputs) {
    if (multiplies_halves(call)) take_halves(call, (uint16_t*)inputs);
    else take_singles(call, inputs);
}

void run_bf16(const BF16Call& call, const float* inputs, int64_t first, int64_t stop, float* sums) {
    if (multiplies_halves(call)) run_halves(call, (const uint16_t*)inputs, first, stop, sums);
    else run_singles(call, inputs, first, stop, sums);
}
#else
constexpr auto take_inputs = take_singles;
constexpr auto run_bf16 = run_singles;
#endif

}  // namespace
}  // namespace octavo
