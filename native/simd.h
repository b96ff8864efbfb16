// Vectors of OCTAVO_WIDTH 32-bit numbers, and what several kernels do with them.
//
// They are GCC's and Clang's own (`vector_size`), which become whatever the target has. Nothing of the
// standard library's templates is used here or where this is included: a copy of one that was built
// for wide instructions could be linked into code that runs without them.
//
// A file that includes this for x86-64 includes <immintrin.h> first, before it sets its target.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

namespace octavo {
namespace {

constexpr int W = OCTAVO_WIDTH;
typedef float Vec __attribute__((vector_size(4 * W)));
typedef int32_t IntVec __attribute__((vector_size(4 * W)));
typedef int16_t ShortVec __attribute__((vector_size(4 * W)));      // 2 * W numbers
typedef int8_t ByteVec __attribute__((vector_size(2 * W)));        // 2 * W numbers
typedef int8_t QuarterVec __attribute__((vector_size(W)));         // W numbers
typedef uint16_t HalfVec __attribute__((vector_size(2 * W)));      // W numbers

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

inline Vec splat(float x) { return x - Vec{}; }
inline IntVec splat(int32_t x) { return x - IntVec{}; }

template <typename V, typename T>
inline V load_as(const T* p) {
    V v;
    memcpy(&v, p, sizeof v);
    return v;
}
inline Vec load(const float* p) { return load_as<Vec>(p); }
inline Vec load(const uint16_t* p) {  // a bf16 number is the upper half of an fp32 one
    return (Vec)(__builtin_convertvector(load_as<HalfVec>(p), IntVec) << 16);
}
inline void store(float* p, Vec v) { memcpy(p, &v, sizeof v); }
inline void store(uint16_t* p, Vec v) {  // to the nearest, ties to even; NaN stays NaN
    const IntVec bits = (IntVec)v;
    const IntVec rounded = bits + 0x7FFF + ((bits >> 16) & 1);
    const IntVec quiet = bits | 0x400000;
    const HalfVec half = __builtin_convertvector((v != v ? quiet : rounded) >> 16, HalfVec);
    memcpy(p, &half, sizeof half);
}

inline float widen(float x) { return x; }
inline float widen(uint16_t x) {
    const uint32_t bits = uint32_t(x) << 16;
    float out;
    memcpy(&out, &bits, sizeof out);
    return out;
}
inline void narrow(float x, float* p) { *p = x; }
inline void narrow(float x, uint16_t* p) {  // to the nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    *p = isnan(x) ? 0x7FC0 : uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

inline float sum(Vec v) {
    float out[W];
    store(out, v);
    for (int half = W / 2; half; half /= 2)
        for (int i = 0; i < half; i++) out[i] += out[i + half];
    return out[0];
}

// 2 * W bytes to int16. (GCC makes several steps of the conversion where there is one instruction.)
inline ShortVec load_bytes(const int8_t* p) {
#if defined(__x86_64__) && OCTAVO_WIDTH == 8
    return (ShortVec)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p));
#else
    return __builtin_convertvector(load_as<ByteVec>(p), ShortVec);
#endif
}

// Each number of the result is that of `sums` plus two neighbouring products of int16 numbers.
inline IntVec add_products(IntVec sums, ShortVec a, ShortVec b) {
#if defined(__x86_64__) && OCTAVO_WIDTH == 8
    return sums + (IntVec)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__x86_64__) && OCTAVO_WIDTH == 4
    return sums + (IntVec)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
    // The lower of two neighbours is the lower half of an int32, on every machine octavo runs on.
    const IntVec low = (((IntVec)a << 16) >> 16) * (((IntVec)b << 16) >> 16);
    return sums + low + ((IntVec)a >> 16) * ((IntVec)b >> 16);
#endif
}

// e^x for x <= 0, to 2e-7 of it; exactly 0 below 2^-126.
inline Vec exp_nonpositive(Vec x) {
    x *= splat(1.4426950408889634f);
    const IntVec tiny = x < splat(-126.0f);
    x = tiny ? splat(-126.0f) : x;
    // Adding 1.5 * 2^23 rounds to a whole number, which then stands in the lowest bits.
    const Vec shifted = x + splat(12582912.0f);
    const Vec f = x - (shifted - splat(12582912.0f));  // in -0.5…0.5
    Vec y = splat(1.5353362e-4f);  // Taylor's coefficients ln(2)^k / k!, from k = 6 down
    y = y * f + splat(1.3333558e-3f);
    y = y * f + splat(9.6181291e-3f);
    y = y * f + splat(5.5504109e-2f);
    y = y * f + splat(2.4022651e-1f);
    y = y * f + splat(6.9314718e-1f);
    y = y * f + splat(1.0f);
    return tiny ? splat(0.0f) : (Vec)((IntVec)y + ((IntVec)shifted << 23));
}

}  // namespace
}  // namespace octavo
