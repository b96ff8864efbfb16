"""Smoothing moves outliers from inputs into weights, and changes nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from octavo.evaluate.outliers import with_outliers
from octavo.kernels import linear_w8a8
from octavo.model.linear import LinearW4A8, LinearW8A8, QuantizedLinear
from octavo.model.rope import rotary_angles
from octavo.model.transformer import Layer, RMSNorm, Stream
from octavo.quantize.activations import Chunk, Derived
from octavo.quantize.grid import WeightGrid
from octavo.quantize.noise import least_noise_scales
from octavo.quantize.smoothing import NormSmoother, RowSmoother, smoothing_scales
from octavo.schemes import SCHEMES
from tests.checkpoints import random_state, small_config

CHUNK = Chunk(0, (30, 20))


def norm_of(weight: Tensor) -> RMSNorm:
    norm = RMSNorm(len(weight), 1e-5).requires_grad_(False)
    norm.weight.copy_(weight)
    return norm


def with_large_channels(n_tokens: int, n_inputs: int, factor: float = 100.0) -> Tensor:
    x = torch.randn(n_tokens, n_inputs)
    x[:, [1, n_inputs // 2]] *= factor
    return x


def unevenness(x: Tensor) -> float:
    """How far the largest input lies above most others."""
    largest = x.abs().amax(0)
    return float(largest.max() / largest.median())


def test_the_papers_scales_by_hand() -> None:
    largest = torch.tensor([16.0, 1.0, 0.0, 4.0])
    weights = [torch.tensor([[1.0, 0.25, 1.0, 0.0]]), torch.tensor([[-4.0, 0.1, 1.0, 0.0]])]
    # √(16 / 4), √(1 / 0.25), an input that is always zero, and one that no weight uses.
    assert smoothing_scales(largest, weights, 0.5).tolist() == [2.0, 2.0, 1.0, 1.0]
    assert smoothing_scales(largest, weights, 1.0).tolist() == [16.0, 1.0, 1.0, 1.0]
    assert smoothing_scales(largest, weights, 0.0).tolist() == [0.25, 4.0, 1.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("strength", [0.0, 0.5, 0.8, 1.0])
def test_norm_and_linears_compute_the_same_as_before(dtype: torch.dtype, strength: float) -> None:
    """Whatever the norm's weight, and though the smoothed one is rounded to its dtype on disk."""
    n = 64
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(n, generator=generator).to(dtype).float()  # half of it negative
        weight[[5, 9]] = 0.0
        weight[[1, 30]] *= 256
        norm = norm_of(weight)
        weights = [torch.randn(k, n, generator=generator) for k in (16, 8)]
        for each in weights:
            each[:, 7] = 0.0
        x = torch.randn(200, n, generator=generator)
        x[:, 3] = 0.0
        inputs = norm(x)
        before = [inputs @ each.t() for each in weights]
        scales = NormSmoother(norm, strength, dtype).smooth(inputs.abs().amax(0), weights)
        after = [norm(x) @ (each * scales).t() for each in weights]
        for found, expected in zip(after, before, strict=True):
            assert (found - expected).abs().max() < 1e-4 * expected.abs().mean()
        assert torch.equal(norm.weight, norm.weight.to(dtype).float())  # as it goes to disk
        assert (scales > 0).all() and scales[[3, 5, 7, 9]].tolist() == [1.0] * 4
        if strength == 0.8:
            assert unevenness(norm(x)) < 0.5 * unevenness(inputs)


def test_a_norm_weight_too_small_for_its_dtype_stays() -> None:
    norm = norm_of(torch.tensor([1e-7, 1.0]))
    scales = NormSmoother(norm, 1.0, torch.float16).smooth(
        torch.tensor([100.0, 1.0]), [torch.ones(2, 2)]
    )
    assert scales.tolist() == [1.0, 1.0]
    assert norm.weight.tolist() == pytest.approx([1e-7, 1.0])


def test_a_layer_with_outliers_computes_the_same_as_before() -> None:
    config = small_config((None, 8))
    state = with_outliers(random_state(config), (3, 40), 256.0)
    layer = Layer(config, 1).requires_grad_(False)
    prefix = "layers.1."
    layer.load_state_dict(
        {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
    )
    x = torch.randn(CHUNK.n_tokens, config.dim)
    positions = torch.cat([torch.arange(n) for n in CHUNK.seqlens])
    rotary = rotary_angles(positions, config.head_dim, config.rope_theta)

    def compute() -> Tensor:
        stream = Stream(x)
        layer(stream, rotary, CHUNK.seqlens, None)
        return stream.total()

    expected = compute()
    stream = x + layer.attention(layer.attention_norm(x), rotary, CHUNK.seqlens, None)
    for norm, owner, names, given in (
        (layer.attention_norm, layer.attention, ("wq", "wk", "wv"), x),
        (layer.ffn_norm, layer.feed_forward, ("w1", "w3"), stream),
    ):
        linears = [getattr(owner, name) for name in names]
        before = norm(given)
        scales = NormSmoother(norm, 0.8, torch.bfloat16).smooth(
            before.abs().amax(0), [linear.weight for linear in linears]
        )
        for linear in linears:
            linear.weight *= scales
        assert unevenness(before) > 100 and unevenness(norm(given)) < 10
    found = compute()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.std()))


def quantised(scheme: str, weight: Tensor) -> tuple[QuantizedLinear, dict[str, Tensor]]:
    """A linear rounded to the nearest with bf16 scales, and its tensors as they go to disk."""
    grid = WeightGrid(SCHEMES[scheme], torch.bfloat16)
    scale = grid.find_scales(weight)
    stored = grid.stored(grid.round_matrix(weight, scale), scale)
    kind: type[LinearW8A8 | LinearW4A8] = LinearW8A8 if scheme == "W8A8" else LinearW4A8
    linear = kind(weight.shape[1], weight.shape[0], SCHEMES[scheme])
    assert linear.weight is not None
    linear.weight.copy_(stored["weight"])
    linear.weight_scale.copy_(stored["weight_scale"].float().view_as(linear.weight_scale))
    return linear, stored


def spread(rows: Tensor, shared: int, run: int) -> Tensor:
    """Each run of rows, `shared` times."""
    return torch.cat([part for part in rows.split(run, dim=-1) for _ in range(shared)], dim=-1)


@pytest.mark.parametrize(("shared", "run"), [(1, 1), (2, 4), (4, 2)])
@pytest.mark.parametrize("scheme", ["W8A8", "W4A8"])
def test_rows_are_divided_exactly(scheme: str, shared: int, run: int) -> None:
    """By bf16 scales: what the next linear is multiplied with is what the rows are divided by."""
    weight = torch.randn(8, 256)
    weight[[2, 5]] *= 1000  # rows that make outliers
    linear, stored = quantised(scheme, weight)
    x = torch.randn(CHUNK.n_tokens, 256)
    before, stored_before = linear(x), stored["weight_scale"].clone()
    derived = Derived(lambda chunk: spread(linear(x), shared, run), torch.empty(50, 8 * shared))
    inputs = derived(CHUNK).clone()
    smoother = RowSmoother(linear, stored, derived, shared, run)
    next_weight = torch.randn(6, 8 * shared)
    scales = smoother.smooth(inputs, next_weight, lambda s: float((s == 1).all()))
    rows = torch.stack([part[:run] for part in scales.split(shared * run)]).flatten()
    assert torch.equal(scales, spread(rows, shared, run)) and not (scales == 1).all()
    torch.testing.assert_close(linear(x) * rows, before, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(derived(CHUNK) * scales, inputs, rtol=1e-6, atol=1e-5)
    scale = stored["weight_scale"]
    assert scale.dtype == torch.bfloat16
    assert torch.equal(scale.float().view_as(linear.weight_scale), linear.weight_scale)
    if scheme == "W4A8":  # several scales a row, which only a power of two divides all alike
        assert torch.equal(rows.log2(), rows.log2().round())
        assert torch.equal(scale.float() * rows[:, None], stored_before.float())
    assert rows[2] > 2 * rows[0] and rows[5] > 2 * rows[1]


def test_rows_are_left_alone_where_dividing_does_not_help() -> None:
    linear, stored = quantised("W8A8", torch.randn(8, 32))
    kept, before = linear.weight_scale.clone(), stored["weight_scale"].clone()
    x = torch.randn(CHUNK.n_tokens, 32)
    derived = Derived(lambda chunk: linear(x), torch.empty(50, 8))
    inputs = derived(CHUNK).clone()
    tried: list[Tensor] = []

    def error(scales: Tensor) -> float:
        tried.append(scales)
        return 0.5  # as before

    scales = RowSmoother(linear, stored, derived).smooth(inputs, torch.randn(6, 8), error)
    assert scales.tolist() == [1.0] * 8 and len(tried) == 2
    assert torch.equal(linear.weight_scale, kept) and torch.equal(stored["weight_scale"], before)
    assert torch.equal(derived(CHUNK), inputs)


def log_noise(log_s: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """log E of the docstring of `octavo.quantize.noise`, in fp64, with rows of x of one size."""
    x2 = x.double().square()
    x2 = x2 / x2.sum(1, keepdim=True)
    w2, s2 = weight.double().square(), (2 * log_s).exp()
    inputs = (x2 / s2).amax(1).sum() * (w2 * s2).sum()
    weights = (w2 * s2).amax(1).sum() * (x2 / s2).sum()
    return (inputs + weights).log()


def minimum(x: Tensor, weight: Tensor) -> float:
    """The least log E that a long descent finds."""
    log_s = torch.zeros(x.shape[1], dtype=torch.float64, requires_grad=True)
    descent = torch.optim.Adam([log_s], lr=0.05)
    least = float("inf")
    with torch.enable_grad():
        for step in range(400):
            for group in descent.param_groups:
                group["lr"] = 0.05 * (1 - step / 400)
            descent.zero_grad()
            noise = log_noise(log_s, x, weight)
            noise.backward()
            descent.step()
            least = min(least, float(noise.detach()))
    return least


def heavy_tailed(n_inputs: int) -> list[tuple[Tensor, Tensor]]:
    """Pairs of inputs and weights: plain ones, channel outliers, heavy tails, and both sides'."""
    plain, weight = torch.randn(100, n_inputs), torch.randn(30, n_inputs)
    columns = weight * torch.linspace(0.1, 3, n_inputs)
    return [
        (plain, weight),
        (with_large_channels(100, n_inputs), weight),
        (plain**3, weight),
        (with_large_channels(100, n_inputs, 10.0), columns),
    ]


@pytest.mark.parametrize("n_inputs", [12, 16])
def test_least_noise_scales_are_near_the_minimum(n_inputs: int) -> None:
    for x, weight in heavy_tailed(n_inputs):
        scales = least_noise_scales(x, weight)
        assert scales.log().mean().abs() < 1e-5
        found = float(log_noise(scales.double().log(), x, weight))
        assert found < minimum(x, weight) + 0.03
        assert found <= float(log_noise(torch.zeros(n_inputs), x, weight)) + 1e-6


def w8a8_error(x: Tensor, weight: Tensor, scales: Tensor) -> float:
    """What rounding x / s and W diag(s) to int8 costs, of the outputs' own size."""
    grid = WeightGrid(SCHEMES["W8A8"], torch.float32)
    smoothed = weight * scales
    scale = grid.find_scales(smoothed)
    found = linear_w8a8(x / scales, grid.round_matrix(smoothed, scale), scale[:, 0])
    exact = x @ weight.t()
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("n_inputs", [64, 300])
def test_least_noise_scales_lessen_what_int8_costs(n_inputs: int) -> None:
    """With more inputs than are looked at a token, and more rows than stand for the weight."""
    weight = torch.randn(600, n_inputs)
    x = with_large_channels(400, n_inputs)
    ones = torch.ones(n_inputs)
    scales = least_noise_scales(x, weight)
    assert w8a8_error(x, weight, scales) < 0.5 * w8a8_error(x, weight, ones)
    of_the_paper = smoothing_scales(x.abs().amax(0), [weight], 0.5)
    assert w8a8_error(x, weight, scales) < 1.1 * w8a8_error(x, weight, of_the_paper)


@pytest.mark.parametrize("dead", ["input", "weight", "everything"])
def test_least_noise_scales_are_finite_for_what_is_always_zero(dead: str) -> None:
    x, weight = torch.randn(50, 8), torch.randn(9, 8)
    zeroed: Sequence[Tensor] = {"input": [x], "weight": [weight], "everything": [x, weight]}[dead]
    for tensor in zeroed:
        tensor[:, slice(None) if dead == "everything" else 3] = 0.0
    scales = least_noise_scales(x, weight)
    assert scales.isfinite().all() and (scales > 0).all()
