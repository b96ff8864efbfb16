// A linear with bf16 weights for few tokens, by products of bf16, whose sums are fp32.
//
// A quarter of a vector holds a piece of neighbouring inputs: of a token each, and then a weight's piece is
// repeated in all four; or of a row of weights each, and then a token's is. So a weight that was read serves four
// tokens by one instruction, and at a row's end four lanes are left to be summed up and not sixteen: 20 % faster
// for 8 and 16 tokens than a whole vector of a row by a whole one of a token (two cores of an AMD EPYC, Zen 5).
// Either way a sum's lanes take the pieces in their order: a token's outputs do not depend on its company.
#include "linear.h"
#include "products.h"

namespace octavo {
namespace {

constexpr int64_t PIECE = 8;  // inputs of a quarter

// How a tile's inputs are laid out.
struct TileOfHalves {
    static constexpr int MOST = W;     // tokens, whose sums of a row are one vector
    static constexpr int BY_ROWS = 4;  // up to which rows are in the quarters: they are read a line at a time
    const int64_t n_tokens;

    bool is_by_rows() const { return n_tokens <= BY_ROWS; }
    // [K / PIECE][n_columns][PIECE]
    int64_t n_columns() const { return is_by_rows() ? n_tokens : (n_tokens + 3) / 4 * 4; }
};

// Rows that are read side by side, one of each run of memory.
template <int N>
struct SideBySide {
    int64_t rows[N];
};

constexpr int64_t PREFETCH_HALVES = 1024;  // numbers ahead in each run

// sums[row][token] of four rows, which are in the quarters, and TOKENS tokens.
template <int TOKENS>
__attribute__((noinline)) void dot_rows(
    const uint16_t* x, const uint16_t* weight, int64_t K, const SideBySide<4>& side, float* sums
) {
    Vec own[4] = {};  // of a token each; zeros of those that there are not
    for (int64_t k = 0; k < K; k += 2 * W) {
        IntVec lines[4];
        repeat<4>(OCTAVO_EACH(r) {
            const uint16_t* const line = weight + side.rows[r] * K + k;
            fetch_line(line + PREFETCH_HALVES);
            lines[r] = load((const int32_t*)line);
        });
        const IntVec a = quarters<0, 1>(lines[0], lines[1]), b = quarters<0, 1>(lines[2], lines[3]);
        const IntVec c = quarters<2, 3>(lines[0], lines[1]), d = quarters<2, 3>(lines[2], lines[3]);
        const IntVec pieces[4] = {
            quarters<0, 2>(a, b), quarters<1, 3>(a, b), quarters<0, 2>(c, d), quarters<1, 3>(c, d)
        };
        repeat<4>(OCTAVO_EACH(i) {
            const uint16_t* const inputs = x + (k + i * PIECE) * TOKENS;
            repeat<TOKENS>(OCTAVO_EACH(t) {
                own[t] = Halves::add(own[t], pieces[i], repeat_quarter(inputs + t * PIECE));
            });
        });
    }
    float all[W];
    store(all, sum_quads(own));
    for (int r = 0; r < 4; r++) memcpy(sums + side.rows[r] * W, all + 4 * r, 4 * sizeof(float));
}

// The same of ROWS rows and GROUPS times four tokens, which are in the quarters.
template <int ROWS, int GROUPS>
__attribute__((noinline)) void dot_tokens(
    const uint16_t* x, const uint16_t* weight, int64_t K, const SideBySide<ROWS>& side, float* sums
) {
    Vec own[ROWS][GROUPS];
    const uint16_t* rows[ROWS];
    repeat<ROWS>(OCTAVO_EACH(r) {
        rows[r] = weight + side.rows[r] * K;
        repeat<GROUPS>(OCTAVO_EACH(g) { own[r][g] = Vec{}; });
    });
    for (int64_t k = 0; k < K; k += 2 * W) {
        for (int r = 0; r < ROWS; r++) fetch_line(rows[r] + k + PREFETCH_HALVES);
        for (int64_t i = k; i < k + 2 * W; i += PIECE) {
            IntVec inputs[GROUPS];
            repeat<GROUPS>(OCTAVO_EACH(g) { inputs[g] = load((const int32_t*)(x + i * GROUPS * 4 + g * 2 * W)); });
            repeat<ROWS>(OCTAVO_EACH(r) {
                const IntVec piece = repeat_quarter(rows[r] + i);
                repeat<GROUPS>(OCTAVO_EACH(g) { own[r][g] = Halves::add(own[r][g], inputs[g], piece); });
            });
        }
    }
    constexpr IntVec in_order = lanes([](int i) { return i % 4 * 4 + i / 4; });
    repeat<ROWS>(OCTAVO_EACH(r) {
        Vec quads[4] = {};
        repeat<GROUPS>(OCTAVO_EACH(g) { quads[g] = own[r][g]; });
        const IntVec sum = (IntVec)sum_quads(quads);
        store(sums + side.rows[r] * W, (Vec)shuffle(sum, sum, in_order));
    });
}

// f(side) for all of n_rows rows, in N runs. What is left over is the last row again.
template <int N, typename F>
void each_side(int64_t n_rows, const F& f) {
    const int64_t length = (n_rows + N - 1) / N;
    for (int64_t i = 0; i < length; i++) {
        SideBySide<N> side;
        for (int r = 0; r < N; r++) side.rows[r] = least(r * length + i, n_rows - 1);
        f(side);
    }
}

// sums[row][W], a token a lane, of a tile and the n_rows rows of `weight`.
void sum_tile(
    const TileOfHalves& tile, const uint16_t* x, const uint16_t* weight, int64_t K, int64_t n_rows, float* sums
) {
    if (tile.is_by_rows())
        return with_number<TileOfHalves::BY_ROWS>(tile.n_tokens, [&](auto tokens) {
            each_side<4>(n_rows, [&](const auto& side) { dot_rows<tokens>(x, weight, K, side, sums); });
        });
    with_number<4>(tile.n_columns() / 4, [&](auto groups) {
        // Memory is quickest to give four runs at once. But four rows would read 16 tokens' inputs, which are
        // in the second-level cache, half as often again as six.
        constexpr int ROWS = groups == 4 ? 6 : 4;
        each_side<ROWS>(n_rows, [&](const auto& side) { dot_tokens<ROWS, groups>(x, weight, K, side, sums); });
    });
}

bool multiplies_halves(const BF16Call& call) {
    return OCTAVO_HAS_HALVES && call.n_inputs % (2 * W) == 0;
}

void take_halves(const BF16Call& call, uint16_t* to) {
    const int64_t K = call.n_inputs;
    const Tiles tiles(call.n_tokens, TileOfHalves::MOST);
    for (int64_t i = 0; i < tiles.n; i++) {
        const TileOfHalves tile{tiles.size(i)};
        const int64_t n = tile.n_columns();
        memset(to, 0, n * K * sizeof *to);
        for (int64_t t = 0; t < tile.n_tokens; t++)
            for (int64_t k = 0; k < K; k += PIECE)
                memcpy(to + k * n + t * PIECE, call.x + (tiles.first(i) + t) * K + k, PIECE * sizeof *to);
        to += n * K;
    }
}

void run_halves(const BF16Call& call, const uint16_t* inputs, int64_t first, int64_t stop, float* sums) {
    const int64_t K = call.n_inputs, n = stop - first;
    const Tiles tiles(call.n_tokens, TileOfHalves::MOST);
    for (int64_t i = 0; i < tiles.n; i++) {
        const TileOfHalves tile{tiles.size(i)};
        sum_tile(tile, inputs, call.weight + first * K, K, n, sums);
        inputs += tile.n_columns() * K;
        for (int64_t row = 0; row < n; row += W) {
            IntVec own[W];
            for (int64_t r = 0; r < W; r++) own[r] = (IntVec)load(sums + (row + r) * W);
            transpose(own);
            for (int64_t t = 0; t < tile.n_tokens; t++) {
                uint16_t* const to = call.out + (tiles.first(i) + t) * call.n_outputs + first + row;
                store_first(to, (Vec)own[t], n - row);
            }
        }
    }
}

}  // namespace
}  // namespace octavo
