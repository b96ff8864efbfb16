// The library's door to the rows: shares a call's tokens out.
#include "rows.h"

#include <vector>

#include "isa.h"

namespace octavo {
namespace {

RowsKernel kernel_of(int isa) {
#if defined(__x86_64__)
    if (isa == EMULATED) return rows_emulated;
    if (isa == AVX512) return rows_avx512;
    if (isa == AVX2) return rows_avx2;
#endif
    (void)isa;
    return rows_portable;
}

void run(const RowsCall& call, RowsKernel kernel) {
#if defined(_OPENMP)
#pragma omp parallel num_threads(int(call.n_threads)) if (call.n_tokens > 1 && call.n_threads > 1)
#endif
    {
        std::vector<float> row(call.n_columns);
#if defined(_OPENMP)
#pragma omp for schedule(static)
#endif
        for (int64_t token = 0; token < call.n_tokens; token++) kernel(call, token, row.data());
    }
}

}  // namespace
}  // namespace octavo

// 0, or 1 where the machine does not have the instructions.
extern "C" int octavo_rows(const octavo::RowsCall* call, int isa) {
    if (!octavo::runs(isa)) return 1;
    octavo::run(*call, octavo::kernel_of(isa));
    return 0;
}
