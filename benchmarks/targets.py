"""The figures that octavo is to reach on the CPU, held against what was measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.pace import fastest_at_one_pace

VLLM, LLAMA = "vLLM", "llama.cpp"
PACES = "paces_gb_s"  # of memory, before a peer's round and after it
RATE, INT8 = "the machine reads", "the machine's int8"
WITHOUT_CONTEXT = (
    "prefill", "prefill_bf16_kv", "prefill_int8_head", "decode_int8_head", "decode_bf16_head",
)  # fmt: skip

Result = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """A figure of octavo beside what it is held against.

    Attributes:
        what: was measured.
        octavo, other: the figures, in `unit`.
        against: whose `other` is.
        unit: of both.
        target: what octavo / other should be; None for a figure that only informs.
        at_most: whether it should be no more than the target, rather than no less.
    """

    what: str
    octavo: float
    other: float
    against: str
    unit: str
    target: float | None = None
    at_most: bool = False

    @property
    def ratio(self) -> float:
        return self.octavo / self.other

    @property
    def met(self) -> bool | None:
        """Whether the target is; None without one."""
        if self.target is None:
            return None
        return self.ratio <= self.target if self.at_most else self.ratio >= self.target


def rows_of(result: Result) -> list[Row]:
    """A row for each figure of a run of `benchmarks/cpu.py` that has something to stand beside."""
    return [
        *_decode(result),
        *_prefill(result),
        *_long_context(result),
        *_attention(result),
        *_start(result),
        *_memory(result),
        *_prompt_lookup(result),
    ]


def _decode(result: Result) -> Iterator[Row]:
    """Generated tokens a second."""
    unit = "tokens/s"
    targets = {  # by head, batch and peer
        ("int8", 1, VLLM): 1.5,
        ("int8", 1, LLAMA): 1.15,
        ("bf16", 1, VLLM): 1.15,
        ("int8", 16, VLLM): 1.3,
        ("bf16", 16, VLLM): 1.3,
    }
    for head in ("int8", "bf16"):
        for batch, own in result["octavo"].get(f"decode_{head}_head", {}).items():
            what = f"decode, batch {batch}, {head} head"
            for peer in (VLLM, LLAMA):
                step = result.get(peer, {}).get("decode_step_s", {}).get(batch)
                if step is None or (head, peer) == ("bf16", LLAMA):  # llama.cpp's is int8
                    continue
                target = targets.get((head, int(batch), peer))
                paced = _steps_at_one_pace(result, head, batch, peer)
                own_s, other_s = paced or (int(batch) / own["decode_tok_s"], step)
                yield Row(what, int(batch) / own_s, int(batch) / other_s, peer, unit, target)
            if batch == "1":
                target = 0.9 if head == "int8" else None
                runs = [each["octavo"][f"decode_{head}_head"]["1"] for each in _rounds(result)]
                read = _read(runs or [own], "read_gb_s")
                yield Row(f"{what}: memory read", *read, RATE, "GB/s", target)


def _steps_at_one_pace(
    result: Result, head: str, batch: str, peer: str
) -> tuple[float, float] | None:
    """Seconds of a step, octavo's and a peer's, of the fastest rounds at one pace of memory."""
    own, other = [], []
    for each in _rounds(result):
        run = each["octavo"][f"decode_{head}_head"][batch]
        own.append((run["machine_read_gb_s"], int(batch) / run["decode_tok_s"]))
        other.append((each[peer].get(PACES, ()), each[peer]["decode_step_s"][batch]))
    return fastest_at_one_pace(own, other)


def _prefill(result: Result) -> Iterator[Row]:
    """Prompt tokens a second."""
    targets = {("512", VLLM): 1.3, ("512", LLAMA): 5.0, ("16384", VLLM): 1.7}
    for n_tokens, own in result["octavo"].get("prefill", {}).items():
        for peer in (VLLM, LLAMA):
            seconds = result.get(peer, {}).get("prefill_s", {}).get(n_tokens)
            if seconds is not None:
                yield Row(
                    f"prefill, {int(n_tokens):,} tokens", own["prefill_tok_s"],
                    int(n_tokens) / seconds, peer, "tokens/s", targets.get((n_tokens, peer)),
                )  # fmt: skip


def _long_context(result: Result) -> Iterator[Row]:
    """Keys and values read at the end of a long context."""
    own = result["octavo"].get("context")
    if own is not None and own["kv_read_gb_s"] is not None:
        what = f"decode after {own['context']:,} tokens: keys and values read"
        runs = [each["octavo"]["context"] for each in _rounds(result)]
        yield Row(what, *_read(runs or [own], "kv_read_gb_s"), RATE, "GB/s", 0.75)


def _rounds(result: Result) -> list[Result]:
    """The figures of every round, if they are kept."""
    return list(result.get("rounds", ()))


def _read(runs: Sequence[Result], what: str) -> tuple[float, float]:
    """What was read of memory and what the machine reads, GB/s, in the round in the middle.

    Both are of one process. The fastest round says nothing of their ratio: where memory changes its
    pace in the middle of a run, it may be anything.
    """
    pairs = [(run[what], run["machine_read_gb_s"]) for run in runs if run[what] is not None]
    return sorted(pairs, key=lambda pair: pair[0] / pair[1])[(len(pairs) - 1) // 2]


def _attention(result: Result) -> Iterator[Row]:
    """Attention alone over a full layer, by the largest chunk: the targets are rates."""
    alone = result.get("attention")
    if alone is None:
        return
    full = [row for row in alone["rows"] if row["window"] is None and row["queries"] > 1]
    most = max((row["queries"] for row in full), default=0)
    rows = {row["by"]: row for row in full if row["queries"] == most}
    for kv, target in (("int8", 1.2), ("bf16", 0.6)):
        own = rows.get(f"octavo, {kv} KV")
        if own is None:
            continue
        what = f"attention alone, {most:,} queries x {own['keys']:,} keys, {kv} KV"
        yield Row(what, own["tflop_s"], target, "the target", "TFLOP/s", 1.0)
        if "PyTorch, bf16" in rows:
            yield Row(what, own["tflop_s"], rows["PyTorch, bf16"]["tflop_s"], "SDPA", "TFLOP/s")
        if kv == "int8" and alone["machine_int8_tops"]:
            yield Row(what, own["tflop_s"], alone["machine_int8_tops"], INT8, "TFLOP/s")


def _start(result: Result) -> Iterator[Row]:
    """From process start to first token."""
    own = result["octavo"].get("first_token_s")
    for peer, target in ((VLLM, 0.1), (LLAMA, None)):
        seconds = result.get(peer, {}).get("first_token_s")
        if own is not None and seconds is not None:
            yield Row("start to first token", own, seconds, peer, "s", target, at_most=True)


def _memory(result: Result) -> Iterator[Row]:
    """The most memory, of some layers by the run that has the most beside weights and cache."""
    own, layers = result["octavo"], f"{result['layers']} layers"
    some = [run for name in WITHOUT_CONTEXT for run in own.get(name, {}).values()]
    for what, runs, target in (
        (layers, [run for run in some if run["batch"] == 1], 1.1),
        (f"{layers}, several sequences", [run for run in some if run["batch"] > 1], None),
        (f"{layers} at the end of the context", [own.get("context")], 1.1),
        ("all layers", [own.get("full")], 1.1),
        ("all layers at the end of the context", [own.get("full_context")], 1.1),
    ):
        pairs = [
            (run["peak_rss_bytes"] / 1e9, (run["weights_bytes"] + run["kv_bytes"]) / 1e9)
            for run in runs
            if run is not None
        ]
        if pairs:
            peak, held = max(pairs, key=lambda pair: pair[0] / pair[1])
            yield Row(
                f"peak memory, {what}", peak, held, "weights and KV", "GB", target, at_most=True
            )


def _prompt_lookup(result: Result) -> Iterator[Row]:
    """Text that repeats itself, with guessing and without."""
    own = result.get("prompt_lookup")
    if own is not None:
        yield Row(
            "repetitive text, prompt lookup", own["on_tok_s"], own["off_tok_s"], "without it",
            "tokens/s", 2.0,
        )  # fmt: skip
