// A block's products by AMX, of packed keys and values: 16 rows at a time, by the 64 columns of a panel, of
// which 16 words lie as a register wants them.
#pragma once

#include "amx.h"
#include "attention_block.h"

namespace octavo {
namespace {

// Whether a Dot's words are multiplied so, and how: queries by keys, and weights by values. (A few rows by
// keys as they lie are left to vectors: products of 16 keys were no faster, since both wait for memory.)
template <class Dot>
struct Matrices {
    static constexpr bool ARE_MULTIPLIED = false;
};
template <>
struct Matrices<Quads> {
    static constexpr bool ARE_MULTIPLIED = true;
    // AMX multiplies signed bytes: nothing has to be added to keys, and nothing taken off the products.
    struct Keys : Quads {
        static OCTAVO_INLINE IntVec words(const int8_t* p, int64_t n) {
            return Quads::words(p, n) ^ int32_t(0x80808080);
        }
    };
    template <int C, int A, int B>
    static OCTAVO_INLINE void add_keys() {
        amx::add_signed_signed<C, A, B>();
    }
    template <int C, int A, int B>
    static OCTAVO_INLINE void add_values() {
        amx::add_unsigned_signed<C, A, B>();
    }
};
template <>
struct Matrices<Halves> {
    static constexpr bool ARE_MULTIPLIED = true;
    typedef Halves Keys;
    template <int C, int A, int B>
    static OCTAVO_INLINE void add_keys() {
        amx::add_halves<C, A, B>();
    }
    template <int C, int A, int B>
    static OCTAVO_INLINE void add_values() {
        amx::add_halves<C, A, B>();
    }
};

static_assert(COLUMNS == 4 && W == amx::WORDS && AMX_TILE == amx::ROWS, "a panel is four registers");

// out[16, PANEL], `out_stride` words a row, is the product of 16 rows of n_words words by a panel's columns.
template <class Dot, bool ARE_KEYS>
OCTAVO_INLINE void multiply_panel(
    const int32_t* rows, int64_t stride, const int32_t* panel, int64_t n_words, void* out,
    int64_t out_stride
) {
    repeat<4>(OCTAVO_EACH(c) { amx::clear<c>(); });
    for (int64_t w = 0; w < n_words; w += amx::WORDS) {
        amx::load<4>(rows + w, stride);
        repeat<4>(OCTAVO_EACH(c) {
            constexpr int OWN = 5 + c % 3;
            amx::load<OWN>(panel + w * PANEL + c * amx::WORDS, PANEL);
            if constexpr (ARE_KEYS) Matrices<Dot>::template add_keys<c, 4, OWN>();
            else Matrices<Dot>::template add_values<c, 4, OWN>();
        });
    }
    repeat<4>(OCTAVO_EACH(c) { amx::store<c>((int32_t*)out + c * amx::WORDS, out_stride); });
}

}  // namespace
}  // namespace octavo
