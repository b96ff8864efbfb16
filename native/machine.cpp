// What the machine itself can do, for figures to be held against: the rate at which all threads read
// memory, and the int8 multiply-adds that they do on numbers that never leave the registers.
#include <cstdint>
#include <cstring>

#include "isa.h"

#if defined(OCTAVO_KNOWS_AMX)
#define OCTAVO_WIDTH 16
#include "target_avx512.h"
#include "amx.h"

namespace octavo {
namespace {

// Multiply-adds of one round: four sums of products of the four matrices that are left.
int64_t multiply_amx(int64_t rounds) {
    const amx::Registers registers;
    repeat<8>(OCTAVO_EACH(i) { amx::clear<i>(); });
    for (int64_t round = 0; round < rounds; round++)
        repeat<4>(OCTAVO_EACH(i) { amx::add_signed_signed<i, 4 + i / 2, 6 + i % 2>(); });
    return 4 * amx::ROWS * amx::WORDS * 4 * amx::WORDS;
}

}  // namespace
}  // namespace octavo
#include "target_end.h"
#endif

namespace octavo {
namespace {

constexpr int SUMS = 10;  // that do not wait for one another: more than any processor's latency needs

constexpr int LINES = 128;      // bytes of a stream that are read at a time
constexpr int PREFETCH = 1024;  // bytes ahead

// The sum of 64-bit words, read as several streams side by side: a processor fetches ahead within a
// page and for each stream by itself, so that a single one leaves much of the memory's rate unused.
// No read can be left out, and adding costs nothing beside reading.
uint64_t sum_words(const char* bytes, int64_t n_bytes, int64_t n_streams) {
    typedef uint64_t Vec __attribute__((vector_size(16)));
    Vec sums[LINES / 16] = {};
    const int64_t length = n_bytes / n_streams / LINES * LINES;
    for (int64_t at = 0; at < length; at += LINES) {
        for (int64_t stream = 0; stream < n_streams; stream++) {
            const char* here = bytes + stream * length + at;
            __builtin_prefetch(here + PREFETCH);
            __builtin_prefetch(here + PREFETCH + 64);
            for (int j = 0; j < LINES / 16; j++) {
                Vec v;
                memcpy(&v, here + 16 * j, sizeof v);
                sums[j] += v;
            }
        }
    }
    uint64_t total = 0;
    for (const Vec& sum : sums) total += sum[0] + sum[1];
    return total;
}

// Each `multiply_*` does `rounds` rounds and gives back the multiply-adds of one.

// Whatever the compiler makes of a dot product of numbers in the first-level cache.
int64_t multiply_portable(int64_t rounds) {
    constexpr int N = 1024;
    int16_t numbers[N];
    for (int i = 0; i < N; i++) numbers[i] = int16_t(i % 255 - 127);
    for (int64_t round = 0; round < rounds; round++) {
        int32_t sum = 0;
        for (int i = 0; i < N; i++) sum += int32_t(numbers[i]) * numbers[i];
        numbers[round % N] ^= int16_t(sum & 1);  // or the rounds would be one
    }
    return numbers[0] == INT16_MIN ? 0 : N;
}

// Products of bytes, four to a sum. Sums by name: in an array they would be in memory.
#define OCTAVO_MULTIPLY_BYTES(n_bytes, sum, number)                                              \
    typedef int32_t Vec __attribute__((vector_size(n_bytes)));                                   \
    const Vec numbers = Vec{} + 0x01010101;                                                      \
    Vec s0 = {}, s1 = {}, s2 = {}, s3 = {}, s4 = {}, s5 = {}, s6 = {}, s7 = {}, s8 = {}, s9 = {}; \
    for (int64_t round = 0; round < rounds; round++)                                             \
        asm volatile(                                                                            \
            OCTAVO_PRODUCT(0) "\n\t" OCTAVO_PRODUCT(1) "\n\t" OCTAVO_PRODUCT(2) "\n\t"           \
            OCTAVO_PRODUCT(3) "\n\t" OCTAVO_PRODUCT(4) "\n\t" OCTAVO_PRODUCT(5) "\n\t"           \
            OCTAVO_PRODUCT(6) "\n\t" OCTAVO_PRODUCT(7) "\n\t" OCTAVO_PRODUCT(8) "\n\t"           \
            OCTAVO_PRODUCT(9)                                                                    \
            : sum(s0), sum(s1), sum(s2), sum(s3), sum(s4), sum(s5), sum(s6), sum(s7), sum(s8),   \
              sum(s9)                                                                            \
            : number(numbers)                                                                    \
        );                                                                                       \
    return SUMS * n_bytes;

#if defined(__x86_64__)
// The instructions are written out: a product of numbers that do not change would be taken out of the
// loop, and GCC 12 keeps the sums of `vpdpbusd` in memory.

// Products of int16 numbers, added in pairs: the exact way without VNNI. (`vpmaddubsw` saturates, and
// with the `vpmaddwd` that must follow it is no faster.)
__attribute__((target("avx2"))) int64_t multiply_avx2(int64_t rounds) {
    typedef int32_t Vec __attribute__((vector_size(32)));
    Vec sums[SUMS] = {};
    const Vec numbers = Vec{} + 0x00010001;
    for (int64_t round = 0; round < rounds; round++) {
#pragma GCC unroll 10
        for (int i = 0; i < SUMS; i++) {
            Vec product;
            asm volatile("vpmaddwd %1, %1, %0" : "=x"(product) : "x"(numbers));
            sums[i] += product;
        }
    }
    for (Vec& sum : sums) asm volatile("" : : "x"(sum));  // somebody wants them
    return SUMS * 16;
}

__attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni"))) int64_t multiply_avx512(int64_t rounds) {
#define OCTAVO_PRODUCT(i) "vpdpbusd %10, %10, %" #i
    OCTAVO_MULTIPLY_BYTES(64, "+x", "x")
#undef OCTAVO_PRODUCT
}

#if defined(OCTAVO_KNOWS_AVX_VNNI)
__attribute__((target("avxvnni"))) int64_t multiply_avx_vnni(int64_t rounds) {
#define OCTAVO_PRODUCT(i) "%{vex%} vpdpbusd %10, %10, %" #i
    OCTAVO_MULTIPLY_BYTES(32, "+x", "x")
#undef OCTAVO_PRODUCT
}
#endif
#elif defined(__aarch64__)
#include "target_dotprod.h"
int64_t multiply_dotprod(int64_t rounds) {
#define OCTAVO_PRODUCT(i) "sdot %" #i ".4s, %10.16b, %10.16b"
    OCTAVO_MULTIPLY_BYTES(16, "+w", "w")
}
#include "target_end.h"
#endif

typedef int64_t (*Multiply)(int64_t rounds);

Multiply best_multiply() {
    switch (best_isa()) {
#if defined(__x86_64__)
        case AVX2: return multiply_avx2;
        case AVX512: return multiply_avx512;
#endif
#if defined(OCTAVO_KNOWS_AMX)
        case AMX: return multiply_amx;
#endif
#if defined(OCTAVO_KNOWS_AVX_VNNI)
        case AVX_VNNI: return multiply_avx_vnni;
#endif
#if defined(__aarch64__)
        case DOTPROD: return multiply_dotprod;
#endif
        default: return multiply_portable;
    }
}

}  // namespace
}  // namespace octavo

extern "C" {

// Read `n_bytes` with all threads, each in `n_streams` at once (of whole runs of 128 bytes); the sum of
// their 64-bit words.
uint64_t octavo_machine_read(
    const void* bytes, int64_t n_bytes, int64_t n_threads, int64_t n_streams
) {
    const int64_t share = n_bytes / n_threads / octavo::LINES * octavo::LINES;
    uint64_t total = 0;
#if defined(_OPENMP)
#pragma omp parallel for num_threads(int(n_threads)) schedule(static) reduction(+ : total)
#endif
    for (int64_t i = 0; i < n_threads; i++)
        total += octavo::sum_words((const char*)bytes + i * share, share, n_streams);
    return total;
}

// The machine's best int8 multiply-adds, `rounds` rounds on every thread; how many they were in all.
int64_t octavo_machine_int8(int64_t rounds, int64_t n_threads) {
    const octavo::Multiply multiply = octavo::best_multiply();
    int64_t total = 0;
#if defined(_OPENMP)
#pragma omp parallel for num_threads(int(n_threads)) schedule(static) reduction(+ : total)
#endif
    for (int64_t i = 0; i < n_threads; i++) total += rounds * multiply(rounds);
    return total;
}

}  // extern "C"
