// One token's row, written once and built for each instruction set.
#include "rows.h"
#include "vectors.h"

namespace octavo {
namespace {

template <typename T>
void rms_norm(const T* x, const T* weight, float* row, int64_t n, float eps) {
    Vec squares[2] = {};
    int64_t k = 0;
    for (; k + 2 * W <= n; k += 2 * W) {
        const Vec a = load(x + k), b = load(x + k + W);
        squares[0] += a * a;
        squares[1] += b * b;
    }
    if (k < n) squares[0] += load(x + k) * load(x + k);
    const Vec factor = splat(1.0f / sqrtf(sum(squares[0] + squares[1]) / float(n) + eps));
    for (int64_t i = 0; i < n; i += W) store(row + i, load(x + i) * factor * load(weight + i));
}

template <typename T>
void silu_mul(const T* gate, const T* up, float* row, int64_t n) {
    for (int64_t i = 0; i < n; i += W) {
        const Vec x = load(gate + i);
        const IntVec negative = x < splat(0.0f);
        const Vec e = exp2<false>((negative ? x : -x) * splat(LOG2_E));
        const Vec sigmoid = (negative ? e : splat(1.0f)) / (splat(1.0f) + e);
        store(row + i, x * sigmoid * load(up + i));
    }
}

// scale = max|x| / 127 and q = x / scale, to the nearest, ties to even. A NaN makes the scale NaN.
void quantize_row(const float* row, int64_t n, int8_t* q, float* scale) {
    const float largest = largest_magnitude(row, n);
    *scale = largest == 0 ? 1.0f : largest / 127.0f;
    const Vec divisor = splat(*scale);
    for (int64_t i = 0; i < n; i += W) store(q + i, round_to_int(load(row + i) / divisor));
}

template <typename T>
void run_token(const RowsCall& call, int64_t token, float* row) {
    const int64_t n = call.n_columns, at = token * n;
    const T *x = (const T*)call.x + at, *second = (const T*)call.second;
    if (call.added) {
        const T* const added = (const T*)call.added + at;
        T* const total = (T*)call.total + at;
        for (int64_t i = 0; i < n; i += W) store(total + i, load(x + i) + load(added + i));
        x = total;
    }
    if (call.operation == RMS_NORM) rms_norm(x, second, row, n, float(call.eps));
    else if (call.operation == SILU_MUL) silu_mul(x, second + at, row, n);
    else
        for (int64_t i = 0; i < n; i += W) store(row + i, load(x + i));
    if (call.scale) quantize_row(row, n, (int8_t*)call.out + at, call.scale + token);
    else
        for (int64_t i = 0; i < n; i += W) store((T*)call.out + at + i, load(row + i));
}

void run(const RowsCall& call, int64_t token, float* row) {
    if (call.is_bf16) run_token<uint16_t>(call, token, row);
    else run_token<float>(call, token, row);
}

}  // namespace

const RowsKernel OCTAVO_KERNEL = run;

}  // namespace octavo
