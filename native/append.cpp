// The library's door to the cache: shares a call's tokens out.
#include "append.h"

#include "isa.h"
#include "tokens.h"

namespace octavo {
namespace {

constexpr int64_t ELEMENT_WORK = 8;  // of a head's element, in multiply-adds

void append(const AppendCall& call, AppendKernel kernel) {
    const auto one = [&](int64_t token, float* head) { kernel(call, token, head); };
    const int64_t n_elements = (call.n_heads + 2 * call.n_kv_heads) * call.head_dim;
    for_each_token(call.n_tokens, ELEMENT_WORK * n_elements, call.n_threads, call.head_dim, one);
}

}  // namespace
}  // namespace octavo

extern "C" const int64_t octavo_rotary_append_bytes = sizeof(octavo::AppendCall);

// 0, or 1 where the machine does not have the instructions. It is not built for wider ones than AVX2.
extern "C" int octavo_rotary_append(const octavo::AppendCall* call, int isa) {
    if (!octavo::runs(isa)) return 1;
#if defined(__x86_64__)
    if (isa >= octavo::AVX2) {
        octavo::append(*call, octavo::append_avx2);
        return 0;
    }
#endif
    octavo::append(*call, octavo::append_portable);
    return 0;
}
