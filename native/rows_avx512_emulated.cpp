// AVX-512's vectors by AVX2's instructions: for tests on machines that lack the others.
#if defined(__x86_64__)
#define OCTAVO_KERNEL rows_avx512_emulated
#define OCTAVO_WIDTH 16
#include "rows.h"
#include "target_avx2.h"
#include "rows_kernel.h"
#include "target_end.h"
#endif
