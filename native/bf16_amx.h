// A linear with bf16 weights by AMX: products of 16 outputs' weights, as they lie, by 16 tokens' inputs, which
// are transposed; missing ones are zeros. One token is multiplied so too, which takes 6 % longer than by
// vectors: a token's result is not to depend on its company, so that the order of the additions is one.
#include "amx.h"
#include "bf16_kernel.h"

namespace octavo {
namespace {

constexpr int64_t TILE_DEPTH = 2 * amx::WORDS;  // inputs of a register's row

bool multiplies_tiles(const BF16Call& call) {
    return call.n_inputs % TILE_DEPTH == 0 && call.n_outputs % amx::ROWS == 0;
}

// [tiles of tokens, tiles of inputs][16 words][16 tokens], a word being two inputs.
void take_inputs_amx(const BF16Call& call, float* inputs) {
    if (!multiplies_tiles(call)) return take_inputs(call, inputs);
    const int64_t K = call.n_inputs;
    int32_t* to = (int32_t*)inputs;
    for (int64_t first = 0; first < call.n_tokens; first += amx::ROWS)
        for (int64_t k = 0; k < K; k += TILE_DEPTH, to += amx::ROWS * amx::WORDS) {
            IntVec words[W];
            for (int64_t t = 0; t < W; t++)
                words[t] = first + t < call.n_tokens
                               ? load((const int32_t*)(call.x + (first + t) * K + k)) : IntVec{};
            transpose(words);
            for (int64_t i = 0; i < W; i++) store(to + i * W, words[i]);
        }
}

// 16 outputs from `first` on, for TOKENS tiles of 16 tokens, the first of which is `token`. Weights are not
// fetched ahead: a processor does so for 16 rows by itself, and better.
template <int TOKENS>
__attribute__((noinline)) void dot_amx(
    const BF16Call& call, const int32_t* inputs, int64_t first, int64_t token
) {
    constexpr int A = TOKENS, B = A + 1;  // registers: the sums', then weights', then inputs'
    constexpr int64_t WORDS = amx::ROWS * amx::WORDS;
    const int64_t K = call.n_inputs, n_tiles = K / TILE_DEPTH;
    const uint16_t* const weight = call.weight + first * K;
    repeat<TOKENS>(OCTAVO_EACH(t) { amx::clear<t>(); });
    for (int64_t k = 0; k < n_tiles; k++) {
        amx::load<A>(weight + k * TILE_DEPTH, K / 2);
        repeat<TOKENS>(OCTAVO_EACH(t) {
            const int64_t tile = (token / amx::ROWS + t) * n_tiles + k;
            amx::load<B + t>(inputs + tile * WORDS, amx::WORDS);
            amx::add_halves<t, A, B + t>();
        });
    }
    float sums[TOKENS][WORDS];  // [outputs, tokens]
    repeat<TOKENS>(OCTAVO_EACH(t) { amx::store<t>(sums[t], amx::WORDS); });
    for (int64_t i = 0; i < TOKENS; i++) {
        IntVec own[W];
        for (int64_t r = 0; r < W; r++) own[r] = (IntVec)load(sums[i] + r * W);
        transpose(own);
        const int64_t from = token + i * amx::ROWS, n = least(amx::ROWS, call.n_tokens - from);
        for (int64_t t = 0; t < n; t++) store(call.out + (from + t) * call.n_outputs + first, (Vec)own[t]);
    }
}

void run_bf16_amx(const BF16Call& call, const float* inputs, int64_t first, int64_t stop, float* sums) {
    if (!multiplies_tiles(call)) return run_bf16(call, inputs, first, stop, sums);
    const amx::Registers registers;
    for (; first < stop; first += amx::ROWS)
        for (int64_t token = 0; token < call.n_tokens; token += 2 * amx::ROWS)
            with_number<2>((call.n_tokens - token + amx::ROWS - 1) / amx::ROWS, [&](auto tiles) {
                dot_amx<tiles>(call, (const int32_t*)inputs, first, token);
            });
}

}  // namespace
}  // namespace octavo
