// 512-bit vectors.
#if defined(__x86_64__)
#define OCTAVO_KERNEL attention_avx512
#define OCTAVO_WIDTH 16
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx2,fma")
#endif
#include "attention_kernel.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
