"""`octavo bench`: speed and memory of a shape with random weights, no checkpoint needed."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from octavo.bench import BenchSettings, run_bench
from octavo.bench.shapes import HEADS, SCHEMES, SHAPES
from octavo.cli import options
from octavo.config import parse_size
from octavo.engine.defaults import MAX_NUM_BATCHED_TOKENS


def bench(
    shape: Annotated[
        str, typer.Option(help=f"{', '.join(SHAPES)}, `demo`, or a folder with a config.")
    ] = "ministral-8b",
    layers: Annotated[int | None, typer.Option(help="Of the shape's; default all.")] = None,
    scheme: Annotated[str, typer.Option(help=f"Of the linears: {' or '.join(SCHEMES)}.")] = "w8a8",
    head: Annotated[str, typer.Option(help=f"{' or '.join(HEADS)}.")] = "bf16",
    kv: Annotated[str, typer.Option(help="KV cache: auto, bf16 or int8.")] = "auto",
    prompt: Annotated[str, typer.Option(help="Tokens of each prompt: 512 or 16k.")] = "512",
    decode: Annotated[int, typer.Option(help="Tokens that are then generated for each.")] = 32,
    batch: Annotated[int, typer.Option(help="Sequences at once.")] = 1,
    context: Annotated[
        str | None,
        typer.Option(help="Tokens that each holds before its prompt: random keys and values."),
    ] = None,
    chunk: Annotated[
        int, typer.Option(help="Most prompt tokens in one forward pass.")
    ] = MAX_NUM_BATCHED_TOKENS,
    rounds: Annotated[
        int, typer.Option(help="Times that the prompts are read; the fastest counts.")
    ] = 2,
    threads: Annotated[int | None, typer.Option(help="Default: as many as PyTorch takes.")] = None,
    device: options.Device = "auto",
    seed: Annotated[int, typer.Option(help="Of weights, tokens, keys and values.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure prefill, decode and memory with random weights, beside the machine's limits."""
    settings = BenchSettings(
        shape=shape, layers=layers, scheme=scheme, head=head, kv=kv,
        prompt=parse_size(prompt, "--prompt"), decode=decode, batch=batch,
        context=parse_size(context, "--context") if context else 0,
        chunk=chunk, rounds=rounds, threads=threads, device=device,
        seed=seed,
    )  # fmt: skip
    values = asdict(settings) | asdict(run_bench(settings))
    if as_json:
        print(json.dumps(values))
    else:
        _print(Console(highlight=False), values)


def _print(console: Console, values: dict[str, Any]) -> None:
    """The figures, for people."""
    versions = ", ".join(f"{name} {number}" for name, number in values["versions"].items())
    what = (
        f"{values['shape']}, {values['layers']} layers, {values['scheme']}, {values['head']} head, "
        f"{values['kv']} KV; {values['batch']} x {values['prompt']:,} tokens"
    )
    if values["context"]:
        what += f" after {values['context']:,}"
    table = Table("Figure", "Value")
    table.columns[1].justify = "right"
    tops, tflops = values["machine_int8_tops"], values["machine_bf16_tflops"]
    device_bytes = values["peak_device_bytes"]
    rows = {
        "Prefill": f"{values['prefill_tok_s']:,.1f} tokens/s",
        "Decode": f"{values['decode_tok_s']:,.2f} tokens/s",
        "A step, median": f"{values['decode_step_s'] * 1e3:,.1f} ms",
        "A step, fastest": f"{values['decode_step_min_s'] * 1e3:,.1f} ms",
        "From start to first token": f"{values['time_to_first_token_s']:.2f} s",
        "Weights": decimal(values["weights_bytes"]),
        "KV cache": decimal(values["kv_bytes"]),
        "Peak memory": decimal(values["peak_rss_bytes"]),
        "A step reads": f"{values['read_gb_s']:.1f} GB/s",
        "The machine reads meanwhile": f"{values['machine_read_gb_s']:.1f} GB/s",
        "The machine reads at best": f"{values['machine_read_best_gb_s']:.1f} GB/s",
        "The machine's int8 arithmetic": "unknown" if tops is None else f"{tops:.2f} TOPS",
    }
    if values["kv_read_gb_s"] is not None:
        rows["Of the context a step reads"] = f"{values['kv_read_gb_s']:.1f} GB/s"
    if device_bytes is not None:
        rows["Peak memory of the device"] = decimal(device_bytes)
    if tflops is not None:
        rows["The machine's bf16 arithmetic"] = f"{tflops:,.1f} TFLOP/s"
    for figure, value in rows.items():
        table.add_row(figure, value)
    console.print(what, soft_wrap=True)
    console.print(table)
    where = values["device_name"] or f"{values['threads']} threads"
    console.print(f"{where}; {versions}")
