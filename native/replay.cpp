// Calls of the library in the order in which they were recorded, made again without Python between them.
#include <cstdint>

namespace octavo {

// Every other door of the library takes a call's address and the instructions, and gives 0.
struct RecordedCall {
    int (*function)(const void* call, int isa);
    const void* call;
    int64_t isa;
};

}  // namespace octavo

// 0, or 1 where one of them could not run; those after it are not tried.
extern "C" int octavo_replay(const octavo::RecordedCall* calls, int64_t n_calls) {
    for (int64_t i = 0; i < n_calls; i++)
        if (calls[i].function(calls[i].call, int(calls[i].isa))) return 1;
    return 0;
}
