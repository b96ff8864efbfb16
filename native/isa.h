// The instruction sets that every kernel is built for; which of them a machine runs is found out
// when it runs.
#pragma once

#include <cstdint>

// Compilers and assemblers that know AVX-VNNI.
#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 11)
#define OCTAVO_KNOWS_AVX_VNNI
#endif
// And AMX, which a process on Linux asks for.
#if defined(OCTAVO_KNOWS_AVX_VNNI) && defined(__linux__)
#define OCTAVO_KNOWS_AMX
#endif

namespace octavo {

enum Isa {
    PORTABLE = 0,  // 128-bit vectors, as every x86-64 and arm64 has
    AVX2 = 1,      // and FMA
    AVX_VNNI = 2,  // and products of bytes, as Intel's laptops have had since 2021 instead of AVX-512
    AVX512 = 3,    // F, BW, DQ, VL and VNNI, as Intel has had since 2019 and AMD since 2022
    AMX = 4,       // AVX512, and products of matrices, as Intel's servers have had since 2023
    DOTPROD = 5,   // arm64's products of bytes, as most have had since 2018
    // What the others do to int8 and bf16, on AVX2: slow, and for tests alone.
    AVX_VNNI_EMULATED = 6,
    AVX512_EMULATED = 7,
    AMX_EMULATED = 8,
};

bool runs(int isa);
Isa best_isa();

// Which instructions compute what has no products of bytes: these are all that some add to others.
inline int without_bytes(int isa) {
    if (isa == AVX_VNNI || isa == AVX_VNNI_EMULATED) return AVX2;
    return isa == DOTPROD ? int(PORTABLE) : isa;
}

// Likewise what has no products at all.
inline int without_products(int isa) {
    if (isa == AMX) return AVX512;
    return isa == AMX_EMULATED ? int(AVX512_EMULATED) : without_bytes(isa);
}

// Whether an AVX512 machine has BF16's instructions too, as Intel has had since 2020 and AMD since
// 2022.
bool has_bf16_products();

}  // namespace octavo
