// The library's door: cuts a call into pieces, and runs them with the widest instructions there are.
// It is given addresses and sizes and nothing else, so that it is built for no release of PyTorch or
// Python.
#include "attention.h"

#include <algorithm>
#include <vector>

#include "isa.h"
#include "memory.h"
#include "threads.h"

namespace octavo {
namespace {

constexpr int64_t FEW_QUERIES = 16;  // new tokens of a sequence whose keys are cut into runs
constexpr int64_t SPLIT_KEYS = 512;  // keys of a run, at least, times the queries: so parts take no
constexpr int64_t MOST_RUNS = 32;    // more room; of a long context runs are longer instead of more

const AttentionKernel& kernel_of(int isa) {
    switch (isa) {
#if defined(__x86_64__)
        case AVX2: return attention_avx2;
        case AVX512: return attention_avx512;
        case AVX_VNNI_EMULATED: return attention_avx_vnni_emulated;
        case AVX512_EMULATED: return attention_avx512_emulated;
        case AMX_EMULATED: return attention_amx_emulated;
#endif
#if defined(OCTAVO_KNOWS_AVX_VNNI)
        case AVX_VNNI: return attention_avx_vnni;
#endif
#if defined(OCTAVO_KNOWS_AMX)
        case AMX: return attention_amx;
#endif
        default: return attention_portable;
    }
}

// A piece whose keys were cut into runs, and where the first of its parts is.
struct Merge {
    Piece piece;
    int64_t first_part, n_parts;
};

struct Plan {
    std::vector<Piece> pieces;
    std::vector<int64_t> parts;  // of each piece: where its part goes, or -1
    std::vector<Merge> merges;
    int64_t part_words = 0, most_rows = 1;
    int64_t n_scores = 0;  // of all rows, those that nobody sees counted
    bool is_runs = true;  // every piece is one of a few tokens' runs of keys

    // Pieces that a thread takes at a time. Runs of keys take the same time each, and one after another a
    // thread reads them without a break: 47 for 38 GB/s on two cores of an AMD EPYC whose memory gives 57.
    int64_t pieces_at_a_time(int64_t n_threads) const {
        return is_runs ? std::max<int64_t>(1, (pieces.size() + n_threads - 1) / n_threads) : 1;
    }

    void add(const Piece& piece, int64_t group, int64_t part) {
        pieces.push_back(piece);
        parts.push_back(part);
        most_rows = std::max(most_rows, piece.n_rows(group));
        n_scores += piece.n_rows(group) * (piece.key_end - piece.key_begin);
        is_runs &= part >= 0;
    }
};

// How a sequence is cut depends on its own lengths alone: so its answer does not depend on what else
// is in the batch, or on the number of threads.
Plan make_plan(const AttentionCall& call, int64_t most_rows) {
    Plan plan;
    const int64_t group = call.group(), block = std::max<int64_t>(1, most_rows / group);
    int64_t first_token = 0;
    for (int64_t s = 0; s < call.n_sequences; s++) {
        const int64_t n_new = call.query_lens[s], past = call.kv_lens[s] - n_new;
        const auto first_key = [&](int64_t position) {
            return call.window ? std::max<int64_t>(0, position - call.window + 1) : 0;
        };
        if (n_new == 0) continue;
        if (n_new <= FEW_QUERIES) {
            const int64_t start = first_key(past), stop = past + n_new;
            const int64_t most = SPLIT_KEYS * MOST_RUNS;
            const int64_t run = SPLIT_KEYS * std::max(n_new, (stop - start + most - 1) / most);
            if (stop - start <= run) {
                for (int64_t head = 0; head < call.n_kv_heads; head++)
                    plan.add({s, head, 1, first_token, past, n_new, start, stop}, group, -1);
            } else {
                // All heads together: a page's heads lie one after another, and are read in that
                // order. Runs begin at multiples of their length, and so with pages.
                Piece piece{s, 0, call.n_kv_heads, first_token, past, n_new, start, stop};
                const int64_t first = start / run, last = (stop - 1) / run;
                const int64_t size = Part::words(piece.n_rows(group), call.head_dim);
                plan.merges.push_back({piece, plan.part_words, last - first + 1});
                for (int64_t i = first; i <= last; i++) {
                    piece.key_begin = std::max(i * run, start);
                    piece.key_end = std::min((i + 1) * run, stop);
                    plan.add(piece, group, plan.part_words);
                    plan.part_words += size;
                }
            }
        } else {
            for (int64_t q = 0; q < n_new; q += block)
                for (int64_t head = 0; head < call.n_kv_heads; head++) {
                    const int64_t n_queries = std::min(block, n_new - q), position = past + q;
                    plan.add(
                        {s, head, 1, first_token + q, position, n_queries, first_key(position),
                         position + n_queries},
                        group, -1
                    );
                }
        }
        first_token += n_new;
    }
    return plan;
}

void attend(const AttentionCall& call, const AttentionKernel& kernel) {
    const Plan plan = make_plan(call, kernel.most_rows);
    const int64_t n_pieces = plan.pieces.size(), n_merges = plan.merges.size();
    const int64_t n_threads = threads_for(2 * plan.n_scores * call.head_dim, call.n_threads);
    const int64_t at_a_time = plan.pieces_at_a_time(n_threads);
    (void)at_a_time;
    const Memory<float> parts(plan.part_words);
#if defined(_OPENMP)
#pragma omp parallel num_threads(int(n_threads)) if (n_pieces > 1 && n_threads > 1)
#endif
    {
        const Memory<float> scratch(Scratch::words(plan.most_rows, call.head_dim));
#if defined(_OPENMP)
#pragma omp for schedule(dynamic, at_a_time)
#endif
        for (int64_t i = 0; i < n_pieces; i++) {
            float* const part = plan.parts[i] < 0 ? nullptr : parts.numbers + plan.parts[i];
            kernel.run(call, plan.pieces[i], scratch.numbers, part);
        }
#if defined(_OPENMP)
#pragma omp for schedule(static)
#endif
        for (int64_t i = 0; i < n_merges; i++) {
            const Merge& one = plan.merges[i];
            kernel.merge(call, one.piece, parts.numbers + one.first_part, one.n_parts);
        }
    }
}

}  // namespace
}  // namespace octavo

extern "C" const int64_t octavo_attention_bytes = sizeof(octavo::AttentionCall);
extern "C" const int64_t octavo_attention_direct_bytes = octavo::DIRECT_BYTES;

// Attention with the given instructions; 0, or 1 where the machine does not have them.
extern "C" int octavo_attention(const octavo::AttentionCall* call, int isa) {
    if (!octavo::runs(isa)) return 1;
    const bool is_float = call->kv_dtype == octavo::FP32 || call->q_dtype == octavo::FP32;
    if (call->kv_dtype != octavo::INT8) isa = octavo::without_bytes(isa);
    const bool is_emulated = isa == octavo::AVX512_EMULATED || isa == octavo::AMX_EMULATED;
    if (is_emulated && call->kv_dtype != octavo::INT8 && is_float) return 1;
    octavo::attend(*call, octavo::kernel_of(isa));
    return 0;
}
