// One piece of paged attention with an online softmax, written once and built for each instruction
// set (Milakov & Gimelshein 2018, algorithm 3; Dao et al. 2022, algorithm 1).
#include "attention_block.h"
#if defined(OCTAVO_AMX)
#include "attention_amx.h"
#endif

namespace octavo {
namespace {

constexpr float NEVER = -__builtin_inff();
constexpr int SIDE = 2;  // keys that are multiplied as they lie, at a time

// Neighbouring rows that take a block in together.
struct Tile {
    int64_t row;                  // the first
    int64_t low[AMX_TILE];        // each sees the keys low…high-1 of the block,
    int64_t high[AMX_TILE];
    int64_t n;                    // of which none sees more than the first n
    float correction[LINE] = {};  // what the sums of earlier blocks are multiplied by,
    float factor[LINE] = {};      // and those of this one
};

// The steps of a piece: `Dot` multiplies, and keys and values are kept as T.
template <class Dot, typename T>
struct Attend {
    typedef typename Dot::Sum Sum;
    static constexpr bool HAS_SCALES = sizeof(T) == 1;
#if defined(OCTAVO_AMX)
    static constexpr bool HAS_AMX = Matrices<Dot>::ARE_MULTIPLIED;
#else
    static constexpr bool HAS_AMX = false;
#endif

    const AttentionCall& call;
    const Piece& piece;
    const int64_t D, group, head_rows, n_rows;  // rows of one key head, and of all
    const int64_t n_words, stride;              // words of a query, and from one to the next
    // Of few rows the keys are read once: packing them would cost as much as multiplying them. Then
    // a block's values are fetched while its keys are multiplied, and the next one's keys while its
    // values are: both, and no more, stay in the first-level cache.
    const bool is_direct;
    const bool is_amx;  // packed blocks are multiplied as matrices
    const int64_t block_keys, block_lines;  // of one head; as many of values
    const Scratch scratch;
    const Part part;
    mutable Ahead<T> keys_ahead, values_ahead;
    Block<T> block;
    float unit = 1.0f;  // what the block's sums are to be multiplied by

    Attend(const AttentionCall& call, const Piece& piece, float* memory, float* result)
        : call(call), piece(piece), D(call.head_dim), group(call.group()),
          head_rows(piece.n_queries * group), n_rows(piece.n_rows(group)), n_words(D / Dot::N),
          stride(in_lines(n_words)), is_direct(head_rows <= TILE),
          is_amx(HAS_AMX && !is_direct && D % PANEL == 0),
          block_keys(is_direct ? DIRECT_BYTES / int64_t(sizeof(T)) : BLOCK_KEYS),
          block_lines(block_keys * D * int64_t(sizeof(T)) / 64),
          scratch(memory, n_rows, D), part(result ? result : scratch.part, n_rows, D),
          keys_ahead(call, piece, call.keys, HAS_SCALES),
          values_ahead(call, piece, call.values, false) {}

    void run() {
#if defined(OCTAVO_AMX)
        if (is_amx) {
            const amx::Registers registers;
            return run_blocks();
        }
#endif
        run_blocks();
    }

    void run_blocks() {
        take_queries();
        for (int64_t begin = piece.key_begin; begin < piece.key_end; begin += block_keys)
            for (int64_t head = 0; head < piece.n_heads; head++) take_head(begin, head);
        restore();
    }

    // A block of one head's keys; all heads have their turn with a block.
    void take_head(int64_t begin, int64_t head) {
        const bool is_end = head + 1 == piece.n_heads;
        const int64_t next_begin = is_end ? begin + block_keys : begin;
        const int64_t next_head = piece.kv_head + (is_end ? 0 : head + 1);
        keys_ahead.start(next_begin, block_keys, next_head);
        if (is_direct) values_ahead.start(begin, block_keys, piece.kv_head + head);
        else values_ahead.start(next_begin, block_keys, next_head);
        find_block(call, piece, begin, block_keys, piece.kv_head + head, block);
        unit = find_scales<Dot>(call, block, scratch);
        const int64_t tile = is_amx ? AMX_TILE : TILE, n_tiles = (head_rows + tile - 1) / tile;
        // A packed block's tiles have a share each of what is to be fetched, and its packing bit by bit two.
        const int64_t share = block_lines / (n_tiles + (is_amx ? 0 : 2)) + 1;
        if (is_amx) pack_amx();
        else if (!is_direct) pack_block(share * W / block_keys + 1);
        for (int64_t row = 0; row < head_rows; row += tile) {
            if (!is_direct) keys_ahead.fetch(share), values_ahead.fetch(share);
            if (is_amx) {
                take_block_amx(head * head_rows + row, least(tile, head_rows - row));
                continue;
            }
            with_number<TILE>(least(TILE, head_rows - row), [&](auto rows) {
                take_block<rows>(head * head_rows + row);
            });
        }
    }

    void take_queries() const {
        const bool in_pairs = W == 16 && is_direct;
        const int64_t head_words = in_pairs ? (head_rows + 1) / 2 * 4 * stride : head_rows * stride;
        memset(scratch.queries, 0, piece.n_heads * head_words * sizeof(int32_t));
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
            // `keys` is free: of few rows they are not packed.
            int32_t* const query = in_pairs ? scratch.keys : scratch.queries + r * stride;
            scratch.query_scales[r] = scale * Dot::query(scratch.row, D, query, scratch.begins + r);
            if (in_pairs) pair(query, r % head_rows, scratch.queries + r / head_rows * head_words);
            part.highest[r] = NEVER;
            part.total[r] = 0.0f;
        }
    }

    // A row's words among those of its head, as `score_pairs` wants them:
    // [stride / 4, pairs, 2, 2 rows, 4 words].
    void pair(const int32_t* query, int64_t row, int32_t* queries) const {
        const int64_t n_pairs = (head_rows + 1) / 2;
        for (int64_t w = 0; w < n_words; w += 4)
            for (int64_t twice = 0; twice < 2; twice++)
                memcpy(queries + w * n_pairs * 4 + (row / 2 * 4 + twice * 2 + row % 2) * 4, query + w, 16);
    }

    // The place in q or out of a row.
    static int64_t place(const AttentionCall& call, const Piece& piece, int64_t row) {
        const int64_t group = call.group(), of_head = row % (piece.n_queries * group);
        const int64_t head = piece.kv_head + row / (piece.n_queries * group);
        const int64_t token = piece.first_token + of_head / group;
        return (token * call.n_heads + head * group + of_head % group) * call.head_dim;
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

    // The tile of `n` rows from `row` on; whether any of them sees a key of the block.
    bool find_tile(int64_t row, int64_t n, Tile& tile) const {
        tile.row = row;
        // Its rows are one head's. Divided once: a division takes as long as ten vectors' products.
        const int64_t of_head = row % head_rows;
        int64_t position = piece.position + of_head / group - block.begin, of_group = of_head % group;
        for (int64_t r = 0; r < n; r++) {
            tile.low[r] = call.window ? within(position - call.window + 1, block.n) : 0;
            tile.high[r] = within(position + 1, block.n);
            if (++of_group == group) position++, of_group = 0;
        }
        tile.n = tile.high[n - 1];
        return tile.low[0] < tile.n;  // or it is before or after what they see
    }

    template <int ROWS>
    void take_block(int64_t row) const {
        Tile tile;
        if (!find_tile(row, ROWS, tile)) return;
        if (!is_direct) score<ROWS>(tile);
        else if constexpr (W == 16) score_pairs<ROWS>(tile);
        else score_direct<ROWS>(tile);
        soften<W == 16 ? ROWS : 1>(tile, ROWS);
        for (int64_t d = 0; d < D;) {
            const bool is_wide = panel_width(d, D) == PANEL;
            if (is_direct) {
                const Direct<Dot, T> values{block.values, d, keys_ahead};
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

    // Each time so many lines of keys and of values are fetched.
    void pack_block(int64_t n_lines) const {
        pack<Dot>(block, D, block.n, scratch, [&] { keys_ahead.fetch(n_lines), values_ahead.fetch(n_lines); });
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
    __attribute__((noinline)) void score_direct(const Tile& tile) const {
        const int32_t* const queries = scratch.queries + tile.row * stride;
        for (int64_t k = 0; k < tile.n; k += W) {
            Sum sums[ROWS][W / SIDE];
            for (int i = 0; i < W / SIDE; i++) {
                const T* const* const keys = block.keys + k + i * SIDE;
                values_ahead.fetch(SIDE * D * int64_t(sizeof(T)) / 64);
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

    // The same of wide vectors, which have room for a quarter of two rows' words, twice: they are multiplied
    // by the same quarter of two keys at a time. So two rows by two keys leave one vector to sum up.
    template <int ROWS>
    __attribute__((noinline)) void score_pairs(const Tile& tile) const {
        constexpr int PAIRS = (ROWS + 1) / 2;
        const int32_t* const queries = scratch.queries + tile.row / head_rows * PAIRS * 4 * stride;
        for (int64_t k = 0; k < tile.n; k += W) {
            Sum sums[PAIRS][2];
            values_ahead.fetch(while_multiplying(W * D * int64_t(sizeof(T)) / 64));
            repeat<2>(OCTAVO_EACH(half) {
                const T* const* const keys = block.keys + k + half * 8;
                Sum own[PAIRS][4];
                repeat<PAIRS * 4>(OCTAVO_EACH(i) { own[i / 4][i % 4] = Sum{}; });
                for (int64_t w = 0; w < n_words; w += W) {
                    const int64_t d = w * Dot::N;
                    IntVec rows[4 * PAIRS];
                    repeat<4 * PAIRS>(OCTAVO_EACH(i) {
                        rows[i] = load(queries + w * 4 * PAIRS + i * W);
                        keep(rows[i]);
                    });
                    repeat<4>(OCTAVO_EACH(j) {
                        const IntVec a = Dot::words(keys[j] + d, D - d);
                        const IntVec b = Dot::words(keys[j + 4] + d, D - d);
                        repeat<4>(OCTAVO_EACH(i) {
                            const IntVec words = quarters<i, i>(a, b);
                            repeat<PAIRS>(OCTAVO_EACH(p) {
                                own[p][j] = Dot::add(own[p][j], words, rows[i * PAIRS + p]);
                            });
                        });
                    });
                }
                repeat<PAIRS>(OCTAVO_EACH(p) { sums[p][half] = sum_quads(own[p]); });
            });
            repeat<ROWS>(OCTAVO_EACH(r) {
                const IntVec a = (IntVec)sums[r / 2][0], b = (IntVec)sums[r / 2][1];
                const Sum sum = (Sum)(r % 2 ? quarters<1, 3>(a, b) : quarters<0, 2>(a, b));
                store_scores(r, k, sum + Dot::start(scratch.begins[tile.row + r]));
            });
        }
    }

    OCTAVO_INLINE void store_scores(int r, int64_t k, Sum sums) const {
        Vec scores = Dot::floats(sums);
        if (HAS_SCALES) scores *= load(scratch.key_scales + k);
        store(scratch.scores + r * BLOCK_KEYS + k, scores);
    }

    // Scores that were products, in whose place they are put.
    static OCTAVO_INLINE Vec take_scores(float* products, const float* key_scales) {
        if (!HAS_SCALES) return load(products);  // they are scores
        const Vec scores = __builtin_convertvector(load((const int32_t*)products), Vec) * load(key_scales);
        store(products, scores);
        return scores;
    }

    // Turn scores into weights, relative to the block's greatest; greatest score and total move on.
    // Rows side by side hide how long a sum takes, where there are registers for them.
    // Where scores are still products, they become scores first.
    template <int TOGETHER, bool ARE_PRODUCTS = false>
    OCTAVO_INLINE void soften(Tile& tile, int64_t rows) const {
        float own[AMX_TILE], added[AMX_TILE];
        int64_t first = 0;
        for (; first + TOGETHER <= rows; first += TOGETHER)
            weigh<TOGETHER, ARE_PRODUCTS>(tile, first, own + first, added + first);
        for (; first < rows; first++) weigh<1, ARE_PRODUCTS>(tile, first, own + first, added + first);
        for (int64_t r = 0; r < rows; r++) {
            const float before = part.highest[tile.row + r];
            const float after = own[r] > before ? own[r] : before;
            part.highest[tile.row + r] = after;
            tile.correction[r] = before - after;
            tile.factor[r] = own[r] - after;
        }
        for (int64_t r = 0; r < rows; r += W) {
            store(tile.correction + r, exp2<false>(load(tile.correction + r)));
            store(tile.factor + r, exp2<false>(load(tile.factor + r)));
        }
        for (int64_t r = 0; r < rows; r++) {
            if (own[r] == NEVER) tile.correction[r] = 1.0f, tile.factor[r] = 0.0f;
            float& total = part.total[tile.row + r];
            total = total * tile.correction[r] + added[r] * tile.factor[r];
            tile.factor[r] *= unit;
        }
    }

    // Weights of the tile's rows first…; each row's greatest score, and its weights' total.
    template <int ROWS, bool ARE_PRODUCTS>
    OCTAVO_INLINE void weigh(const Tile& tile, int64_t first, float* own, float* added) const {
        float* const scores = scratch.scores + first * BLOCK_KEYS;
        int32_t* const words = scratch.weights + first * BLOCK_KEYS;
        const float* const key_scales = scratch.key_scales;
        const float* const value_scales = scratch.value_scales;
        const int64_t n = (tile.n + W - 1) / W * W;
        Vec most[ROWS], factor[ROWS], shift[ROWS], total[ROWS];
        repeat<ROWS>(OCTAVO_EACH(r) { most[r] = splat(NEVER); });
        // Products become scores. Then what rows do not see is hidden, unless they see all.
        bool is_seen = ARE_PRODUCTS;
        for (int r = 0; r < ROWS; r++) is_seen &= tile.low[first + r] == 0 && tile.high[first + r] >= n;
        if (ARE_PRODUCTS)
            for (int64_t k = 0; k < n; k += W)
                repeat<ROWS>(OCTAVO_EACH(r) {
                    most[r] = greater(take_scores(scores + r * BLOCK_KEYS + k, key_scales + k), most[r]);
                });
        if (!is_seen) {
            for (int r = 0; r < ROWS; r++) {
                float* const row = scores + r * BLOCK_KEYS;
                for (int64_t k = 0; k < tile.low[first + r]; k++) row[k] = NEVER;
                for (int64_t k = tile.high[first + r]; k < n; k++) row[k] = NEVER;
            }
            repeat<ROWS>(OCTAVO_EACH(r) { most[r] = load(scores + r * BLOCK_KEYS); });
            for (int64_t k = W; k < n; k += W)
                repeat<ROWS>(OCTAVO_EACH(r) {
                    most[r] = greater(load(scores + r * BLOCK_KEYS + k), most[r]);
                });
        }
        repeat<ROWS>(OCTAVO_EACH(r) {
            const float scale = scratch.query_scales[tile.row + first + r];
            const float highest = largest(most[r]);
            own[r] = highest * scale;
            // A row may see no key of this block; then all its weights are next to nothing.
            shift[r] = splat(highest == NEVER ? 0.0f : highest);
            factor[r] = splat(scale);
            total[r] = Vec{};
        });
        for (int64_t k = 0; k < n; k += W) {
            if (is_direct) {
                keys_ahead.fetch(while_weighing(block_lines * W / block_keys));
                values_ahead.fetch(while_weighing(block_lines * W / block_keys));
            }
            repeat<ROWS>(OCTAVO_EACH(r) {
                const Vec score = load(scores + r * BLOCK_KEYS + k);
                // The difference first: that of products, one of them rounded, may be above 0, and
                // what a weight above 1 becomes in integers has the other sign.
                const Vec weights = exp2<Dot::COARSE>((score - shift[r]) * factor[r]);
                total[r] += weights;
                Dot::weigh(weights, value_scales, k, words + r * BLOCK_KEYS);
            });
        }
        repeat<ROWS>(OCTAVO_EACH(r) { added[r] = sum(total[r]); });
    }

    // Bring rows' sums to their new greatest score, and add the block's: N_COLUMNS vectors from the
    // element d on.
    template <int ROWS, int N_COLUMNS, class Values>
    __attribute__((noinline)) void add_values(const Tile& tile, int64_t d, const Values& values) const {
        Sum sums[ROWS][N_COLUMNS];
        repeat<ROWS * N_COLUMNS>(OCTAVO_EACH(i) { sums[i / N_COLUMNS][i % N_COLUMNS] = Sum{}; });
        multiply<Dot, ROWS, N_COLUMNS, false>(
            scratch.weights, BLOCK_KEYS, (tile.n + Dot::N - 1) / Dot::N, values, sums
        );
        repeat<ROWS>(OCTAVO_EACH(r) { move_on(tile, r, d, sums[r]); });
    }

    // A row's sums from the element d on, to which the block's are added.
    template <int N_COLUMNS>
    OCTAVO_INLINE void move_on(const Tile& tile, int64_t r, int64_t d, const Sum (&sums)[N_COLUMNS]) const {
        float* const all = part.sums + (tile.row + r) * D + d;
        const Vec correction = splat(tile.correction[r]), factor = splat(tile.factor[r]);
        repeat<N_COLUMNS>(OCTAVO_EACH(c) {
            store(all + c * W, load(all + c * W) * correction + Dot::floats(sums[c]) * factor);
        });
    }

#if defined(OCTAVO_AMX)
    void pack_amx() const {
        if constexpr (HAS_AMX) pack<typename Matrices<Dot>::Keys>(block, D, block.room, scratch, [] {});
    }

    void take_block_amx(int64_t row, int64_t rows) const {
        if constexpr (HAS_AMX) {
            Tile tile;
            if (!find_tile(row, rows, tile)) return;
            for (int64_t k = 0; k < tile.n; k += PANEL)
                multiply_panel<Dot, true>(
                    scratch.queries + row * stride, stride, scratch.keys + k * n_words, n_words,
                    scratch.scores + k, BLOCK_KEYS
                );
            const int64_t n = (tile.n + W - 1) / W * W;
            soften<4, true>(tile, rows);
            // A register's words are more than a vector's weights.
            constexpr int64_t DEPTH = amx::WORDS * Dot::N;
            const int64_t depth = (n + DEPTH - 1) / DEPTH * DEPTH;
            for (int64_t r = 0; r < rows; r++)
                memset((char*)(scratch.weights + r * BLOCK_KEYS) + n * 4 / Dot::N, 0, (depth - n) * 4 / Dot::N);
            float* const products = scratch.scores;  // they are done with
            for (int64_t d = 0; d < D; d += PANEL) {
                multiply_panel<Dot, false>(
                    scratch.weights, BLOCK_KEYS, scratch.values + d * (BLOCK_KEYS / Dot::N),
                    depth / Dot::N, products, BLOCK_KEYS
                );
                for (int64_t r = 0; r < rows; r++) {
                    Sum sums[COLUMNS];
                    repeat<COLUMNS>(OCTAVO_EACH(c) {
                        sums[c] = (Sum)load(products + r * BLOCK_KEYS + c * W);
                    });
                    move_on(tile, r, d, sums);
                }
            }
        }
    }
#else
    void pack_amx() const {}
    void take_block_amx(int64_t, int64_t) const {}
#endif

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
#if defined(OCTAVO_HAS_HALVES)
    if (call.kv_dtype == BF16 && call.q_dtype == BF16 && OCTAVO_HAS_HALVES)
        return run_piece<Halves, uint16_t>(call, piece, scratch, part);
#endif
#if !defined(OCTAVO_NO_SINGLES)
    if (call.kv_dtype == BF16) return run_piece<Singles, uint16_t>(call, piece, scratch, part);
    return run_piece<Singles, float>(call, piece, scratch, part);
#endif
}

}  // namespace

// By AMX packing takes as long as before, and all else less.
#if defined(OCTAVO_AMX)
const AttentionKernel OCTAVO_KERNEL = {run, merge, 768};
#else
const AttentionKernel OCTAVO_KERNEL = {run, merge, 384};
#endif

}  // namespace octavo
