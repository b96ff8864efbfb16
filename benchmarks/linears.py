"""A layer's linears alone, at a published shape: int8 weights by int8 inputs of a chunk of tokens.

    python -m benchmarks.linears --tokens 1 16 512

Beside them stands what the machine does of int8 in registers alone, or a GPU in one large product.
Two operations count for every token and weight; inputs are quantised already.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from benchmarks.attention import best_seconds
from benchmarks.common import make_parser
from benchmarks.figures import write_figures
from octavo import kernels
from octavo.bench.machine import measure_machine
from octavo.bench.random_model import DTYPE, RandomBlocks
from octavo.bench.shapes import find_shape
from octavo.config import ModelConfig
from octavo.device import choose_device, current
from octavo.quantize.memory import GROUPS


class Linears:
    """The linears of one layer, of random weights.

    Attributes:
        n_weights: of all of them.
    """

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        self._blocks = RandomBlocks(0, device)
        self._device = device
        self._groups = []
        self.n_weights = 0
        for names in GROUPS:  # those that share their inputs run together
            stored, scales = [], []
            for name in names:
                shape = config.linear_shape(name)
                weight = torch.empty(shape, dtype=torch.int8, device=device)
                self._blocks.integers(weight)
                packed = kernels.pack_w8a8(weight)
                stored.append(weight if packed is None else packed)
                scales.append(torch.full(shape[:1], 1e-4, device=device))
                self.n_weights += shape[0] * shape[1]
            self._groups.append((stored, scales, shape[1]))

    def inputs(self, n_tokens: int) -> list[kernels.QuantizedTokens]:
        """Of each group."""
        shapes = [(n_tokens, n_inputs) for *_, n_inputs in self._groups]
        numbers = [torch.empty(shape, dtype=DTYPE, device=self._device) for shape in shapes]
        return [kernels.quantize_per_token(self._blocks.normal(each)) for each in numbers]

    def run(self, inputs: list[kernels.QuantizedTokens]) -> None:
        """All of them, in memory that is kept as a pass keeps it."""
        with kernels.reuse_memory(self._device):
            for x, (stored, scales, _) in zip(inputs, self._groups, strict=True):
                kernels.linears_w8a8(x, stored, scales)


def main() -> None:
    """Measure each number of tokens; print a table."""
    options = parse_arguments()
    with torch.inference_mode(), current(options.device):
        linears = Linears(find_shape(options.shape), options.device)
        rows = [measure(linears, n_tokens, options) for n_tokens in options.tokens]
        machine = measure_machine(options.device)
    print("| tokens | ms | int8 TOPS |\n| --- | --- | --- |")
    for row in rows:
        print(f"| {row['tokens']:,} | {row['seconds'] * 1e3:.2f} | {row['tops']:.3f} |")
    tops = machine.int8_tops
    print(f"\n{options.device}" + ("" if tops is None else f"; the machine does {tops:.2f}"))
    write_figures({"rows": rows, "machine_int8_tops": tops}, options.json)


def measure(linears: Linears, n_tokens: int, options: argparse.Namespace) -> dict[str, Any]:
    """One layer's linears of so many tokens."""
    inputs = linears.inputs(n_tokens)
    seconds = best_seconds(lambda: linears.run(inputs), options)
    tops = 2 * n_tokens * linears.n_weights / seconds / 1e12
    return {"tokens": n_tokens, "seconds": seconds, "tops": tops}


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--shape", default="ministral-8b", help="as octavo bench takes it")
    parser.add_argument("--tokens", type=int, nargs="*", default=[1, 16, 512], help="of a chunk")
    parser.add_argument("--seconds", type=float, default=3.0, help="to repeat each measurement")
    parser.add_argument("--device", default="cpu", type=choose_device, help="cpu or cuda")
    return parser.parse_args()


if __name__ == "__main__":
    main()
