// One piece of paged attention with an online softmax, written once and built for each instruction
// set (Milakov & Gimelshein 2018, algorithm 3; Dao et al. 2022, algorithm 1).
#include "attention.h"
#include "products.h"

namespace octavo {
namespace {

constexpr float NEVER = -__builtin_inff();
constexpr int COLUMNS = W == 16 ? 4 : 2;  // vectors whose sums stay in registers, by TILE rows

// A block of keys: where each token's key and value are. The last ones may be there twice, so that
// there are always whole vectors of them.
template <typename T>
struct Block {
    int64_t begin, n;
    int64_t slots[BLOCK_KEYS];  // counted in tokens of one head
    const T* keys[BLOCK_KEYS];
    const T* values[BLOCK_KEYS];
};

template <typename T>
void find_block(const AttentionCall& call, const Piece& piece, int64_t begin, Block<T>& block) {
    const int64_t D = call.head_dim, P = call.page_size;
    const int64_t* table = call.page_table + piece.sequence * call.table_stride;
    block.begin = begin;
    block.n = least(BLOCK_KEYS, piece.key_end - begin);
    int64_t k = 0;
    while (k < block.n) {
        const int64_t page = (begin + k) / P, offset = begin + k - page * P;
        const int64_t run = least(P - offset, block.n - k);
        const int64_t at = (table[page] * call.n_kv_heads + piece.kv_head) * P + offset;
        for (int64_t i = 0; i < run; i++) block.slots[k++] = at + i;
    }
    for (; k < BLOCK_KEYS; k++) block.slots[k] = block.slots[k - 1];
    for (k = 0; k < BLOCK_KEYS; k++) {
        block.keys[k] = (const T*)call.keys + block.slots[k] * D;
        block.values[k] = (const T*)call.values + block.slots[k] * D;
    }
}

// The block's scales, of keys and values. Values' are brought to what the greatest of them becomes
// when weights are as great as they may be; gives by what weights are to be multiplied afterwards.
template <class Dot>
float find_scales(
    const AttentionCall& call, const Block<int8_t>& block, const Scratch& scratch
) {
    for (int64_t k = 0; k < BLOCK_KEYS; k++) {
        const uint32_t key_scale = uint32_t(call.key_scales[block.slots[k]]) << 16;
        const uint32_t value_scale = uint32_t(call.value_scales[block.slots[k]]) << 16;
        memcpy(scratch.key_scales + k, &key_scale, sizeof key_scale);
        memcpy(scratch.value_scales + k, &value_scale, sizeof value_scale);
    }
    const float most = largest_magnitude(scratch.value_scales, BLOCK_KEYS);
    const Vec factor = splat(Dot::MOST / most);
    for (int64_t k = 0; k < BLOCK_KEYS; k += W)
        store(scratch.value_scales + k, load(scratch.value_scales + k) * factor);
    return most / Dot::MOST;
}
template <class Dot, typename T>
float find_scales(const AttentionCall&, const Block<T>&, const Scratch&) {
    return 1.0f;
}

// Keys as columns, [words of a head][BLOCK_KEYS], and values as columns, [words of a block][D].
template <class Dot, typename T>
void pack(const Block<T>& block, int64_t D, const Scratch& scratch) {
    const int64_t n_words = D / Dot::N;
    for (int64_t k = 0; k < block.n; k += W)
        for (int64_t d = 0; d < n_words; d += W) {
            IntVec v[W];
            for (int i = 0; i < W; i++)
                v[i] = Dot::words(block.keys[k + i] + d * Dot::N, D - d * Dot::N);
            transpose(v);
            for (int i = 0; i < least(W, n_words - d); i++)
                store(scratch.keys + (d + i) * BLOCK_KEYS + k, v[i]);
        }
    for (int64_t k = 0; k < block.n; k += Dot::N)
        for (int64_t d = 0; d < D; d += W)
            store(scratch.values + k / Dot::N * D + d, Dot::interleave(block.values + k, d));
}

// What a tile's rows see of a block, and how they were scored.
struct Tile {
    int64_t row;        // the first
    int64_t low[TILE];  // the keys low…high-1 of the block
    int64_t high[TILE];
    float correction[LINE] = {};  // what the sums of earlier blocks are multiplied by
    float factor[LINE] = {};      // and those of this one
};

// Scores of ROWS rows, by columns of packed keys.
template <class Dot, int ROWS>
void score(const Scratch& scratch, int64_t row, int64_t n, int64_t D, bool has_scales) {
    const int64_t n_words = D / Dot::N, stride = padded(n_words);
    for (int64_t k = 0; k < n; k += COLUMNS * W) {
        typename Dot::Sum sums[ROWS][COLUMNS];
        for (int r = 0; r < ROWS; r++)
            for (int c = 0; c < COLUMNS; c++) sums[r][c] = Dot::start(scratch.begins[row + r]);
        const int32_t* const keys = scratch.keys + k;
        multiply<Dot, ROWS, COLUMNS, true>(
            scratch.queries + row * stride, stride, n_words,
            [&](int64_t i, int c) { return load(keys + i * BLOCK_KEYS + c * W); }, sums
        );
        for (int r = 0; r < ROWS; r++)
            for (int c = 0; c < COLUMNS; c++) {
                Vec scores = Dot::floats(sums[r][c]);
                if (has_scales) scores *= load(scratch.key_scales + k + c * W);
                store(scratch.scores + r * BLOCK_KEYS + k + c * W, scores);
            }
    }
}

// The same by keys as they lie, of which the block's successor is fetched meanwhile.
template <class Dot, int ROWS, typename T>
void score_direct(
    const Scratch& scratch, const Block<T>& block, const Block<T>& next, int64_t D, bool has_scales
) {
    const int64_t n_words = D / Dot::N, stride = padded(n_words);
    for (int64_t k = 0; k < block.n; k += W) {
        typename Dot::Sum sums[ROWS][W];
        for (int i = 0; i < W; i++) {
            for (int64_t d = 0; d < D; d += 64 / int64_t(sizeof(T))) {
                __builtin_prefetch(next.keys[k + i] + d);
                __builtin_prefetch(next.values[k + i] + d);
            }
            typename Dot::Sum own[ROWS];
            for (int r = 0; r < ROWS; r++) own[r] = typename Dot::Sum{};
            for (int64_t d = 0; d < n_words; d += W) {
                const IntVec key = Dot::words(block.keys[k + i] + d * Dot::N, D - d * Dot::N);
                for (int r = 0; r < ROWS; r++)
                    own[r] = Dot::add(own[r], key, load(scratch.queries + r * stride + d));
            }
            for (int r = 0; r < ROWS; r++) sums[r][i] = own[r];
        }
        for (int r = 0; r < ROWS; r++) {
            sum_each(sums[r]);
            Vec scores = Dot::floats(sums[r][0] + Dot::start(scratch.begins[r]));
            if (has_scales) scores *= load(scratch.key_scales + k);
            store(scratch.scores + r * BLOCK_KEYS + k, scores);
        }
    }
}

// Turn scores into weights, relative to the block's greatest; greatest score and total move on.
template <class Dot, int ROWS>
void soften(const Scratch& scratch, Tile& tile, const Part& part, float unit) {
    float own[ROWS], added[ROWS];
    for (int r = 0; r < ROWS; r++) {
        float* const scores = scratch.scores + r * BLOCK_KEYS;
        for (int64_t k = 0; k < tile.low[r]; k++) scores[k] = NEVER;
        for (int64_t k = tile.high[r]; k < BLOCK_KEYS; k++) scores[k] = NEVER;
        Vec most = load(scores);
        for (int64_t k = W; k < BLOCK_KEYS; k += W) {
            const Vec s = load(scores + k);
            most = s > most ? s : most;
        }
        const float scale = scratch.query_scales[tile.row + r];
        const float highest = largest(most) * scale;
        // A row may see no key of this block; then all its weights are next to nothing.
        own[r] = highest;
        const Vec shift = splat(highest == NEVER ? 0.0f : highest), factor = splat(scale);
        Vec total = Vec{};
        for (int64_t k = 0; k < BLOCK_KEYS; k += W) {
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
        float& total = part.total[tile.row + r];
        if (own[r] == NEVER) tile.correction[r] = 1.0f, tile.factor[r] = 0.0f;
        total = total * tile.correction[r] + added[r] * tile.factor[r];
        tile.factor[r] *= unit;
    }
}

// Bring the sums of ROWS rows to the new greatest score, and add the block's; the elements from d on.
template <class Dot, int ROWS, int N_COLUMNS, class Values>
inline void add_values(
    const Scratch& scratch, const Tile& tile, const Part& part, int64_t d, int64_t D, int64_t n,
    const Values& values
) {
    typename Dot::Sum sums[ROWS][N_COLUMNS];
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < N_COLUMNS; c++) sums[r][c] = typename Dot::Sum{};
    multiply<Dot, ROWS, N_COLUMNS, false>(
        scratch.weights, BLOCK_KEYS, (n + Dot::N - 1) / Dot::N, values, sums
    );
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < N_COLUMNS; c++) {
            float* const all = part.sums + (tile.row + r) * D + d + c * W;
            store(
                all, load(all) * splat(tile.correction[r]) +
                         Dot::floats(sums[r][c]) * splat(tile.factor[r])
            );
        }
}

template <class Dot, int ROWS, typename T>
void attend_tile(
    const AttentionCall& call, const Piece& piece, const Scratch& scratch, const Part& part,
    const Block<T>& block, const Block<T>* next, float unit, int64_t row
) {
    const int64_t D = call.head_dim;
    Tile tile;
    tile.row = row;
    for (int r = 0; r < ROWS; r++) {
        const int64_t position = piece.position + (row + r) / call.group() - block.begin;
        tile.low[r] = call.window ? within(position - call.window + 1, block.n) : 0;
        tile.high[r] = within(position + 1, block.n);
    }
    const bool has_scales = sizeof(T) == 1;
    if (next) score_direct<Dot, ROWS>(scratch, block, *next, D, has_scales);
    else score<Dot, ROWS>(scratch, row, block.n, D, has_scales);
    soften<Dot, ROWS>(scratch, tile, part, unit);
    int64_t d = 0;
    const auto packed = [&](int64_t i, int c) { return load(scratch.values + i * D + d + c * W); };
    const auto direct = [&](int64_t i, int c) {
        return Dot::interleave(block.values + i * Dot::N, d + c * W);
    };
    for (; d + COLUMNS * W <= D; d += COLUMNS * W)
        if (next) add_values<Dot, ROWS, COLUMNS>(scratch, tile, part, d, D, block.n, direct);
        else add_values<Dot, ROWS, COLUMNS>(scratch, tile, part, d, D, block.n, packed);
    for (; d < D; d += 2 * W)
        if (next) add_values<Dot, ROWS, 2>(scratch, tile, part, d, D, block.n, direct);
        else add_values<Dot, ROWS, 2>(scratch, tile, part, d, D, block.n, packed);
}

// A tile's function for each number of rows, so that the compiler knows it.
template <class Dot, typename T>
void attend_rows(
    int64_t n, const AttentionCall& call, const Piece& piece, const Scratch& scratch,
    const Part& part, const Block<T>& block, const Block<T>* next, float unit, int64_t row
) {
    switch (n) {
        case 1: return attend_tile<Dot, 1>(call, piece, scratch, part, block, next, unit, row);
        case 2: return attend_tile<Dot, 2>(call, piece, scratch, part, block, next, unit, row);
        case 3: return attend_tile<Dot, 3>(call, piece, scratch, part, block, next, unit, row);
        case 4: return attend_tile<Dot, 4>(call, piece, scratch, part, block, next, unit, row);
        case 5: return attend_tile<Dot, 5>(call, piece, scratch, part, block, next, unit, row);
        default: return attend_tile<Dot, 6>(call, piece, scratch, part, block, next, unit, row);
    }
}

// The place in q or out of a row.
inline int64_t place(const AttentionCall& call, const Piece& piece, int64_t row) {
    const int64_t group = call.group(), head = piece.kv_head * group + row % group;
    return ((piece.first_token + row / group) * call.n_heads + head) * call.head_dim;
}

template <class Dot>
void take_queries(
    const AttentionCall& call, const Piece& piece, int64_t n_rows, const Scratch& scratch
) {
    const int64_t D = call.head_dim, stride = padded(D / Dot::N);
    memset(scratch.queries, 0, n_rows * stride * sizeof(int32_t));
    // exp(x) is 2^(x log2 e).
    const float scale = 1.4426950408889634f / sqrtf(float(D));
    for (int64_t r = 0; r < n_rows; r++) {
        const int64_t at = place(call, piece, r);
        for (int64_t d = 0; d < D; d += W)
            store(
                scratch.row + d, call.q_dtype == BF16 ? load((const uint16_t*)call.q + at + d)
                                                      : load((const float*)call.q + at + d)
            );
        scratch.query_scales[r] =
            scale * Dot::query(scratch.row, D, scratch.queries + r * stride, scratch.begins + r);
    }
}

// Divide a row's sums by its total, into out.
void finish(const AttentionCall& call, const Piece& piece, int64_t row, const Part& part) {
    const int64_t at = place(call, piece, row);
    const Vec total = splat(part.total[row]);
    for (int64_t d = 0; d < call.head_dim; d += W) {
        const Vec mean = load(part.sums + row * call.head_dim + d) / total;
        if (call.q_dtype == BF16) store((uint16_t*)call.out + at + d, mean);
        else store((float*)call.out + at + d, mean);
    }
}

template <class Dot, typename T>
void run_piece(const AttentionCall& call, const Piece& piece, float* memory, float* result) {
    const int64_t D = call.head_dim, n_rows = piece.n_queries * call.group();
    const Scratch scratch(memory, n_rows, D);
    const Part part(result ? result : scratch.part, n_rows, D);
    take_queries<Dot>(call, piece, n_rows, scratch);
    for (int64_t r = 0; r < n_rows; r++) part.highest[r] = NEVER, part.total[r] = 0.0f;
    memset(part.sums, 0, n_rows * D * sizeof(float));
    // Of few rows the keys are read once: packing them would cost as much as multiplying them.
    const bool is_direct = n_rows <= TILE;
    Block<T> blocks[2];
    find_block(call, piece, piece.key_begin, blocks[0]);
    for (int64_t i = 0, begin = piece.key_begin; begin < piece.key_end; i++) {
        const Block<T>& block = blocks[i % 2];
        Block<T>& next = blocks[(i + 1) % 2];
        begin += block.n;
        const bool is_last = begin == piece.key_end;
        if (!is_last) find_block(call, piece, begin, next);
        const float unit = find_scales<Dot>(call, block, scratch);
        if (!is_direct) pack<Dot>(block, D, scratch);
        for (int64_t row = 0; row < n_rows; row += TILE)
            attend_rows<Dot>(
                least(TILE, n_rows - row), call, piece, scratch, part, block,
                !is_direct ? nullptr : is_last ? &block : &next, unit, row
            );
    }
    if (!result)
        for (int64_t r = 0; r < n_rows; r++) finish(call, piece, r, part);
}

void merge(const AttentionCall& call, const Piece& piece, float* parts, int64_t n, int64_t size) {
    const int64_t D = call.head_dim, n_rows = piece.n_queries * call.group();
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
        finish(call, piece, r, all);
    }
}

void run(const AttentionCall& call, const Piece& piece, float* scratch, float* part) {
    if (call.kv_dtype == INT8)
        return run_piece<OCTAVO_INTEGERS, int8_t>(call, piece, scratch, part);
#if !defined(OCTAVO_EMULATED)
    if (call.kv_dtype == BF16) return run_piece<Singles, uint16_t>(call, piece, scratch, part);
    return run_piece<Singles, float>(call, piece, scratch, part);
#endif
}

}  // namespace

const AttentionKernel OCTAVO_KERNEL = {run, merge};

}  // namespace octavo
