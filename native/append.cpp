// The library's door to the cache: shares a call's tokens out.
#include "append.h"

#include <vector>

#include "isa.h"

namespace octavo {
namespace {

constexpr int64_t FEW_TOKENS = 4;  // up to which waking a thread takes longer

void append(const AppendCall& call, AppendKernel kernel) {
#if defined(_OPENMP)
    const bool several = call.n_tokens > FEW_TOKENS && call.n_threads > 1;
#pragma omp parallel num_threads(int(call.n_threads)) if (several)
#endif
    {
        std::vector<float> head(call.head_dim);
#if defined(_OPENMP)
#pragma omp for schedule(static)
#endif
        for (int64_t token = 0; token < call.n_tokens; token++) kernel(call, token, head.data());
    }
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
