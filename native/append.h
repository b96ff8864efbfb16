// New tokens on their way into the cache: queries and keys turned, keys and values stored.
#pragma once

#include <cstdint>

namespace octavo {

// One call's arguments; shapes and meaning are those of `octavo.kernels.append.rotary_append`.
struct AppendCall {
    const void* q;           // [T, n_heads, head_dim], fp32 or bf16
    const void* k;           // [T, n_kv_heads, head_dim], of q's dtype
    const void* v;           // the same
    void* turned;            // as q
    const float* cos;        // [T, head_dim / 2]
    const float* sin;        // the same
    void* keys;              // [n_pages, n_kv_heads, page_size, head_dim], of any dtype
    void* values;            // the same
    uint16_t* key_scales;    // [n_pages, n_kv_heads, page_size] bf16, of int8 keys
    uint16_t* value_scales;  // the same
    const int64_t* slots;    // [T], page · page_size + offset
    int64_t n_tokens;
    int64_t n_heads;
    int64_t n_kv_heads;
    int64_t head_dim;
    int64_t page_size;
    int64_t n_threads;
    int64_t q_dtype;
    int64_t kv_dtype;
};

// What each instruction set implements: one token, in a head of head_dim floats.
using AppendKernel = void (*)(const AppendCall& call, int64_t token, float* head);

extern const AppendKernel append_portable;
#if defined(__x86_64__)
extern const AppendKernel append_avx2;
#endif

}  // namespace octavo
