// What follows, up to target_end.h, is built for AVX-512. Its products of bytes are written out as
// `vpdpbusd`, which every machine has that `best_isa` lets in here.
#define OCTAVO_AVX512
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")
#endif
