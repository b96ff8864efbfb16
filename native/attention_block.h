// A block of keys: where its tokens are, what scales they have, and how they are packed.
#pragma once

#include "attention.h"
#include "products.h"

namespace octavo {
namespace {

// A head's tokens of a page, which lie one after another: the first one's place, in tokens of one head, and
// how many they are.
struct Run {
    int64_t slot, length;
};

// From the token `begin` on, and before `end`.
inline Run find_run(
    const AttentionCall& call, const Piece& piece, int64_t begin, int64_t end, int64_t kv_head
) {
    const int64_t P = call.page_size, page = begin / P, offset = begin - page * P;
    const int64_t* table = call.page_table + piece.sequence * call.table_stride;
    return {(table[page] * call.n_kv_heads + kv_head) * P + offset, least(P - offset, end - begin)};
}

// Of one key head. The last tokens may stand there twice, so that there are always whole vectors.
template <typename T>
struct Block {
    int64_t begin, n;  // its first token's position in the sequence, and its tokens
    int64_t room;      // how many there could be
    const T* keys[BLOCK_KEYS];
    const T* values[BLOCK_KEYS];
    int64_t n_runs;
    Run runs[BLOCK_KEYS];
};

template <typename T>
void find_block(
    const AttentionCall& call, const Piece& piece, int64_t begin, int64_t room, int64_t kv_head,
    Block<T>& block
) {
    const int64_t D = call.head_dim;
    block.begin = begin;
    block.n = least(room, piece.key_end - begin);
    block.room = room;
    block.n_runs = 0;
    int64_t k = 0;
    while (k < block.n) {
        const Run run = find_run(call, piece, begin + k, begin + block.n, kv_head);
        block.runs[block.n_runs++] = run;
        for (int64_t i = 0; i < run.length; i++, k++) {
            block.keys[k] = (const T*)call.keys + (run.slot + i) * D;
            block.values[k] = (const T*)call.values + (run.slot + i) * D;
        }
    }
    for (; k < room; k++) {
        block.keys[k] = block.keys[k - 1];
        block.values[k] = block.values[k - 1];
    }
}

// Of so many lines, those that are fetched while as many are multiplied, and while their scores become
// weights: which takes wide vectors some time.
constexpr int64_t while_multiplying(int64_t n) { return W == 16 ? n * 7 / 8 : n; }
constexpr int64_t while_weighing(int64_t n) { return W == 16 ? n / 8 : 0; }
// Steps of `Direct` whose lines are asked for together: memory is quicker then, wide vectors by 2 to 5 %.
constexpr int64_t TOGETHER = W == 16 ? 8 : 1;

// Keys or values that are fetched before their turn, line by line: as many at a time as there is work
// meanwhile, for the cache waits for some twenty lines at once and stops at one more. They are fetched in
// the order in which they lie, which memory is quickest to give.
template <typename T>
class Ahead {
   public:
    // Keys bring the scales of both: a block's weights want those of its values before the values come.
    Ahead(const AttentionCall& call, const Piece& piece, const void* tensor, bool brings_scales)
        : call(call), piece(piece), tensor((const T*)tensor), brings_scales(brings_scales) {}

    // From here on those of `n` tokens of a head, as far as there are.
    void start(int64_t begin, int64_t n, int64_t kv_head) {
        token = begin;
        last = least(begin + n, piece.key_end);
        head = kv_head;
        n_left = 0;
    }

    OCTAVO_INLINE void fetch(int64_t n_lines) {
        if (n_left >= n_lines) take(n_lines);
        else take_more(n_lines);
    }

   private:
    OCTAVO_INLINE void take(int64_t n_lines) {
        for (int64_t i = 0; i < n_lines; i++) fetch_line(at + 64 * i);
        at += 64 * n_lines;
        n_left -= n_lines;
    }
    __attribute__((noinline)) void take_more(int64_t n_lines) {
        while (n_left < n_lines) {
            n_lines -= n_left;
            take(n_left);
            if (!next_run()) return;
        }
        take(n_lines);
    }

    bool next_run() {
        if (token >= last) return false;
        const Run run = find_run(call, piece, token, last, head);
        at = (const char*)(tensor + run.slot * call.head_dim);
        n_left = (run.length * call.head_dim * int64_t(sizeof(T)) + 63) / 64;
        if (brings_scales)
            for (int64_t i = 0; i < run.length; i += 64 / int64_t(sizeof(uint16_t))) {
                fetch_line(call.key_scales + run.slot + i);
                fetch_line(call.value_scales + run.slot + i);
            }
        token += run.length;
        return true;
    }

    const AttentionCall& call;
    const Piece& piece;
    const T* const tensor;
    const bool brings_scales;
    int64_t head = 0, token = 0, last = 0;  // where it is, and before which token it ends
    const char* at = nullptr;               // a run's next line,
    int64_t n_left = 0;                     // and how many it has
};

// The scales of a block's keys, and what its weights are multiplied by before they are rounded:
// values' scales, the greatest of them brought to the greatest weight that there is. Gives what
// undoes that.
template <class Dot>
float find_scales(const AttentionCall& call, const Block<int8_t>& block, const Scratch& scratch) {
    int64_t k = 0;
    for (int64_t run = 0; run < block.n_runs; run++) {
        int64_t i = block.runs[run].slot;
        const int64_t end = i + block.runs[run].length;
        for (; i + W <= end; i += W, k += W) {
            store(scratch.key_scales + k, load(call.key_scales + i));
            store(scratch.value_scales + k, load(call.value_scales + i));
        }
        for (; i < end; i++, k++) {
            scratch.key_scales[k] = widen(call.key_scales[i]);
            scratch.value_scales[k] = widen(call.value_scales[i]);
        }
    }
    for (; k < block.room; k++) scratch.key_scales[k] = scratch.value_scales[k] = 0.0f;
    const float most = largest_magnitude(scratch.value_scales, block.room);
    const Vec factor = splat(Dot::MOST / most);
    for (k = 0; k < block.room; k += W)
        store(scratch.value_scales + k, load(scratch.value_scales + k) * factor);
    return most / Dot::MOST;
}
template <class Dot, typename T>
float find_scales(const AttentionCall&, const Block<T>&, const Scratch&) {
    return 1.0f;
}

constexpr int COLUMNS = W == 16 ? 4 : 2;  // vectors whose sums stay in registers, by TILE rows
constexpr int64_t PANEL = COLUMNS * W;

// How many of an element's neighbours, it and what follows, are in one panel of values.
inline int64_t panel_width(int64_t d, int64_t D) { return d - d % PANEL + PANEL <= D ? PANEL : 2 * W; }

// Values of Dot::N tokens from the element d on, into a panel of C vectors a word.
template <class Dot, int C, typename T>
OCTAVO_INLINE void pack_values(const T* const* tokens, int64_t d, int32_t* panel, int64_t k) {
    IntVec v[C];
    Dot::interleave(tokens, d, v);
    for (int c = 0; c < C; c++) store(panel + (k / Dot::N * C + c) * W, v[c]);
}

// The block's first n keys and values as columns, in panels as wide as `multiply` takes them. Keys' panels are
// [words of a head][PANEL], and there are BLOCK_KEYS / PANEL; values' are [words of a block][PANEL],
// and what of D is left over makes narrower ones. For each W keys, and again for each W values, `meanwhile`
// is called.
template <class Dot, typename T, class Meanwhile>
__attribute__((noinline)) void pack(
    const Block<T>& block, int64_t D, int64_t n, const Scratch& scratch, const Meanwhile& meanwhile
) {
    const int64_t n_words = D / Dot::N;
    for (int64_t k = 0; k < n; k += W) {
        meanwhile();
        for (int64_t d = 0; d < n_words; d += W) {
            IntVec v[W];
            repeat<W>(OCTAVO_EACH(i) {
                v[i] = Dot::words(block.keys[k + i] + d * Dot::N, D - d * Dot::N);
            });
            transpose(v);
            int32_t* const panel = scratch.keys + k / PANEL * PANEL * n_words + k % PANEL;
            const int64_t left = n_words - d;  // or more
            repeat<W>(OCTAVO_EACH(i) {
                if (i < left) store(panel + (d + i) * PANEL, v[i]);
            });
        }
    }
    for (int64_t k = 0; k < n; k += Dot::N) {
        if (k % W == 0) meanwhile();
        for (int64_t d = 0; d < D; d += panel_width(d, D)) {
            int32_t* const panel = scratch.values + d * (BLOCK_KEYS / Dot::N);
            if (panel_width(d, D) == PANEL) pack_values<Dot, COLUMNS>(block.values + k, d, panel, k);
            else pack_values<Dot, 2>(block.values + k, d, panel, k);
        }
    }
}

// What `multiply` asks for: a panel; or values as they lie, and then others are fetched meanwhile.
struct Packed {
    const int32_t* panel;
    template <int C>
    OCTAVO_INLINE void operator()(int64_t i, IntVec (&out)[C]) const {
        for (int c = 0; c < C; c++) out[c] = load(panel + (i * C + c) * W);
    }
};
template <class Dot, typename T>
struct Direct {
    const T* const* tokens;
    int64_t d;
    Ahead<T>& ahead;
    template <int C>
    OCTAVO_INLINE void operator()(int64_t i, IntVec (&out)[C]) const {
        Dot::interleave(tokens + i * Dot::N, d, out);
        constexpr int BYTES = Dot::N * C * W * sizeof(T);
        if (BYTES < 64) {
            if (i % (64 / BYTES) == 0) ahead.fetch(1);
        } else if (i % TOGETHER == 0) {
            ahead.fetch(while_multiplying(TOGETHER * BYTES / 64));
        }
    }
};

}  // namespace
}  // namespace octavo
