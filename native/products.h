// Sums of products, a word of 32 bits at a time: a word holds one number, or two or four small ones
// of neighbouring depth, and the instructions multiply and add those in one go. Keys, values, queries
// and weights are turned into such words; what does so, and multiplies them, is a type here.
#pragma once

#include "vectors.h"

namespace octavo {
namespace {

// Of every 16 bytes of a and b the first halves, or the second: N bytes of a, as many of b, and so on.
template <int N, bool SECOND>
OCTAVO_INLINE IntVec zip(IntVec a, IntVec b) {
#if defined(OCTAVO_AVX512)
    const __m512i x = (__m512i)a, y = (__m512i)b;
    if (N == 1) return (IntVec)(SECOND ? _mm512_unpackhi_epi8(x, y) : _mm512_unpacklo_epi8(x, y));
    if (N == 2) return (IntVec)(SECOND ? _mm512_unpackhi_epi16(x, y) : _mm512_unpacklo_epi16(x, y));
    if (N == 4)
        return (IntVec)(SECOND ? _mm512_maskz_unpackhi_epi32(0xFFFF, x, y)
                               : _mm512_maskz_unpacklo_epi32(0xFFFF, x, y));
    return (IntVec)(SECOND ? _mm512_maskz_unpackhi_epi64(0xFF, x, y)
                           : _mm512_maskz_unpacklo_epi64(0xFF, x, y));
#else
    constexpr ByteVec index = byte_lanes([](int i) {
        const int from = i / 16 * 16 + i % 16 / (2 * N) * N + i % N + (SECOND ? 8 : 0);
        return from + i / N % 2 * 4 * W;
    });
    return (IntVec)shuffle((ByteVec)a, (ByteVec)b, index);
#endif
}

// Of each 16 bytes the sum of their four words: of v[0]'s, of v[1]'s, and so on. As `sum_each<1>`, with other
// shuffles, by which decoding is 2 % faster.
template <typename Sum>
OCTAVO_INLINE Sum sum_quads(const Sum (&v)[4]) {
    Sum pairs[2];
    for (int i = 0; i < 2; i++) {
        const IntVec a = (IntVec)v[2 * i], b = (IntVec)v[2 * i + 1];
        pairs[i] = (Sum)zip<4, false>(a, b) + (Sum)zip<4, true>(a, b);
    }
    const IntVec a = (IntVec)pairs[0], b = (IntVec)pairs[1];
    return (Sum)zip<8, false>(a, b) + (Sum)zip<8, true>(a, b);
}

// Quarters I and J of a, then of b.
template <int I, int J>
OCTAVO_INLINE IntVec quarters(IntVec a, IntVec b) {
    constexpr IntVec index = lanes([](int i) {
        return (i / 4 % 2 ? J : I) * 4 + i % 4 + (i < W / 2 ? 0 : W);
    });
    return shuffle(a, b, index);
}

// The four words from p on, in every quarter.
OCTAVO_INLINE IntVec repeat_quarter(const void* p) {
#if defined(OCTAVO_AVX512)
    return (IntVec)_mm512_maskz_broadcast_i32x4(0xFFFF, _mm_loadu_si128((const __m128i*)p));
#else
    IntVec v = IntVec{};
    memcpy(&v, p, 16);
    constexpr IntVec index = lanes([](int i) { return i % 4; });
    return shuffle(v, v, index);
#endif
}

// Floating point: one number a word, fp32.
struct Singles {
    static constexpr int N = 1;
    static constexpr bool COARSE = false;  // what is enough for the weights' exponential
    typedef Vec Sum;

    static OCTAVO_INLINE Sum add(Sum sum, IntVec a, IntVec b) { return sum + (Vec)a * (Vec)b; }
    static OCTAVO_INLINE Vec floats(Sum sum) { return sum; }
    static OCTAVO_INLINE Sum start(int32_t) { return Sum{}; }

    // W words of one token.
    template <typename T>
    static OCTAVO_INLINE IntVec words(const T* p, int64_t) {
        return (IntVec)load(p);
    }
    // Words of C · W neighbouring elements of N tokens, from the d-th on, in an order that suits the
    // instructions; `restore` brings sums of such columns back in that of the elements.
    template <int C, typename T>
    static OCTAVO_INLINE void interleave(const T* const* tokens, int64_t d, IntVec (&out)[C]) {
        for (int c = 0; c < C; c++) out[c] = (IntVec)load(tokens[0] + d + c * W);
    }
    // A query; gives what its products are to be multiplied by.
    static float query(const float* q, int64_t n, int32_t* words, int32_t* begin) {
        memcpy(words, q, n * sizeof *q);
        *begin = 0;
        return 1.0f;
    }
    // W weights from the k-th on, into a row of words; gives what they were multiplied by.
    static OCTAVO_INLINE void weigh(Vec weights, const float*, int64_t k, int32_t* words) {
        store((float*)words + k, weights);
    }
    static constexpr float MOST = 1.0f;
    template <int C>
    static OCTAVO_INLINE void restore(Vec (&)[C]) {}
};

// The same in bf16, two numbers a word: what AVX-512 BF16 multiplies twice as fast. Queries and weights
// are rounded to it too.
struct Halves {
    static constexpr int N = 2;
    static constexpr bool COARSE = true;
    typedef Vec Sum;

    static OCTAVO_STEP Sum add(Sum sum, IntVec a, IntVec b) {
#if defined(OCTAVO_AVX512)
        asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
#else
        sum += (Vec)(a << 16) * (Vec)(b << 16);
        sum += (Vec)(a & int32_t(0xFFFF0000)) * (Vec)(b & int32_t(0xFFFF0000));
#endif
        return sum;
    }
    static OCTAVO_INLINE Vec floats(Sum sum) { return sum; }
    static OCTAVO_INLINE Sum start(int32_t) { return Sum{}; }

    static OCTAVO_INLINE IntVec words(const uint16_t* p, int64_t) { return load((const int32_t*)p); }
    template <int C>
    static OCTAVO_INLINE void interleave(
        const uint16_t* const* tokens, int64_t d, IntVec (&out)[C]
    ) {
        for (int c = 0; c < C; c += 2) {
            const IntVec a = load((const int32_t*)(tokens[0] + d + c * W));
            const IntVec b = load((const int32_t*)(tokens[1] + d + c * W));
            out[c] = zip<2, false>(a, b);
            out[c + 1] = zip<2, true>(a, b);
        }
    }
    // A lane of four words of one vector, one of the other, and so on.
    template <int C>
    static OCTAVO_INLINE void restore(Vec (&sums)[C]) {
        constexpr IntVec low = lanes([](int i) { return i / 8 * 4 + i % 4 + i / 4 % 2 * W; });
        constexpr IntVec high = low + W / 2;
        for (int c = 0; c < C; c += 2) {
            const IntVec a = (IntVec)sums[c], b = (IntVec)sums[c + 1];
            sums[c] = (Vec)shuffle(a, b, low);
            sums[c + 1] = (Vec)shuffle(a, b, high);
        }
    }
    static float query(const float* q, int64_t n, int32_t* words, int32_t* begin) {
        for (int64_t d = 0; d < n; d += W) store((uint16_t*)words + d, load(q + d));
        *begin = 0;
        return 1.0f;
    }
    static OCTAVO_INLINE void weigh(Vec weights, const float*, int64_t k, int32_t* words) {
#if defined(OCTAVO_AVX512)
        __m256i halves;
        asm("vcvtneps2bf16 %1, %0" : "=v"(halves) : "v"(weights));
        _mm256_storeu_si256((__m256i*)((uint16_t*)words + k), halves);
#else
        store((uint16_t*)words + k, weights);
#endif
    }
    static constexpr float MOST = 1.0f;
};

// A query in integers of at most `most`, as Q; gives its scale. They are summed up in *sum.
template <typename Q>
OCTAVO_INLINE float quantize_query(const float* q, int64_t n, float most, Q* out, int32_t* sum) {
    typedef Q Narrow __attribute__((vector_size(W * sizeof(Q))));
    float scale = largest_magnitude(q, n) / most;
    if (scale == 0.0f) scale = 1.0f;
    const Vec inverse = splat(1.0f / scale);
    IntVec total = IntVec{};
    for (int64_t d = 0; d < n; d += W) {
        const IntVec rounded = round_to_int(load(q + d) * inverse);
        const Narrow narrow = __builtin_convertvector(rounded, Narrow);
        memcpy(out + d, &narrow, sizeof narrow);
        total += rounded;
    }
    *sum = 0;
    for (int i = 0; i < W; i++) *sum += total[i];
    return scale;
}

// int8 keys and values, times queries and weights of 14 and 15 bits: two a word, as int16.
struct Pairs {
    static constexpr int N = 2;
    static constexpr bool COARSE = true;
    typedef IntVec Sum;

    static OCTAVO_INLINE Sum add(Sum sum, IntVec a, IntVec b) {
#if OCTAVO_WIDTH == 8
        return sum + (IntVec)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif OCTAVO_WIDTH == 4 && defined(__SSE2__)
        return sum + (IntVec)_mm_madd_epi16((__m128i)a, (__m128i)b);
#elif defined(__aarch64__)
        const int16x8_t x = (int16x8_t)a, y = (int16x8_t)b;
        const int32x4_t low = vmull_s16(vget_low_s16(x), vget_low_s16(y));
        return sum + (IntVec)vpaddq_s32(low, vmull_high_s16(x, y));
#else
        return sum + ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16);
#endif
    }
    static OCTAVO_INLINE Vec floats(Sum sum) { return __builtin_convertvector(sum, Vec); }
    static OCTAVO_INLINE Sum start(int32_t) { return Sum{}; }

    // Of a linear's weight, packed, and what of an input is multiplied by it.
    typedef int16_t Input;
    static OCTAVO_INLINE int8_t packed(int8_t weight) { return weight; }
    static OCTAVO_INLINE IntVec packed_words(const int8_t* p) { return words(p, 2 * W); }
    static OCTAVO_INLINE IntVec input_words(const int8_t* p) { return words(p, 2 * W); }
    static int32_t begin(const int8_t*, int64_t) { return 0; }

    static OCTAVO_INLINE IntVec words(const int8_t* p, int64_t) {
#if OCTAVO_WIDTH == 8
        return (IntVec)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p));
#else
        typedef int8_t Narrow __attribute__((vector_size(2 * W)));
        typedef int16_t Wide __attribute__((vector_size(4 * W)));
        Narrow narrow;
        memcpy(&narrow, p, sizeof narrow);
        return (IntVec)__builtin_convertvector(narrow, Wide);
#endif
    }
    template <int C>
    static OCTAVO_INLINE void interleave(
        const int8_t* const* tokens, int64_t d, IntVec (&out)[C]
    ) {
        const int8_t *const first = tokens[0] + d, *const second = tokens[1] + d;
#if OCTAVO_WIDTH == 8
        static_assert(C == 2, "16 bytes at a time");
        const __m128i a = _mm_loadu_si128((const __m128i*)first);
        const __m128i b = _mm_loadu_si128((const __m128i*)second);
        out[0] = (IntVec)_mm256_cvtepi8_epi16(_mm_unpacklo_epi8(a, b));
        out[1] = (IntVec)_mm256_cvtepi8_epi16(_mm_unpackhi_epi8(a, b));
#else
        typedef int8_t Narrow __attribute__((vector_size(W)));
        for (int c = 0; c < C; c++) {
            Narrow a, b;
            memcpy(&a, first + c * W, sizeof a);
            memcpy(&b, second + c * W, sizeof b);
            out[c] = (__builtin_convertvector(a, IntVec) & 0xFFFF) |
                     (__builtin_convertvector(b, IntVec) << 16);
        }
#endif
    }
    // 8,191 · 127 · head_dim stays below 2^31 up to 2,064.
    static float query(const float* q, int64_t n, int32_t* words, int32_t* begin) {
        return quantize_query(q, n, 8191.0f, (int16_t*)words, begin);
    }
    static OCTAVO_INLINE void weigh(Vec weights, const float* scales, int64_t k, int32_t* words) {
        typedef int16_t Narrow __attribute__((vector_size(2 * W)));
        const IntVec rounded = round_low(weights * load(scales + k));
        const Narrow narrow = __builtin_convertvector(rounded, Narrow);
        memcpy((int16_t*)words + k, &narrow, sizeof narrow);
    }
    template <int C>
    static OCTAVO_INLINE void restore(Vec (&)[C]) {}
    static constexpr float MOST = 32767.0f;  // times 127 and a block's 128 keys: below 2^30
};

#if defined(OCTAVO_DOTPROD)
// A linear's weights and inputs, four a word, for instructions that multiply signed bytes.
struct SignedQuads {
    static constexpr int N = 4;
    typedef IntVec Sum;
    typedef int8_t Input;

    static OCTAVO_INLINE Sum add(Sum sum, IntVec a, IntVec b) {
        asm("sdot %0.4s, %1.16b, %2.16b" : "+w"(sum) : "w"(a), "w"(b));
        return sum;
    }
    static OCTAVO_INLINE int8_t packed(int8_t weight) { return weight; }
    static OCTAVO_INLINE IntVec packed_words(const int8_t* p) { return load((const int32_t*)p); }
    static OCTAVO_INLINE IntVec input_words(const int8_t* p) { return load((const int32_t*)p); }
    static int32_t begin(const int8_t*, int64_t) { return 0; }
};
#endif

// The same as `Pairs` in four bytes a word, for instructions that multiply unsigned by signed: keys plus 128 by
// queries of 8 bits, which adds 128 times the query's own sum, and weights of 8 bits by values.
struct Quads {
    static constexpr int N = 4;
    static constexpr bool COARSE = true;
    typedef IntVec Sum;

    static OCTAVO_STEP Sum add(Sum sum, IntVec a, IntVec b) {  // a is unsigned
#if defined(OCTAVO_AVX512)
        // Written out, since GCC 12 spills the sums of its own intrinsic.
        asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
#elif defined(OCTAVO_AVX_VNNI)
        asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
#else
        for (int i = 0; i < 32; i += 8) sum += ((a >> i) & 255) * ((b << (24 - i)) >> 24);
#endif
        return sum;
    }
    static OCTAVO_INLINE Vec floats(Sum sum) { return __builtin_convertvector(sum, Vec); }
    static OCTAVO_INLINE Sum start(int32_t begin) { return splat(begin); }

    typedef int8_t Input;
    static OCTAVO_INLINE int8_t packed(int8_t weight) { return int8_t(weight ^ 0x80); }
    static OCTAVO_INLINE IntVec packed_words(const int8_t* p) { return load((const int32_t*)p); }
    static OCTAVO_INLINE IntVec input_words(const int8_t* p) { return load((const int32_t*)p); }
    // What the sums of n inputs' products begin with: it undoes the 128.
    static int32_t begin(const int8_t* inputs, int64_t n) {
        Sum sums = Sum{};
        int64_t i = 0;
        for (; i + 4 * W <= n; i += 4 * W)
            sums = add(sums, splat(0x01010101), load((const int32_t*)(inputs + i)));
        int32_t sum = 0;
        for (int lane = 0; lane < W; lane++) sum += sums[lane];
        for (; i < n; i++) sum += inputs[i];
        return -128 * sum;
    }

    static OCTAVO_INLINE IntVec words(const int8_t* p, int64_t n) {
        IntVec v = IntVec{};
        if (n >= 4 * W) memcpy(&v, p, 4 * W);
        else memcpy(&v, p, 2 * W);
        return v ^ int32_t(0x80808080);
    }
    static OCTAVO_INLINE IntVec interleave_one(const int8_t* const* tokens, int64_t d) {
        IntVec v;
#if defined(OCTAVO_AVX512)
        const auto part = [&](int i) { return _mm_loadu_si128((const __m128i*)(tokens[i] + d)); };
        __m512i all = _mm512_castsi128_si512(part(0));
        all = _mm512_inserti32x4(all, part(1), 1);
        all = _mm512_inserti32x4(all, part(2), 2);
        v = (IntVec)_mm512_inserti32x4(all, part(3), 3);
#else
        for (int i = 0; i < 4; i++) memcpy((char*)&v + i * W, tokens[i] + d, W);
#endif
        // Four bytes of each token become neighbours, then bytes of the same element.
        constexpr IntVec index = lanes([](int i) { return i % 4 * (W / 4) + i / 4; });
        const ByteVec bytes = (ByteVec)shuffle(v, v, index);
        constexpr ByteVec within = byte_lanes([](int i) {
            return i / 16 * 16 + i % 4 * 4 + i % 16 / 4;
        });
        return (IntVec)shuffle(bytes, bytes, within);
    }
    // Of four vectors, each has four elements of every sixteen; `restore` brings their sums in order.
    template <int C>
    static OCTAVO_INLINE void interleave(
        const int8_t* const* tokens, int64_t d, IntVec (&out)[C]
    ) {
#if OCTAVO_WIDTH == 8
        static_assert(C == 2, "16 bytes at a time");
        __m128i v[4];
        for (int i = 0; i < 4; i++) v[i] = _mm_loadu_si128((const __m128i*)(tokens[i] + d));
        const __m128i low = _mm_unpacklo_epi8(v[0], v[1]), high = _mm_unpackhi_epi8(v[0], v[1]);
        const __m128i low2 = _mm_unpacklo_epi8(v[2], v[3]), high2 = _mm_unpackhi_epi8(v[2], v[3]);
        const auto join = [](__m128i a, __m128i b) {
            return (IntVec)_mm256_set_m128i(_mm_unpackhi_epi16(a, b), _mm_unpacklo_epi16(a, b));
        };
        out[0] = join(low, low2);
        out[1] = join(high, high2);
#else
        if constexpr (C == 4) {
            IntVec v[4];
            for (int i = 0; i < 4; i++) v[i] = load((const int32_t*)(tokens[i] + d));
            const IntVec low = zip<1, false>(v[0], v[1]), high = zip<1, true>(v[0], v[1]);
            const IntVec low2 = zip<1, false>(v[2], v[3]), high2 = zip<1, true>(v[2], v[3]);
            out[0] = zip<2, false>(low, low2);
            out[1] = zip<2, true>(low, low2);
            out[2] = zip<2, false>(high, high2);
            out[3] = zip<2, true>(high, high2);
        } else {
            for (int c = 0; c < C; c++) out[c] = interleave_one(tokens, d + c * W);
        }
#endif
    }
    template <int C>
    static OCTAVO_INLINE void restore(Vec (&sums)[C]) {
        if constexpr (C == 4) {
            // By lanes of four words.
            constexpr IntVec low = lanes([](int i) { return i % (W / 2) + i / (W / 2) * W; });
            constexpr IntVec high = low + W / 2;
            constexpr IntVec even = lanes([](int i) {
                return i / 4 % 2 * 8 + i % 4 + i / (W / 2) * W;
            });
            constexpr IntVec odd = even + 4;
            IntVec v[4];
            for (int i = 0; i < 4; i++) v[i] = (IntVec)sums[i];
            const IntVec a = shuffle(v[0], v[1], low), b = shuffle(v[2], v[3], low);
            const IntVec c = shuffle(v[0], v[1], high), d = shuffle(v[2], v[3], high);
            sums[0] = (Vec)shuffle(a, b, even);
            sums[1] = (Vec)shuffle(a, b, odd);
            sums[2] = (Vec)shuffle(c, d, even);
            sums[3] = (Vec)shuffle(c, d, odd);
        }
    }
    static float query(const float* q, int64_t n, int32_t* words, int32_t* begin) {
        const float scale = quantize_query(q, n, 127.0f, (int8_t*)words, begin);
        *begin *= -128;
        return scale;
    }
    static OCTAVO_INLINE void weigh(Vec weights, const float* scales, int64_t k, int32_t* words) {
        store((int8_t*)words + k, round_low(weights * load(scales + k)));
    }
    static constexpr float MOST = 255.0f;
};

// sums[r][c] += the product, over `depth` words, of row r and of W columns from the c-th W on, of which
// columns(i, words) gives the i-th words.
// SIGNED tells which side is unsigned for `Quads`: the columns if it is set, else the rows.
template <class Dot, int ROWS, int COLUMNS, bool SIGNED, class Columns>
OCTAVO_INLINE void multiply(
    const int32_t* rows, int64_t stride, int64_t depth, const Columns& columns,
    typename Dot::Sum (&sums)[ROWS][COLUMNS]
) {
    for (int64_t i = 0; i < depth; i++) {
        IntVec column[COLUMNS];
        columns(i, column);
        repeat<ROWS>(OCTAVO_EACH(r) {
            const IntVec row = splat(rows[r * stride + i]);
            repeat<COLUMNS>(OCTAVO_EACH(c) {
                sums[r][c] = SIGNED ? Dot::add(sums[r][c], column[c], row)
                                    : Dot::add(sums[r][c], row, column[c]);
            });
        });
    }
}

}  // namespace
}  // namespace octavo
