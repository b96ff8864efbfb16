// What AMX's kernel does to int8 and bf16, by AVX2's instructions: slow, and for tests on machines that lack
// the others.
#if defined(__x86_64__)
#define OCTAVO_KERNEL attention_amx_emulated
#define OCTAVO_WIDTH 16
#define OCTAVO_INTEGERS Quads
#define OCTAVO_NO_SINGLES
#define OCTAVO_HAS_HALVES true
#define OCTAVO_AMX
#include "attention.h"
#include "target_avx2.h"
#include "attention_kernel.h"
#include "target_end.h"
#endif
