// How many threads share a call's work out.
#pragma once

#include <cstdint>

namespace octavo {

// Multiply-adds from which on a second thread is woken: one does fewer in 10 to 30 us, and to wake
// another and wait for it takes 5. Where other processes compute too it takes as long as the system lets
// a thread wait for its turn, which may be milliseconds.
constexpr int64_t SHARED_WORK = 1 << 18;

inline int64_t threads_for(int64_t work, int64_t n_threads) {
    return work < SHARED_WORK || n_threads < 1 ? 1 : n_threads;
}

}  // namespace octavo
