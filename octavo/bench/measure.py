"""One measurement from beginning to end, and its figures."""

from __future__ import annotations

import gc
import platform
import statistics
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from octavo.bench.machine import measure_machine
from octavo.bench.memory import require_memory, step_bytes
from octavo.bench.random_model import DTYPE, random_model
from octavo.bench.run import Run
from octavo.bench.settings import BenchSettings
from octavo.bench.shapes import find_shape, quantised
from octavo.cache import KV_DTYPES, CacheLayout, kv_dtype
from octavo.config import ModelConfig
from octavo.device import choose_device, current
from octavo.errors import ConfigError
from octavo.kernels.cpu.machine import Reads
from octavo.process import peak_rss_bytes
from octavo.version import __version__


@dataclass(frozen=True)
class BenchResult:
    """What was measured; names end in their unit.

    Attributes:
        prefill_tok_s: prompt tokens of all sequences a second, in the fastest round.
        decode_tok_s: tokens of all sequences a second, by the median step.
        prefill_s: of the fastest round.
        decode_step_s, decode_step_min_s: the median step, and the fastest.
        time_to_first_token_s: from the process's start to the first sequence's first token.
        peak_rss_bytes: the most that the process had in the host's memory until the last step.
        peak_device_bytes: the most that PyTorch had taken of the device's memory until then, with
            whatever else was not free: the driver's own, and other processes'; None on the CPU.
        weights_bytes: of the weights as they run.
        kv_bytes: of the pages that are held at the end.
        read_gb_s: bytes that a step must read, over the median step's time.
        kv_read_gb_s: bytes of the context's keys and values over what they add to a step: the
            median step less that of steps without them, taken in turn; None without a context, or
            with one so short that steps are no longer for it.
        machine_read_gb_s: what all threads read of memory while they do nothing else, in turn with
            the steps, by the median as they are; a GPU's is `machine_read_best_gb_s`.
        machine_read_best_gb_s: the same, the best of many at the end.
        machine_int8_tops: their int8 operations, 10¹² a second: on a CPU's registers, or in a GPU's
            largest product; None on a CPU without the C++ library.
        machine_bf16_tflops: the device's bf16 operations in its largest product; None on a CPU.
        versions: of octavo, PyTorch and Python.
        layers, threads: that computed.
        device: where, such as `cpu` or `cuda`.
        device_name: what its maker calls it; None for a CPU.
    """

    prefill_tok_s: float
    decode_tok_s: float
    prefill_s: float
    decode_step_s: float
    decode_step_min_s: float
    time_to_first_token_s: float
    peak_rss_bytes: int
    peak_device_bytes: int | None
    weights_bytes: int
    kv_bytes: int
    read_gb_s: float
    kv_read_gb_s: float | None
    machine_read_gb_s: float
    machine_read_best_gb_s: float
    machine_int8_tops: float | None
    machine_bf16_tflops: float | None
    versions: dict[str, str]
    layers: int
    threads: int
    device: str
    device_name: str | None


def run_bench(settings: BenchSettings) -> BenchResult:
    """Measure in this process, which should have done nothing else before.

    Raises:
        ConfigError: settings that no model has, or that do not fit in memory.
    """
    device = choose_device(settings.device)
    config = checked_config(settings, device)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    with current(device):
        return _measure(settings, config, device)


def _measure(settings: BenchSettings, config: ModelConfig, device: torch.device) -> BenchResult:
    run = Run(settings, random_model(config, settings.seed, device))
    prefill_s = min(run.read_prompts() for _ in range(settings.rounds))
    kv_lens = [settings.context + settings.prompt + 1 + i for i in range(settings.decode)]
    on_gpu = device.type == "cuda"
    reads = None if on_gpu else Reads(run.model.tok_embeddings.weight)
    steps = run.generate(reads.read) if reads else run.generate()
    step_s = statistics.median(steps.seconds)
    layout = run.caches[0].pool.layout
    read = _mean_bytes(config, layout, settings.batch, kv_lens)
    kv_read_gb_s = None
    if steps.short and (longer_s := step_s - statistics.median(steps.short)) > 0:
        short = _mean_bytes(config, layout, settings.batch, range(1, settings.decode + 1))
        kv_read_gb_s = (read - short) / longer_s / 1e9
    meanwhile_gb_s = reads.bytes_per_second() / 1e9 if reads else None
    peak, kv_bytes, first_token_s = peak_rss_bytes(), run.kv_bytes, run.first_token_s
    peak_device = _peak_device_bytes(device) if on_gpu else None
    assert first_token_s is not None
    del run, reads
    gc.collect()  # there may be no room for the machine's own figures beside the model
    if on_gpu:
        torch.cuda.empty_cache()
    machine = measure_machine(device)
    return BenchResult(
        prefill_tok_s=settings.batch * settings.prompt / prefill_s,
        decode_tok_s=settings.batch / step_s,
        prefill_s=prefill_s,
        decode_step_s=step_s,
        decode_step_min_s=min(steps.seconds),
        time_to_first_token_s=first_token_s,
        peak_rss_bytes=peak,
        peak_device_bytes=peak_device,
        weights_bytes=config.weight_bytes(DTYPE.itemsize),
        kv_bytes=kv_bytes,
        read_gb_s=read / step_s / 1e9,
        kv_read_gb_s=kv_read_gb_s,
        machine_read_gb_s=meanwhile_gb_s or machine.read_gb_s,
        machine_read_best_gb_s=machine.read_gb_s,
        machine_int8_tops=machine.int8_tops,
        machine_bf16_tflops=machine.bf16_tflops,
        versions={
            "octavo": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        layers=config.n_layers,
        threads=torch.get_num_threads(),
        device=str(device),
        device_name=torch.cuda.get_device_name(device) if on_gpu else None,
    )


def _peak_device_bytes(device: torch.device) -> int:
    """As `BenchResult.peak_device_bytes`."""
    free, total = torch.cuda.mem_get_info(device)
    others = total - free - torch.cuda.memory_reserved(device)
    return torch.cuda.max_memory_reserved(device) + others


def _mean_bytes(
    config: ModelConfig, layout: CacheLayout, batch: int, kv_lens: Iterable[int]
) -> float:
    """Of steps of a batch, whose sequences are all as long."""
    return statistics.mean(step_bytes(config, layout, [n] * batch) for n in kv_lens)


def checked_config(settings: BenchSettings, device: torch.device) -> ModelConfig:
    """The model's config, if there is one and it fits the device.

    Raises:
        ConfigError: naming the flag at fault.
    """
    shape = find_shape(settings.shape, settings.layers)
    config = quantised(shape, settings.scheme, settings.head)
    if settings.kv not in KV_DTYPES:
        raise ConfigError(f"--kv: {settings.kv!r} is not one of {', '.join(KV_DTYPES)}")
    if settings.length > config.max_seq_len:
        raise ConfigError(
            f"--context {settings.context}, --prompt {settings.prompt} and --decode "
            f"{settings.decode} make {settings.length} tokens, more than the model's context of "
            f"{config.max_seq_len}"
        )
    require_memory(config, CacheLayout.of(config, kv_dtype(settings.kv, DTYPE)), settings, device)
    return config
