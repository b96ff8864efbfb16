// One piece of paged attention with an online softmax, written once and built for each instruction
// set (Milakov & Gimelshein 2018, algorithm 3; Dao et al. 2022, algorithm 1).
#include "attention_block.h"

namespace octavo {
namespace {

constexpr float NEVER = -__builtin_inff();

// Neighbouring rows that take a block in together.
struct Tile {
    int64_t row;                  // the first
    int64_t low[TILE];            // each sees the keys low…high-1 of the block
    int64_t high[TILE];
    float correction[LINE] = {};  // what the sums of earlier blocks are multiplied by,
    float factor[LINE] = {};      // and those of this one
};

// The steps of a piece: `Dot` multiplies, and keys and values are kept as T.
template <class Dot, typename T>
struct Attend {
    typedef typename Dot::Sum Sum;
    static constexpr bool HAS_SCALES = sizeof(T) == 1;

    const AttentionCall& call;
    const Piece& piece;
    const int64_t D, group, head_rows, n_rows;  // rows of one key head, and of all
    const int64_t n_words, stride;              // words of a query, and from one to the next
    // Of few rows the keys are read once: packing them would cost as much as multiplying them. Then
    // a block's values are fetched while its keys are multiplied, and the next one's keys while its
    // values are: both, and no more, stay in the first-level cache.
    const bool is_direct;
    const int64_t block_keys;
    const Scratch scratch;
    const Part part;
    const Block<T>* block;
    const Block<T>* next;
    float unit = 1.0f;     // what the block's sums are to be multiplied by

    Attend(const AttentionCall& call, const Piece& piece, float* memory, float* result)
        : call(call), piece(piece), D(call.head_dim), group(call.group()),
          head_rows(piece.n_queries * group), n_rows(piece.n_rows(group)), n_words(D / Dot::N),
          stride(in_lines(n_words)), is_direct(head_rows <= TILE),
          block_keys(is_direct ? DIRECT_BYTES / int64_t(sizeof(T)) : BLOCK_KEYS),
          scratch(memory, n_rows, D), part(result ? result : scratch.part, n_rows, D) {}

    void run() {
        take_queries();
        Block<T> blocks[2];
        find(piece.key_begin, 0, blocks[0]);
        int64_t i = 0;
        for (int64_t begin = piece.key_begin; begin < piece.key_end; begin += block_keys)
            for (int64_t head = 0; head < piece.n_heads; head++, i++) {
                block = &blocks[i % 2];
                Block<T>& other = blocks[(i + 1) % 2];
                next = &other;
                if (head + 1 < piece.n_heads) find(begin, head + 1, other);
                else if (begin + block_keys < piece.key_end) find(begin + block_keys, 0, other);
                else next = block;
                unit = find_scales<Dot>(call, *block, scratch);
                if (!is_direct) pack<Dot>(*block, D, scratch);
                for (int64_t row = 0; row < head_rows; row += TILE) {
                    const int64_t n = least(TILE, head_rows - row), first = head * head_rows + row;
                    if (!is_direct) fetch_share(row);
                    switch (n) {
                        case 1: take_block<1>(first); break;
                        case 2: take_block<2>(first); break;
                        case 3: take_block<3>(first); break;
                        case 4: take_block<4>(first); break;
                        case 5: take_block<5>(first); break;
                        default: take_block<6>(first);
                    }
                }
            }
    }

    void find(int64_t begin, int64_t head, Block<T>& found) const {
        find_block(call, piece, begin, block_keys, piece.kv_head + head, found);
    }

    void take_queries() const {
        memset(scratch.queries, 0, n_rows * stride * sizeof(int32_t));
        memset(part.sums, 0, n_rows * D * sizeof(float));
        // exp(x) is 2^(x log2 e).
        const float scale = LOG2_E / sqrtf(float(D));
        for (int64_t r = 0; r < n_rows; r++) {
            const int64_t at = place(call, piece, r);
            for (int64_t d = 0; d < D; d += W)
                store(
                    scratch.row + d, call.q_dtype == BF16
                                         ? load((const uint16_t*)call.q + at + d)
                                         : load((const float*)call.q + at + d)
                );
            int32_t* const query = scratch.queries + r * stride;
            scratch.query_scales[r] = scale * Dot::query(scratch.row, D, query, scratch.begins + r);
            part.highest[r] = NEVER;
            part.total[r] = 0.0f;
        }
    }

    // The place in q or out of a row.
    static int64_t place(const AttentionCall& call, const Piece& piece, int64_t row) {
        const int64_t group = call.group(), of_head = row % (piece.n_queries * group);
        const int64_t head = piece.kv_head + row / (piece.n_queries * group);
        const int64_t token = piece.first_token + of_head / group;
        return (token * call.n_heads + head * group + of_head % group) * call.head_dim;
    }

    // Fetch a part of the next block before each tile, so that all of it has come after the last.
    void fetch_share(int64_t row) const {
        const int64_t share = (block_keys * TILE + head_rows - 1) / head_rows;
        const int64_t from = row / TILE * share, n = least(share, block_keys - from);
        fetch(next->keys + from, n, D);
        fetch(next->values + from, n, D);
    }

    template <int ROWS>
    void take_block(int64_t row) const {
        Tile tile;
        tile.row = row;
        for (int r = 0; r < ROWS; r++) {
            const int64_t position = piece.position + (row + r) % head_rows / group - block->begin;
            tile.low[r] = call.window ? within(position - call.window + 1, block->n) : 0;
            tile.high[r] = within(position + 1, block->n);
        }
        if (is_direct) score_direct<ROWS>(row);
        else score<ROWS>(row);
        soften<ROWS>(tile);
        const int64_t share = block_keys * 2 * W / D;
        for (int64_t d = 0; d < D;) {
            const bool is_wide = panel_width(d, D) == PANEL;
            if (is_direct) {
                fetch(next->keys + d / (2 * W) * share, share * panel_width(d, D) / (2 * W), D);
                const Direct<Dot, T> values{block->values, d};
                if (is_wide) add_values<ROWS, COLUMNS>(tile, d, values);
                else add_values<ROWS, 2>(tile, d, values);
            } else {
                const Packed values{scratch.values + d * (BLOCK_KEYS / Dot::N)};
                if (is_wide) add_values<ROWS, COLUMNS>(tile, d, values);
                else add_values<ROWS, 2>(tile, d, values);
            }
            d += panel_width(d, D);
        }
    }

    // Scores of ROWS rows, by packed keys.
    template <int ROWS>
    __attribute__((noinline)) void score(int64_t row) const {
        for (int64_t k = 0; k < block->n; k += PANEL) {
            Sum sums[ROWS][COLUMNS];
            for (int r = 0; r < ROWS; r++)
                for (int c = 0; c < COLUMNS; c++) sums[r][c] = Dot::start(scratch.begins[row + r]);
            multiply<Dot, ROWS, COLUMNS, true>(
                scratch.queries + row * stride, stride, n_words,
                Packed{scratch.keys + k * n_words}, sums
            );
            for (int r = 0; r < ROWS; r++)
                for (int c = 0; c < COLUMNS; c++) store_scores(r, k + c * W, sums[r][c]);
        }
    }

    // The same by keys as they lie.
    template <int ROWS>
    void score_direct(int64_t row) const {
        const int32_t* const queries = scratch.queries + row * stride;
        for (int64_t k = 0; k < block->n; k += W) {
            Sum sums[ROWS][W];
            for (int i = 0; i < W; i += 2) {  // two keys at a time
                fetch(block->values + k + i, 2, D);
                const T *const first = block->keys[k + i], *const second = block->keys[k + i + 1];
                Sum own[2][ROWS] = {};
                for (int64_t d = 0; d < n_words; d += W) {
                    const int64_t e = d * Dot::N;
                    const IntVec a = Dot::words(first + e, D - e);
                    const IntVec b = Dot::words(second + e, D - e);
                    for (int r = 0; r < ROWS; r++) {
                        IntVec query = load(queries + r * stride + d);
                        keep(query);
                        own[0][r] = Dot::add(own[0][r], a, query);
                        own[1][r] = Dot::add(own[1][r], b, query);
                    }
                }
                for (int r = 0; r < ROWS; r++) sums[r][i] = own[0][r], sums[r][i + 1] = own[1][r];
            }
            for (int r = 0; r < ROWS; r++) {
                sum_each(sums[r]);
                store_scores(r, k, sums[r][0] + Dot::start(scratch.begins[row + r]));
            }
        }
    }

    OCTAVO_INLINE void store_scores(int r, int64_t k, Sum sums) const {
        Vec scores = Dot::floats(sums);
        if (HAS_SCALES) scores *= load(scratch.key_scales + k);
        store(scratch.scores + r * BLOCK_KEYS + k, scores);
    }

    // Turn scores into weights, relative to the block's greatest; greatest score and total move on.
    template <int ROWS>
    void soften(Tile& tile) const {
        float own[ROWS], added[ROWS];
        for (int r = 0; r < ROWS; r++) {
            float* const scores = scratch.scores + r * BLOCK_KEYS;
            for (int64_t k = 0; k < tile.low[r]; k++) scores[k] = NEVER;
            for (int64_t k = tile.high[r]; k < block_keys; k++) scores[k] = NEVER;
            Vec most = load(scores);
            for (int64_t k = W; k < block_keys; k += W) {
                const Vec s = load(scores + k);
                most = s > most ? s : most;
            }
            const float scale = scratch.query_scales[tile.row + r];
            own[r] = largest(most) * scale;
            // A row may see no key of this block; then all its weights are next to nothing.
            const Vec shift = splat(own[r] == NEVER ? 0.0f : own[r]), factor = splat(scale);
            Vec total = Vec{};
            for (int64_t k = 0; k < block_keys; k += W) {
                const Vec weights = exp2<Dot::COARSE>(load(scores + k) * factor - shift);
                total += weights;
                Dot::weigh(weights, scratch.value_scales, k, scratch.weights + r * BLOCK_KEYS);
            }
            added[r] = sum(total);
        }
        for (int r = 0; r < ROWS; r++) {
            const float before = part.highest[tile.row + r];
            const float after = own[r] > before ? own[r] : before;
            part.highest[tile.row + r] = after;
            tile.correction[r] = before - after;
            tile.factor[r] = own[r] - after;
        }
        for (int r = 0; r < ROWS; r += W) {
            store(tile.correction + r, exp2<false>(load(tile.correction + r)));
            store(tile.factor + r, exp2<false>(load(tile.factor + r)));
        }
        for (int r = 0; r < ROWS; r++) {
            if (own[r] == NEVER) tile.correction[r] = 1.0f, tile.factor[r] = 0.0f;
            float& total = part.total[tile.row + r];
            total = total * tile.correction[r] + added[r] * tile.factor[r];
            tile.factor[r] *= unit;
        }
    }

    // Bring rows' sums to their new greatest score, and add the block's: N_COLUMNS vectors from the
    // element d on.
    template <int ROWS, int N_COLUMNS, class Values>
    void add_values(const Tile& tile, int64_t d, const Values& values) const {
        Sum sums[ROWS][N_COLUMNS] = {};
        multiply<Dot, ROWS, N_COLUMNS, false>(
            scratch.weights, BLOCK_KEYS, (block->n + Dot::N - 1) / Dot::N, values, sums
        );
        for (int r = 0; r < ROWS; r++)
            for (int c = 0; c < N_COLUMNS; c++) {
                float* const all = part.sums + (tile.row + r) * D + d + c * W;
                const Vec before = load(all) * splat(tile.correction[r]);
                store(all, before + Dot::floats(sums[r][c]) * splat(tile.factor[r]));
            }
    }

    // Divide all rows' sums by their totals, into out.
    static void finish(const AttentionCall& call, const Piece& piece, const Part& part) {
        for (int64_t r = 0; r < piece.n_rows(call.group()); r++) {
            const int64_t at = place(call, piece, r);
            const Vec total = splat(part.total[r]);
            for (int64_t d = 0; d < call.head_dim; d += W) {
                const Vec mean = load(part.sums + r * call.head_dim + d) / total;
                if (call.q_dtype == BF16) store((uint16_t*)call.out + at + d, mean);
                else store((float*)call.out + at + d, mean);
            }
        }
    }
};

template <class Dot, typename T>
void run_piece(const AttentionCall& call, const Piece& piece, float* scratch, float* result) {
    Attend<Dot, T> attend(call, piece, scratch, result);
    attend.run();
    if (!result) attend.finish(call, piece, attend.part);
}

void merge(const AttentionCall& call, const Piece& piece, float* parts, int64_t n) {
    const int64_t D = call.head_dim, n_rows = piece.n_rows(call.group());
    const int64_t size = Part::words(n_rows, D);
    const Part all(parts, n_rows, D);  // the first part takes the others in
    for (int64_t r = 0; r < n_rows; r++) {
        float highest = NEVER;
        for (int64_t i = 0; i < n; i++) {
            const float own = Part(parts + i * size, n_rows, D).highest[r];
            highest = own > highest ? own : highest;
        }
        for (int64_t i = 0; i < n; i++) {
            const Part part(parts + i * size, n_rows, D);
            const float factor = exp2f(part.highest[r] - highest);
            all.total[r] = (i ? all.total[r] : 0.0f) + part.total[r] * factor;
            for (int64_t d = r * D; d < (r + 1) * D; d++)
                all.sums[d] = (i ? all.sums[d] : 0.0f) + part.sums[d] * factor;
        }
    }
    Attend<Singles, float>::finish(call, piece, all);
}

void run(const AttentionCall& call, const Piece& piece, float* scratch, float* part) {
    if (call.kv_dtype == INT8)
        return run_piece<OCTAVO_INTEGERS, int8_t>(call, piece, scratch, part);
#if defined(OCTAVO_VNNI) || defined(OCTAVO_EMULATED)
    if (call.kv_dtype == BF16 && call.q_dtype == BF16 && OCTAVO_HAS_HALVES)
        return run_piece<Halves, uint16_t>(call, piece, scratch, part);
#endif
#if !defined(OCTAVO_EMULATED)
    if (call.kv_dtype == BF16) return run_piece<Singles, uint16_t>(call, piece, scratch, part);
    return run_piece<Singles, float>(call, piece, scratch, part);
#endif
}

}  // namespace

const AttentionKernel OCTAVO_KERNEL = {run, merge};

}  // namespace octavo
