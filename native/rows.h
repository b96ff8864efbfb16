// Operations on the rows of activations, each in fp32 all through, whose results may become int8.
#pragma once

#include <cstdint>

namespace octavo {

// One call of `octavo.kernels.rms_norm`, `add_rms_norm` or `silu_mul`, or of `quantize_per_token` or one
// of the same names with `_quantize`; shapes and meaning are theirs.
struct RowsCall {
    const void* x;       // [T, K] fp32 or bf16; the gate of SiLU·mul
    const void* added;   // [T, K] of x's dtype, or null: it makes a total with x, which takes
    void* total;         // x's place, [T, K] of x's dtype
    const void* second;  // the norm's weight [K], or up [T, K], of x's dtype
    void* out;           // [T, K] int8 with scales, else of x's dtype
    float* scale;        // [T], or null
    int64_t n_tokens;
    int64_t n_columns;  // a multiple of COLUMN_MULTIPLE
    int64_t operation;
    int64_t n_threads;
    int64_t is_bf16;
    double eps;  // of the norm
};

enum RowOperation { AS_IT_IS = 0, RMS_NORM = 1, SILU_MUL = 2 };

constexpr int64_t COLUMN_MULTIPLE = 16;

// What each instruction set implements: one token, in a row of n_columns floats.
using RowsKernel = void (*)(const RowsCall& call, int64_t token, float* row);

extern const RowsKernel rows_portable;
#if defined(__x86_64__)
extern const RowsKernel rows_avx2, rows_avx512, rows_avx512_emulated;
#endif

}  // namespace octavo
