"""docs/performance.md and docs/performance.png, from the figures of `benchmarks.cpu`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.targets import LLAMA, VLLM, Row, rows_of

PAGE, PICTURE = "performance.md", "performance.png"
BEGIN, END = "<!-- benchmarks.cpu: begin -->", "<!-- benchmarks.cpu: end -->"
COLOURS = {VLLM: "#4477aa", LLAMA: "#228833"}  # Paul Tol's, told apart by everybody
Result = Mapping[str, Any]


def write_page(result: Result, folder: Path) -> None:
    """Put the tables between the page's markers, and the picture beside it.

    Raises:
        SystemExit: the page, or one of its markers, is not there.
    """
    path = folder / PAGE
    try:
        before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    except OSError as error:
        sys.exit(f"{path}: {error.strerror}; it must be there, with {BEGIN} and {END} in it")
    _, end, after = rest.partition(END)
    if not end:
        sys.exit(f"{path}: {BEGIN} and {END} must be in it, in this order")
    rows = rows_of(result)
    parts = [conditions(result), targets_table(rows)]
    if draw(rows, folder / PICTURE):
        parts.append(f"![octavo's speed by its peers']({PICTURE})")
    parts.append(runs_table(result))
    text = f"{before}{BEGIN}\n\n" + "\n\n".join(parts) + f"\n\n{END}{after}"
    path.write_text(text, encoding="utf-8")


def conditions(result: Result) -> str:
    """What the figures hold for."""
    machine = result["machine"]
    versions = [f"octavo {result['octavo']['version']}"]
    versions += [f"{peer} {result[peer]['version']}" for peer in (VLLM, LLAMA) if peer in result]
    return (
        f"{result['shape']}, {result['layers']} layers unless said otherwise, random weights in "
        f"W8A8, octavo's KV cache in {result['kv']}; {machine['cpu']}, {machine['cores']} cores, "
        f"{machine['memory_gb']} GB, {result['threads']} threads each, {result['date']}; "
        f"{', '.join(versions)}."
    )


def targets_table(rows: Sequence[Row]) -> str:
    """Each figure of octavo beside the other, their ratio, the target, and whether it is met."""
    lines = ["| figure | octavo | beside | ratio | target | |", "| --- " * 6 + "|"]
    for row in rows:
        target = "" if row.target is None else f"{'≤' if row.at_most else '≥'} {row.target:g}"
        verdict = {True: "met", False: "missed", None: ""}[row.met]
        lines.append(
            f"| {row.what} | {figure(row.octavo)} {row.unit} "
            f"| {row.against} {figure(row.other)} {row.unit} "
            f"| {row.ratio:.2f} | {target} | {verdict} |"
        )
    return "\n".join(lines)


def runs_table(result: Result) -> str:
    """octavo's own runs, each beside the machine's read rate in the same process."""
    lines = [
        "octavo's runs. A step reads all weights and the keys and values that it sees; the rate of "
        "the machine is what the same process reads in turn with the steps, doing nothing else, "
        "and in brackets the best of many times.",
        "",
        "| layers, head, KV | prompt | batch | prefill, tokens/s | decode, tokens/s | a step reads "
        "| the machine reads | weights and KV | peak memory |",
        "| --- " * 9 + "|",
    ]
    for run in octavo_runs(result):
        after = f" after {run['context']:,}" if run["context"] else ""
        held = (run["weights_bytes"] + run["kv_bytes"]) / 1e9
        lines.append(
            f"| {run['layers']}, {run['head']}, {run['kv']} | {run['prompt']:,}{after} "
            f"| {run['batch']} | {figure(run['prefill_tok_s'])} | {figure(run['decode_tok_s'])} "
            f"| {figure(run['read_gb_s'])} GB/s | {figure(run['machine_read_gb_s'])} "
            f"({figure(run['machine_read_best_gb_s'])}) GB/s | {held:.2f} GB "
            f"| {run['peak_rss_bytes'] / 1e9:.2f} GB |"
        )
    return "\n".join(lines)


def octavo_runs(result: Result) -> Iterator[Mapping[str, Any]]:
    """Every output of `octavo bench` in the figures."""
    for value in result["octavo"].values():
        if isinstance(value, Mapping):
            yield from [value] if "prefill_tok_s" in value else value.values()


def figure(value: float) -> str:
    """Three digits, and all of those before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def draw(rows: Sequence[Row], path: Path) -> bool:
    """Bars of octavo's speed by each peer's, with the targets; whether there was one to draw."""
    shown = [row for row in rows if row.against in COLOURS and row.unit == "tokens/s"][::-1]
    if not shown:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

    chart, axes = plt.subplots(figsize=(8, 0.3 * len(shown) + 1.2), layout="constrained")
    axes.set_xscale("log")  # twice as fast and half as fast are as far from 1
    for i, row in enumerate(shown):
        axes.barh(i, row.ratio - 1, left=1, color=COLOURS[row.against], height=0.7)
        axes.text(max(row.ratio, row.target or 1), i, f"  {row.ratio:.2f}", va="center", fontsize=8)
        if row.target is not None:
            axes.plot([row.target] * 2, [i - 0.45, i + 0.45], color="black", linewidth=2)
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set_yticks(range(len(shown)), [f"{row.what} / {row.against}" for row in shown], fontsize=8)
    axes.set_xlabel("octavo's tokens/s by the peer's")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.08, y=0.01)
    peers = [peer for peer in COLOURS if any(row.against == peer for row in shown)]
    handles: list[Any] = [Patch(color=COLOURS[peer], label=f"by {peer}") for peer in peers]
    handles.append(Line2D([], [], color="black", linewidth=2, label="target"))
    chart.legend(handles=handles, loc="outside upper right", ncols=len(handles), fontsize=8)
    chart.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(chart)
    return True
