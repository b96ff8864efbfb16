#include "isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace octavo {
namespace {

#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni");
}

#if defined(OCTAVO_KNOWS_AVX_VNNI)
// Not every compiler knows its name. Asked once: a virtual machine's processor answers slowly.
bool has_avx_vnni() {
    static const bool has = [] {
        unsigned a, b, c, d;
        return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
    }();
    return has && has_avx2();
}
#endif

#if defined(OCTAVO_KNOWS_AMX)
// Its registers are 8 KiB, which Linux keeps only for a process that has asked for them
// (Documentation/arch/x86/xstate.rst); an older one has no such call, and refuses.
bool has_amx() {
    static const bool has = [] {
        constexpr unsigned BF16 = 1 << 22, TILES = 1 << 24, BYTES = 1 << 25, ALL = BF16 | TILES | BYTES;
        constexpr int REQUEST = 0x1023, REGISTERS = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
        unsigned a, b, c, d;
        return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & ALL) == ALL && has_avx512() &&
               has_bf16_products() && !syscall(SYS_arch_prctl, REQUEST, REGISTERS);
    }();
    return has;
}
#endif
#endif

#if defined(__aarch64__)
bool has_dotprod() {
#if defined(__linux__)
    return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#elif defined(__APPLE__)
    return true;  // all that Apple has built for its computers
#else
    return false;
#endif
}
#endif

}  // namespace

bool runs(int isa) {
    switch (isa) {
        case PORTABLE: return true;
#if defined(__x86_64__)
        case AVX2: return has_avx2();
        case AVX512: return has_avx512();
        case AVX_VNNI_EMULATED: return has_avx2();
        case AVX512_EMULATED: return has_avx2();
        case AMX_EMULATED: return has_avx2();
#endif
#if defined(OCTAVO_KNOWS_AVX_VNNI)
        case AVX_VNNI: return has_avx_vnni();
#endif
#if defined(OCTAVO_KNOWS_AMX)
        case AMX: return has_amx();
#endif
#if defined(__aarch64__)
        case DOTPROD: return has_dotprod();
#endif
        default: return false;
    }
}

Isa best_isa() {
    for (int isa = DOTPROD; isa > PORTABLE; isa--)
        if (runs(isa)) return Isa(isa);
    return PORTABLE;
}

bool has_bf16_products() {
#if defined(__x86_64__)
    return __builtin_cpu_supports("avx512bf16");
#else
    return false;
#endif
}

}  // namespace octavo

extern "C" {

// The widest that this machine runs.
int octavo_best_isa() { return octavo::best_isa(); }

int octavo_runs(int isa) { return octavo::runs(isa); }

}  // extern "C"
