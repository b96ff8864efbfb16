// One token's queries, keys and values, written once and built for each instruction set.
#include "append.h"
#include "attention.h"
#include "vectors.h"

namespace octavo {
namespace {

// Pairs of the two halves, turned by their angles (Su et al. 2021), and rounded to T.
template <typename T>
void turn(const T* x, const float* cos, const float* sin, int64_t n, T* out) {
    const int64_t half = n / 2;
    for (int64_t i = 0; i < half; i += W) {
        const Vec a = load(x + i), b = load(x + half + i), c = load(cos + i), s = load(sin + i);
        store(out + i, a * c - b * s);
        store(out + half + i, b * c + a * s);
    }
}

// Into the page, as its dtype has it.
template <typename T>
void put(const T* x, int64_t n, int64_t dtype, void* pages, uint16_t* scales, int64_t at) {
    if (dtype == FP32) {
        for (int64_t i = 0; i < n; i += W) store((float*)pages + at * n + i, load(x + i));
        return;
    }
    if (dtype == BF16) {
        for (int64_t i = 0; i < n; i += W) store((uint16_t*)pages + at * n + i, load(x + i));
        return;
    }
    uint16_t scale[W];
    store(scale, splat(largest_magnitude(x, n) / 127.0f));
    if (scale[0] == 0) scale[0] = 0x3F80;  // 1 in bf16
    scales[at] = scale[0];
    const Vec divisor = splat(widen(scale[0]));
    for (int64_t i = 0; i < n; i += W) {
        IntVec q = round_to_int(load(x + i) / divisor);
        q = q > 127 ? splat(int32_t(127)) : q < -127 ? splat(int32_t(-127)) : q;
        store((int8_t*)pages + at * n + i, q);
    }
}

template <typename T>
void append_token(const AppendCall& call, int64_t token, T* head) {
    const int64_t n = call.head_dim;
    const float *cos = call.cos + token * n / 2, *sin = call.sin + token * n / 2;
    for (int64_t h = 0; h < call.n_heads; h++) {
        const int64_t at = (token * call.n_heads + h) * n;
        turn((const T*)call.q + at, cos, sin, n, (T*)call.turned + at);
    }
    const int64_t page = call.slots[token] / call.page_size, offset = call.slots[token] % call.page_size;
    for (int64_t h = 0; h < call.n_kv_heads; h++) {
        const int64_t from = (token * call.n_kv_heads + h) * n;
        const int64_t to = (page * call.n_kv_heads + h) * call.page_size + offset;
        turn((const T*)call.k + from, cos, sin, n, head);
        put(head, n, call.kv_dtype, call.keys, call.key_scales, to);
        put((const T*)call.v + from, n, call.kv_dtype, call.values, call.value_scales, to);
    }
}

void run(const AppendCall& call, int64_t token, float* head) {
    if (call.q_dtype == BF16) append_token(call, token, (uint16_t*)head);
    else append_token(call, token, head);
}

}  // namespace

const AppendKernel OCTAVO_KERNEL = run;

}  // namespace octavo
