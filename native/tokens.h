// How a call's tokens are shared out among threads.
#pragma once

#include <cstdint>
#include <vector>

#include "threads.h"

namespace octavo {

// f(token, row) of each token, with a row of n_columns floats that is the thread's own.
//
// `work` is what a token takes, in multiply-adds.
template <typename F>
void for_each_token(int64_t n_tokens, int64_t work, int64_t n_threads, int64_t n_columns, const F& f) {
    const int64_t n = n_tokens > 1 ? threads_for(n_tokens * work, n_threads) : 1;
    (void)n;
#if defined(_OPENMP)
#pragma omp parallel num_threads(int(n)) if (n > 1)
#endif
    {
        std::vector<float> row(n_columns);
#if defined(_OPENMP)
#pragma omp for schedule(static)
#endif
        for (int64_t token = 0; token < n_tokens; token++) f(token, row.data());
    }
}

}  // namespace octavo
