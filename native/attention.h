// Paged attention on the CPU: one call, the pieces that it is cut into, and what computes a piece.
#pragma once

#include <cstdint>

namespace octavo {

// One call's arguments; shapes and meaning are those of `octavo.kernels.paged.attention_reference`.
struct AttentionCall {
    const void* q;              // [T, n_heads, head_dim]
    void* out;                  // [T, n_heads, head_dim]
    const void* keys;           // [n_pages, n_kv_heads, page_size, head_dim]
    const void* values;         // the same
    const int64_t* page_table;  // [n_sequences, table_stride]
    const int64_t* query_lens;  // [n_sequences]
    const int64_t* kv_lens;     // [n_sequences]
    int64_t n_sequences;
    int64_t table_stride;
    int64_t n_heads;
    int64_t n_kv_heads;
    int64_t head_dim;
    int64_t page_size;
    int64_t window;  // tokens; 0 is full attention
    int64_t n_threads;
    int64_t is_bf16;  // else fp32

    int64_t group() const { return n_heads / n_kv_heads; }
};

// A piece of work: one key head of one sequence, a run of its queries, and a run of keys. Queries
// and keys are counted by their positions in the sequence. The query heads that share the key head
// are rows: row r is head r % group of query r / group.
struct Piece {
    int64_t sequence;
    int64_t kv_head;
    int64_t first_token;  // of q and out: the piece's first query
    int64_t position;     // of that query
    int64_t n_queries;
    int64_t key_begin;
    int64_t key_end;
};

constexpr int64_t BLOCK_KEYS = 64;  // keys a step

// Floats that a thread works in: queries, keys, weights, and the sums with two numbers a row.
constexpr int64_t scratch_floats(int64_t n_rows, int64_t head_dim) {
    return n_rows * head_dim + BLOCK_KEYS * head_dim + n_rows * BLOCK_KEYS + n_rows * (head_dim + 2);
}

// Where a piece leaves row r: its maximum, its total, and head_dim sums, one after another.
constexpr int64_t part_floats(int64_t n_rows, int64_t head_dim) { return n_rows * (head_dim + 2); }

// What each instruction set implements.
struct AttentionKernel {
    // Compute a piece. Its result goes to `part` if that is given, else to call.out.
    void (*run)(const AttentionCall& call, const Piece& piece, float* scratch, float* part);
    // Put a piece together from the parts of its runs of keys, which lie `size` floats apart.
    void (*merge)(
        const AttentionCall& call, const Piece& piece, float* parts, int64_t n_parts, int64_t size
    );
};

extern const AttentionKernel attention_portable;
#if defined(__x86_64__)
extern const AttentionKernel attention_avx2, attention_avx512;
#endif

}  // namespace octavo
