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
// Where weights are read from end to end: tokens of a tile, and tiles. With more, blocks are faster.
constexpr int TILE_ONCE = PARTS == 1 ? 16 : TILE, TILES_ONCE = PARTS == 1 ? 3 : 1;
static_assert(TILES_ONCE * TILE_ONCE <= W8A8Scratch::MOST_ONCE && TILES_ONCE <= 3);
static_assert(W8A8Scratch::MOST_ONCE <= BLOCK_TOKENS);  // of a piece, which then has all tokens of a call
constexpr int64_t SUMS = BLOCK_TOKENS * PANEL;           // of a panel
constexpr int64_t BLOCK_WORDS = BLOCK_INPUTS / Dot::N;   // of a token
// From one token's block of inputs to the next, in words. Tiles know it when they are compiled, or each
// row's address would take a register.
constexpr int64_t BLOCK_STRIDE = BLOCK_WORDS + APART;
constexpr int64_t WORD_BYTES = PANEL * Dot::N;           // of a panel
constexpr int64_t LINE_BYTES = 64, LINE_WORDS = LINE_BYTES / WORD_BYTES;
constexpr int64_t PREFETCH = 2048;       // bytes ahead of a panel; where weights are read but once,
constexpr int64_t PREFETCH_ONCE = 8192;  // of all panels that are side by side,
constexpr int64_t LINES_ONCE = 8;        // and their lines that are asked for together

// sum + a · the same word in every lane: one instruction, where panels do not share the word.
OCTAVO_STEP IntVec add_repeated(IntVec sum, IntVec a, const int32_t* word) {
#if defined(OCTAVO_AVX512)
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(a), "m"(*word));
    return sum;
#else
    return Dot::add(sum, a, splat(*word));
#endif
}

// Sums of TOKENS tokens and PANELS panels, in registers.
template <int TOKENS, int PANELS>
struct TileSums {
    IntVec own[PANELS][TOKENS][PARTS];

    // += a word of each panel, `apart` bytes from one another, · one of each token, `stride` words from one another.
    OCTAVO_INLINE void add(const int8_t* weights, int64_t apart, const int32_t* inputs, int64_t stride) {
        IntVec w[PANELS][PARTS];
        for (int p = 0; p < PANELS; p++)
            for (int i = 0; i < PARTS; i++) w[p][i] = Dot::packed_words(weights + p * apart + i * W * Dot::N);
        repeat<TOKENS>(OCTAVO_EACH(t) {
            if constexpr (PANELS * PARTS == 1) {
                own[0][t][0] = add_repeated(own[0][t][0], w[0][0], inputs + t * stride);
                return;
            }
            const IntVec x = splat(inputs[t * stride]);
            for (int p = 0; p < PANELS; p++)
                for (int i = 0; i < PARTS; i++) own[p][t][i] = Dot::add(own[p][t][i], w[p][i], x);
        });
    }

    OCTAVO_INLINE void put(int32_t* sums) const {
        repeat<TOKENS>(OCTAVO_EACH(t) {
            for (int p = 0; p < PANELS; p++)
                for (int i = 0; i < PARTS; i++) store(sums + p * SUMS + t * PANEL + i * W, own[p][t][i]);
        });
    }
};

// sums[panel][token][PANEL] = begins[token] + inputs · weights, for a tile of TOKENS tokens, one of TILES, and
// PANELS panels; `inputs` are [words][TOKENS]. What lies `ahead` is fetched meanwhile: of each panel as many lines
// as are read, or of several tiles a share.
//
// A weight that is used once is read as fast as memory gives it, if several lines of a panel are asked for
// together: a line of each of four panels in turn took 5 to 14 % longer for one token (two cores of an AMD
// EPYC, Zen 5). So asked for, it makes little difference how many panels are side by side. (Else it is half as
// fast again for four as for one: a processor looks ahead in each run of memory by itself.)
//
// Not inlined: in a caller's loops GCC 12 keeps sums in memory.
template <int TOKENS, int PANELS, int TILES>
__attribute__((noinline)) void add_once(
    const int32_t* inputs, const int32_t* begins, const int8_t* weights, int64_t apart, int64_t n_words,
    const int8_t* ahead, int32_t* sums
) {
    constexpr int64_t LINES = LINES_ONCE / PANELS, WORDS = LINES * LINE_WORDS;
    constexpr int64_t FETCHED = (LINES + TILES - 1) / TILES;
    TileSums<TOKENS, PANELS> tile;
    repeat<TOKENS>(OCTAVO_EACH(t) {
        for (int p = 0; p < PANELS; p++)
            for (int i = 0; i < PARTS; i++) tile.own[p][t][i] = splat(begins[t]);
    });
    int64_t k = 0;
    for (; k + WORDS <= n_words; k += WORDS, ahead += FETCHED * LINE_BYTES) {
        for (int p = 0; p < PANELS; p++)
            for (int64_t i = 0; i < FETCHED; i++) {
                const int8_t* const line = ahead + p * apart + i * LINE_BYTES;
                TILES == 1 ? fetch_line(line) : fetch_line_early(line);
            }
        for (int64_t i = 0; i < WORDS; i++)
            tile.add(weights + (k + i) * WORD_BYTES, apart, inputs + (k + i) * TOKENS, 1);
    }
    for (; k < n_words; k++) tile.add(weights + k * WORD_BYTES, apart, inputs + k * TOKENS, 1);
    tile.put(sums);
}

// All panels of a piece for its only tile, two side by side if beside the sums there are registers for their
// weights.
template <int TOKENS>
void add_panels_once(
    const int32_t* inputs, const int32_t* begins, const int8_t* weights, int64_t apart, int64_t n_panels,
    int64_t n_words, int32_t* sums
) {
    constexpr int SIDE = 2 * PARTS * (TOKENS + 1) < REGISTERS ? 2 : 1;
    int64_t p = 0;
    const auto add = [&](auto side) {
        const int8_t* const own = weights + p * apart;
        add_once<TOKENS, side, 1>(inputs, begins, own, apart, n_words, own + PREFETCH_ONCE / side, sums + p * SUMS);
    };
    for (; p + SIDE <= n_panels; p += SIDE) add(Number<SIDE>());
    for (; p < n_panels; p++) add(Number<1>());
}

// One panel for one of several tiles. The first alone would wait for memory, and leave it idle while the others
// are computed: so each has its share of the next panel fetched.
template <int TILES>
void add_panel_once(
    const int32_t* inputs, const int32_t* begins, const int8_t* weights, int64_t n_words, int64_t tile,
    int64_t n_tokens, int32_t* sums
) {
    const int64_t n_bytes = n_words * WORD_BYTES, share = n_bytes / TILES / LINE_BYTES * LINE_BYTES;
    const int8_t* const ahead = weights + n_bytes + tile * share;
    with_number<TILE_ONCE>(n_tokens, [&](auto tokens) {
        add_once<tokens, 1, TILES>(inputs, begins, weights, n_bytes, n_words, ahead, sums);
    });
}

// sums[panel][token][PANEL] += inputs · weights over a block of words, for TOKENS tokens of many and
// PANELS panels, `apart` bytes from one another. Not inlined, as above.
template <int TOKENS, int PANELS>
__attribute__((noinline)) void add_tile(
    const int32_t* inputs, const int8_t* weights, int64_t apart, int64_t n_words, int64_t fetched,
    int32_t* sums
) {
    TileSums<TOKENS, PANELS> tile;
    for (int p = 0; p < PANELS; p++)
        for (int t = 0; t < TOKENS; t++)
            for (int i = 0; i < PARTS; i++) tile.own[p][t][i] = load(sums + p * SUMS + t * PANEL + i * W);
    int64_t k = 0;
    for (; PANELS > 1 && k + LINE_WORDS <= n_words; k += LINE_WORDS) {  // a line of each panel
        for (int p = 0; p < PANELS; p++)
            fetch_line_early(weights + p * apart + k * WORD_BYTES + fetched);
        for (int64_t i = 0; i < LINE_WORDS; i++)
            tile.add(weights + (k + i) * WORD_BYTES, apart, inputs + k + i, BLOCK_STRIDE);
    }
    for (; k < n_words; k++) {
        fetch_line_early(weights + k * WORD_BYTES + fetched);
        tile.add(weights + k * WORD_BYTES, apart, inputs + k, BLOCK_STRIDE);
    }
    tile.put(sums);
}

// All panels of a piece, for TOKENS tokens; as many side by side as there are registers for.
template <int TOKENS>
void add_panels(
    const int32_t* inputs, const int8_t* weights, int64_t apart, int64_t n_panels, int64_t n_words,
    int64_t fetched, int32_t* sums
) {
    constexpr int MOST = IN_REGISTERS / PARTS / TOKENS;
    constexpr int SIDE = PARTS > 2 ? 1 : MOST < 4 ? MOST : 4;
    int64_t p = 0;
    for (; p + SIDE <= n_panels; p += SIDE)
        add_tile<TOKENS, SIDE>(
            inputs, weights + p * apart, apart, n_words, fetched, sums + p * SUMS
        );
    for (; p < n_panels; p++)
        add_tile<TOKENS, 1>(
            inputs, weights + p * apart, apart, n_words, fetched, sums + p * SUMS
        );
}

// All tokens of a piece, a tile for each number of them, so that the compiler knows it.
void add_tokens(
    const int32_t* inputs, const int8_t* weights, int64_t apart, int64_t n_panels, int64_t n_words,
    int64_t n_tokens, int32_t* sums
) {
    // Of tokens that are few, though in several tiles, the first waits for memory and the others do not:
    // they have the next block of weights fetched.
    const bool is_few = n_tokens <= 4 * TILE;
    const Tiles tiles(n_tokens, TILE);
    for (int64_t i = 0; i < tiles.n; i++) {
        const int64_t token = tiles.first(i), fetched = i && is_few ? n_words * WORD_BYTES : PREFETCH;
        with_number<TILE>(tiles.size(i), [&](auto tokens) {
            add_panels<tokens>(
                inputs + token * BLOCK_STRIDE, weights, apart, n_panels, n_words, fetched, sums + token * PANEL
            );
        });
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

// Of so few tokens that a call is one piece high: weights are read from end to end.
void multiply_once(const W8A8Call& call, const W8A8Piece& piece, W8A8Scratch& scratch) {
    const int64_t K = call.n_inputs, n_words = K / Dot::N;
    const Tiles tiles(call.n_tokens, TILE_ONCE);
    if (!scratch.has_inputs) {
        auto* to = (Dot::Input*)scratch.inputs;
        for (int64_t tile = 0; tile < tiles.n; tile++)
            for (int64_t k = 0; k < K; k += Dot::N)
                for (int64_t t = tiles.first(tile); t < tiles.first(tile + 1); t++)
                    for (int64_t i = 0; i < Dot::N; i++) *to++ = Dot::Input(call.q[t * K + k + i]);
        for (int64_t t = 0; t < call.n_tokens; t++) scratch.begins_once[t] = Dot::begin(call.q + t * K, K);
        scratch.has_inputs = true;
    }
    const int64_t apart = K * PANEL;
    const int8_t* const weights = call.packed + piece.first_panel * apart;
    if (tiles.n == 1)
        return with_number<TILE_ONCE>(call.n_tokens, [&](auto tokens) {
            add_panels_once<tokens>(
                scratch.inputs, scratch.begins_once, weights, apart, piece.n_panels, n_words, scratch.sums
            );
        });
    const auto add = tiles.n == 2 ? add_panel_once<2> : add_panel_once<3>;
    for (int64_t p = 0; p < piece.n_panels; p++)
        for (int64_t tile = 0; tile < tiles.n; tile++) {
            const int64_t t = tiles.first(tile);
            add(scratch.inputs + t * n_words, scratch.begins_once + t, weights + p * apart, n_words, tile,
                tiles.size(tile), scratch.sums + p * SUMS + t * PANEL);
        }
}

// Weights that are used often, in blocks that stay in the first-level cache, or with wide tiles, which wait
// for less, in the second-level one.
void multiply_blocks(const W8A8Call& call, const W8A8Piece& piece, W8A8Scratch& scratch) {
    const int64_t K = call.n_inputs, n_words = K / Dot::N, apart = K * PANEL;
    const int8_t* const q = call.q + piece.first_token * K;
    for (int64_t t = 0; t < piece.n_tokens; t++) {
        const IntVec begin = splat(Dot::begin(q + t * K, K));
        for (int64_t p = 0; p < piece.n_panels; p++)
            for (int i = 0; i < PARTS; i++) store(scratch.sums + p * SUMS + t * PANEL + i * W, begin);
    }
    const int64_t n_panels = PARTS == 1 ? piece.n_panels : 1;  // at a time
    for (int64_t word = 0; word < n_words; word += BLOCK_WORDS) {
        const int64_t n = least(BLOCK_WORDS, n_words - word);
        for (int64_t t = 0; t < piece.n_tokens; t++) {
            const int8_t* from = q + t * K + word * Dot::N;
            auto* to = (Dot::Input*)(scratch.inputs + t * BLOCK_STRIDE);
            for (int64_t i = 0; i < n * Dot::N; i++) to[i] = Dot::Input(from[i]);
        }
        for (int64_t p = 0; p < piece.n_panels; p += n_panels)
            add_tokens(
                scratch.inputs, call.packed + (piece.first_panel + p) * apart + word * WORD_BYTES, apart,
                n_panels, n, piece.n_tokens, scratch.sums + p * SUMS
            );
    }
}

void run_w8a8(const W8A8Call& call, const W8A8Piece& piece, W8A8Scratch& scratch) {
    // By the call: its last piece may have few tokens, for whom other pieces have read the weights.
    const int64_t words = call.n_tokens * (call.n_inputs / Dot::N);
    const bool is_once = call.n_tokens <= TILES_ONCE * TILE_ONCE && words <= W8A8Scratch::WORDS;
    (is_once ? multiply_once : multiply_blocks)(call, piece, scratch);
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
