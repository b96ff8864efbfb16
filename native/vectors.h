// Vectors of OCTAVO_WIDTH lanes of 32 bits, and what kernels do with them.
//
// They are GCC's and Clang's own (`vector_size`), which become whatever the target has. Nothing of
// the standard library's templates is used in a kernel: a copy of one that was built for wide
// instructions could be linked into code that runs without them.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace octavo {
namespace {

#define OCTAVO_INLINE inline __attribute__((always_inline))

// What is one instruction, or a few, where the machine has vectors of this width. Where it has not, a kernel
// that has them written out at every use takes a minute to build.
#if OCTAVO_WIDTH == 16 && !defined(OCTAVO_AVX512)
#define OCTAVO_EMULATED
#define OCTAVO_STEP __attribute__((noinline))
#else
#define OCTAVO_STEP OCTAVO_INLINE
#endif

constexpr int W = OCTAVO_WIDTH;
#if OCTAVO_WIDTH == 16 || defined(__aarch64__)
constexpr int REGISTERS = 32;
#else
constexpr int REGISTERS = 16;
#endif
constexpr int IN_REGISTERS = REGISTERS / 4 * 3;  // vectors of sums, beside what is added to them
typedef float Vec __attribute__((vector_size(4 * W)));
typedef int32_t IntVec __attribute__((vector_size(4 * W)));
typedef int8_t ByteVec __attribute__((vector_size(4 * W)));  // 4 W of them
typedef uint16_t HalfVec __attribute__((vector_size(2 * W)));

// f(0)…f(N-1) with numbers that are known when this is compiled. Written as a loop, GCC 12 unrolls it only
// after it has chosen what lies in memory: arrays of sums then, which are cleared, stored and read again.
template <int I>
struct Number {
    constexpr operator int() const { return I; }
};
template <typename F, int... I>
OCTAVO_INLINE void repeat(const F& f, std::integer_sequence<int, I...>) {
    (f(Number<I>()), ...);
}
template <int N, typename F>
OCTAVO_INLINE void repeat(const F& f) {
    repeat(f, std::make_integer_sequence<int, N>());
}
#define OCTAVO_EACH(i) [&](auto i) __attribute__((always_inline))

// f(n) for n in 1…MOST, with a number that is known when this is compiled.
template <int MOST, typename F>
void with_number(int64_t n, const F& f) {
    if constexpr (MOST > 1)
        if (n < MOST) return with_number<MOST - 1>(n, f);
    f(Number<MOST>());
}

constexpr float LOG2_E = 1.4426950408889634f;

OCTAVO_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
OCTAVO_INLINE int64_t within(int64_t x, int64_t high) { return x < 0 ? 0 : x > high ? high : x; }

OCTAVO_INLINE Vec splat(float x) { return x - Vec{}; }
OCTAVO_INLINE IntVec splat(int32_t x) { return x - IntVec{}; }

OCTAVO_INLINE Vec load(const float* p) {
    Vec v;
    memcpy(&v, p, sizeof v);
    return v;
}
OCTAVO_INLINE IntVec load(const int32_t* p) {
    IntVec v;
    memcpy(&v, p, sizeof v);
    return v;
}
// A bf16 number is the upper half of an fp32 one. (GCC 12 converts whole vectors by their halves.)
OCTAVO_INLINE Vec load(const uint16_t* p) {
#if OCTAVO_WIDTH == 8
    return (Vec)((IntVec)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)) << 16);
#elif OCTAVO_WIDTH == 16 && defined(OCTAVO_AVX512)
    return (Vec)((IntVec)_mm512_maskz_cvtepu16_epi32(0xFFFF, _mm256_loadu_si256((const __m256i*)p)) << 16);
#else
    HalfVec half;
    memcpy(&half, p, sizeof half);
    return (Vec)(__builtin_convertvector(half, IntVec) << 16);
#endif
}
OCTAVO_INLINE float widen(uint16_t bf16) {
    const uint32_t bits = uint32_t(bf16) << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}
OCTAVO_INLINE void store(float* p, Vec v) { memcpy(p, &v, sizeof v); }
OCTAVO_INLINE void store(int32_t* p, IntVec v) { memcpy(p, &v, sizeof v); }
OCTAVO_INLINE void store(uint16_t* p, Vec v) {  // to the nearest, ties to even
    const IntVec bits = (IntVec)v;
    const IntVec rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    const IntVec halves = v == v ? rounded : splat(0x7FC0);
#if defined(OCTAVO_AVX512)
    _mm256_storeu_si256((__m256i*)p, _mm512_maskz_cvtepi32_epi16(0xFFFF, (__m512i)halves));
#else
    const HalfVec half = __builtin_convertvector(halves, HalfVec);
    memcpy(p, &half, sizeof half);
#endif
}

// No more than the first n lanes.
OCTAVO_INLINE void store_first(uint16_t* p, Vec v, int64_t n) {
    uint16_t numbers[W];
    store(numbers, v);
    memcpy(p, numbers, least(W, n) * sizeof *numbers);
}

OCTAVO_INLINE void store(int8_t* p, IntVec v) {  // the lowest byte of each
#if defined(OCTAVO_AVX512)
    _mm_storeu_si128((__m128i*)p, _mm512_maskz_cvtepi32_epi8(0xFFFF, (__m512i)v));
#else
    typedef int8_t Narrow __attribute__((vector_size(W)));
    const Narrow narrow = __builtin_convertvector(v, Narrow);
    memcpy(p, &narrow, sizeof narrow);
#endif
}

// The greater of each two lanes; b's if either is a NaN.
OCTAVO_INLINE Vec greater(Vec a, Vec b) {
#if defined(OCTAVO_AVX512)
    return (Vec)_mm512_maskz_max_ps(0xFFFF, (__m512)a, (__m512)b);
#elif OCTAVO_WIDTH == 8
    return (Vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return a > b ? a : b;
#endif
}

// To the nearest whole number, for |x| < 2^22: adding 1.5 * 2^23 rounds, and leaves it in the lowest
// 22 bits. `round_low` stops there.
OCTAVO_INLINE IntVec round_low(Vec x) { return (IntVec)(x + splat(12582912.0f)); }
OCTAVO_INLINE IntVec round_to_int(Vec x) { return round_low(x) - 0x4B400000; }

// f(0), f(1)… as a vector that is known when this is compiled. Filled by a loop it would be as well, but
// each use of it takes GCC so long to find that out that a kernel takes twice as long to build.
template <typename F, int... I>
constexpr IntVec lanes(const F& f, std::integer_sequence<int, I...>) {
    return IntVec{f(I)...};
}
template <typename F>
constexpr IntVec lanes(const F& f) {
    return lanes(f, std::make_integer_sequence<int, W>());
}
template <typename F, int... I>
constexpr ByteVec byte_lanes(const F& f, std::integer_sequence<int, I...>) {
    return ByteVec{int8_t(f(I))...};
}
template <typename F>
constexpr ByteVec byte_lanes(const F& f) {
    return byte_lanes(f, std::make_integer_sequence<int, 4 * W>());
}

// Lanes of a, then of b, by their indices.
template <typename V>
OCTAVO_STEP V shuffle(V a, V b, V index) {
#if defined(__clang__) || defined(OCTAVO_EMULATED)
    constexpr int N = sizeof(V) / sizeof(V{}[0]);
    V out;
    for (int i = 0; i < N; i++) out[i] = index[i] < N ? a[index[i]] : b[index[i] - N];
    return out;
#else
    return __builtin_shuffle(a, b, index);
#endif
}

// Begin to fetch a line that is read but once, and soon. Where there is AMX, to the second-level cache, which waits
// for more lines at once. Elsewhere it would wait twice, for on its way to the registers it takes up one of the
// first level's places again: 45 GB/s for 52, of keys and values in int8 on two cores of an AMD EPYC (Zen 5).
#if defined(OCTAVO_AMX)
constexpr int FETCHED_TO = 2;
#else
constexpr int FETCHED_TO = 3;
#endif
OCTAVO_INLINE void fetch_line(const void* p) { __builtin_prefetch(p, 0, FETCHED_TO); }

// The same of one that the first-level cache would not keep until it is read.
OCTAVO_INLINE void fetch_line_early(const void* p) { __builtin_prefetch(p, 0, W == 16 ? 2 : 3); }

// Have v in a register from here on. GCC would read what is used twice from memory twice, and a loop of
// few products waits for its reads.
OCTAVO_INLINE void keep(IntVec& v) {
#if defined(OCTAVO_AVX512)
    asm("" : "+v"(v));
#elif OCTAVO_WIDTH == 8
    asm("" : "+x"(v));
#else
    (void)v;
#endif
}

// Of each run of 2 H lanes: its first half from a and then from b; its second half likewise.
template <int H>
OCTAVO_INLINE void exchange(IntVec& a, IntVec& b) {
    constexpr IntVec low = lanes([](int i) { return i & H ? W + i - H : i; });
    constexpr IntVec high = lanes([](int i) { return i & H ? W + i : i + H; });
    const IntVec first = shuffle(a, b, low), second = shuffle(a, b, high);
    a = first;
    b = second;
}

// Lane i of vector j becomes lane j of vector i.
template <int H = W / 2>
OCTAVO_INLINE void transpose(IntVec (&v)[W]) {
    repeat<W>(OCTAVO_EACH(i) {
        if constexpr (!(i & H)) exchange<H>(v[i], v[i + H]);
    });
    if constexpr (H > 1) transpose<H / 2>(v);
}

// Lane i is a's, or where i & H is set b's, plus the same vector's lane that is H lanes away.
template <int H, typename V>
OCTAVO_INLINE V sum_pairs(V a, V b) {
    constexpr IntVec own = lanes([](int i) { return i & H ? W + i : i; });
    constexpr IntVec other = lanes([](int i) { return i & H ? i : W + i; });
    constexpr IntVec away = lanes([](int i) { return i ^ H; });
    const IntVec y = shuffle((IntVec)a, (IntVec)b, other);
    return (V)shuffle((IntVec)a, (IntVec)b, own) + (V)shuffle(y, y, away);
}

// Lane i of the result, left in v[0], is the sum of those lanes of v[i % N] that are the same in all but
// the bits H…H·N/2 of their numbers: with H = 1 and N = W the sum of all. Neighbours first, while there
// are many vectors: it costs more to move lanes from one half to the other.
template <int H, int N, typename V>
OCTAVO_INLINE void sum_each(V (&v)[N]) {
    V halves[N / 2];
    repeat<N / 2>(OCTAVO_EACH(i) { halves[i] = sum_pairs<H>(v[2 * i], v[2 * i + 1]); });
    if constexpr (N > 2) sum_each<2 * H>(halves);
    v[0] = halves[0];
}

// Each lane, and the one that is H lanes away.
template <int H, typename V>
OCTAVO_INLINE V swap_lanes(V v) {
    constexpr IntVec away = lanes([](int i) { return i ^ H; });
    return (V)shuffle((IntVec)v, (IntVec)v, away);
}
template <int H = W / 2>
OCTAVO_INLINE float sum(Vec v) {
    v += swap_lanes<H>(v);
    if constexpr (H > 1) return sum<H / 2>(v);
    return v[0];
}
template <int H = W / 2, typename V>
OCTAVO_INLINE auto largest(V v) {
    const V other = swap_lanes<H>(v);
    v = other > v ? other : v;
    if constexpr (H > 1) return largest<H / 2>(v);
    else return v[0];
}

// max|x| of n numbers. As integers, so that it is a NaN if there is one among them.
template <typename T>
OCTAVO_INLINE float largest_magnitude(const T* x, int64_t n) {
    IntVec most = IntVec{};
    for (int64_t i = 0; i < n; i += W) {
        const IntVec bits = (IntVec)load(x + i) & 0x7FFFFFFF;
        most = bits > most ? bits : most;
    }
    const int32_t bits = largest(most);
    float out;
    memcpy(&out, &bits, sizeof out);
    return out;
}

// 2^x for x <= 0, to 1e-7 of it, or for COARSE to 8e-5; 2e-38 for all that is less, and for
// -infinity. The coefficients are those with the smallest relative error in -0.5…0.5.
template <bool COARSE>
OCTAVO_STEP Vec exp2(Vec x) {
    x = greater(splat(-125.0f), x);  // and a NaN stays
    const Vec shifted = x + splat(12582912.0f);
    const Vec f = x - (shifted - splat(12582912.0f));
    Vec y;
    if constexpr (COARSE) {
        y = splat(0.0551716695f);
        y = y * f + splat(0.242611125f);
        y = y * f + splat(0.693260986f);
        y = y * f + splat(0.999928073f);
    } else {
        y = splat(0.0013276472f);
        y = y * f + splat(0.00967554138f);
        y = y * f + splat(0.0555071327f);
        y = y * f + splat(0.240221197f);
        y = y * f + splat(0.693146967f);
        y = y * f + splat(1.00000007f);
    }
    return (Vec)((IntVec)y + ((IntVec)shifted << 23));
}

}  // namespace
}  // namespace octavo
