"""A checkpoint's weights, brought into a model: one module after another, the next read meanwhile.

On a CPU, weights that run as they lie in their file stay mapped, and are read when they are used.
Those that are changed on the way (another dtype, another order of rows, a kernel's own layout) are
read and changed a module at a time. What a module was made from is let go before the next, so that
memory never holds more than the weights and one module's twice. To another device all are read and
sent as they lie, and changed there: the host's memory holds no more than one of them at a time.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from threading import Event
from typing import TYPE_CHECKING

import torch
from torch import nn
from tqdm import tqdm

from octavo import kernels
from octavo.checkpoint import Checkpoint
from octavo.checkpoint.read_ahead import read_ahead
from octavo.checkpoint.tensors import TensorInfo
from octavo.device import CPU
from octavo.model.linear import LinearW8A8, pack_linears
from octavo.process import return_unused_memory

if TYPE_CHECKING:
    from octavo.model.transformer import Transformer

READERS = 2  # threads
DEVICE_READERS = 4  # the same where the weights go elsewhere, and the host has nothing else to do
AHEAD = 8  # modules that are read before their turn: about a layer
SHOW_AFTER = 1.0  # seconds without a bar


def load_weights(
    model: Transformer,
    checkpoint: Checkpoint,
    dtype: torch.dtype | str | None = None,
    pack: bool = True,
    device: torch.device = CPU,
) -> None:
    """Give every module of a model its tensors on the device it is to run on; pack int8 weights.

    What a weight was packed from is let go. Packing runs in the calling thread, and uses all of
    PyTorch's. On a terminal a bar on stderr shows a load that takes longer than a second.

    Args:
        model: of the checkpoint's config; its tensors may be on the meta device.
        checkpoint: any.
        dtype: of the floating-point weights; None or "auto" keeps the file's.
        pack: whether modules are packed, each on its device.
        device: where the weights go.

    Raises:
        ConfigError: a dtype that is none.
        CheckpointError: a file that has gone or changed since it was opened.
    """
    kernels.check_kernels(device)
    return_unused_memory()
    on_host = device.type == "cpu"
    modules = [(name, module) for name, module in model.named_modules() if _owns_tensors(module)]
    whole = {name for name, m in modules if not on_host or (pack and isinstance(m, LinearW8A8))}
    read = _read_at_load(checkpoint, dtype, whole)
    work = [read[name] for name, _ in modules]
    n_threads = READERS if on_host else DEVICE_READERS
    with _Readers(work, n_threads) as readers, _bar(read) as bar:
        for name, module in modules:
            readers.wait()
            if name == "output" and checkpoint.config.tied_embeddings:
                # One parameter: two of the same memory would be two copies on another device.
                model.output.weight = model.tok_embeddings.weight
            else:
                _assign(module, checkpoint, f"{name}.", dtype, device)
            if pack:
                pack_linears(module)
            bar.update(_n_bytes(read[name]))
    if on_host:
        held = model.state_dict()  # without what was packed
        mapped = (n for n in checkpoint.tensors if n in held and checkpoint.stays_mapped(n, dtype))
        model.mapped_bytes = _n_bytes(checkpoint.tensors[name] for name in mapped)
    return_unused_memory()
    model.requires_grad_(False).eval()


def _owns_tensors(module: nn.Module) -> bool:
    own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    return len(own) > 0


def _read_at_load(
    checkpoint: Checkpoint, dtype: torch.dtype | str | None, whole: set[str]
) -> dict[str, list[TensorInfo]]:
    """By module, the tensors that are read when it is loaded and not only mapped.

    Args:
        checkpoint, dtype: as in `load_weights`.
        whole: the modules all of whose tensors are, since they are packed or go elsewhere.
    """
    read: dict[str, list[TensorInfo]] = defaultdict(list)
    for name, info in checkpoint.tensors.items():
        module = name.rsplit(".", 1)[0]
        if module in whole or not checkpoint.stays_mapped(name, dtype):
            read[module].append(info)
    return read


def _assign(
    module: nn.Module,
    checkpoint: Checkpoint,
    prefix: str,
    dtype: torch.dtype | str | None,
    device: torch.device,
) -> None:
    """A function of its own, so that nothing but the module holds its tensors afterwards."""
    state = checkpoint.load(dtype, prefix, device)
    own = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    module.load_state_dict(own, strict=True, assign=True)


def _n_bytes(tensors: Iterable[TensorInfo]) -> int:
    return sum(info.n_bytes for info in tensors)


def _bar(read: dict[str, list[TensorInfo]]) -> tqdm:
    """Over the bytes that are read; only on a terminal, and if it takes long."""
    return tqdm(
        total=_n_bytes(chain.from_iterable(read.values())), desc="loading", unit="B",
        unit_scale=True, leave=False, delay=SHOW_AFTER, disable=None,
    )  # fmt: skip


class _Readers:
    """Threads that read the tensors of the next modules ahead; each `wait` is for one module's.

    Args:
        work: the tensors of each module, in order; a module may have none.
        n_threads: that read at once, each another module, from whichever files they are in.
    """

    def __init__(self, work: list[list[TensorInfo]], n_threads: int) -> None:
        self._work: Iterator[list[TensorInfo]] = iter(work)
        self._stop = Event()
        self._pool = ThreadPoolExecutor(n_threads, "octavo-read")
        self._running: deque[Future[None] | None] = deque()

    def __enter__(self) -> _Readers:
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)

    def wait(self) -> None:
        """Until the next module's tensors are in the file cache."""
        while len(self._running) < AHEAD and (infos := next(self._work, None)) is not None:
            reading = self._pool.submit(read_ahead, infos, self._stop) if infos else None
            self._running.append(reading)
        if (first := self._running.popleft()) is not None:
            first.result()
