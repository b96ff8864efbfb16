// The library's door to the cache: shares a call's tokens out.
#include "append.h"

#include "isa.h"
#include "tokens.h"

namespace octavo {
namespace {

constexpr int64_t FEW_TOKENS = 4;

void append(const AppendCall& call, AppendKernel kernel) {
    const auto one = [&](int64_t token, float* head) { kernel(call, token, head); };
    for_each_token(call.n_tokens, FEW_TOKENS, call.n_threads, call.head_dim, one);
}

}  // namespace
}  // namespace octavo

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
