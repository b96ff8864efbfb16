// How a call's tokens are shared out among threads.
#pragma once

#include <cstdint>
#include <vector>

namespace octavo {

// f(token, row) of each token, with a row of n_columns floats that is the thread's own; by one thread for
// up to `few` tokens, where waking another would take longer.
template <typename F>
void for_each_token(int64_t n_tokens, int64_t few, int64_t n_threads, int64_t n_columns, const F& f) {
    const bool several = n_tokens > few && n_threads > 1;
    (void)several;
#if defined(_OPENMP)
#pragma omp parallel num_threads(int(n_threads)) if (several)
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
