"""Loading: the tensors that the files hold, packed once each, the next ones read meanwhile."""

from __future__ import annotations

import io
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from octavo.checkpoint import open_checkpoint, read_ahead
from octavo.checkpoint.tensors import TensorInfo
from octavo.errors import CheckpointError
from octavo.model import Transformer, loading
from octavo.model.linear import LinearW8A8
from tests.checkpoints import small_config, write_hugging_face, write_mistral, write_w8a8

Pack = Callable[[LinearW8A8], None]


def use_pack(monkeypatch: pytest.MonkeyPatch, pack: Pack) -> None:
    monkeypatch.setattr(LinearW8A8, "pack", pack)


def bytes_read() -> int:
    """By this process with read() and its kin; what comes through a mapping is not counted."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("rchar")).split()[1])


def is_mapped(tensor: torch.Tensor, file: Path) -> bool:
    """Whether its memory is the file's."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(file)):
            low, high = (int(end, 16) for end in line.split()[0].split("-"))
            if low <= tensor.data_ptr() < high:
                return True
    return False


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("write", [write_mistral, write_hugging_face, write_w8a8])
def test_the_model_has_what_the_files_hold_and_copies_only_what_changes(
    tmp_path: Path, write: Callable[..., Path], tied: bool, dtype: torch.dtype | None
) -> None:
    config = small_config(tied_embeddings=tied)
    write(tmp_path, config, shards=2, dtype=torch.bfloat16)
    checkpoint = open_checkpoint(tmp_path)
    model = Transformer.from_checkpoint(checkpoint, dtype, pack=False)
    state, expected = model.state_dict(), checkpoint.load(dtype)
    if tied:
        assert model.output.weight is model.tok_embeddings.weight
        del state["output.weight"]
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name
        mapped = is_mapped(tensor, checkpoint.tensors[name].file)
        assert mapped == checkpoint.stays_mapped(name, dtype), name
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_offsets_are_where_the_tensors_bytes_lie(tmp_path: Path) -> None:
    write_w8a8(tmp_path, small_config(), shards=3)
    for info in open_checkpoint(tmp_path).tensors.values():
        with info.file.open("rb") as file:
            file.seek(info.offset)
            stored = file.read(info.n_bytes)
        assert stored == info.read().contiguous().view(torch.uint8).numpy().tobytes(), info.name


def test_every_module_is_packed_once_when_it_has_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_w8a8(tmp_path, small_config())
    weights = open_checkpoint(tmp_path).load()
    packed: list[LinearW8A8] = []

    def pack(self: LinearW8A8) -> None:
        packed.append(self)
        assert self.weight is not None
        self.weight = self.weight.t().contiguous()

    use_pack(monkeypatch, pack)
    model = Transformer.from_folder(tmp_path)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, LinearW8A8)}
    assert len(linears) == 4 * 7 and packed == list(linears.values())
    for name, linear in linears.items():
        assert linear.weight is not None
        assert torch.equal(linear.weight, weights[f"{name}.weight"].t())
        assert torch.equal(linear.weight_scale, weights[f"{name}.weight_scale"])


def test_a_module_is_read_before_it_is_packed_and_few_others_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_w8a8(tmp_path, small_config())
    order = [n for n in open_checkpoint(tmp_path).config.linear_names() if n != "output"]
    begun: set[str] = set()
    done: set[str] = set()
    n_packed = 0
    real = loading.read_ahead

    def read(tensors: list[TensorInfo], stop: threading.Event) -> None:
        begun.update(info.name for info in tensors)
        real(tensors, stop)
        done.update(info.name for info in tensors)

    def pack(self: LinearW8A8) -> None:
        nonlocal n_packed
        assert sum(name.endswith(".weight") for name in done) > n_packed
        n_packed += 1
        assert sum(name.endswith(".weight") for name in begun) <= n_packed + loading.AHEAD

    monkeypatch.setattr(loading, "read_ahead", read)
    use_pack(monkeypatch, pack)
    Transformer.from_folder(tmp_path)
    assert n_packed == len(order) and begun == done


def test_what_is_packed_is_read_and_what_stays_mapped_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(dim=256, hidden_dim=1024)
    checkpoint = open_checkpoint(write_w8a8(tmp_path, config))
    weights = sum(i.n_bytes for n, i in checkpoint.tensors.items() if i.dtype == "I8")
    monkeypatch.setattr(loading, "return_unused_memory", lambda: None)  # it reads /proc
    before = bytes_read()
    Transformer.from_checkpoint(checkpoint, pack=False)
    plain = bytes_read() - before
    before = bytes_read()
    Transformer.from_checkpoint(checkpoint)
    assert bytes_read() - before >= plain + weights > 2 * plain


class Elsewhere(TorchDispatchMode):
    """Stands for another device: keeps what is copied from the CPU to `meta`, whence none returns.

    Attributes:
        copied: the tensors as they were on the CPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.copied: list[Tensor] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].device.type != out.device.type:
            assert args[0].device.type == "cpu" and args[0].dtype == out.dtype
            self.copied.append(args[0].clone())
        return out


@pytest.mark.parametrize("dtype", [None, torch.float32])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("write", [write_mistral, write_hugging_face, write_w8a8])
def test_every_tensor_goes_to_the_device_once_as_it_lies_and_is_changed_there(
    tmp_path: Path, write: Callable[..., Path], tied: bool, dtype: torch.dtype | None
) -> None:
    write(tmp_path, small_config(tied_embeddings=tied), shards=2, dtype=torch.bfloat16)
    checkpoint = open_checkpoint(tmp_path)
    with Elsewhere() as elsewhere:
        model = Transformer.from_checkpoint(checkpoint, dtype, device=torch.device("meta"))
    state = model.state_dict()
    for name, tensor in checkpoint.load(dtype).items():
        assert state[name].device.type == "meta"
        assert (state[name].shape, state[name].dtype) == (tensor.shape, tensor.dtype)
    assert (model.output.weight is model.tok_embeddings.weight) == tied
    assert len(elsewhere.copied) == len(checkpoint.tensors)
    for name, info in checkpoint.tensors.items():
        assert any(_same(info.read(), copy) for copy in elsewhere.copied), name
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def test_for_another_device_all_is_read_ahead_by_several_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(write_mistral(tmp_path, small_config(), shards=4))
    read: set[str] = set()
    together = threading.Barrier(loading.DEVICE_READERS, timeout=20)
    waiting = threading.Semaphore(loading.DEVICE_READERS)

    def read_together(tensors: list[TensorInfo], stop: threading.Event) -> None:
        if waiting.acquire(blocking=False):  # the first modules wait for each other
            together.wait()
        read.update(info.name for info in tensors)

    monkeypatch.setattr(loading, "read_ahead", read_together)
    Transformer.from_checkpoint(checkpoint, device=torch.device("meta"))
    assert read == {info.name for info in checkpoint.tensors.values()}


def test_reading_ahead_ends_when_it_is_told_to(tmp_path: Path) -> None:
    info = open_checkpoint(write_w8a8(tmp_path, small_config())).tensors["norm.weight"]
    stop = threading.Event()
    stop.set()
    before = bytes_read()
    read_ahead.read_ahead([info] * 1000, stop)
    assert bytes_read() - before < 1000 * info.n_bytes


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_a_load_that_fails_leaves_no_reader_behind(
    error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pack(self: LinearW8A8) -> None:
        raise error

    write_w8a8(tmp_path, small_config())
    use_pack(monkeypatch, pack)
    with pytest.raises(error):
        Transformer.from_folder(tmp_path)
    assert not [t for t in threading.enumerate() if t.name.startswith("octavo-read")]


def test_a_file_that_goes_while_it_is_loaded_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(write_w8a8(tmp_path, small_config()))
    (tmp_path / "model.safetensors").unlink()
    use_pack(monkeypatch, lambda self: None)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is gone"):
        Transformer.from_checkpoint(checkpoint)


class Screen(io.StringIO):
    """A stderr that is, or is not, a terminal."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


@pytest.mark.parametrize(("terminal", "delay", "shown"), [(1, 0, 1), (1, 60, 0), (0, 0, 0)])
def test_a_bar_is_shown_on_a_terminal_if_loading_takes_long(
    terminal: Any, delay: float, shown: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_w8a8(tmp_path, small_config())
    screen = Screen(bool(terminal))
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(loading, "SHOW_AFTER", delay)
    Transformer.from_folder(tmp_path)
    assert ("loading" in screen.getvalue()) == bool(shown)
