// AMX: eight registers of 16 rows of 64 bytes, and products of such matrices, in which words of 32 bits lie
// as in native/products.h: C[16 rows, 16 columns] += A[16 rows, 16 words] · B[16 words, 16 columns]
// (Intel's Software Developer's Manual, volume 1, chapter 18). A core does 1,024 multiply-adds of bytes a
// cycle so, where vectors do 128.
//
// The registers' numbers are written into the instructions, so that they are template arguments here.
// The instructions are written out, as those of `Quads` are, and each waits for its turn (`volatile`).
#pragma once

#include "vectors.h"

namespace octavo {
namespace {
namespace amx {

constexpr int64_t ROWS = 16;
constexpr int64_t WORDS = 16;  // of a row
constexpr int64_t BYTES = ROWS * WORDS * 4;

#if defined(OCTAVO_AVX512)

// The registers are there while one of these lives, and each is a whole matrix. After that the system
// need not keep them when it takes the thread from its core.
class Registers {
   public:
    Registers() {
        struct {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {};
            uint8_t rows[16] = {};
        } shapes;
        static_assert(sizeof shapes == 64, "as `ldtilecfg` reads it");
        for (int i = 0; i < 8; i++) shapes.row_bytes[i] = 4 * WORDS, shapes.rows[i] = ROWS;
        asm volatile("ldtilecfg %0" : : "m"(shapes));
    }
    ~Registers() { asm volatile("tilerelease"); }
    Registers(const Registers&) = delete;
    Registers& operator=(const Registers&) = delete;
};

template <int I>
OCTAVO_INLINE void clear() {
    asm volatile("tilezero %%tmm%c0" : : "i"(I));
}
// From one row to the next are `apart` words.
template <int I>
OCTAVO_INLINE void load(const void* p, int64_t apart) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(4 * apart), "i"(I) : "memory");
}
template <int I>
OCTAVO_INLINE void store(void* p, int64_t apart) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(4 * apart), "i"(I) : "memory");
}

// C += A · B, of bytes: signed or unsigned ones of A, then of B.
template <int C, int A, int B>
OCTAVO_INLINE void add_signed_signed() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}
template <int C, int A, int B>
OCTAVO_INLINE void add_signed_unsigned() {
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}
template <int C, int A, int B>
OCTAVO_INLINE void add_unsigned_signed() {
    asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}
// Of bf16, with fp32 sums.
template <int C, int A, int B>
OCTAVO_INLINE void add_halves() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}

#else  // the same spelled out, for tests

thread_local int32_t registers[8][ROWS][WORDS];

struct Registers {
    Registers() { memset(registers, 0, sizeof registers); }
};

template <int I>
void clear() {
    memset(registers[I], 0, BYTES);
}
template <int I>
void load(const void* p, int64_t apart) {
    for (int64_t r = 0; r < ROWS; r++) memcpy(registers[I][r], (const int32_t*)p + r * apart, 4 * WORDS);
}
template <int I>
void store(void* p, int64_t apart) {
    for (int64_t r = 0; r < ROWS; r++) memcpy((int32_t*)p + r * apart, registers[I][r], 4 * WORDS);
}

// C += A · B, `multiply` giving the sum of products of two words.
template <int C, int A, int B, typename Sum, typename F>
void add(const F& multiply) {
    for (int64_t r = 0; r < ROWS; r++)
        for (int64_t k = 0; k < WORDS; k++)
            for (int64_t c = 0; c < WORDS; c++) {
                Sum sum;
                memcpy(&sum, &registers[C][r][c], sizeof sum);
                sum += multiply(registers[A][r][k], registers[B][k][c]);
                memcpy(&registers[C][r][c], &sum, sizeof sum);
            }
}
template <typename X, typename Y>
int32_t multiply_bytes(int32_t a, int32_t b) {
    int32_t sum = 0;
    for (int i = 0; i < 32; i += 8) sum += X(a >> i) * Y(b >> i);
    return sum;
}
template <int C, int A, int B>
void add_signed_signed() {
    add<C, A, B, int32_t>(multiply_bytes<int8_t, int8_t>);
}
template <int C, int A, int B>
void add_signed_unsigned() {
    add<C, A, B, int32_t>(multiply_bytes<int8_t, uint8_t>);
}
template <int C, int A, int B>
void add_unsigned_signed() {
    add<C, A, B, int32_t>(multiply_bytes<uint8_t, int8_t>);
}
template <int C, int A, int B>
void add_halves() {
    add<C, A, B, float>([](int32_t a, int32_t b) {
        return widen(uint16_t(a)) * widen(uint16_t(b)) + widen(uint16_t(a >> 16)) * widen(uint16_t(b >> 16));
    });
}
#endif

}  // namespace amx
}  // namespace
}  // namespace octavo
