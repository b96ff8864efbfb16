"""Prefill, decode and start of llama.cpp, run by `benchmarks/cpu.py` in its environment.

By llama.cpp's own C interface, since the Python class above it decodes one sequence at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as llama

BATCH = 512  # tokens of one pass, llama.cpp's own default
VOCABULARY = 100_000
LONG = 1024  # tokens of a prompt that warms up by itself


class Model:
    """A loaded model and a context for up to 16 sequences.

    Args:
        path: a GGUF file.
        n_tokens: of all sequences together.
        threads: that compute.
    """

    def __init__(self, path: str, n_tokens: int, threads: int) -> None:
        llama.llama_backend_init()
        self.model = llama.llama_model_load_from_file(
            path.encode(), llama.llama_model_default_params()
        )
        params = llama.llama_context_default_params()
        params.n_ctx = n_tokens
        params.n_batch = params.n_ubatch = BATCH
        params.n_threads = params.n_threads_batch = threads
        params.n_seq_max = 16
        params.kv_unified = True
        self.context = llama.llama_init_from_model(self.model, params)
        if not self.context:
            raise SystemExit(f"{path}: llama.cpp cannot make a context for {n_tokens} tokens")

    def clear(self) -> None:
        """Forget all sequences."""
        llama.llama_memory_clear(llama.llama_get_memory(self.context), True)

    def decode(self, tokens: list[tuple[int, int]], with_logits: set[int]) -> None:
        """One pass.

        Args:
            tokens: of each its sequence and its position.
            with_logits: which of them are to have logits.
        """
        batch = llama.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, (sequence, position) in enumerate(tokens):
            batch.token[i] = 10 + (position * 7919 + sequence * 104_729) % VOCABULARY
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = i in with_logits
        code = llama.llama_decode(self.context, batch)
        llama.llama_synchronize(self.context)
        llama.llama_batch_free(batch)
        if code:
            raise SystemExit(f"llama_decode failed with {code}")

    def read(self, sequence: int, n_tokens: int) -> None:
        """A prompt, in passes of BATCH tokens; logits of its last token."""
        for start in range(0, n_tokens, BATCH):
            stop = min(start + BATCH, n_tokens)
            last = {stop - start - 1} if stop == n_tokens else set()
            self.decode([(sequence, position) for position in range(start, stop)], last)

    def prefill(self, n_tokens: int) -> float:
        """Seconds for a prompt; of a short one the faster of two, since the first warms up."""
        seconds = []
        for _ in range(1 if n_tokens > LONG else 2):
            self.clear()
            started = time.perf_counter()
            self.read(0, n_tokens)
            seconds.append(time.perf_counter() - started)
        return min(seconds)

    def decode_step(self, n_tokens: int, batch: int, steps: int) -> float:
        """The median seconds of a step in which every sequence gets a token."""
        self.clear()
        for sequence in range(batch):
            self.read(sequence, n_tokens)
        seconds = []
        for position in range(n_tokens, n_tokens + steps):
            started = time.perf_counter()
            tokens = [(sequence, position) for sequence in range(batch)]
            self.decode(tokens, set(range(batch)))
            seconds.append(time.perf_counter() - started)
        return statistics.median(seconds)


def main() -> None:
    """Load the model, measure what is asked for, write it as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prefill", type=int, nargs="*", default=[], help="prompt lengths")
    parser.add_argument("--decode", type=int, nargs="*", default=[], help="batch sizes, at most 16")
    parser.add_argument("--prompt", type=int, default=128, help="tokens before decoding")
    parser.add_argument("--steps", type=int, default=32, help="of decoding")
    parser.add_argument("--start", action="store_true", help="only the time of the first token")
    options = parser.parse_args()
    threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
    together = max(options.decode, default=1) * (options.prompt + options.steps)
    model = Model(options.model, max([*options.prefill, together]) + 64, threads)
    result: dict[str, Any] = {"version": version("llama-cpp-python")}
    if options.start:
        model.read(0, options.prompt)
        result["first_token_at"] = time.time()
    else:
        result["prefill_s"] = {n: model.prefill(n) for n in options.prefill}
        result["decode_step_s"] = {
            batch: model.decode_step(options.prompt, batch, options.steps)
            for batch in options.decode
        }
    options.out.write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
