// 256-bit vectors, and products of bytes: of int8 keys and values alone, see `without_bytes`.
#include "isa.h"
#if defined(OCTAVO_KNOWS_AVX_VNNI)
#define OCTAVO_KERNEL attention_avx_vnni
#define OCTAVO_WIDTH 8
#define OCTAVO_INTEGERS Quads
#define OCTAVO_NO_SINGLES
#include "attention.h"
#include "target_avx_vnni.h"
#include "attention_kernel.h"
#include "target_end.h"
#endif
