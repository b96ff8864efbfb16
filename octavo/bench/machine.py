"""The rates of the machine that a measurement ran on, taken in the same process."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from octavo.kernels.cpu import machine as cpu
from octavo.kernels.cuda import machine as gpu


@dataclass(frozen=True)
class MachineRates:
    """What a device does when it does nothing else.

    Attributes:
        read_gb_s: bytes of memory, 10⁹ a second, at best.
        int8_tops: int8 operations, 10¹² a second; None on a CPU without the C++ library.
        bf16_tflops: the same in bf16; None on a CPU.
    """

    read_gb_s: float
    int8_tops: float | None
    bf16_tflops: float | None


def measure_machine(device: torch.device) -> MachineRates:
    """Measure it; a second or two."""
    if device.type == "cpu":
        int8 = cpu.int8_operations_per_second()
        tops = None if int8 is None else int8 / 1e12
        return MachineRates(cpu.read_bytes_per_second() / 1e9, tops, None)
    return MachineRates(
        gpu.read_bytes_per_second(device) / 1e9,
        gpu.int8_operations_per_second(device) / 1e12,
        gpu.bf16_operations_per_second(device) / 1e12,
    )
