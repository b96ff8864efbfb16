// One piece of paged attention with an online softmax, written once and built for each instruction
// set (Milakov & Gimelshein 2018, algorithm 3; Dao et al. 2022, algorithm 1).
#include "attention_block.h"

namespace octavo {
namespace {

constexpr float NEVER = -__builtin_inff();
constexpr int SIDE = 2;  // keys that are multiplied as they lie, at a time
constexpr int64_t DIRECT_BYTES = W == 16 ? 128 : 64;  // of a column of a step's keys that are not packed

// Neighbouring rows that take a block in together.
struct Tile {
    int64_t row;                  // the first
    int64_t low[TILE];            // each sees the keys low…high-1 of the block,
    int64_t high[TILE];
    int64_t n;                    // of which none sees more than the first n
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
    // values are: both, and no more, stay in the first-level cache. Wide vectors are done with a block
    // before memory has sent the next: theirs are fetched two blocks ahead, and to the second-level cache
    // (18 for 11 GB/s on a core of an AMD EPYC whose memory gives 19).
    const bool is_direct;
    const int64_t block_keys;
    const Scratch scratch;
    const Part part;
    const Block<T>* block;
    const Block<T>* next;  // that is fetched meanwhile; at the end the same
    float unit = 1.0f;     // what the block's sums are to be multiplied by

    Attend(const AttentionCall& call, const Piece& piece, float* memory, float* result)
        : call(call), piece(piece), D(call.head_dim), group(call.group()),
          head_rows(piece.n_queries * group), n_rows(piece.n_rows(group)), n_words(D / Dot::N),
          stride(in_lines(n_words)), is_direct(head_rows <= TILE),
          block_keys(is_direct ? DIRECT_BYTES / int64_t(sizeof(T)) : BLOCK_KEYS),
          scratch(memory, n_rows, D), part(result ? result : scratch.part, n_rows, D) {}

    void run() {
        take_queries();
        // A step is a block of one head's keys; all heads have their turn with a block.
        const int64_t n_blocks = (piece.key_end - piece.key_begin + block_keys - 1) / block_keys;
        const int64_t n_steps = n_blocks * piece.n_heads;
        Block<T> blocks[2];
        if (n_steps) find(0, blocks[0]);
        for (int64_t step = 0; step < n_steps; step++) {
            block = next = &blocks[step % 2];
            if (step + 1 < n_steps) {
                Block<T>& found = blocks[(step + 1) % 2];
                find(step + 1, found);
                next = &found;
            }
            unit = find_scales<Dot>(call, *block, scratch);
            if (!is_direct) pack<Dot>(*block, D, scratch);
            for (int64_t row = 0; row < head_rows; row += TILE) {
                const int64_t n = least(TILE, head_rows - row);
                const int64_t first = step % piece.n_heads * head_rows + row;
                if (!is_direct) fetch_share(row);
                with_number<TILE>(n, [&](auto rows) { take_block<rows>(first); });
            }
        }
        restore();
    }

    void find(int64_t step, Block<T>& found) const {
        const int64_t begin = piece.key_begin + step / piece.n_heads * block_keys;
        find_block(call, piece, begin, block_keys, piece.kv_head + step % piece.n_heads, found);
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

    // Rows' sums in the order of their elements.
    void restore() const {
        for (int64_t r = 0; r < n_rows; r++)
            for (int64_t d = 0; d < D; d += panel_width(d, D)) {
                if (panel_width(d, D) == PANEL) restore<COLUMNS>(part.sums + r * D + d);
                else restore<2>(part.sums + r * D + d);
            }
    }
    template <int N_COLUMNS>
    static OCTAVO_INLINE void restore(float* all) {
        Vec sums[N_COLUMNS];
        repeat<N_COLUMNS>(OCTAVO_EACH(c) { sums[c] = load(all + c * W); });
        Dot::restore(sums);
        repeat<N_COLUMNS>(OCTAVO_EACH(c) { store(all + c * W, sums[c]); });
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
        tile.n = tile.high[ROWS - 1];
        if (tile.low[0] >= tile.n) return;  // before or after what any of them sees
        if (!is_direct) score<ROWS>(tile);
        else if constexpr (W == 16) score_abreast<ROWS>(tile);
        else score_direct<ROWS>(tile);
        soften<ROWS>(tile);
        Fetching<T> keys{next->keys, D};
        for (int64_t d = 0; d < D;) {
            const bool is_wide = panel_width(d, D) == PANEL;
            if (is_direct) {
                const Direct<Dot, T> values{block->values, d, keys};
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
    __attribute__((noinline)) void score(const Tile& tile) const {
        const int64_t row = tile.row;
        for (int64_t k = 0; k < tile.n; k += PANEL) {
            Sum sums[ROWS][COLUMNS];
            repeat<ROWS * COLUMNS>(OCTAVO_EACH(i) {
                sums[i / COLUMNS][i % COLUMNS] = Dot::start(scratch.begins[row + i / COLUMNS]);
            });
            multiply<Dot, ROWS, COLUMNS, true>(
                scratch.queries + row * stride, stride, n_words,
                Packed{scratch.keys + k * n_words}, sums
            );
            repeat<ROWS * COLUMNS>(OCTAVO_EACH(i) {
                store_scores(i / COLUMNS, k + i % COLUMNS * W, sums[i / COLUMNS][i % COLUMNS]);
            });
        }
    }

    // The same by keys as they lie.
    template <int ROWS>
    void score_direct(const Tile& tile) const {
        const int32_t* const queries = scratch.queries + tile.row * stride;
        for (int64_t k = 0; k < tile.n; k += W) {
            Sum sums[ROWS][W / SIDE];
            for (int i = 0; i < W / SIDE; i++) {
                const T* const* const keys = block->keys + k + i * SIDE;
                fetch(block->values + k + i * SIDE, SIDE, D);
                Sum own[ROWS][SIDE];
                repeat<ROWS * SIDE>(OCTAVO_EACH(j) { own[j / SIDE][j % SIDE] = Sum{}; });
                for (int64_t d = 0; d < n_words; d += W) {
                    const int64_t e = d * Dot::N;
                    IntVec words[SIDE];
                    repeat<SIDE>(OCTAVO_EACH(j) { words[j] = Dot::words(keys[j] + e, D - e); });
                    repeat<ROWS>(OCTAVO_EACH(r) {
                        IntVec query = load(queries + r * stride + d);
                        keep(query);
                        repeat<SIDE>(OCTAVO_EACH(j) {
                            own[r][j] = Dot::add(own[r][j], words[j], query);
                        });
                    });
                }
                repeat<ROWS>(OCTAVO_EACH(r) {
                    sum_each<1>(own[r]);
                    sums[r][i] = own[r][0];
                });
            }
            repeat<ROWS>(OCTAVO_EACH(r) {
                sum_each<SIDE>(sums[r]);
                store_scores(r, k, sums[r][0] + Dot::start(scratch.begins[tile.row + r]));
            });
        }
    }

    // The same of wide vectors: four rows lie abreast in one, by which a key's words are multiplied four at
    // a time. So four rows leave one vector to sum up.
    template <int ROWS>
    void score_abreast(const Tile& tile) const {
        constexpr int ABREAST = (ROWS + 3) / 4;  // vectors of rows
        int32_t* const queries = scratch.keys;   // [stride / 4, ABREAST, 4 rows, 4 words]
        for (int64_t w = 0; w < stride; w += 4)
            repeat<ABREAST * 4>(OCTAVO_EACH(r) {
                const int64_t row = tile.row + least(r, ROWS - 1);
                memcpy(queries + w * ABREAST * 4 + r * 4, scratch.queries + row * stride + w, 16);
            });
        for (int64_t k = 0; k < tile.n; k += W) {
            Sum sums[ABREAST][4];
            repeat<4>(OCTAVO_EACH(i) {
                const T* const* const keys = block->keys + k + i * 4;
                const T* const* const values = next->values + k + i * 4;
                Sum own[ABREAST][4];
                repeat<ABREAST * 4>(OCTAVO_EACH(j) { own[j / 4][j % 4] = Sum{}; });
                for (int64_t w = 0; w < n_words; w += W) {
                    const int64_t d = w * Dot::N;
                    IntVec rows[4 * ABREAST];
                    repeat<4 * ABREAST>(OCTAVO_EACH(a) {
                        rows[a] = load(queries + w * 4 * ABREAST + a * W);
                        keep(rows[a]);
                    });
                    repeat<4>(OCTAVO_EACH(j) {
                        fetch_line(values[j] + d);
                        const IntVec words = Dot::words(keys[j] + d, D - d);
                        repeat<4>(OCTAVO_EACH(quarter) {
                            const IntVec four = spread<quarter>(words);
                            repeat<ABREAST>(OCTAVO_EACH(a) {
                                own[a][j] = Dot::add(own[a][j], four, rows[quarter * ABREAST + a]);
                            });
                        });
                    });
                }
                repeat<ABREAST>(OCTAVO_EACH(a) { sums[a][i] = sum_quads(own[a]); });
            });
            repeat<ABREAST>(OCTAVO_EACH(a) {
                Sum(&own)[4] = sums[a];
                exchange<8>(own[0], own[2]);
                exchange<8>(own[1], own[3]);
                exchange<4>(own[0], own[1]);
                exchange<4>(own[2], own[3]);
                repeat<4>(OCTAVO_EACH(i) {
                    constexpr int r = a * 4 + i;
                    if constexpr (r < ROWS)
                        store_scores(r, k, sums[a][i] + Dot::start(scratch.begins[tile.row + r]));
                });
            });
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
        // Rows side by side hide how long a sum takes, where there are registers for them.
        constexpr int TOGETHER = W == 16 ? ROWS : 1;
        float own[ROWS], added[ROWS];
        for (int r = 0; r < ROWS; r += TOGETHER) weigh<TOGETHER>(tile, r, own + r, added + r);
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

    // Weights of the tile's rows first…; each row's greatest score, and its weights' total.
    template <int ROWS>
    OCTAVO_INLINE void weigh(const Tile& tile, int first, float* own, float* added) const {
        float* const scores = scratch.scores + first * BLOCK_KEYS;
        int32_t* const words = scratch.weights + first * BLOCK_KEYS;
        const float* const value_scales = scratch.value_scales;
        const int64_t n = (tile.n + W - 1) / W * W;
        for (int r = 0; r < ROWS; r++) {
            float* const row = scores + r * BLOCK_KEYS;
            for (int64_t k = 0; k < tile.low[first + r]; k++) row[k] = NEVER;
            for (int64_t k = tile.high[first + r]; k < n; k++) row[k] = NEVER;
        }
        Vec most[ROWS], factor[ROWS], shift[ROWS], total[ROWS];
        repeat<ROWS>(OCTAVO_EACH(r) { most[r] = load(scores + r * BLOCK_KEYS); });
        for (int64_t k = W; k < n; k += W)
            repeat<ROWS>(OCTAVO_EACH(r) {
                most[r] = greater(load(scores + r * BLOCK_KEYS + k), most[r]);
            });
        repeat<ROWS>(OCTAVO_EACH(r) {
            const float scale = scratch.query_scales[tile.row + first + r];
            own[r] = largest(most[r]) * scale;
            // A row may see no key of this block; then all its weights are next to nothing.
            shift[r] = splat(own[r] == NEVER ? 0.0f : own[r]);
            factor[r] = splat(scale);
            total[r] = Vec{};
        });
        for (int64_t k = 0; k < n; k += W)
            repeat<ROWS>(OCTAVO_EACH(r) {
                const Vec score = load(scores + r * BLOCK_KEYS + k);
                const Vec weights = exp2<Dot::COARSE>(score * factor[r] - shift[r]);
                total[r] += weights;
                Dot::weigh(weights, value_scales, k, words + r * BLOCK_KEYS);
            });
        repeat<ROWS>(OCTAVO_EACH(r) { added[r] = sum(total[r]); });
    }

    // Bring rows' sums to their new greatest score, and add the block's: N_COLUMNS vectors from the
    // element d on.
    template <int ROWS, int N_COLUMNS, class Values>
    void add_values(const Tile& tile, int64_t d, const Values& values) const {
        Sum sums[ROWS][N_COLUMNS];
        repeat<ROWS * N_COLUMNS>(OCTAVO_EACH(i) { sums[i / N_COLUMNS][i % N_COLUMNS] = Sum{}; });
        multiply<Dot, ROWS, N_COLUMNS, false>(
            scratch.weights, BLOCK_KEYS, (tile.n + Dot::N - 1) / Dot::N, values, sums
        );
        repeat<ROWS>(OCTAVO_EACH(r) {
            repeat<N_COLUMNS>(OCTAVO_EACH(c) {
                float* const all = part.sums + (tile.row + r) * D + d + c * W;
                const Vec before = load(all) * splat(tile.correction[r]);
                store(all, before + Dot::floats(sums[r][c]) * splat(tile.factor[r]));
            });
        });
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
