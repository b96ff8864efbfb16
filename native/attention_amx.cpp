// 512-bit vectors, and AMX for many rows.
#include "isa.h"
#if defined(OCTAVO_KNOWS_AMX)
#define OCTAVO_KERNEL attention_amx
#define OCTAVO_WIDTH 16
#define OCTAVO_INTEGERS Quads
#define OCTAVO_HAS_HALVES true
#define OCTAVO_AMX
#include "attention.h"
#include "target_avx512.h"
#include "attention_kernel.h"
#include "target_end.h"
#endif
