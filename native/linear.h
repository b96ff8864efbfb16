// Linears on the CPU: calls, pieces of work, and who computes them.
#pragma once

#include <cstdint>

namespace octavo {

// A packed int8 weight is panels of PANEL outputs; a panel holds, for each word of neighbouring inputs,
// the PANEL words. A word is what an instruction set multiplies at a time, see native/products.h: two
// numbers, or four to which 128 was added. Missing outputs are zeros.
constexpr int64_t PANEL = 16;

// One call of `octavo.kernels.linear_w8a8`; shapes and meaning are its.
struct W8A8Call {
    const int8_t* q;            // [T, K]
    const float* scale;         // [T]
    const int8_t* packed;       // [ceil(N / PANEL), words of K, PANEL], for the same instructions
    const float* weight_scale;  // [N]
    void* out;                  // [T, N] fp32 or bf16
    int64_t n_tokens;
    int64_t n_outputs;
    int64_t n_inputs;  // a multiple of 4
    int64_t n_threads;
    int64_t is_bf16;  // the outputs; else fp32

    int64_t n_panels() const { return (n_outputs + PANEL - 1) / PANEL; }
    int64_t work() const { return n_tokens * n_outputs * n_inputs; }  // multiply-adds
};

// Several calls with the same inputs and number of threads: they are shared out as one.
struct W8A8Calls {
    const W8A8Call* calls;
    int64_t n_calls;
    int8_t* laid_out;  // for the inputs: octavo_w8a8_laid_out_bytes, beginning with a line of the cache
};

constexpr int64_t BLOCK_TOKENS = 144;  // of a piece: so often is a weight used that was read
constexpr int64_t BLOCK_PANELS = 16;   // of a piece

// A piece of work: the outputs first_panel * PANEL… of the tokens first_token….
struct W8A8Piece {
    int64_t first_token, n_tokens;
    int64_t first_panel, n_panels;
};

// Tokens in tiles of at most `most`, and of about the same size: a small one reads as many weights for fewer sums.
struct Tiles {
    const int64_t n_tokens, n;

    Tiles(int64_t n_tokens, int64_t most) : n_tokens(n_tokens), n((n_tokens + most - 1) / most) {}
    int64_t first(int64_t tile) const { return tile * n_tokens / n; }
    int64_t size(int64_t tile) const { return first(tile + 1) - first(tile); }
};

// How inputs are laid out once for all pieces, some tokens at a time.
struct LayOut {
    // The tokens first… into `to` [n_tokens · n_inputs], and what their sums begin with [n_tokens, PANEL].
    void (*run)(const W8A8Call& call, int64_t first, int8_t* to, int32_t* begins);
    int64_t n_tokens;      // at a time; there is room for them at the end too
    int64_t input_bytes;   // of one
    int64_t tile_tokens;   // pieces of many tokens are a multiple of it,
    int64_t block_tokens;  // and no more than these
};

// What a thread works in.
struct W8A8Scratch {
    static constexpr int64_t WORDS = 48 << 10, MOST_ONCE = 32;

    int32_t* sums;            // [BLOCK_PANELS, block of tokens, PANEL]
    const int8_t* laid_out;   // what a LayOut made of all inputs,
    const int32_t* begins;    // and what sums begin with
    // Where weights are read from end to end: whether all tokens' inputs are here, for all pieces.
    bool has_inputs = false;
    int32_t inputs[WORDS], begins_once[MOST_ONCE];
};

// One call of `octavo.kernels.linear` with bf16 weights and few tokens.
struct BF16Call {
    const uint16_t* x;       // [T, K]
    const uint16_t* weight;  // [N, K]
    uint16_t* out;           // [T, N]
    int64_t n_tokens;
    int64_t n_outputs;
    int64_t n_inputs;  // a multiple of INPUT_MULTIPLE
    int64_t n_threads;

    int64_t work() const { return n_tokens * n_outputs * n_inputs; }  // multiply-adds
};

constexpr int64_t INPUT_MULTIPLE = 16;
constexpr int64_t FEWEST_TOKENS = 8;  // for whose inputs kernels are given room
constexpr int64_t LINE_FLOATS = 16;   // that a vector of sums may reach beyond them
constexpr int64_t BLOCK_OUTPUTS = 48;  // of a bf16 product's piece: whole groups of rows, and of a matrix's

// What each instruction set implements; AVX-VNNI and DOTPROD the first two, see `without_bytes`.
struct LinearKernels {
    // One panel of a weight [n_outputs, n_inputs].
    void (*pack)(
        const int8_t* weight, int64_t n_outputs, int64_t n_inputs, int64_t panel, int8_t* packed
    );
    void (*w8a8)(const W8A8Call& call, const W8A8Piece& piece, W8A8Scratch& scratch);
    // All tokens' inputs as `bf16` reads them: widened, or where there are products of bf16 as they are.
    void (*take_inputs)(const BF16Call& call, float* inputs);
    // The outputs first…stop-1 of all tokens, by BLOCK_OUTPUTS · max(n_tokens, LINE_FLOATS) + LINE_FLOATS floats.
    void (*bf16)(const BF16Call& call, const float* inputs, int64_t first, int64_t stop, float* sums);
    // How `w8a8` wants a call's inputs laid out; null for a call of few tokens, which are one piece high.
    const LayOut* (*find_layout)(const W8A8Call& call);
};

extern const LinearKernels linears_portable;
#if defined(__x86_64__)
extern const LinearKernels linears_avx2, linears_avx_vnni, linears_avx512, linears_amx;
extern const LinearKernels linears_avx_vnni_emulated, linears_avx512_emulated, linears_amx_emulated;
#elif defined(__aarch64__)
extern const LinearKernels linears_dotprod;
#endif

}  // namespace octavo
