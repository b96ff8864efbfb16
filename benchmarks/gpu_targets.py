"""The figures that octavo is to reach on a GPU, held against what was measured."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.targets import INT8, RATE, Result, Row

PEER = "transformers"
TARGET = "the target"
BF16 = "the machine's bf16"
BATCHES = (1, 64)
BATCH_64_TOK_S = 6000.0
LONG_S, LONG_GB = 20.0, 16.0  # to the first token of a prompt of 131,072, and the device's memory
LONG_TOKENS = 131_072


def rows_of(result: Result) -> list[Row]:
    """A row for each figure of a run of `benchmarks/gpu.py` that has something to stand beside."""
    return [
        *_decode(result),
        *_prefill(result),
        *_linears(result),
        *_attention(result),
        *_long(result),
        *_passkey(result),
    ]


def _decode(result: Result) -> Iterator[Row]:
    """Generated tokens a second, and how near a step comes to reading its bytes once."""
    for name, own in result.items():
        if not name.startswith("decode_"):
            continue
        batch = own["batch"]
        what = f"decode, batch {batch}, after {result['context']:,} tokens"
        if batch == 1:
            read = own["read_gb_s"], own["machine_read_gb_s"]
            yield Row(f"{what}: memory read", *read, RATE, "GB/s", 0.7)
        if batch == 64:
            yield Row(what, own["decode_tok_s"], BATCH_64_TOK_S, TARGET, "tokens/s", 1.0)
        step = result.get(PEER, {}).get("decode_step_s", {}).get(str(batch))
        if step is not None:
            target = 2.5 if batch == 1 else None
            yield Row(what, own["decode_tok_s"], batch / step, PEER, "tokens/s", target)


def _prefill(result: Result) -> Iterator[Row]:
    """The prompt's linears over the whole time, as if nothing else took any; and tokens a second.

    Only those that all tokens go through: the rest of the last layer, and the head, are the last
    token's alone.
    """
    own = result.get("prefill")
    if own is None:
        return
    what = f"prefill, {own['prompt']:,} tokens"
    if own["machine_int8_tops"] is not None:
        tops = own["prefill_tok_s"] * result["linear_operations_per_token"] / 1e12
        yield Row(f"{what}: linears", tops, own["machine_int8_tops"], INT8, "TOPS", None)
    seconds = result.get(PEER, {}).get("prefill_s", {}).get(str(own["prompt"]))
    if seconds is not None:
        other = own["prompt"] / seconds
        yield Row(what, own["prefill_tok_s"], other, PEER, "tokens/s", 1.5)


def _linears(result: Result) -> Iterator[Row]:
    """A layer's linears alone, of a chunk of the prompt: what the target is of."""
    alone = result.get("linears", {})
    rate = alone.get("machine_int8_tops")
    for row in alone.get("rows", []) if rate is not None else []:
        what = f"prefill in chunks of {row['tokens']:,}: linears alone"
        yield Row(what, row["tops"], rate, INT8, "TOPS", 0.6)


def _attention(result: Result) -> Iterator[Row]:
    """A chunk of queries alone."""
    alone = result.get("attention", {})
    rate = alone.get("machine_bf16_tflops")
    if rate is None:
        return
    for row in alone["rows"]:
        if row["queries"] > 1:
            window = "full" if row["window"] is None else f"window {row['window']:,}"
            what = f"attention alone, {row['queries']:,} x {row['keys']:,}, {window}, {row['by']}"
            yield Row(what, row["tflop_s"], rate, BF16, "TFLOP/s", 0.6)


def _long(result: Result) -> Iterator[Row]:
    """The longest prompt: the targets are of 131,072 tokens, answer included."""
    own = result.get("long")
    if own is None or own["peak_device_bytes"] is None:
        return
    what = f"prompt of {own['prompt']:,} tokens, int8 weights and KV"
    whole = own["prompt"] + own["decode"] >= LONG_TOKENS
    target = 1.0 if whole else None
    seconds, memory = own["prefill_s"], own["peak_device_bytes"] / 1e9
    yield Row(f"{what}: first token", seconds, LONG_S, TARGET, "s", target, at_most=True)
    yield Row(f"{what}: device memory", memory, LONG_GB, TARGET, "GB", target, at_most=True)


def _passkey(result: Result) -> Iterator[Row]:
    """Right answers, beside a CPU's to the same prompts if they are known."""
    own = result.get("passkey", {})
    if not own.get("models"):  # or the file of a run that had no answer yet
        return
    [model] = own["models"]
    what = f"passkey in {own['lengths'][0]:,} tokens, {model['tries']} tries"
    on_cpu = own.get("right_on_cpu")
    if on_cpu:
        yield Row(what, model["right"], on_cpu, "the CPU", "right", 1.0)
    else:
        yield Row(what, model["right"], model["tries"], "all", "right")
