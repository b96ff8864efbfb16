// Paged attention on the CPU: one call, the pieces that it is cut into, and what computes a piece.
#pragma once

#include <cstdint>

namespace octavo {

enum Dtype : int64_t { FP32 = 0, BF16 = 1, INT8 = 2 };

// One call's arguments; shapes and meaning are those of `octavo.kernels.paged.attention_reference`.
struct AttentionCall {
    const void* q;                 // [T, n_heads, head_dim], fp32 or bf16
    void* out;                     // the same
    const void* keys;              // [n_pages, n_kv_heads, page_size, head_dim], of any dtype
    const void* values;            // the same
    const uint16_t* key_scales;    // [n_pages, n_kv_heads, page_size] bf16, of int8 keys
    const uint16_t* value_scales;  // the same
    const int64_t* page_table;     // [n_sequences, table_stride]
    const int64_t* query_lens;     // [n_sequences]
    const int64_t* kv_lens;        // [n_sequences]
    int64_t n_sequences;
    int64_t table_stride;
    int64_t n_heads;
    int64_t n_kv_heads;
    int64_t head_dim;
    int64_t page_size;
    int64_t window;  // tokens; 0 is full attention
    int64_t n_threads;
    int64_t q_dtype;
    int64_t kv_dtype;

    int64_t group() const { return n_heads / n_kv_heads; }
};

// A piece of work: neighbouring key heads of one sequence, a run of its queries, and a run of keys.
// Queries and keys are counted by their positions in the sequence. The query heads that share a key
// head are rows: row r of a key head is head r % group of query r / group.
struct Piece {
    int64_t sequence;
    int64_t kv_head;
    int64_t n_heads;
    int64_t first_token;  // of q and out: the piece's first query
    int64_t position;     // of that query
    int64_t n_queries;
    int64_t key_begin;
    int64_t key_end;

    int64_t n_rows(int64_t group) const { return n_heads * n_queries * group; }
};

constexpr int64_t DIRECT_BYTES = 64;  // of a column of a step's keys that are not packed; a page has as many
constexpr int64_t BLOCK_KEYS = 128;   // keys a step, at most: so seldom are rows' sums moved on
constexpr int64_t TILE = 6;           // rows whose sums stay in registers,
constexpr int64_t AMX_TILE = 16;      // and of matrices, see native/amx.h
constexpr int64_t LINE = 16;          // words of a line of the cache, at which everything begins

constexpr int64_t in_lines(int64_t n_words) { return (n_words + LINE - 1) / LINE * LINE; }

// What a piece leaves behind, row by row: sums over its keys of values by their weights, the greatest
// score, to which the weights are relative, and the weights' total.
struct Part {
    float* sums;     // [n_rows, head_dim]
    float* highest;  // [n_rows], in logarithms to the base 2
    float* total;    // [n_rows]

    Part(float* memory, int64_t n_rows, int64_t head_dim)
        : sums(memory), highest(memory + n_rows * head_dim), total(highest + n_rows) {}
    static constexpr int64_t words(int64_t n_rows, int64_t head_dim) {
        return in_lines(n_rows * (head_dim + 2));
    }
};

// What a thread works in; words are described in native/products.h.
struct Scratch {
    int32_t* queries;     // [n_rows, words of a head, in whole lines]; of few rows in pairs, up to 4 times
    float* query_scales;  // [n_rows]
    int32_t* begins;      // [n_rows]: what a row's products begin with
    int32_t* keys;        // [words of a head, BLOCK_KEYS]
    int32_t* values;      // [words of a block, head_dim]
    float* key_scales;    // [BLOCK_KEYS]
    float* value_scales;  // [BLOCK_KEYS]
    float* scores;        // [AMX_TILE, BLOCK_KEYS]
    int32_t* weights;     // [AMX_TILE, BLOCK_KEYS]
    float* row;           // [head_dim]
    float* part;          // a Part's words

    Scratch(float* memory, int64_t n_rows, int64_t head_dim) {
        const auto take = [&](int64_t n) {
            float* const here = memory;
            memory += in_lines(n);
            return here;
        };
        queries = (int32_t*)take(4 * n_rows * in_lines(head_dim));
        query_scales = take(n_rows);
        begins = (int32_t*)take(n_rows);
        keys = (int32_t*)take(BLOCK_KEYS * head_dim);
        values = (int32_t*)take(BLOCK_KEYS * head_dim);
        key_scales = take(BLOCK_KEYS);
        value_scales = take(BLOCK_KEYS);
        scores = take(AMX_TILE * BLOCK_KEYS);
        weights = (int32_t*)take(AMX_TILE * BLOCK_KEYS);
        row = take(head_dim);
        part = take(Part::words(n_rows, head_dim));
    }
    static int64_t words(int64_t n_rows, int64_t head_dim) {
        Scratch all(nullptr, n_rows, head_dim);
        return (all.part - (float*)nullptr) + Part::words(n_rows, head_dim);
    }
};

// What each instruction set implements.
struct AttentionKernel {
    // Compute a piece. Its result goes to `part` if that is given, else to call.out.
    void (*run)(const AttentionCall& call, const Piece& piece, float* scratch, float* part);
    // Put a piece together from the parts of its runs of keys, which lie one after another.
    void (*merge)(const AttentionCall& call, const Piece& piece, float* parts, int64_t n_parts);
    int64_t most_rows;  // of a piece, about: so often is a key used that was packed
};

extern const AttentionKernel attention_portable;
#if defined(__x86_64__)
extern const AttentionKernel attention_avx2, attention_avx_vnni, attention_avx512, attention_amx;
extern const AttentionKernel attention_avx_vnni_emulated, attention_avx512_emulated, attention_amx_emulated;
#endif

}  // namespace octavo
