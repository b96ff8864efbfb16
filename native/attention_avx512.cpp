// 512-bit vectors.
#if defined(__x86_64__)
#define OCTAVO_KERNEL attention_avx512
#define OCTAVO_WIDTH 16
#define OCTAVO_INTEGERS Quads
#define OCTAVO_HAS_HALVES has_bf16_products()
#include "attention.h"
#include "isa.h"
#include "target_avx512.h"
#include "attention_kernel.h"
#include "target_end.h"
#endif
