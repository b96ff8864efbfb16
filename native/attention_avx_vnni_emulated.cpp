// What AVX-VNNI's kernel does to int8, by AVX2's instructions: slow, and for tests on machines that lack
// the other.
#if defined(__x86_64__)
#define OCTAVO_KERNEL attention_avx_vnni_emulated
#define OCTAVO_WIDTH 8
#define OCTAVO_INTEGERS Quads
#define OCTAVO_NO_SINGLES
#include "attention.h"
#include "target_avx2.h"
#include "attention_kernel.h"
#include "target_end.h"
#endif
