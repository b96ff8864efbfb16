// One piece of a W8A8 linear, written once and built for each instruction set.
//
// The products are exact: int8 numbers are widened to int16, whose products are added in pairs into
// int32. (Without VNNI, x86's own product of bytes, `vpmaddubsw`, saturates, and oneDNN's int8 matrix
// product with it. Inputs' magnitudes, times weights that are given the inputs' signs, would not; but
// their pairs need a second multiplication to be summed, and it took a fifth longer for many tokens.)
#include "linear.h"
#include "products.h"

namespace octavo {
namespace {

constexpr int PARTS = PANEL / W;                // vectors a panel's row of sums
constexpr int TILE = PARTS <= 2 ? 6 : 2;        // tokens of one panel whose sums stay in registers
constexpr int64_t SUMS = BLOCK_TOKENS * PANEL;  // of a panel
constexpr int64_t PREFETCH = 2048;              // bytes ahead of a panel that is read by itself,
constexpr int64_t PREFETCH_SIDE = 512;          // and of each of several

template <int COUNT>
struct Count {
    static constexpr int N = COUNT;
};

// sums[panel][token][PANEL] += inputs · weights over a block of inputs, for TOKENS tokens and PANELS
// panels, `apart` bytes from one another.
//
// A weight that is used once is read as fast as memory gives it, which is half as fast again for four
// panels side by side as for one (26 and 39 GB/s on two cores of an AMD EPYC; 42 if nothing else is
// done): a processor looks ahead in each run of memory by itself.
template <int TOKENS, int PANELS>
void add_tile(
    const int16_t* inputs, int64_t stride, const int8_t* weights, int64_t apart, int64_t n_inputs,
    int32_t* sums
) {
    IntVec own[PANELS][TOKENS][PARTS];
    for (int p = 0; p < PANELS; p++)
        for (int t = 0; t < TOKENS; t++)
            for (int i = 0; i < PARTS; i++) own[p][t][i] = load(sums + p * SUMS + t * PANEL + i * W);
    const auto add_pair = [&](int64_t k) __attribute__((always_inline)) {
        for (int p = 0; p < PANELS; p++) {
            const int8_t* here = weights + p * apart + k * PANEL;
            IntVec w[PARTS];
            for (int i = 0; i < PARTS; i++) w[i] = Pairs::words(here + i * 2 * W, 2 * W);
            for (int t = 0; t < TOKENS; t++) {
                int32_t pair;
                memcpy(&pair, inputs + t * stride + k, sizeof pair);
                const IntVec x = splat(pair);
                for (int i = 0; i < PARTS; i++) own[p][t][i] = Pairs::add(own[p][t][i], w[i], x);
            }
        }
    };
    int64_t k = 0;
    for (; PANELS > 1 && k + 4 <= n_inputs; k += 4) {  // a line of each panel
        for (int p = 0; p < PANELS; p++)
            __builtin_prefetch(weights + p * apart + k * PANEL + PREFETCH_SIDE);
        add_pair(k);
        add_pair(k + 2);
    }
    for (; k < n_inputs; k += 2) {
        __builtin_prefetch(weights + k * PANEL + PREFETCH);
        add_pair(k);
    }
    for (int p = 0; p < PANELS; p++)
        for (int t = 0; t < TOKENS; t++)
            for (int i = 0; i < PARTS; i++) store(sums + p * SUMS + t * PANEL + i * W, own[p][t][i]);
}

// All panels of a piece, for TOKENS tokens; as many side by side as there are registers for.
template <int TOKENS>
void add_panels(
    const int16_t* inputs, int64_t stride, const int8_t* weights, int64_t apart, int64_t n_panels,
    int64_t n_inputs, int32_t* sums
) {
    constexpr int SIDE = PARTS > 2 ? 1 : TOKENS == 1 ? 4 : TILE / TOKENS;
    int64_t p = 0;
    for (; p + SIDE <= n_panels; p += SIDE)
        add_tile<TOKENS, SIDE>(inputs, stride, weights + p * apart, apart, n_inputs, sums + p * SUMS);
    for (; p < n_panels; p++)
        add_tile<TOKENS, 1>(inputs, stride, weights + p * apart, apart, n_inputs, sums + p * SUMS);
}

// A tile for each number of tokens, so that the compiler knows it; of about the same size, since a
// small one loads as many weights for fewer sums.
void add_tokens(
    const int16_t* inputs, int64_t stride, const int8_t* weights, int64_t apart, int64_t n_panels,
    int64_t n_inputs, int64_t n_tokens, int32_t* sums
) {
    const auto add = [&](auto tokens) {
        add_panels<tokens.N>(inputs, stride, weights, apart, n_panels, n_inputs, sums);
    };
    while (n_tokens > 0) {
        const int64_t n_tiles = (n_tokens + TILE - 1) / TILE;
        const int64_t n = (n_tokens + n_tiles - 1) / n_tiles;
        switch (n) {
            case 1: add(Count<1>()); break;
            case 2: add(Count<2>()); break;
            case 3: add(Count<TILE < 3 ? TILE : 3>()); break;
            case 4: add(Count<TILE < 4 ? TILE : 4>()); break;
            case 5: add(Count<TILE < 5 ? TILE : 5>()); break;
            default: add(Count<TILE>());
        }
        inputs += n * stride;
        sums += n * PANEL;
        n_tokens -= n;
    }
}

template <typename T>
void scale_panel(
    const W8A8Call& call, const W8A8Piece& piece, int64_t panel, const int32_t* sums
) {
    const int64_t first = panel * PANEL, n = least(PANEL, call.n_outputs - first);
    float factors[PANEL] = {};
    memcpy(factors, call.weight_scale + first, n * sizeof(float));
    for (int64_t t = 0; t < piece.n_tokens; t++) {
        const int64_t token = piece.first_token + t;
        T results[PANEL];
        for (int64_t i = 0; i < PANEL; i += W) {
            const IntVec own = load(sums + t * PANEL + i);
            const Vec x = __builtin_convertvector(own, Vec) * splat(call.scale[token]);
            store(results + i, x * load(factors + i));
        }
        memcpy((T*)call.out + token * call.n_outputs + first, results, n * sizeof(T));
    }
}

void run_w8a8(const W8A8Call& call, const W8A8Piece& piece, W8A8Scratch& scratch) {
    for (int64_t p = 0; p < piece.n_panels; p++)
        memset(scratch.sums + p * SUMS, 0, piece.n_tokens * PANEL * sizeof(int32_t));
    // A weight that is used once is read from end to end; one that is used often, in blocks that stay
    // in the first-level cache.
    const bool is_used_once = piece.n_tokens <= TILE;
    const int64_t most = BLOCK_TOKENS * BLOCK_INPUTS / TILE;
    const int64_t block = is_used_once ? least(call.n_inputs, most) : BLOCK_INPUTS;
    const int64_t n_panels = is_used_once ? piece.n_panels : 1;  // at a time
    const int64_t apart = call.n_inputs * PANEL;
    for (int64_t k = 0; k < call.n_inputs; k += block) {
        const int64_t n_inputs = least(block, call.n_inputs - k);
        for (int64_t t = 0; t < piece.n_tokens; t++) {
            const int8_t* from = call.q + (piece.first_token + t) * call.n_inputs + k;
            int16_t* to = scratch.inputs + t * block;
            for (int64_t i = 0; i < n_inputs; i++) to[i] = from[i];
        }
        for (int64_t p = 0; p < piece.n_panels; p += n_panels)
            add_tokens(
                scratch.inputs, block, call.packed + (piece.first_panel + p) * apart + k * PANEL,
                apart, n_panels, n_inputs, piece.n_tokens, scratch.sums + p * SUMS
            );
    }
    for (int64_t p = 0; p < piece.n_panels; p++) {
        const int32_t* sums = scratch.sums + p * SUMS;
        if (call.is_bf16) scale_panel<uint16_t>(call, piece, piece.first_panel + p, sums);
        else scale_panel<float>(call, piece, piece.first_panel + p, sums);
    }
}

}  // namespace
}  // namespace octavo
