// One piece of a W8A8 linear, written once and built for each instruction set.
//
// The products are exact. With VNNI (AVX-512's or AVX's) they are of bytes, in fours: weights plus 128, which are unsigned,
// by inputs. Without it int8 numbers are widened to int16, whose products are added in pairs into int32.
// (x86's older product of bytes, `vpmaddubsw`, saturates, and oneDNN's int8 matrix product with it.
// Inputs' magnitudes, times weights that are given the inputs' signs, would not; but their pairs need a
// second multiplication to be summed, and it took a fifth longer for many tokens.)
#include "linear.h"
#include "products.h"

namespace octavo {
namespace {

typedef OCTAVO_INTEGERS Dot;

constexpr int PARTS = PANEL / W;                         // vectors a panel's row of sums
constexpr int TILE = PARTS <= 2 ? IN_REGISTERS / 2 : IN_REGISTERS / 6;  // tokens of a tile, at most
constexpr int64_t SUMS = BLOCK_TOKENS * PANEL;           // of a panel
constexpr int64_t BLOCK_WORDS = BLOCK_INPUTS / Dot::N;   // of a token
constexpr int64_t WORD_BYTES = PANEL * Dot::N;           // of a panel
constexpr int64_t LINE_WORDS = 64 / WORD_BYTES;
constexpr int64_t PREFETCH = 2048;      // bytes ahead of a panel,
constexpr int64_t PREFETCH_SIDE = 512;  // and of each of several that are read but once
// From one token's block of inputs to the next, in words: of many tokens, and of one tile's, which have
// all of the room. Tiles know it when they are compiled, or each row's address would take a register.
constexpr int64_t BLOCK_STRIDE = BLOCK_WORDS + APART, TILE_STRIDE = BLOCK_TOKENS * BLOCK_STRIDE / TILE;

// sums[panel][token][PANEL] += inputs · weights over a block of words, for TOKENS tokens and PANELS
// panels, `apart` bytes from one another.
//
// A weight that is used once is read as fast as memory gives it, which is half as fast again for four
// panels side by side as for one (26 and 39 GB/s on two cores of an AMD EPYC; 42 if nothing else is
// done): a processor looks ahead in each run of memory by itself.
//
// Not inlined: in a caller's loops GCC 12 keeps sums in memory.
template <int TOKENS, int PANELS, int64_t STRIDE>
__attribute__((noinline)) void add_tile(
    const int32_t* inputs, const int8_t* weights, int64_t apart, int64_t n_words, int64_t ahead,
    int32_t* sums
) {
    constexpr bool IS_SIDE = PANELS > 1 && STRIDE == TILE_STRIDE;
    const int64_t fetched = ahead ? ahead : IS_SIDE ? PREFETCH_SIDE : PREFETCH;
    IntVec own[PANELS][TOKENS][PARTS];
    for (int p = 0; p < PANELS; p++)
        for (int t = 0; t < TOKENS; t++)
            for (int i = 0; i < PARTS; i++) own[p][t][i] = load(sums + p * SUMS + t * PANEL + i * W);
    const auto add_word = [&](int64_t k) __attribute__((always_inline)) {
        IntVec w[PANELS][PARTS];
        for (int p = 0; p < PANELS; p++)
            for (int i = 0; i < PARTS; i++)
                w[p][i] = Dot::packed_words(weights + p * apart + k * WORD_BYTES + i * W * Dot::N);
        for (int t = 0; t < TOKENS; t++) {
            const IntVec x = splat(inputs[t * STRIDE + k]);
            for (int p = 0; p < PANELS; p++)
                for (int i = 0; i < PARTS; i++) own[p][t][i] = Dot::add(own[p][t][i], w[p][i], x);
        }
    };
    int64_t k = 0;
    for (; PANELS > 1 && k + LINE_WORDS <= n_words; k += LINE_WORDS) {  // a line of each panel
        for (int p = 0; p < PANELS; p++)
            fetch_line(weights + p * apart + k * WORD_BYTES + fetched);
        for (int64_t i = 0; i < LINE_WORDS; i++) add_word(k + i);
    }
    for (; k < n_words; k++) {
        fetch_line(weights + k * WORD_BYTES + fetched);
        add_word(k);
    }
    for (int p = 0; p < PANELS; p++)
        for (int t = 0; t < TOKENS; t++)
            for (int i = 0; i < PARTS; i++) store(sums + p * SUMS + t * PANEL + i * W, own[p][t][i]);
}

// All panels of a piece, for TOKENS tokens; as many side by side as there are registers for. What is
// fetched is `ahead` bytes of each panel away, or if that is 0 as near as is good.
template <int TOKENS, int64_t STRIDE>
void add_panels(
    const int32_t* inputs, const int8_t* weights, int64_t apart, int64_t n_panels, int64_t n_words,
    int64_t ahead, int32_t* sums
) {
    constexpr int MOST = IN_REGISTERS / PARTS / TOKENS;
    constexpr int SIDE = PARTS > 2 ? 1 : MOST < 4 ? MOST : 4;
    int64_t p = 0;
    for (; p + SIDE <= n_panels; p += SIDE)
        add_tile<TOKENS, SIDE, STRIDE>(
            inputs, weights + p * apart, apart, n_words, ahead, sums + p * SUMS
        );
    for (; p < n_panels; p++)
        add_tile<TOKENS, 1, STRIDE>(
            inputs, weights + p * apart, apart, n_words, ahead, sums + p * SUMS
        );
}

// A tile for each number of tokens, so that the compiler knows it; of about the same size, since a
// small one loads as many weights for fewer sums.
template <int64_t STRIDE>
void add_tokens(
    const int32_t* inputs, const int8_t* weights, int64_t apart, int64_t n_panels, int64_t n_words,
    int64_t n_tokens, int32_t* sums
) {
    // Of tokens that are few, though in several tiles, the first waits for memory and the others do not:
    // they have the next block of weights fetched.
    const bool is_few = n_tokens <= 4 * TILE;
    int64_t ahead = 0;
    while (n_tokens > 0) {
        const int64_t n_tiles = (n_tokens + TILE - 1) / TILE;
        const int64_t n = (n_tokens + n_tiles - 1) / n_tiles;
        with_number<TILE>(n, [&](auto tokens) {
            add_panels<tokens, STRIDE>(inputs, weights, apart, n_panels, n_words, ahead, sums);
        });
        if (is_few) ahead = n_words * WORD_BYTES;
        inputs += n * STRIDE;
        sums += n * PANEL;
        n_tokens -= n;
    }
}

// Outputs of a piece from its sums, a panel's `apart` after the one before: a token's side by side, so that
// memory is written in whole lines.
template <typename T>
void scale_sums(const W8A8Call& call, const W8A8Piece& piece, const int32_t* sums, int64_t apart) {
    const int64_t first = piece.first_panel * PANEL;
    const int64_t n = least(piece.n_panels * PANEL, call.n_outputs - first), whole = n / PANEL * PANEL;
    float factors[BLOCK_PANELS * PANEL] = {};
    memcpy(factors, call.weight_scale + first, n * sizeof(float));
    for (int64_t t = 0; t < piece.n_tokens; t++) {
        const int64_t token = piece.first_token + t;
        const Vec scale = splat(call.scale[token]);
        T* const out = (T*)call.out + token * call.n_outputs + first;
        const auto put = [&](int64_t i, T* to) __attribute__((always_inline)) {
            const IntVec own = load(sums + i / PANEL * apart + t * PANEL + i % PANEL);
            store(to, __builtin_convertvector(own, Vec) * scale * load(factors + i));
        };
        for (int64_t i = 0; i < whole; i += W) put(i, out + i);
        if (whole == n) continue;
        T rest[PANEL];
        for (int64_t i = 0; i < PANEL; i += W) put(whole + i, rest + i);
        memcpy(out + whole, rest, (n - whole) * sizeof(T));
    }
}

void run_w8a8(const W8A8Call& call, const W8A8Piece& piece, W8A8Scratch& scratch) {
    const int64_t K = call.n_inputs, n_words = K / Dot::N, apart = K * PANEL;
    const int8_t* const q = call.q + piece.first_token * K;
    for (int64_t t = 0; t < piece.n_tokens; t++) {
        const IntVec begin = splat(Dot::begin(q + t * K, K));
        for (int64_t p = 0; p < piece.n_panels; p++)
            for (int i = 0; i < PARTS; i++) store(scratch.sums + p * SUMS + t * PANEL + i * W, begin);
    }
    // A weight that is used once is read from end to end; one that is used often, in blocks that stay
    // in the first-level cache, or with wide tiles, which wait for less, in the second-level one.
    const bool is_used_once = piece.n_tokens <= TILE;
    const int64_t block = is_used_once ? TILE_STRIDE : BLOCK_WORDS;
    const int64_t stride = is_used_once ? TILE_STRIDE : BLOCK_STRIDE;
    const auto add = is_used_once ? add_tokens<TILE_STRIDE> : add_tokens<BLOCK_STRIDE>;
    const int64_t n_panels = is_used_once || PARTS == 1 ? piece.n_panels : 1;  // at a time
    for (int64_t word = 0; word < n_words; word += block) {
        const int64_t n = least(block, n_words - word);
        for (int64_t t = 0; t < piece.n_tokens; t++) {
            const int8_t* from = q + t * K + word * Dot::N;
            auto* to = (Dot::Input*)(scratch.inputs + t * stride);
            for (int64_t i = 0; i < n * Dot::N; i++) to[i] = Dot::Input(from[i]);
        }
        for (int64_t p = 0; p < piece.n_panels; p += n_panels)
            add(scratch.inputs,
                call.packed + (piece.first_panel + p) * apart + word * WORD_BYTES, apart, n_panels, n,
                piece.n_tokens, scratch.sums + p * SUMS);
    }
    if (call.is_bf16) scale_sums<uint16_t>(call, piece, scratch.sums, SUMS);
    else scale_sums<float>(call, piece, scratch.sums, SUMS);
}

void pack_w8(
    const int8_t* weight, int64_t n_outputs, int64_t n_inputs, int64_t panel, int8_t* packed
) {
    for (int64_t i = 0; i < PANEL; i++) {
        const int64_t output = panel * PANEL + i;
        const int8_t* row = weight + output * n_inputs;
        int8_t* to = packed + i * Dot::N;
        for (int64_t k = 0; k < n_inputs; k += Dot::N, to += WORD_BYTES)
            for (int j = 0; j < Dot::N; j++) to[j] = output < n_outputs ? Dot::packed(row[k + j]) : 0;
    }
}

}  // namespace
}  // namespace octavo
