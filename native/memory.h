// Memory of a call.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace octavo {

// Numbers that begin with a line of the cache, so that no more of them than have to be are crossed by a
// vector or a matrix. They hold whatever the memory held before.
template <typename T>
struct Memory {
    explicit Memory(int64_t n) : numbers((T*)operator new(n * sizeof(T), LINE_ALIGNMENT)) {}
    ~Memory() { operator delete(numbers, LINE_ALIGNMENT); }
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;

    static constexpr std::align_val_t LINE_ALIGNMENT{64};
    T* const numbers;
};

// The same, one at a time, kept for the thread's next call unless it is more than MOST bytes: the system gives
// much memory anew each time, a page at a time as it is first written, and takes it back.
template <typename T>
class KeptMemory {
   public:
    static constexpr int64_t MOST = 16 << 20;

    explicit KeptMemory(int64_t n) {
        static thread_local std::unique_ptr<Memory<T>> kept;
        static thread_local int64_t n_kept = 0;
        const bool is_much = n * int64_t(sizeof(T)) > MOST;
        if (is_much) own.reset(new Memory<T>(n));
        else if (n > n_kept) {
            kept.reset();  // before there is another
            n_kept = 0;
            kept.reset(new Memory<T>(n));
            n_kept = n;
        }
        numbers = is_much ? own->numbers : n ? kept->numbers : nullptr;
    }

    T* numbers;

   private:
    std::unique_ptr<Memory<T>> own;
};

}  // namespace octavo
