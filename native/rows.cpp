// The library's door to the rows: shares a call's tokens out.
#include "rows.h"

#include "isa.h"
#include "tokens.h"

namespace octavo {
namespace {

constexpr int64_t COLUMN_WORK = 32;  // of a column, in multiply-adds

RowsKernel kernel_of(int isa) {
    switch (isa) {
#if defined(__x86_64__)
        case AVX2: return rows_avx2;
        case AVX512: return rows_avx512;
        case AVX512_EMULATED: return rows_avx512_emulated;
#endif
        default: return rows_portable;
    }
}

void run(const RowsCall& call, RowsKernel kernel) {
    const auto one = [&](int64_t token, float* row) { kernel(call, token, row); };
    for_each_token(
        call.n_tokens, COLUMN_WORK * call.n_columns, call.n_threads, call.n_columns, one
    );
}

}  // namespace
}  // namespace octavo

extern "C" const int64_t octavo_rows_bytes = sizeof(octavo::RowsCall);

// 0, or 1 where the machine does not have the instructions.
extern "C" int octavo_rows(const octavo::RowsCall* call, int isa) {
    if (!octavo::runs(isa)) return 1;
    octavo::run(*call, octavo::kernel_of(octavo::without_products(isa)));
    return 0;
}
