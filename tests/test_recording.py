"""Recorded calls of the C++ library: what is refused, and what a replay computes."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from octavo import kernels
from octavo.kernels import reference
from octavo.kernels.cpu import library, rows
from octavo.kernels.cpu.arena import Arena
from octavo.kernels.cpu.recording import NotRecorded, Recording

pytestmark = pytest.mark.skipif(library.load() is None, reason="no C++ library")


@pytest.fixture(autouse=True)
def _self_checked() -> None:
    """So that no kernel is tried within a recording."""
    assert rows.best_isa() is not None


def test_a_replay_reads_its_inputs_anew() -> None:
    x, y, weight = torch.randn(3, 64), torch.randn(3, 64), torch.rand(64)
    recording = Recording(Arena(2**16))
    with recording.record():
        total, _ = kernels.add_rms_norm(x, y, weight, 1e-5)
        result = kernels.rms_norm(total.flatten().view(3, 64), weight, 1e-5)
    assert torch.equal(result, kernels.rms_norm(x + y, weight, 1e-5))
    for tensor in (x, y, weight):
        tensor.copy_(torch.rand_like(tensor))
    recording.overwrite()
    assert result.isnan().all()
    recording.replay()
    assert torch.equal(result, kernels.rms_norm(x + y, weight, 1e-5))


@pytest.mark.parametrize(
    ("what", "compute"),
    [
        ("a sum", lambda x: x + x),
        ("in place", lambda x: x.mul_(2)),
        ("an output", lambda x: torch.add(x, x, out=x)),
        ("memory", lambda x: torch.empty(3)),
        ("another dtype", lambda x: x.bfloat16()),
        ("a copy", lambda x: x.t().contiguous()),
        ("a copy that looks like a view", lambda x: x.t().flatten()),
        ("rows by their numbers", lambda x: x[[1, 2]]),
        ("an operator", lambda x: torch.ops.aten.add(x, x)),
        ("a function", lambda x: torch.nn.functional.linear(x, x)),
        ("assignment", lambda x: x.__setitem__(0, 1.0)),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_what_pytorch_computes_is_refused(what: str, compute: object) -> None:
    assert callable(compute)
    x = torch.randn(4, 64)
    with pytest.raises(NotRecorded, match="PyTorch's"), Recording(Arena(2**16)).record():
        compute(x)
    expected = reference.silu_mul(x, x)
    torch.testing.assert_close(kernels.silu_mul(x, x), expected)  # nothing is recorded any more


def test_views_are_not_refused() -> None:
    x = torch.randn(4, 64)
    with torch.inference_mode(), Recording(Arena(2**16)).record():
        views = (x.view(2, 128), x.flatten(), x[1:, 3], x.t(), x.contiguous(), x.split(2)[0])
    assert all(view.untyped_storage().data_ptr() == x.data_ptr() for view in views)


def test_another_threads_calls_are_not_recorded() -> None:
    x, y = torch.randn(2, 64), torch.randn(2, 64)
    recording = Recording(Arena(2**16))
    others: list[Tensor] = []
    with recording.record():
        thread = threading.Thread(target=lambda: others.append(kernels.silu_mul(x, x)))
        thread.start()
        thread.join()
        gated = kernels.silu_mul(x, y)
    [other] = others
    other.zero_()
    recording.overwrite()
    recording.replay()
    assert torch.equal(gated, kernels.silu_mul(x, y)) and not other.any()


def test_a_call_that_cannot_run_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 64)
    recording = Recording(Arena(2**16))
    with recording.record():
        kernels.silu_mul(x, x)
    assert recording._calls is not None
    recording._calls[0].isa = 99
    with pytest.raises(ValueError, match="did not run"):
        recording.replay()
