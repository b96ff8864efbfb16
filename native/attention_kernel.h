// One piece of paged attention with an online softmax, written once and built for each instruction
// set (Milakov & Gimelshein 2018, algorithm 3; Dao et al. 2022, algorithm 1).
//
// Vectors are GCC's and Clang's own (`vector_size`), which become whatever the target has. Nothing of
// the standard library's templates is used here: a copy of one that was built for wide instructions
// could be linked into code that runs without them.
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "attention.h"

namespace octavo {
namespace {

constexpr int W = OCTAVO_WIDTH;
typedef float Vec __attribute__((vector_size(4 * W)));
typedef int32_t IntVec __attribute__((vector_size(4 * W)));
typedef uint16_t HalfVec __attribute__((vector_size(2 * W)));

constexpr int64_t FEW_ROWS = 8;  // up to which keys are multiplied as they lie
constexpr int TILE = 6;          // rows whose sums stay in registers
constexpr float NEVER = -__builtin_inff();

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t within(int64_t x, int64_t high) { return x < 0 ? 0 : x > high ? high : x; }

inline Vec load(const float* p) {
    Vec v;
    memcpy(&v, p, sizeof v);
    return v;
}
inline Vec load(const uint16_t* p) {  // a bf16 number is the upper half of an fp32 one
    HalfVec half;
    memcpy(&half, p, sizeof half);
    return (Vec)(__builtin_convertvector(half, IntVec) << 16);
}
inline void store(float* p, Vec v) { memcpy(p, &v, sizeof v); }
inline Vec splat(float x) { return x - Vec{}; }

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
    for (int half = W / 2; half; half /= 2) {
        IntVec index;
        for (int i = 0; i < W; i++) index[i] = i ^ half;
#if defined(__clang__)
        Vec other;
        for (int i = 0; i < W; i++) other[i] = v[index[i]];
        v += other;
#else
        v += __builtin_shuffle(v, index);
#endif
    }
    return v[0];
}

// 2^x for x <= 0, to 2e-7 of it; exactly 0 below 2^-126, and of -infinity.
inline Vec exp2(Vec x) {
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

// What a thread works in.
struct Scratch {
    float* rows;     // [n_rows, head_dim] queries, scaled
    float* keys;     // [head_dim, BLOCK_KEYS]
    float* weights;  // [n_rows, BLOCK_KEYS]: scores, then what values are multiplied by
    float* parts;    // [n_rows, head_dim + 2], as `Piece` leaves them
};

// The place of one token's key or value.
template <typename T>
inline const T* token(const AttentionCall& call, const void* pages, const Piece& piece, int64_t at) {
    const int64_t page = call.page_table[piece.sequence * call.table_stride + at / call.page_size];
    const int64_t row = (page * call.n_kv_heads + piece.kv_head) * call.page_size;
    return (const T*)pages + (row + at % call.page_size) * call.head_dim;
}

// Scores of ROWS rows and 2 * W keys, keys lying as [head_dim][BLOCK_KEYS].
template <int ROWS>
void score_tile(const float* rows, const float* keys, int64_t head_dim, float* scores) {
    Vec low[ROWS], high[ROWS];
    for (int r = 0; r < ROWS; r++) low[r] = high[r] = Vec{};
    for (int64_t d = 0; d < head_dim; d++) {
        const Vec first = load(keys + d * BLOCK_KEYS), second = load(keys + d * BLOCK_KEYS + W);
        for (int r = 0; r < ROWS; r++) {
            const Vec q = splat(rows[r * head_dim + d]);
            low[r] += q * first;
            high[r] += q * second;
        }
    }
    for (int r = 0; r < ROWS; r++) {
        store(scores + r * BLOCK_KEYS, low[r]);
        store(scores + r * BLOCK_KEYS + W, high[r]);
    }
}

// sums[r] += weights[r][k] * values[k] over n keys of a page, for ROWS rows and 2 * W elements.
template <int ROWS, typename T>
void value_tile(
    const float* weights, const T* values, int64_t n, int64_t stride, float* sums, int64_t sums_stride
) {
    Vec low[ROWS], high[ROWS];
    for (int r = 0; r < ROWS; r++) {
        low[r] = load(sums + r * sums_stride);
        high[r] = load(sums + r * sums_stride + W);
    }
    for (int64_t k = 0; k < n; k++) {
        const Vec first = load(values + k * stride), second = load(values + k * stride + W);
        for (int r = 0; r < ROWS; r++) {
            const Vec p = splat(weights[r * BLOCK_KEYS + k]);
            low[r] += p * first;
            high[r] += p * second;
        }
    }
    for (int r = 0; r < ROWS; r++) {
        store(sums + r * sums_stride, low[r]);
        store(sums + r * sums_stride + W, high[r]);
    }
}

// A tile's function for each number of rows, so that the compiler knows it.
#define OCTAVO_BY_ROWS(n, CALL) \
    switch (n) {                \
        case 1: CALL(1); break; \
        case 2: CALL(2); break; \
        case 3: CALL(3); break; \
        case 4: CALL(4); break; \
        case 5: CALL(5); break; \
        default: CALL(6);       \
    }

// Scores of n keys from `begin` on, in logarithms to the base 2.
template <typename T>
void score_block(
    const AttentionCall& call, const Piece& piece, int64_t begin, int64_t n, int64_t n_rows,
    const Scratch& scratch
) {
    const int64_t D = call.head_dim;
    if (n_rows <= FEW_ROWS) {  // turning the keys would cost as much as multiplying them
        for (int64_t k = 0; k < n; k++) {
            const T* key = token<T>(call, call.keys, piece, begin + k);
            for (int64_t r = 0; r < n_rows; r++) {
                const float* row = scratch.rows + r * D;
                Vec a = Vec{}, b = Vec{};
                for (int64_t d = 0; d < D; d += 2 * W) {
                    a += load(row + d) * load(key + d);
                    b += load(row + d + W) * load(key + d + W);
                }
                scratch.weights[r * BLOCK_KEYS + k] = sum(a + b);
            }
        }
        return;
    }
    for (int64_t k = 0; k < n; k++) {
        const T* key = token<T>(call, call.keys, piece, begin + k);
        for (int64_t d = 0; d < D; d++) scratch.keys[d * BLOCK_KEYS + k] = widen(key[d]);
    }
    for (int64_t k = 0; k < n; k += 2 * W)
        for (int64_t r = 0; r < n_rows; r += TILE) {
#define OCTAVO_CALL(ROWS)                                                              \
    score_tile<ROWS>(                                                                  \
        scratch.rows + r * D, scratch.keys + k, D, scratch.weights + r * BLOCK_KEYS + k \
    )
            OCTAVO_BY_ROWS(least(TILE, n_rows - r), OCTAVO_CALL)
#undef OCTAVO_CALL
        }
}

// Turn a row's scores into weights, where it sees the keys low…high-1 of the block; maximum, total
// and the sums so far are brought to the new maximum.
inline void soften(float* scores, int64_t low, int64_t high, float* part, int64_t head_dim) {
    for (int64_t k = 0; k < low; k++) scores[k] = NEVER;
    for (int64_t k = high; k < BLOCK_KEYS; k++) scores[k] = NEVER;
    Vec most = splat(part[0]);
    for (int64_t k = 0; k < BLOCK_KEYS; k += W) {
        const Vec s = load(scores + k);
        most = s > most ? s : most;
    }
    float highest = most[0];
    for (int i = 1; i < W; i++) highest = most[i] > highest ? most[i] : highest;
    if (highest == NEVER) {  // nothing seen yet
        for (int64_t k = 0; k < BLOCK_KEYS; k++) scores[k] = 0;
        return;
    }
    Vec added = Vec{};
    for (int64_t k = 0; k < BLOCK_KEYS; k += W) {
        const Vec p = exp2(load(scores + k) - splat(highest));
        store(scores + k, p);
        added += p;
    }
    const float correction = exp2f(part[0] - highest);
    part[0] = highest;
    part[1] = part[1] * correction + sum(added);
    if (correction != 1.0f)
        for (int64_t d = 0; d < head_dim; d += W)
            store(part + 2 + d, load(part + 2 + d) * splat(correction));
}

// Divide a row's sums by its total, into out.
template <typename T>
void finish(const AttentionCall& call, const Piece& piece, int64_t row, const float* part) {
    const int64_t group = call.group(), head = piece.kv_head * group + row % group;
    T* out = (T*)call.out +
             ((piece.first_token + row / group) * call.n_heads + head) * call.head_dim;
    for (int64_t d = 0; d < call.head_dim; d++) narrow(part[2 + d] / part[1], out + d);
}

template <typename T>
void run_piece(const AttentionCall& call, const Piece& piece, float* memory, float* part) {
    const int64_t D = call.head_dim, group = call.group(), n_rows = piece.n_queries * group;
    const int64_t part_stride = D + 2;
    Scratch scratch;
    scratch.rows = memory;
    scratch.keys = scratch.rows + n_rows * D;
    scratch.weights = scratch.keys + BLOCK_KEYS * D;
    scratch.parts = part ? part : scratch.weights + n_rows * BLOCK_KEYS;
    // exp(x) is 2^(x log2 e); the factor goes into the queries once.
    const float scale = 1.4426950408889634f / sqrtf(float(D));
    for (int64_t r = 0; r < n_rows; r++) {
        const int64_t head = piece.kv_head * group + r % group;
        const T* q = (const T*)call.q + ((piece.first_token + r / group) * call.n_heads + head) * D;
        for (int64_t d = 0; d < D; d++) scratch.rows[r * D + d] = widen(q[d]) * scale;
        float* own = scratch.parts + r * part_stride;
        for (int64_t d = 1; d < part_stride; d++) own[d] = 0;
        own[0] = NEVER;
    }
    for (int64_t begin = piece.key_begin; begin < piece.key_end; begin += BLOCK_KEYS) {
        const int64_t n = least(BLOCK_KEYS, piece.key_end - begin);
        score_block<T>(call, piece, begin, n, n_rows, scratch);
        for (int64_t r = 0; r < n_rows; r++) {
            const int64_t position = piece.position + r / group;
            const int64_t low = call.window ? position - call.window + 1 - begin : 0;
            soften(
                scratch.weights + r * BLOCK_KEYS, within(low, n), within(position + 1 - begin, n),
                scratch.parts + r * part_stride, D
            );
        }
        for (int64_t k = 0; k < n;) {  // the block's keys of one page at a time
            const int64_t in_page = call.page_size - (begin + k) % call.page_size;
            const int64_t n_page = least(in_page, n - k);
            const T* values = token<T>(call, call.values, piece, begin + k);
            for (int64_t r = 0; r < n_rows; r += TILE)
                for (int64_t d = 0; d < D; d += 2 * W) {
#define OCTAVO_CALL(ROWS)                                                             \
    value_tile<ROWS, T>(                                                              \
        scratch.weights + r * BLOCK_KEYS + k, values + d, n_page, D,                  \
        scratch.parts + r * part_stride + 2 + d, part_stride                          \
    )
                    OCTAVO_BY_ROWS(least(TILE, n_rows - r), OCTAVO_CALL)
#undef OCTAVO_CALL
                }
            k += n_page;
        }
    }
    if (!part)
        for (int64_t r = 0; r < n_rows; r++)
            finish<T>(call, piece, r, scratch.parts + r * part_stride);
}

template <typename T>
void merge_parts(const AttentionCall& call, const Piece& piece, float* parts, int64_t n, int64_t size) {
    const int64_t stride = call.head_dim + 2;
    for (int64_t r = 0; r < piece.n_queries * call.group(); r++) {
        float highest = NEVER;
        for (int64_t i = 0; i < n; i++) {
            const float own = parts[i * size + r * stride];
            highest = own > highest ? own : highest;
        }
        float* all = parts + r * stride;  // the first part takes the others in
        for (int64_t i = 0; i < n; i++) {
            const float* part = parts + i * size + r * stride;
            const float factor = exp2f(part[0] - highest);
            for (int64_t d = 1; d < stride; d++)
                all[d] = i ? all[d] + part[d] * factor : part[d] * factor;
        }
        finish<T>(call, piece, r, all);
    }
}

void run(const AttentionCall& call, const Piece& piece, float* scratch, float* part) {
    if (call.is_bf16) run_piece<uint16_t>(call, piece, scratch, part);
    else run_piece<float>(call, piece, scratch, part);
}

void merge(const AttentionCall& call, const Piece& piece, float* parts, int64_t n, int64_t size) {
    if (call.is_bf16) merge_parts<uint16_t>(call, piece, parts, n, size);
    else merge_parts<float>(call, piece, parts, n, size);
}

}  // namespace

const AttentionKernel OCTAVO_KERNEL = {run, merge};

}  // namespace octavo
