// A piece of a W8A8 linear by AMX: of weights as `Quads` has them packed, for which a panel's words lie as a
// register wants them, and of inputs that are laid out once for all pieces. Fewer tokens than a few are left
// to vectors, which then wait for memory as well.
#include "amx.h"
#include "w8a8_kernel.h"

namespace octavo {
namespace {

constexpr int64_t FEW_TOKENS = 4;
constexpr int64_t TILE_INPUTS = 4 * amx::WORDS;
// Of a piece's tokens, at most, a block of inputs stays in the second-level cache, with the sums of its panels;
// two panels' block of weights stays in the first-level one. Twice as many of either, or half, were slower.
constexpr int64_t TOKENS_AMX = 256;
constexpr int64_t INPUTS_AMX = 512;
constexpr int64_t SUMS_AMX = TOKENS_AMX * PANEL;

bool multiplies_tiles(const W8A8Call& call) {
    return call.n_tokens >= FEW_TOKENS && call.n_inputs % TILE_INPUTS == 0;
}

// 16 tokens from the first one on: [tiles of inputs][16 tokens][bytes]; and what their sums of a panel begin
// with.
void lay_out(const W8A8Call& call, int64_t first, int8_t* to, int32_t* begins) {
    const int64_t K = call.n_inputs;
    for (int64_t t = 0; t < amx::ROWS; t++) {
        const int8_t* const q = call.q + (first + t) * K;
        const bool is_token = first + t < call.n_tokens;
        store(begins + t * PANEL, splat(is_token ? Dot::begin(q, K) : 0));
        for (int64_t k = 0; k < K; k += TILE_INPUTS) {
            const IntVec words = is_token ? load((const int32_t*)(q + k)) : IntVec{};
            store((int32_t*)(to + k * amx::ROWS + t * TILE_INPUTS), words);
        }
    }
}

// sums[panel][token][PANEL] grow by inputs · weights over `n_tiles` tiles of inputs, for ROWS tiles of tokens,
// and PANELS panels, each `apart` bytes after the one before; or begin as `begins`, if that is given.
// Meanwhile `n_lines` lines a tile of each panel are fetched, from `ahead` bytes away on.
template <int ROWS, int PANELS>
__attribute__((noinline)) void add_amx(
    const int8_t* inputs, int64_t inputs_apart, const int8_t* weights, int64_t apart, int64_t n_tiles,
    int64_t ahead, int64_t n_lines, const int32_t* begins, int32_t* sums
) {
    constexpr int A = ROWS * PANELS, B = A + ROWS;  // registers: the sums', then inputs', then weights'
    static_assert(B < 8 && PANEL == amx::WORDS, "");
    repeat<ROWS * PANELS>(OCTAVO_EACH(i) {
        const int64_t own = i / PANELS * amx::ROWS * PANEL;
        amx::load<i>(begins ? begins + own : sums + i % PANELS * SUMS_AMX + own, PANEL);
    });
    for (int64_t k = 0; k < n_tiles; k++) {
        repeat<ROWS>(OCTAVO_EACH(r) {
            amx::load<A + r>(inputs + r * inputs_apart + k * amx::BYTES, amx::WORDS);
        });
        repeat<PANELS>(OCTAVO_EACH(p) {
            constexpr int OWN = B + p % (8 - B);
            const int8_t* const panel = weights + p * apart;
            for (int64_t i = 0; i < n_lines; i++) fetch_line(panel + ahead + (k * n_lines + i) * 64);
            amx::load<OWN>(panel + k * amx::BYTES, amx::WORDS);
            repeat<ROWS>(OCTAVO_EACH(r) { amx::add_signed_unsigned<r * PANELS + p, A + r, OWN>(); });
        });
    }
    repeat<ROWS * PANELS>(OCTAVO_EACH(i) {
        amx::store<i>(sums + i % PANELS * SUMS_AMX + i / PANELS * amx::ROWS * PANEL, PANEL);
    });
}

void run_w8a8_amx(const W8A8Call& call, const W8A8Piece& piece, W8A8Scratch& scratch) {
    if (!multiplies_tiles(call)) return run_w8a8(call, piece, scratch);
    const amx::Registers registers;
    const int64_t K = call.n_inputs, apart = K * PANEL, tile = K * amx::ROWS;
    const int64_t n_tiles = (piece.n_tokens + amx::ROWS - 1) / amx::ROWS;
    // A weight that is used once is read from end to end.
    const bool is_used_once = n_tiles <= 2;
    const int64_t block = is_used_once ? K : INPUTS_AMX, side = n_tiles == 1 ? 4 : 2;
    // One that is used often is fetched a few lines at a time, while the panels before it are multiplied.
    const int64_t pairs = (n_tiles + 1) / 2, n_lines = is_used_once ? 16 : (16 + pairs - 1) / pairs;
    for (int64_t k = 0; k < K; k += block)
        for (int64_t p = 0; p < piece.n_panels; p += side) {
            const int64_t n = least(block, K - k) / TILE_INPUTS, panels = least(side, piece.n_panels - p);
            const int8_t* const weights = call.packed + (piece.first_panel + p) * apart + k * PANEL;
            const int8_t* const inputs = scratch.laid_out + piece.first_token * K + k * amx::ROWS;
            int32_t* const sums = scratch.sums + p * SUMS_AMX;
            for (int64_t r = 0; r < n_tiles; r += 2) {
                const auto add = [&](auto rows, auto n_side) {
                    add_amx<rows, n_side>(
                        inputs + r * tile, tile, weights, apart, n,
                        is_used_once ? PREFETCH : side * apart + r / 2 * n * n_lines * 64, n_lines,
                        k ? nullptr : scratch.begins + (piece.first_token + r * amx::ROWS) * PANEL,
                        sums + r * amx::ROWS * PANEL
                    );
                };
                if (n_tiles - r > 1) with_number<2>(panels, [&](auto i) { add(Number<2>(), i); });
                else with_number<4>(panels, [&](auto i) { add(Number<1>(), i); });
            }
        }
    if (call.is_bf16) scale_sums<uint16_t>(call, piece, scratch.sums, SUMS_AMX);
    else scale_sums<float>(call, piece, scratch.sums, SUMS_AMX);
}

const LayOut layout_amx = {lay_out, amx::ROWS, 1, 2 * amx::ROWS, TOKENS_AMX};

const LayOut* find_layout_amx(const W8A8Call& call) { return multiplies_tiles(call) ? &layout_amx : find_layout(call); }

}  // namespace
}  // namespace octavo
