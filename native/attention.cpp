// The library's door: cuts a call into pieces, and runs them with the widest instructions there are.
// It is given addresses and sizes and nothing else, so that it is built for no release of PyTorch or
// Python.
#include "attention.h"
#include "isa.h"

#include <algorithm>
#include <new>
#include <vector>

namespace octavo {
namespace {

constexpr int64_t MOST_ROWS = 96;     // rows a piece, about: so often is a key used that was turned
constexpr int64_t FEW_QUERIES = 16;   // new tokens of a sequence whose keys are cut into runs
constexpr int64_t SPLIT_KEYS = 4096;  // keys of a run

const AttentionKernel& kernel_of(int isa) {
#if defined(__x86_64__)
    if (isa == EMULATED) return attention_emulated;
    if (isa == AVX512) return attention_avx512;
    if (isa == AVX2) return attention_avx2;
#endif
    (void)isa;
    return attention_portable;
}

// A piece whose keys were cut into runs.
struct Merge {
    Piece piece;
    int64_t first_part, n_parts;
};

struct Plan {
    std::vector<Piece> pieces;
    std::vector<int64_t> parts;  // of each piece: where its part goes, or -1
    std::vector<Merge> merges;
    int64_t n_parts = 0, most_rows = 1;
};

// How a sequence is cut depends on its own lengths alone: so its answer does not depend on what else
// is in the batch, or on the number of threads.
Plan make_plan(const AttentionCall& call) {
    Plan plan;
    const int64_t block = std::max<int64_t>(1, MOST_ROWS / call.group());
    int64_t first_token = 0;
    for (int64_t s = 0; s < call.n_sequences; s++) {
        const int64_t n_new = call.query_lens[s], past = call.kv_lens[s] - n_new;
        for (int64_t q = 0; q < n_new; q += block) {
            const int64_t n_queries = std::min(block, n_new - q), position = past + q;
            const int64_t stop = position + n_queries;
            const int64_t start =
                call.window ? std::max<int64_t>(0, position - call.window + 1) : 0;
            plan.most_rows = std::max(plan.most_rows, n_queries * call.group());
            for (int64_t head = 0; head < call.n_kv_heads; head++) {
                Piece piece{s, head, first_token + q, position, n_queries, start, stop};
                if (n_new > FEW_QUERIES || stop - start <= SPLIT_KEYS) {
                    plan.pieces.push_back(piece);
                    plan.parts.push_back(-1);
                    continue;
                }
                const int64_t first_part = plan.n_parts;
                for (int64_t at = start; at < stop; at += SPLIT_KEYS) {
                    piece.key_begin = at;
                    piece.key_end = std::min(at + SPLIT_KEYS, stop);
                    plan.pieces.push_back(piece);
                    plan.parts.push_back(plan.n_parts++);
                }
                plan.merges.push_back({piece, first_part, plan.n_parts - first_part});
            }
        }
        first_token += n_new;
    }
    return plan;
}

// Memory that begins with a line of the cache; it holds whatever it held before.
struct Memory {
    explicit Memory(int64_t n_words)
        : words((float*)operator new(n_words * sizeof(float), LINE_ALIGNMENT)) {}
    ~Memory() { operator delete(words, LINE_ALIGNMENT); }
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;

    static constexpr std::align_val_t LINE_ALIGNMENT{LINE * sizeof(float)};
    float* const words;
};

void attend(const AttentionCall& call, const AttentionKernel& kernel) {
    const Plan plan = make_plan(call);
    const int64_t n_pieces = plan.pieces.size(), n_merges = plan.merges.size();
    const int64_t part_size = Part::words(FEW_QUERIES * call.group(), call.head_dim);
    Memory parts(plan.n_parts * part_size);
#if defined(_OPENMP)
#pragma omp parallel num_threads(int(call.n_threads)) if (n_pieces > 1 && call.n_threads > 1)
#endif
    {
        Memory scratch(Scratch::words(plan.most_rows, call.head_dim));
#if defined(_OPENMP)
#pragma omp for schedule(dynamic)
#endif
        for (int64_t i = 0; i < n_pieces; i++) {
            const int64_t part = plan.parts[i];
            kernel.run(
                call, plan.pieces[i], scratch.words,
                part < 0 ? nullptr : parts.words + part * part_size
            );
        }
#if defined(_OPENMP)
#pragma omp for schedule(static)
#endif
        for (int64_t i = 0; i < n_merges; i++) {
            const Merge& one = plan.merges[i];
            kernel.merge(
                call, one.piece, parts.words + one.first_part * part_size, one.n_parts, part_size
            );
        }
    }
}

}  // namespace
}  // namespace octavo

extern "C" {

// Attention with the given instructions; 0, or 1 where the machine does not have them.
int octavo_attention(const octavo::AttentionCall* call, int isa) {
    if (!octavo::runs(isa) || (isa == octavo::EMULATED && call->kv_dtype != octavo::INT8)) return 1;
    octavo::attend(*call, octavo::kernel_of(isa));
    return 0;
}

}  // extern "C"
