// Linears on the CPU, and what makes their int8 inputs: calls, pieces of work, and who computes them.
#pragma once

#include <cstdint>

namespace octavo {

// A packed int8 weight is panels of PANEL outputs; a panel holds, for each pair of neighbouring
// inputs, the PANEL pairs of numbers. Missing outputs are zeros.
constexpr int64_t PANEL = 16;

// One call of `octavo.kernels.linear_w8a8`; shapes and meaning are its.
struct W8A8Call {
    const int8_t* q;            // [T, K]
    const float* scale;         // [T]
    const int8_t* packed;       // [ceil(N / PANEL), K / 2, PANEL, 2]
    const float* weight_scale;  // [N]
    void* out;                  // [T, N] fp32 or bf16
    int64_t n_tokens;
    int64_t n_outputs;
    int64_t n_inputs;  // even
    int64_t n_threads;
    int64_t is_bf16;  // the outputs; else fp32

    int64_t n_panels() const { return (n_outputs + PANEL - 1) / PANEL; }
};

// Several calls with the same number of threads: they are shared out as one.
struct W8A8Calls {
    const W8A8Call* calls;
    int64_t n_calls;
};

constexpr int64_t BLOCK_TOKENS = 96;    // of a piece: so often is a weight used that was read
constexpr int64_t BLOCK_PANELS = 8;     // of a piece: so often is an input used that was widened
constexpr int64_t BLOCK_INPUTS = 1024;  // a panel's block, 16 KiB, stays in the first-level cache

// A piece of work: the outputs first_panel * PANEL… of the tokens first_token….
struct W8A8Piece {
    int64_t first_token, n_tokens;
    int64_t first_panel, n_panels;
};

// What a thread works in: its inputs as int16 and its sums.
struct W8A8Scratch {
    int16_t inputs[BLOCK_TOKENS * BLOCK_INPUTS];
    int32_t sums[BLOCK_PANELS * BLOCK_TOKENS * PANEL];  // [panel, token, PANEL]
};

// One call of `octavo.kernels.linear` with bf16 weights and few tokens.
struct BF16Call {
    const float* x;          // [T, K], widened
    const uint16_t* weight;  // [N, K]
    uint16_t* out;           // [T, N]
    int64_t n_tokens;
    int64_t n_outputs;
    int64_t n_inputs;  // a multiple of INPUT_MULTIPLE
    int64_t n_threads;
};

// One call of `octavo.kernels.quantize_per_token`, `rms_norm_quantize` or `silu_mul_quantize`.
struct QuantizeCall {
    const void* x;       // [T, K] fp32 or bf16; the gate of SiLU·mul
    const void* second;  // the norm's weight [K], or up [T, K]; of x's dtype
    int8_t* q;           // [T, K]
    float* scale;        // [T]
    int64_t n_tokens;
    int64_t n_columns;  // a multiple of INPUT_MULTIPLE
    int64_t operation;
    int64_t n_threads;
    int64_t is_bf16;
    double eps;  // of the norm
};

enum RowOperation { AS_IT_IS = 0, RMS_NORM = 1, SILU_MUL = 2 };

constexpr int64_t INPUT_MULTIPLE = 16;

// What each instruction set implements.
struct LinearKernels {
    void (*w8a8)(const W8A8Call& call, const W8A8Piece& piece, W8A8Scratch& scratch);
    // The outputs first…stop-1 of all tokens, in n_tokens · (stop - first) floats.
    void (*bf16)(const BF16Call& call, int64_t first, int64_t stop, float* sums);
    // One token, in a row of n_columns floats.
    void (*quantize)(const QuantizeCall& call, int64_t token, float* row);
};

extern const LinearKernels linears_portable;
#if defined(__x86_64__)
extern const LinearKernels linears_avx2;
#endif

}  // namespace octavo
