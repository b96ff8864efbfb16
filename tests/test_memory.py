"""Memory: a load stays at the checkpoint's size, a long prompt at its cache and one chunk."""

from __future__ import annotations

import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from octavo.model import Transformer
from octavo.model.transformer import Stream
from tests.checkpoints import small_config, write_hugging_face, write_mistral, write_w8a8

# Peak resident memory above that of a process which has run a model already, so that libraries
# and their buffers are not counted. Every weight is read once.
LOAD = """
import sys
import torch
from octavo import Transformer

def status(field):
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024

small = Transformer.from_folder(sys.argv[1])
small(torch.zeros(8, dtype=torch.int64), [8])
del small
open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
before = status("VmRSS")
model = Transformer.from_folder(sys.argv[2])
for tensor in model.state_dict().values():
    tensor.view(torch.int16 if tensor.element_size() == 2 else torch.int8).max()
print(status("VmHWM") - before)
"""

# The same of a load whose weights go elsewhere and are fp32 there: to a device without memory of
# its own, for which a tensor is read as for one that has some.
LOAD_ELSEWHERE = """
import sys
from pathlib import Path
import torch
from octavo import Transformer
from octavo.checkpoint import open_checkpoint
from octavo.checkpoint.tensors import TensorInfo

def status(field):
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024

def read_all(info, read=TensorInfo.read):
    tensor = read(info)
    tensor.view(torch.int16).max()
    return tensor

TensorInfo.read = read_all

def load(folder):
    Transformer.from_checkpoint(
        open_checkpoint(Path(folder)), torch.float32, device=torch.device("meta")
    )

load(sys.argv[1])
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
load(sys.argv[2])
print(status("VmHWM") - before)
"""

PREFILL = """
import sys
import torch
from octavo import Transformer

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024

model = Transformer.from_folder(sys.argv[1], dtype="float32")
chunk, length = 256, int(sys.argv[2])
cache = model.new_cache(length)
with torch.inference_mode():
    for start in range(0, length, chunk):
        model.hidden(torch.zeros(chunk, dtype=torch.int64), [chunk], [cache])
        if start == length // 2:
            early = peak()
print(peak() - early)
"""

# Modules that making a model imports besides those of the package itself.
MODULES = """
import sys
import torch
from octavo.checkpoint import read_config, resolve_model
from octavo.model import Transformer

config = read_config(resolve_model("demo"))
before = set(sys.modules)
with torch.device("meta"):
    Transformer(config)
print(len(set(sys.modules) - before))
"""


def measure(script: str, *arguments: object) -> int:
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    return int(done.stdout)


@pytest.mark.parametrize("write", [write_mistral, write_hugging_face])
def test_bf16_load_peaks_at_the_checkpoints_size_and_a_tenth(
    tmp_path: Path, write: Callable[..., Path]
) -> None:
    small = write(tmp_path / "small", small_config(), dtype=torch.bfloat16)
    config = small_config(
        dim=1024, n_layers=8, head_dim=128, hidden_dim=3072, n_heads=8, vocab_size=16384
    )
    folder = write(tmp_path / "large", config, dtype=torch.bfloat16)
    size = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    assert size > 200e6
    assert size * 0.9 < measure(LOAD, small, folder) < size * 1.1


def test_packed_load_never_holds_the_weights_twice(tmp_path: Path) -> None:
    small = write_w8a8(tmp_path / "small", small_config())
    config = small_config(dim=1024, n_layers=8, head_dim=128, hidden_dim=4096, n_heads=8)
    folder = write_w8a8(tmp_path / "large", config, dtype=torch.bfloat16)
    size = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    assert size > 100e6
    assert size * 0.9 < measure(LOAD, small, folder) < size * 1.1


def test_a_load_to_another_device_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    small = write_hugging_face(tmp_path / "small", small_config(), dtype=torch.bfloat16)
    config = small_config(dim=1024, n_layers=12, head_dim=128, hidden_dim=3072, n_heads=8)
    folder = write_hugging_face(tmp_path / "large", config, dtype=torch.bfloat16, shards=4)
    shards = [f.stat().st_size for f in folder.glob("*.safetensors")]
    assert len(shards) == 4 and sum(shards) > 250e6
    largest = 2 * config.dim * config.hidden_dim  # bytes
    assert measure(LOAD_ELSEWHERE, small, folder) < 3 * largest < min(shards)


def test_long_prefill_grows_by_its_cache_alone(tmp_path: Path) -> None:
    config = small_config((None, 64), n_layers=2, n_kv_heads=4, head_dim=128, max_seq_len=16_384)
    length = 8192
    full, windowed = config.kv_bytes(length, 4)
    assert full > 30e6 and windowed < 1e6
    # The second half of the prompt adds half of its keys and values; its scores alone, were they
    # all in memory at once, would be 4 heads * 8,192² * 4 bytes = 1 GB.
    assert measure(PREFILL, write_mistral(tmp_path, config), length) < full


def test_a_pass_keeps_nothing_of_what_the_stream_was(tmp_path: Path) -> None:
    model = Transformer.from_folder(write_mistral(tmp_path, small_config(n_layers=4)))
    before: list[weakref.ref[torch.Tensor]] = []

    def watch(layer: torch.nn.Module, arguments: tuple[Stream, object, object, object]) -> None:
        assert [each() for each in before] == [None] * len(before)
        stream = arguments[0]
        before[:] = [weakref.ref(each) for each in (stream.x, stream.added) if each is not None]

    for layer in model.layers:
        layer.register_forward_pre_hook(watch)
    with torch.inference_mode():
        model(torch.arange(8), [8])
    assert len(before) == 2


def test_a_model_without_weights_costs_no_memory() -> None:
    """Random embeddings on the meta device import 900 modules, which take 160 MB."""
    assert measure(MODULES) < 50
