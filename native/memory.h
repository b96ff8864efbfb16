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
    explicit Memory(int64_t n) : numbers((T*)operator new(n * sizeof(T), LINE_ALIGNMENT)), size(n) {}
    ~Memory() { operator delete(numbers, LINE_ALIGNMENT); }
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;

    static constexpr std::align_val_t LINE_ALIGNMENT{64};
    T* const numbers;
    const int64_t size;
};

// The same, one at a time, kept for the thread's next call unless it is more than MOST bytes: the system gives
// much memory anew each time, a page at a time as it is first written, and takes it back.
template <typename T>
class KeptMemory {
   public:
    static constexpr int64_t MOST = 16 << 20;

    explicit KeptMemory(int64_t n) {
        static thread_local std::unique_ptr<Memory<T>> kept;
        std::unique_ptr<Memory<T>>& place = n * int64_t(sizeof(T)) > MOST ? own : kept;
        if (!place || place->size < n) {
            place.reset();  // before there is another
            place.reset(new Memory<T>(n));
        }
        numbers = place->numbers;
    }

    T* numbers;

   private:
    std::unique_ptr<Memory<T>> own;
};

}  // namespace octavo
