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
constexpr int TILE_ONCE = PARTS == 1 ? 16 : TILE, TILES_ONCE = PARTS == 1 ? 2 : 1;
static_assert(TILES_ONCE * TILE_ONCE <= W8A8Scratch::MOST_ONCE && TILES_ONCE <= 2);
static_assert(W8A8Scratch::MOST_ONCE <= BLOCK_TOKENS);  // of a piece, which then has all tokens of a call
constexpr int64_t SUMS = BLOCK_TOKENS * PANEL;           // of a panel
// Of a panel's words, so many stay in the first-level cache, beside a tile's: 512 inputs or 1,024.
constexpr int64_t BLOCK_WORDS = (PARTS == 1 ? 512 : 1024) / Dot::N;
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

    // += a word of each panel, `apart` bytes from one another, · one of each token.
    OCTAVO_INLINE void add(const int8_t* weights, int64_t apart, const int32_t* inputs) {
        IntVec w[PANELS][PARTS];
        for (int p = 0; p < PANELS; p++)
            for (int i = 0; i < PARTS; i++) w[p][i] = Dot::packed_words(weights + p * apart + i * W * Dot::N);
        repeat<TOKENS>(OCTAVO_EACH(t) {
            if constexpr (PANELS * PARTS == 1) {
                own[0][t][0] = add_repeated(own[0][t][0], w[0][0], inputs + t);
                return;
            }
            const IntVec x = splat(inputs[t]);
            for (int p = 0; p < PANELS; p++)
                for (int i = 0; i < PARTS; i++) own[p][t][i] = Dot::add(own[p][t][i], w[p][i], x);
        });
    }

    OCTAVO_INLINE void begin(const int32_t* begins, int64_t apart) {
        repeat<TOKENS>(OCTAVO_EACH(t) {
            for (int p = 0; p < PANELS; p++)
                for (int i = 0; i < PARTS; i++) own[p][t][i] = splat(begins[t * apart]);
        });
    }

    OCTAVO_INLINE void take(const int32_t* sums) {
        repeat<TOKENS>(OCTAVO_EACH(t) {
            for (int p = 0; p < PANELS; p++)
                for (int i = 0; i < PARTS; i++) own[p][t][i] = load(sums + p * SUMS + t * PANEL + i * W);
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
    tile.begin(begins, 1);
    int64_t k = 0;
    for (; k + WORDS <= n_words; k += WORDS, ahead += FETCHED * LINE_BYTES) {
        for (int p = 0; p < PANELS; p++)
            for (int64_t i = 0; i < FETCHED; i++) {
                const int8_t* const line = ahead + p * apart + i * LINE_BYTES;
                TILES == 1 ? fetch_line(line) : fetch_line_early(line);
            }
        for (int64_t i = 0; i < WORDS; i++)
            tile.add(weights + (k + i) * WORD_BYTES, apart, inputs + (k + i) * TOKENS);
    }
    for (; k < n_words; k++) tile.add(weights + k * WORD_BYTES, apart, inputs + k * TOKENS);
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

// One panel for one of two tiles. The first alone would wait for memory, and leave it idle while the other is
// computed: so each has half of the next panel fetched.
void add_panel_once(
    const int32_t* inputs, const int32_t* begins, const int8_t* weights, int64_t n_words, int64_t tile,
    int64_t n_tokens, int32_t* sums
) {
    const int64_t n_bytes = n_words * WORD_BYTES, half = n_bytes / 2 / LINE_BYTES * LINE_BYTES;
    const int8_t* const ahead = weights + n_bytes + tile * half;
    with_number<TILE_ONCE>(n_tokens, [&](auto tokens) {
        add_once<tokens, 1, 2>(inputs, begins, weights, n_bytes, n_words, ahead, sums);
    });
}

// A tile of many tokens, and a block of words of some panels.
struct TileBlock {
    const int32_t* inputs;  // [words][tokens]
    const int32_t* begins;  // [tokens, PANEL]; null but for a panel's first block
    const int8_t* weights;
    int64_t apart, n_panels;  // from a panel to the next one in bytes, and how many they are
    int64_t n_words;
    int32_t* sums;  // [panel][token][PANEL]
    // What is fetched meanwhile: of each panel what is so many bytes ahead; and what the next tile is given, or null.
    int64_t weights_ahead;
    const int8_t* next_inputs;
};

// The sums of the panels first…first+PANELS-1 grow by inputs · weights, or begin so. Not inlined, as above.
template <int TOKENS, int PANELS>
__attribute__((noinline)) void add_tile(const TileBlock& block, int64_t first) {
    const int8_t* const weights = block.weights + first * block.apart;
    const int64_t apart = block.apart, n_words = block.n_words, ahead = block.weights_ahead;
    const int32_t* const inputs = block.inputs;
    TileSums<TOKENS, PANELS> tile;
    block.begins ? tile.begin(block.begins, PANEL) : tile.take(block.sums + first * SUMS);
    int64_t k = 0;
    for (; PANELS > 1 && k + LINE_WORDS <= n_words; k += LINE_WORDS) {  // a line of each panel
        for (int p = 0; p < PANELS; p++) fetch_line_early(weights + p * apart + k * WORD_BYTES + ahead);
        for (int64_t i = 0; i < LINE_WORDS; i++)
            tile.add(weights + (k + i) * WORD_BYTES, apart, inputs + (k + i) * TOKENS);
    }
    for (; k < n_words; k++) {
        fetch_line_early(weights + k * WORD_BYTES + ahead);
        tile.add(weights + k * WORD_BYTES, apart, inputs + k * TOKENS);
    }
    tile.put(block.sums + first * SUMS);
}

// The same of all panels, as many side by side as there are registers for; each time a share of the next tile's
// inputs is fetched.
template <int TOKENS>
void add_panels(const TileBlock& block) {
    constexpr int MOST = IN_REGISTERS / PARTS / TOKENS, SIDE = PARTS > 2 ? 1 : MOST < 4 ? MOST : 4;
    const int64_t n_bytes = block.n_words * TOKENS * int64_t(sizeof(int32_t));
    const int64_t share = n_bytes * SIDE / block.n_panels;
    for (int64_t p = 0; p < block.n_panels;) {
        for (int64_t i = 0; block.next_inputs && i < share; i += LINE_BYTES)
            fetch_line_early(block.next_inputs + p / SIDE * share + i);
        const auto add = [&](auto side) {
            add_tile<TOKENS, side>(block, p);
            p += side;
        };
        if (p + SIDE <= block.n_panels) add(Number<SIDE>());
        else add(Number<1>());
    }
}

// n tokens' inputs, no more than a vector has words, as [words][n].
void lay_out_tokens(const W8A8Call& call, int64_t first, int64_t n, int32_t* to) {
    static_assert(TILE <= W && TILE_ONCE <= W);
    const int64_t K = call.n_inputs, n_words = K / Dot::N;
    const int8_t* const q = call.q + first * K;
    int64_t word = 0;
    for (; word + W <= n_words; word += W) {
        IntVec own[W] = {};
        for (int64_t t = 0; t < n; t++) own[t] = Dot::input_words(q + t * K + word * Dot::N);
        transpose(own);
        for (int64_t i = 0; i < W; i++) {
            int32_t* const at = to + (word + i) * n;
            if (at + W <= to + n_words * n) store(at, own[i]);  // the next word's will be in place of the rest
            else memcpy(at, own + i, n * sizeof *at);
        }
    }
    auto* inputs = (Dot::Input*)(to + word * n);
    for (; word < n_words; word++)
        for (int64_t t = 0; t < n; t++)
            for (int64_t i = 0; i < Dot::N; i++) *inputs++ = Dot::Input(q[t * K + word * Dot::N + i]);
}

void lay_out_tile(const W8A8Call& call, int64_t first, int8_t* to, int32_t* begins) {
    const int64_t n = least(TILE, call.n_tokens - first);
    lay_out_tokens(call, first, n, (int32_t*)to);
    for (int64_t t = 0; t < n; t++) begins[t * PANEL] = Dot::begin(call.q + (first + t) * call.n_inputs, call.n_inputs);
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
        for (int64_t tile = 0; tile < tiles.n; tile++)
            lay_out_tokens(call, tiles.first(tile), tiles.size(tile), scratch.inputs + tiles.first(tile) * n_words);
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
    for (int64_t p = 0; p < piece.n_panels; p++)
        for (int64_t tile = 0; tile < tiles.n; tile++) {
            const int64_t t = tiles.first(tile);
            add_panel_once(
                scratch.inputs + t * n_words, scratch.begins_once + t, weights + p * apart, n_words, tile,
                tiles.size(tile), scratch.sums + p * SUMS + t * PANEL
            );
        }
}

// Weights that are used often, in blocks that stay in the first-level cache, or with wide tiles, which wait
// for less, in the second-level one; inputs were laid out by `lay_out_tile`.
void multiply_blocks(const W8A8Call& call, const W8A8Piece& piece, W8A8Scratch& scratch) {
    const int64_t K = call.n_inputs, n_words = K / Dot::N, apart = K * PANEL;
    const auto inputs_of = [&](int64_t token, int64_t word) {
        const auto* const tile = (const Dot::Input*)scratch.laid_out + (piece.first_token + token) * K;
        return (const int32_t*)(tile + word * Dot::N * least(TILE, piece.n_tokens - token));
    };
    const bool is_last_row = piece.first_token + piece.n_tokens == call.n_tokens;
    TileBlock block;
    block.apart = apart;
    block.n_panels = PARTS == 1 ? piece.n_panels : 1;
    for (int64_t word = 0; word < n_words; word += block.n_words) {
        block.n_words = least(BLOCK_WORDS, n_words - word);
        const int64_t next = word + block.n_words;
        // From here to the next block of weights, which may be the same panels' first for the next tokens.
        const int64_t ahead = next < n_words ? block.n_words * WORD_BYTES
                                             : (is_last_row ? block.n_panels * apart : 0) - word * WORD_BYTES;
        for (int64_t p = 0; p < piece.n_panels; p += block.n_panels) {
            block.weights = call.packed + (piece.first_panel + p) * apart + word * WORD_BYTES;
            for (int64_t t = 0; t < piece.n_tokens; t += TILE) {
                block.inputs = inputs_of(t, word);
                block.begins = word ? nullptr : scratch.begins + (piece.first_token + t) * PANEL;
                block.sums = scratch.sums + p * SUMS + t * PANEL;
                // The first tile waits for its weights. The others do not: the second has the next ones fetched.
                block.weights_ahead = t == TILE ? ahead : PREFETCH;
                const int32_t* const inputs = t + TILE < piece.n_tokens ? inputs_of(t + TILE, word) : inputs_of(0, next);
                block.next_inputs = p ? nullptr : (const int8_t*)inputs;
                with_number<TILE>(least(TILE, piece.n_tokens - t), [&](auto tokens) { add_panels<tokens>(block); });
            }
        }
    }
}

bool is_once(const W8A8Call& call) {
    return call.n_tokens <= TILES_ONCE * TILE_ONCE && call.n_tokens * (call.n_inputs / Dot::N) <= W8A8Scratch::WORDS;
}

const LayOut tiles_layout = {lay_out_tile, TILE, sizeof(Dot::Input), TILE, BLOCK_TOKENS};

const LayOut* find_layout(const W8A8Call& call) { return is_once(call) ? nullptr : &tiles_layout; }

void run_w8a8(const W8A8Call& call, const W8A8Piece& piece, W8A8Scratch& scratch) {
    // By the call: its last piece may have few tokens, for whom other pieces have read the weights.
    (is_once(call) ? multiply_once : multiply_blocks)(call, piece, scratch);
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
