// One piece of a W8A8 linear, written once and built for each instruction set.
//
// The products are exact: int8 numbers are widened to int16, whose products are added in pairs into
// int32. (Without VNNI, x86's own product of bytes, `vpmaddubsw`, saturates, and oneDNN's int8 matrix
// product with it.)
#include "linear.h"
#include "products.h"

namespace octavo {
namespace {

#if OCTAVO_WIDTH >= 8
constexpr int TILE = 6;  // tokens whose sums stay in registers, beside two vectors of weights
#else
constexpr int TILE = 2;
#endif
constexpr int64_t PREFETCH = 2048;  // bytes ahead; without it two cores read a fifth slower
constexpr int PARTS = PANEL / W;  // vectors a panel's row of sums

// sums[token][PANEL] += inputs · weights over a block of inputs, for TOKENS tokens.
template <int TOKENS>
void add_tile(
    const int16_t* inputs, int64_t stride, const int8_t* weights, int64_t n_inputs, int32_t* sums
) {
    IntVec own[TOKENS][PARTS];
    for (int t = 0; t < TOKENS; t++)
        for (int i = 0; i < PARTS; i++) own[t][i] = load(sums + t * PANEL + i * W);
    for (int64_t k = 0; k < n_inputs; k += 2) {
        __builtin_prefetch(weights + k * PANEL + PREFETCH);
        IntVec w[PARTS];
        for (int i = 0; i < PARTS; i++) w[i] = Pairs::words(weights + k * PANEL + i * 2 * W, 2 * W);
        for (int t = 0; t < TOKENS; t++) {
            int32_t pair;
            memcpy(&pair, inputs + t * stride + k, sizeof pair);
            const IntVec x = splat(pair);
            for (int i = 0; i < PARTS; i++) own[t][i] = Pairs::add(own[t][i], w[i], x);
        }
    }
    for (int t = 0; t < TOKENS; t++)
        for (int i = 0; i < PARTS; i++) store(sums + t * PANEL + i * W, own[t][i]);
}

// A tile for each number of tokens, so that the compiler knows it; of about the same size, since a
// small one loads as many weights for fewer sums.
void add_tokens(
    const int16_t* inputs, int64_t stride, const int8_t* weights, int64_t n_inputs, int64_t n_tokens,
    int32_t* sums
) {
    while (n_tokens > 0) {
        const int64_t n_tiles = (n_tokens + TILE - 1) / TILE;
        const int64_t n = (n_tokens + n_tiles - 1) / n_tiles;
        switch (n) {
            case 1: add_tile<1>(inputs, stride, weights, n_inputs, sums); break;
#if OCTAVO_WIDTH >= 8
            case 2: add_tile<2>(inputs, stride, weights, n_inputs, sums); break;
            case 3: add_tile<3>(inputs, stride, weights, n_inputs, sums); break;
            case 4: add_tile<4>(inputs, stride, weights, n_inputs, sums); break;
            case 5: add_tile<5>(inputs, stride, weights, n_inputs, sums); break;
#endif
            default: add_tile<TILE>(inputs, stride, weights, n_inputs, sums);
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
    memset(scratch.sums, 0, piece.n_panels * BLOCK_TOKENS * PANEL * sizeof(int32_t));
    // A weight that is used once is read from end to end, as memory likes it.
    const int64_t most = BLOCK_TOKENS * BLOCK_INPUTS / TILE;
    const int64_t block = piece.n_tokens <= TILE ? least(call.n_inputs, most) : BLOCK_INPUTS;
    for (int64_t k = 0; k < call.n_inputs; k += block) {
        const int64_t n_inputs = least(block, call.n_inputs - k);
        for (int64_t t = 0; t < piece.n_tokens; t++) {
            const int8_t* from = call.q + (piece.first_token + t) * call.n_inputs + k;
            int16_t* to = scratch.inputs + t * block;
            for (int64_t i = 0; i < n_inputs; i++) to[i] = from[i];
        }
        for (int64_t p = 0; p < piece.n_panels; p++) {
            const int64_t panel = piece.first_panel + p;
            add_tokens(
                scratch.inputs, block, call.packed + (panel * call.n_inputs + k) * PANEL, n_inputs,
                piece.n_tokens, scratch.sums + p * BLOCK_TOKENS * PANEL
            );
        }
    }
    for (int64_t p = 0; p < piece.n_panels; p++) {
        const int32_t* sums = scratch.sums + p * BLOCK_TOKENS * PANEL;
        if (call.is_bf16) scale_panel<uint16_t>(call, piece, piece.first_panel + p, sums);
        else scale_panel<float>(call, piece, piece.first_panel + p, sums);
    }
}

}  // namespace
}  // namespace octavo
