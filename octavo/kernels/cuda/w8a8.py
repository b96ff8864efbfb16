"""The W8A8 linear on a GPU: by Triton, or by PyTorch's product and Triton's scales.

Few tokens are bound by reading the weight, and a tile's inputs are shared out among programs where
the tiles alone would leave processors idle. The parts' sums are whole numbers: in any order they
add up to the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels import plain, quantized
from octavo.kernels.cuda import quantize
from octavo.kernels.cuda.early_launch import early_launch, fetch, wait_for_previous
from octavo.kernels.cuda.fastest import Fastest, Way
from octavo.kernels.cuda.launch import DEVICE, computes_right, runs_on
from octavo.kernels.cuda.numbers import rounded
from octavo.kernels.cuda.tiling import FEW_TOKENS, Tiling, processors, tiles, tiling
from octavo.kernels.int8 import int8_product_fp32
from octavo.kernels.quantized import QuantizedTokens

_fastest = Fastest()
_MOST_BUCKET = 4096  # tokens beyond which a product is timed no more
_NEIGHBOURS = 8  # rows of tiles that share what they read of the weight, in the L2 cache
_FINISH_COLUMNS = 1024
FETCHED_BYTES = 1024  # of each row of a weight, before few tokens' inputs are there
_LINE = tl.constexpr(128)  # bytes of the L2 cache


def linear_w8a8(
    x: Tensor | QuantizedTokens, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    """As `octavo.kernels.quantized.linear_w8a8`, same arguments, bit by bit.

    It can be captured in a graph once `usable` has been called. Outside of one, a shape of many
    tokens that is met for the first time is timed.
    """
    tokens = quantize.quantize_per_token(x) if isinstance(x, Tensor) else x
    serves = runs_on(tokens.q) and tokens.dtype in quantize.FLOATS
    if not (serves and usable()):
        return plain.linear_w8a8(tokens, weight, weight_scale, bias)
    operands = tokens._replace(q=tokens.q.contiguous()), weight.contiguous(), weight_scale, bias
    ways: list[Way] = [partial(_by_tiles, *operands)]
    n_tokens = len(tokens.q)
    if n_tokens > FEW_TOKENS and _int_mm_serves(weight):
        ways.append(partial(_by_int_mm, *operands))
    bucket = min(triton.next_power_of_2(n_tokens), _MOST_BUCKET)
    return _fastest.run((bucket, *weight.shape), ways)


def linears_w8a8(
    x: Tensor | QuantizedTokens, weights: Sequence[Tensor], weight_scales: Sequence[Tensor]
) -> list[Tensor]:
    """As `octavo.kernels.quantized.linears_w8a8`, same arguments, bit by bit.

    Few tokens in one launch, if there are tiles enough for all processors: a token's keys and
    values alone are not, and a launch takes longer than to read their weights.
    """
    tokens = quantize.quantize_per_token(x) if isinstance(x, Tensor) else x
    n_tokens, n_inputs = tokens.q.shape
    serves = runs_on(tokens.q) and tokens.dtype in quantize.FLOATS and n_tokens <= FEW_TOKENS
    if serves and usable():
        cut = tiling(n_tokens, sum(map(len, weights)), n_inputs, processors())
        if cut.n_parts == 1:
            return _several(tokens, weights, weight_scales, cut)
    return [linear_w8a8(tokens, *each) for each in zip(weights, weight_scales, strict=True)]


@cache
def usable() -> bool:
    """Whether Triton's product computes right here, which is tried once."""
    return computes_right(_is_right, "the W8A8 linear")


def _by_tiles(
    x: QuantizedTokens,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    cut: Tiling | None = None,
) -> Tensor:
    """By Triton's product; `cut` None is this device's tiling of the shape."""
    (n_tokens, n_inputs), n_outputs = x.q.shape, len(weight)
    if cut is None:
        cut = tiling(n_tokens, n_outputs, n_inputs, processors())
    grid = triton.cdiv(n_tokens, cut.m) * triton.cdiv(n_outputs, cut.n), cut.n_parts
    sizes = n_tokens, n_outputs, n_inputs
    blocks = _constants(cut, n_inputs) | {"NEIGHBOURS": _NEIGHBOURS}
    if cut.n_parts > 1:
        sums = torch.empty(cut.n_parts, n_tokens, n_outputs, dtype=torch.int32, device=x.q.device)
        _part_kernel[grid](x.q, weight, sums, *sizes, **blocks)
        return _finish(sums, x, weight_scale, bias)
    out = torch.empty(n_tokens, n_outputs, dtype=x.dtype, device=x.q.device)
    _whole_kernel[grid](x.q, x.scale, weight, weight_scale, bias, out, *sizes, **blocks)
    return out


def _several(
    x: QuantizedTokens, weights: Sequence[Tensor], weight_scales: Sequence[Tensor], cut: Tiling
) -> list[Tensor]:
    """Several products of the same tokens, which are at most cut.m, in one launch."""
    n_tokens, n_inputs = x.q.shape
    n_outputs = tuple(map(len, weights))
    outs = [torch.empty(n_tokens, n, dtype=x.dtype, device=x.q.device) for n in n_outputs]
    _several_kernel[(sum(triton.cdiv(n, cut.n) for n in n_outputs),)](
        x.q.contiguous(), x.scale, tuple(weight.contiguous() for weight in weights),
        tuple(weight_scales), tuple(outs), n_tokens, n_outputs, n_inputs,
        **_constants(cut, n_inputs),
    )  # fmt: skip
    return outs


def _constants(cut: Tiling, n_inputs: int) -> dict[str, int | bool]:
    """What the kernels of a product are compiled for, and Triton's settings."""
    return {
        "BLOCK_M": cut.m, "BLOCK_N": cut.n, "BLOCK_K": cut.k, "WHOLE": n_inputs % cut.k == 0,
        "FETCHED": FETCHED_BYTES if cut.m <= FEW_TOKENS else 0, "num_warps": cut.n_warps,
        "num_stages": cut.n_stages, "enable_fp_fusion": False, **early_launch(),
    }  # fmt: skip


def _by_int_mm(
    x: QuantizedTokens, weight: Tensor, weight_scale: Tensor, bias: Tensor | None
) -> Tensor:
    """By PyTorch's product, whose sums are stored in int32 before they are scaled."""
    return _finish(torch._int_mm(x.q, weight.t())[None], x, weight_scale, bias)


def _int_mm_serves(weight: Tensor) -> bool:
    """Whether PyTorch's product takes this weight [N, K], by more than 16 tokens."""
    return weight.shape[0] % 8 == 0 and weight.shape[1] % 8 == 0 and _int_mm_is_right()


def _finish(sums: Tensor, x: QuantizedTokens, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """The sums of all parts, [n_parts, T, N] int32, added up and scaled."""
    n_parts, n_tokens, n_outputs = sums.shape
    out = torch.empty(n_tokens, n_outputs, dtype=x.dtype, device=sums.device)
    _finish_kernel[(n_tokens, triton.cdiv(n_outputs, _FINISH_COLUMNS))](
        sums, x.scale, weight_scale, bias, out, n_tokens, n_outputs, N_PARTS=n_parts,
        BLOCK=_FINISH_COLUMNS, enable_fp_fusion=False, **early_launch(),
    )  # fmt: skip
    return out


@cache
def _int_mm_is_right() -> bool:
    """Whether PyTorch's product is there for this device and exact, which is tried once."""
    q, weight = _extremes(24, 64), _extremes(32, 64)
    try:
        product = torch._int_mm(q, weight.t())
    except (AttributeError, RuntimeError):  # another release, or a device it does not know
        return False
    return torch.equal(product.float(), int8_product_fp32(q, weight).float())


def _is_right() -> bool:
    """Each tile that this device may use, whole and in parts, against the definition."""
    for cut in tiles(processors()):
        for n_inputs, n_parts in ((4 * cut.k, 1), (4 * cut.k, 2), (cut.k + 16, 1)):
            q, weight = _extremes(cut.m - 1, n_inputs), _extremes(cut.n - 1, n_inputs)
            x = QuantizedTokens(q, torch.rand(len(q), 1, device=DEVICE), torch.float32)
            weight_scale, bias = torch.rand(2, len(weight), device=DEVICE)
            found = _by_tiles(x, weight, weight_scale, bias, cut._replace(n_parts=n_parts))
            if not torch.equal(found, quantized.linear_w8a8(x, weight, weight_scale, bias)):
                return False
            if n_parts == 1 and cut.m <= FEW_TOKENS:
                several = [weight, weight[:9]], [weight_scale, weight_scale[:9]]
                expected = quantized.linears_w8a8(x, *several)
                if not all(map(torch.equal, _several(x, *several, cut), expected)):
                    return False
    return True


def _extremes(n_rows: int, n_columns: int) -> Tensor:
    """Random int8 numbers, a row of them the greatest there is."""
    generator = torch.Generator().manual_seed(n_rows)
    numbers = torch.randint(-127, 128, (n_rows, n_columns), generator=generator, dtype=torch.int8)
    numbers[0] = 127
    return numbers.to(DEVICE)


@triton.jit
def _place(
    n_tokens: tl.tensor,
    n_outputs: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """A program's tokens and outputs: first down a few tiles, then across."""
    program = tl.program_id(0)
    n_down, n_across = tl.cdiv(n_tokens, BLOCK_M), tl.cdiv(n_outputs, BLOCK_N)
    top = program // (NEIGHBOURS * n_across) * NEIGHBOURS
    height = tl.minimum(n_down - top, NEIGHBOURS)
    place = program % (NEIGHBOURS * n_across)
    down, across = top + place % height, place // height
    return down * BLOCK_M + tl.arange(0, BLOCK_M), across * BLOCK_N + tl.arange(0, BLOCK_N)


@triton.jit
def _sums(
    q: tl.tensor,
    weight: tl.tensor,
    tokens: tl.tensor,
    outputs: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    n_tokens: tl.tensor,
    n_outputs: tl.tensor,
    n_inputs: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WHOLE: tl.constexpr,
    FETCHED: tl.constexpr,
) -> tl.tensor:
    """[BLOCK_M, BLOCK_N] int32 over the blocks first…last-1 of inputs, which are waited for.

    Before they are there, FETCHED bytes of each row of the weight are asked for. Instead of tokens
    and outputs that are not there, the first ones are read again.
    """
    inputs = tl.arange(0, BLOCK_K)
    tokens = tl.where(tokens < n_tokens, tokens, 0).to(tl.int64)
    outputs = tl.where(outputs < n_outputs, outputs, 0).to(tl.int64)
    if FETCHED:
        ahead = first * BLOCK_K + _LINE * tl.arange(0, FETCHED // _LINE)
        fetch(weight + outputs[:, None] * n_inputs + tl.minimum(ahead, n_inputs - 1)[None, :])
    wait_for_previous()
    q += tokens[:, None] * n_inputs + inputs[None, :]
    weight += outputs[None, :] * n_inputs + inputs[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for step in range(first, last):
        start = step * BLOCK_K
        if WHOLE:
            total = _add_product(total, tl.load(q + start), tl.load(weight + start))
        else:
            inside = inputs < n_inputs - start
            left = tl.load(q + start, inside[None, :], 0)
            right = tl.load(weight + start, inside[:, None], 0)
            total = _add_product(total, left, right)
    return total


@triton.jit
def _add_product(total: tl.tensor, left: tl.tensor, right: tl.tensor) -> tl.tensor:
    """In int32, which Triton before 3.9 has to be told of a product of int8."""
    return tl.dot(left, right, total, out_dtype=tl.int32)


@triton.jit
def _store_scaled(
    total: tl.tensor,
    scale: tl.tensor,
    weight_scale: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    tokens: tl.tensor,
    outputs: tl.tensor,
    n_tokens: tl.tensor,
    n_outputs: tl.tensor,
) -> None:
    """Each step rounds as the definition's does."""
    is_token, is_output = tokens < n_tokens, outputs < n_outputs
    result = total.to(tl.float32) * tl.load(scale + tokens, is_token, 0.0)[:, None]
    result *= tl.load(weight_scale + outputs, is_output, 0.0)[None, :]
    if bias is not None:
        result += tl.load(bias + outputs, is_output, 0.0)[None, :]
    at = out + tokens.to(tl.int64)[:, None] * n_outputs + outputs[None, :]
    tl.store(at, rounded(result, out.dtype.element_ty), is_token[:, None] & is_output[None, :])


@triton.jit
def _whole_kernel(
    q: tl.tensor,
    scale: tl.tensor,
    weight: tl.tensor,
    weight_scale: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    n_tokens: tl.tensor,
    n_outputs: tl.tensor,
    n_inputs: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WHOLE: tl.constexpr,
    FETCHED: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
) -> None:
    """A tile of the result."""
    tokens, outputs = _place(n_tokens, n_outputs, BLOCK_M, BLOCK_N, NEIGHBOURS)
    total = _sums(
        q, weight, tokens, outputs, 0, tl.cdiv(n_inputs, BLOCK_K), n_tokens, n_outputs, n_inputs,
        BLOCK_M, BLOCK_N, BLOCK_K, WHOLE, FETCHED,
    )  # fmt: skip
    _store_scaled(total, scale, weight_scale, bias, out, tokens, outputs, n_tokens, n_outputs)


@triton.jit
def _several_kernel(
    q: tl.tensor,
    scale: tl.tensor,
    weights: tl.tuple,
    weight_scales: tl.tuple,
    outs: tl.tuple,
    n_tokens: tl.tensor,
    n_outputs: tl.tuple,
    n_inputs: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WHOLE: tl.constexpr,
    FETCHED: tl.constexpr,
) -> None:
    """A tile of one of several results, whose tiles come one after another; it has all tokens."""
    tile, n_steps = tl.program_id(0), tl.cdiv(n_inputs, BLOCK_K)
    tokens = tl.arange(0, BLOCK_M)
    for i in tl.static_range(len(weights)):
        if (tile >= 0) & (tile * BLOCK_N < n_outputs[i]):
            outputs = tile * BLOCK_N + tl.arange(0, BLOCK_N)
            total = _sums(
                q, weights[i], tokens, outputs, 0, n_steps, n_tokens, n_outputs[i], n_inputs,
                BLOCK_M, BLOCK_N, BLOCK_K, WHOLE, FETCHED,
            )  # fmt: skip
            _store_scaled(
                total, scale, weight_scales[i], None, outs[i], tokens, outputs, n_tokens,
                n_outputs[i],
            )  # fmt: skip
        tile -= tl.cdiv(n_outputs[i], BLOCK_N)


@triton.jit
def _part_kernel(
    q: tl.tensor,
    weight: tl.tensor,
    sums: tl.tensor,
    n_tokens: tl.tensor,
    n_outputs: tl.tensor,
    n_inputs: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WHOLE: tl.constexpr,
    FETCHED: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
) -> None:
    """A tile's sums over a part of the inputs."""
    tokens, outputs = _place(n_tokens, n_outputs, BLOCK_M, BLOCK_N, NEIGHBOURS)
    part, n_steps = tl.program_id(1), tl.cdiv(n_inputs, BLOCK_K)
    size = tl.cdiv(n_steps, tl.num_programs(1))
    first = part * size
    total = _sums(
        q, weight, tokens, outputs, first, tl.minimum(first + size, n_steps), n_tokens, n_outputs,
        n_inputs, BLOCK_M, BLOCK_N, BLOCK_K, WHOLE, FETCHED,
    )  # fmt: skip
    at = sums + (part.to(tl.int64) * n_tokens + tokens[:, None]) * n_outputs + outputs[None, :]
    tl.store(at, total, (tokens < n_tokens)[:, None] & (outputs < n_outputs)[None, :])


@triton.jit
def _finish_kernel(
    sums: tl.tensor,
    scale: tl.tensor,
    weight_scale: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    n_tokens: tl.tensor,
    n_outputs: tl.tensor,
    N_PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Some outputs of a token."""
    wait_for_previous()
    tokens = tl.program_id(0) + tl.arange(0, 1)
    outputs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((1, BLOCK), tl.int32)
    for part in range(N_PARTS):
        row = part * n_tokens + tokens.to(tl.int64)
        at = sums + row[:, None] * n_outputs + outputs[None, :]
        total += tl.load(at, (outputs < n_outputs)[None, :], 0)
    _store_scaled(total, scale, weight_scale, bias, out, tokens, outputs, n_tokens, n_outputs)
