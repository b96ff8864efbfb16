// Memory of a call.
#pragma once

#include <cstdint>
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

}  // namespace octavo
