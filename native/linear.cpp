// The library's door to the linears: packs weights, and shares products out.
#include "linear.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "isa.h"
#include "memory.h"
#include "threads.h"

namespace octavo {
namespace {

const LinearKernels& kernels_of(int isa) {
    switch (isa) {
#if defined(__x86_64__)
        case AVX2: return linears_avx2;
        case AVX512: return linears_avx512;
        case AVX_VNNI_EMULATED: return linears_avx_vnni_emulated;
        case AVX512_EMULATED: return linears_avx512_emulated;
        case AMX_EMULATED: return linears_amx_emulated;
#endif
#if defined(OCTAVO_KNOWS_AVX_VNNI)
        case AVX_VNNI: return linears_avx_vnni;
#endif
#if defined(OCTAVO_KNOWS_AMX)
        case AMX: return linears_amx;
#endif
#if defined(__aarch64__)
        case DOTPROD: return linears_dotprod;
#endif
        default: return linears_portable;
    }
}

// Pieces of a few tokens are read straight from memory: smaller ones share out better.
int64_t panels_of_piece(const W8A8Call& call, int64_t n_threads) {
    const int64_t fair = call.n_panels() / (2 * n_threads);
    return std::clamp<int64_t>(fair, 1, BLOCK_PANELS);
}

// How a call is cut into pieces.
struct Cut {
    const W8A8Call& call;
    const int64_t panels, columns, rows;
    // Blocks of about the same size, and whole tiles where there are several.
    const int64_t height;

    Cut(const W8A8Call& call, int64_t n_threads, int64_t tile, int64_t block)
        : call(call), panels(panels_of_piece(call, n_threads)), columns((call.n_panels() + panels - 1) / panels),
          rows((call.n_tokens + block - 1) / block),
          height(rows > 1 ? ((call.n_tokens + rows - 1) / rows + tile - 1) / tile * tile : block) {}

    int64_t n_pieces() const { return rows * columns; }

    W8A8Piece piece(int64_t i) const {
        W8A8Piece piece;
        piece.first_token = i % rows * height;
        piece.n_tokens = std::min(height, call.n_tokens - piece.first_token);
        piece.first_panel = i / rows * panels;
        piece.n_panels = std::min(panels, call.n_panels() - piece.first_panel);
        return piece;
    }
};

// How a call's inputs are laid out for all its pieces: not at all if it has few tokens, and pieces are one high.
struct InputLayout {
    const LayOut* const how;
    const int64_t step, n_steps, token_bytes, tile_tokens, block_tokens;

    InputLayout(const W8A8Call& call, const LayOut* how)
        : how(how), step(how ? how->n_tokens : 1), n_steps(how ? (call.n_tokens + step - 1) / step : 0),
          token_bytes(how ? call.n_inputs * how->input_bytes : 0), tile_tokens(how ? how->tile_tokens : 1),
          block_tokens(how ? how->block_tokens : BLOCK_TOKENS) {}

    int64_t n_tokens() const { return n_steps * step; }  // that there must be room for
    int64_t n_bytes() const { return n_tokens() * token_bytes; }

    void run(const W8A8Call& call, int64_t i, int8_t* laid_out, int32_t* begins) const {
        how->run(call, i * step, laid_out + i * step * token_bytes, begins + i * step * PANEL);
    }
};

// Several products, whose pieces the threads share out as if they were one's.
void multiply(const W8A8Calls& all, const LinearKernels& kernels) {
    int64_t work = 0;
    for (int64_t i = 0; i < all.n_calls; i++) work += all.calls[i].work();
    const int64_t n_threads = threads_for(work, all.calls->n_threads);
    const W8A8Call& first = *all.calls;
    const InputLayout layout(first, kernels.find_layout(first));
    std::vector<Cut> cuts;
    int64_t n_pieces = 0;
    for (int64_t i = 0; i < all.n_calls; i++) {
        cuts.emplace_back(all.calls[i], n_threads, layout.tile_tokens, layout.block_tokens);
        n_pieces += cuts.back().n_pieces();
    }
    const Memory<int32_t> begins(layout.n_tokens() * PANEL);
#if defined(_OPENMP)
#pragma omp parallel num_threads(int(n_threads)) if (n_pieces > 1 && n_threads > 1)
#endif
    {
        const std::unique_ptr<W8A8Scratch> scratch(new W8A8Scratch);
        const Memory<int32_t> sums(BLOCK_PANELS * layout.block_tokens * PANEL);
        scratch->sums = sums.numbers;
        scratch->laid_out = all.laid_out;
        scratch->begins = begins.numbers;
        if (layout.how) {  // else the threads need not wait for each other before they begin
#if defined(_OPENMP)
#pragma omp for schedule(static)
#endif
            for (int64_t i = 0; i < layout.n_steps; i++) layout.run(first, i, all.laid_out, begins.numbers);
        }
#if defined(_OPENMP)
#pragma omp for schedule(dynamic)
#endif
        for (int64_t i = 0; i < n_pieces; i++) {
            auto cut = cuts.begin();
            int64_t own = i;
            while (own >= cut->n_pieces()) own -= (cut++)->n_pieces();
            const W8A8Piece piece = cut->piece(own);
            if (piece.n_tokens > 0) kernels.w8a8(cut->call, piece, *scratch);
        }
    }
}

void multiply(const BF16Call& call, const LinearKernels& kernels) {
    if (call.n_tokens == 0) return;
    const Memory<float> inputs(std::max(call.n_tokens, FEWEST_TOKENS) * call.n_inputs);
    kernels.take_inputs(call, inputs.numbers);
    const int64_t n_blocks = (call.n_outputs + BLOCK_OUTPUTS - 1) / BLOCK_OUTPUTS;
    const int64_t n_threads = threads_for(call.work(), call.n_threads);
    // Neighbours, since a block has the next one's first weights fetched.
    const int64_t at_a_time = std::max<int64_t>(1, n_blocks / (32 * n_threads));
    (void)at_a_time;
#if defined(_OPENMP)
#pragma omp parallel num_threads(int(n_threads)) if (n_blocks > 1 && n_threads > 1)
#endif
    {
        const Memory<float> sums(BLOCK_OUTPUTS * std::max(call.n_tokens, LINE_FLOATS) + LINE_FLOATS);
#if defined(_OPENMP)
#pragma omp for schedule(dynamic, at_a_time)
#endif
        for (int64_t i = 0; i < n_blocks; i++) {
            const int64_t first = i * BLOCK_OUTPUTS, stop = std::min(first + BLOCK_OUTPUTS, call.n_outputs);
            kernels.bf16(call, inputs.numbers, first, stop, sums.numbers);
        }
    }
}

void pack(
    const int8_t* weight, int64_t n_outputs, int64_t n_inputs, int8_t* packed, int n_threads,
    const LinearKernels& kernels
) {
    const int64_t n_panels = (n_outputs + PANEL - 1) / PANEL;
    (void)n_threads;
#if defined(_OPENMP)
#pragma omp parallel for num_threads(n_threads) if (n_threads > 1) schedule(static)
#endif
    for (int64_t panel = 0; panel < n_panels; panel++)
        kernels.pack(weight, n_outputs, n_inputs, panel, packed + panel * PANEL * n_inputs);
}

}  // namespace
}  // namespace octavo

extern "C" const int64_t octavo_linears_w8a8_bytes = sizeof(octavo::W8A8Calls);
extern "C" const int64_t octavo_linear_w8a8_bytes = sizeof(octavo::W8A8Call);  // of them one
extern "C" const int64_t octavo_linear_bf16_bytes = sizeof(octavo::BF16Call);

extern "C" {

// All that give an int give 0, or 1 where the machine does not have the instructions.

// Pack [n_outputs, n_inputs] int8 as native/linear.h says; n_inputs is a multiple of 4.
int octavo_pack_w8(
    const int8_t* weight, int64_t n_outputs, int64_t n_inputs, int8_t* packed, int64_t n_threads,
    int64_t isa
) {
    if (!octavo::runs(int(isa))) return 1;
    const octavo::LinearKernels& kernels = octavo::kernels_of(int(isa));
    octavo::pack(weight, n_outputs, n_inputs, packed, int(n_threads), kernels);
    return 0;
}

// Bytes that `laid_out` of the calls must have: 0 for few tokens, and without the instructions.
int64_t octavo_w8a8_laid_out_bytes(const octavo::W8A8Calls* calls, int isa) {
    if (!octavo::runs(isa)) return 0;
    const octavo::W8A8Call& call = *calls->calls;
    return octavo::InputLayout(call, octavo::kernels_of(isa).find_layout(call)).n_bytes();
}

int octavo_linears_w8a8(const octavo::W8A8Calls* calls, int isa) {
    if (!octavo::runs(isa)) return 1;
    octavo::multiply(*calls, octavo::kernels_of(isa));
    return 0;
}

int octavo_linear_bf16(const octavo::BF16Call* call, int isa) {
    if (!octavo::runs(isa)) return 1;
    octavo::multiply(*call, octavo::kernels_of(octavo::without_bytes(isa)));
    return 0;
}

}  // extern "C"
