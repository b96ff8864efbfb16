// The instruction sets that every kernel is built for; which of them a machine runs is found out
// when it runs.
#pragma once

#include <cstdint>

namespace octavo {

enum Isa {
    PORTABLE = 0,  // 128-bit vectors, as every x86-64 and arm64 has
    AVX2 = 1,      // and FMA
    AVX512 = 2,    // F, BW, DQ, VL and VNNI, as Intel has had since 2019 and AMD since 2022
    EMULATED = 3,  // what AVX512 does to int8 and bf16, on AVX2: slow, and for tests alone
};

Isa best_isa();

// Whether an AVX512 machine has BF16's instructions too, as Intel has had since 2020 and AMD since
// 2022.
bool has_bf16_products();

inline bool runs(int isa) {
    if (isa == EMULATED) return best_isa() >= AVX2;
    return isa >= PORTABLE && isa <= best_isa();
}

}  // namespace octavo
