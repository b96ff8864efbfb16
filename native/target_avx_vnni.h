// What follows, up to target_end.h, is built for AVX2 and FMA, and its products of bytes are written out as
// `vpdpbusd`.
#define OCTAVO_AVX_VNNI
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avxvnni,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avxvnni,avx2,fma")
#endif
