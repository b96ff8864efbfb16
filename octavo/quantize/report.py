"""What a quantisation cost and gained: for the terminal, as JSON, and as one picture."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.table import Table

from octavo.checkpoint.writer import write_json
from octavo.quantize.linears import LinearReport

FILE, PICTURE = "report.json", "error_by_layer.png"

logger = logging.getLogger("octavo")


@dataclass(frozen=True)
class Report:
    """The outcome of one quantisation.

    Attributes:
        folder: where the model is.
        settings: everything that decided its bytes.
        source: the calibration texts, in words.
        calibration_tokens, held_out_tokens: how many were calibrated on, and measured on.
        kl: mean KL divergence of the quantised model from the original on held-out text, nats a
            token.
        perplexity_original, perplexity_quantized: on held-out text.
        bytes_original, bytes_quantized: of all tensors.
        seconds: of work, in all runs.
        peak_rss_bytes: the most memory of any run.
        linears: each linear's relative error.
        notes: what the user should know.
        sample: the sample prompt, continued.
    """

    folder: Path
    settings: dict[str, Any]
    source: str
    calibration_tokens: int
    held_out_tokens: int
    kl: float
    perplexity_original: float
    perplexity_quantized: float
    bytes_original: int
    bytes_quantized: int
    seconds: float
    peak_rss_bytes: int
    linears: list[LinearReport]
    notes: list[str] = field(default_factory=list)
    sample: str = ""

    def to_json(self) -> dict[str, Any]:
        """All but the folder, which may be moved."""
        values = asdict(self)
        del values["folder"]
        return values

    def write(self, folder: Path) -> None:
        """Put report.json and the picture beside the weights."""
        write_json(folder / FILE, self.to_json())
        self.draw(folder / PICTURE)

    def by_layer(self) -> list[tuple[str, list[LinearReport]]]:
        """The linears of each layer, in order; the head is a layer of its own."""
        layers: dict[str, list[LinearReport]] = {}
        for linear in self.linears:
            parts = linear.linear.split(".")
            layers.setdefault(parts[2] if len(parts) > 2 else linear.linear, []).append(linear)
        return list(layers.items())

    def render(self) -> RenderableType:
        """The tables for the terminal."""
        errors = Table(
            title="Relative error of the outputs on held-out text: plain rounding, and as written"
        )
        errors.add_column("layer")
        names = list(dict.fromkeys(_short(linear) for linear in self.linears))
        for name in names:
            errors.add_column(name, justify="right")
        for layer, linears in self.by_layer():
            cells = {
                _short(one): f"{one.nearest:.2%} [bold]{one.quantized:.2%}[/]" for one in linears
            }
            errors.add_row(layer, *(cells.get(name, "") for name in names))
        summary = Table(show_header=False, box=None)
        summary.add_row("KL divergence from the original", f"{self.kl:.6f} nats a token")
        summary.add_row(
            "Perplexity",
            f"{self.perplexity_original:.4f} before, {self.perplexity_quantized:.4f} after",
        )
        saved = 1 - self.bytes_quantized / self.bytes_original
        summary.add_row(
            "Bytes",
            f"{decimal(self.bytes_original)} before, {decimal(self.bytes_quantized)} after "
            f"({saved:.0%} less)",
        )
        summary.add_row("Calibrated on", f"{self.calibration_tokens:,} tokens of {self.source}")
        summary.add_row("Measured on", f"{self.held_out_tokens:,} tokens held out")
        summary.add_row(
            "Took", f"{self.seconds:.1f} s, {decimal(self.peak_rss_bytes)} of memory at most"
        )
        return Group(errors, summary)

    def draw(self, path: Path) -> None:
        """Draw the error by layer; without matplotlib only say so."""
        try:
            from matplotlib.figure import Figure
        except ImportError:
            logger.warning("octavo: no picture without matplotlib; pip install 'octavo[quantize]'")
            return
        figure = Figure(figsize=(9, 5), layout="constrained")
        axes = figure.add_subplot()
        layers = self.by_layer()
        for i, name in enumerate(dict.fromkeys(_short(linear) for linear in self.linears)):
            points = [
                (x, linear.nearest, linear.quantized)
                for x, (_, linears) in enumerate(layers)
                for linear in linears
                if _short(linear) == name
            ]
            at, nearest, quantized = zip(*points, strict=True)
            axes.plot(at, quantized, "o-", color=f"C{i}", label=name)
            axes.plot(at, nearest, "x:", color=f"C{i}", alpha=0.6)
        axes.set_yscale("log")
        axes.set_xticks(range(len(layers)), [layer for layer, _ in layers])
        axes.set_xlabel("layer")
        axes.set_ylabel("relative error of the output")
        axes.set_title(f"{self.settings['scheme']}: plain rounding (dotted), as written (lines)")
        axes.legend(ncols=4, fontsize="small")
        axes.grid(alpha=0.3)
        figure.savefig(path, dpi=120)


def _short(linear: LinearReport) -> str:
    """`q` of `model.layers.0.self_attn.q_proj`."""
    return linear.linear.rsplit(".", 1)[-1].removesuffix("_proj")
