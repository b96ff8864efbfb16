"""octavo beside vLLM and llama.cpp on the CPU: random weights of one shape, one after the other.

    python -m benchmarks.cpu --vllm-python PYTHON --llama-python PYTHON --json build/cpu.json

Each PYTHON is that of an environment of its own (see benchmarks/README.md); without one that peer
is left out. The models are made in `--work` and used again. Every measurement is a process of its
own and should have the machine to itself. A machine that others share changes its pace within
minutes: decoding and prompts are measured in `--rounds` rounds, in turn with the peers, and of each
figure the fastest counts, octavo's and theirs; decoding is compared between rounds in which memory
was as fast. The figures, and those of every round, go to
`--json` after every part, and at the end into docs/performance.md and docs/performance.png;
`--from` writes those again.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.checkpoints import q8_file, w8a8_folder
from benchmarks.figures import read_figures, write_figures
from benchmarks.machine import cores, cpu_name
from benchmarks.performance_page import write_page
from benchmarks.processes import run, run_to_file
from benchmarks.targets import LLAMA, PACES, VLLM
from octavo.kernels.cpu.machine import read_bytes_per_second

PEERS = Path(__file__).parent / "peers"
DOCS = Path(__file__).parent.parent / "docs"
PROMPT = 128  # tokens before decoding
LONG = 1024  # tokens of a prompt that warms up by itself, here and in the peers' drivers
TIMEOUT = 3600.0  # seconds of one process
Result = dict[str, Any]
Part = Callable[[argparse.Namespace], Result]


def main() -> None:
    """Measure what is asked for, write the page."""
    options = parse_arguments()
    result = read_figures(options.source) if options.source else measure(options)
    if not options.no_page:
        write_page(result, options.docs)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--vllm-python", help="of an environment with vLLM for the CPU")
    parser.add_argument("--llama-python", help="of one with llama-cpp-python and gguf")
    parser.add_argument("--work", type=Path, default=Path("build/peers"), help="for the models")
    parser.add_argument("--shape", default="ministral-8b", help="as octavo bench takes it")
    parser.add_argument("--layers", type=int, default=4, help="of the shape's")
    parser.add_argument("--threads", type=int, default=len(cores()), help="that each computes with")
    parser.add_argument(
        "--kv", default="int8", help="dtype of octavo's KV cache; peers have 16 bits"
    )
    parser.add_argument("--chunk", type=int, default=1024, help="tokens of a pass, octavo and vLLM")
    parser.add_argument(
        "--prefill", type=int, nargs="*", default=[128, 512, 4096, 16_384], help="prompt lengths"
    )
    parser.add_argument(
        "--llama-prefill", type=int, nargs="*", default=[128, 512, 4096], help="llama.cpp's"
    )
    parser.add_argument("--decode", type=int, nargs="*", default=[1, 4, 8, 16], help="batches")
    parser.add_argument("--steps", type=int, default=32, help="of decoding")
    parser.add_argument("--rounds", type=int, default=3, help="of decoding and prompts")
    parser.add_argument(
        "--context", type=int, default=131_072, help="tokens in all of the long decode; 0: none"
    )
    parser.add_argument("--full", action="store_true", help="all layers too, by octavo alone")
    parser.add_argument("--no-alone", action="store_true", help="no attention, no prompt lookup")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--from", dest="source", type=Path, help="figures: only write the page")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of the page")
    parser.add_argument("--no-page", action="store_true", help="leave the page as it is")
    options = parser.parse_args()
    if options.source is None and options.json is None:
        parser.error("--json FILE: the figures need a place to be kept")
    return options


def measure(options: argparse.Namespace) -> Result:
    """All parts, one after another; what there is so far is in the file after each."""
    result: Result = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": {
            "cpu": cpu_name(),
            "cores": len(cores()),
            "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
            "system": platform.platform(terse=True),
        },
        "shape": options.shape,
        "layers": options.layers,
        "threads": options.threads,
        "kv": options.kv,
        "chunk": options.chunk,
    }
    in_turn: dict[str, Part] = {"octavo": octavo_round}
    once: list[tuple[str, Part]] = [("octavo", octavo_once)]
    if options.llama_python:
        in_turn[LLAMA] = llama_round
        once.append((LLAMA, llama_once))
    if not options.no_alone:
        once += [("attention", measure_attention), ("prompt_lookup", measure_prompt_lookup)]
    if options.vllm_python:  # last: without AVX-512 it takes several times as long as all others
        in_turn[VLLM] = vllm_round
        once.append((VLLM, vllm_once))
    torch.set_num_threads(options.threads)  # which read memory beside a peer
    rounds: list[dict[str, Result]] = []
    for _ in range(options.rounds):
        rounds.append({name: part(options) for name, part in in_turn.items()})
        result |= fastest(rounds) | {"rounds": rounds}
        write_figures(result, options.json)
    for name, part in once:
        result[name] = merged(result.get(name, {}), part(options))
        write_figures(result, options.json)
    return result


def fastest(results: Sequence[Result]) -> Result:
    """Figure by figure the best of several rounds: the least seconds; of octavo's runs by speed.

    What slows a run down is not the program that runs: other guests of the machine do.
    """
    names = [name for name in results[0] if name != PACES]
    return {name: _fastest([result[name] for result in results]) for name in names}


def _fastest(values: Sequence[Any]) -> Any:
    first = values[0]
    if isinstance(first, str):
        return first
    if not isinstance(first, dict):
        # A step's time is a difference of two measurements, which is nothing if it is not above 0.
        return min((value for value in values if value > 0), default=first)
    if "decode_tok_s" not in first:
        return fastest(values)
    speed = "prefill_tok_s" if first["decode"] == 1 else "decode_tok_s"
    return max(values, key=lambda run: run[speed])


def merged(a: Result, b: Result) -> Result:
    """Both, and what both have dictionaries of."""
    both = {name: a[name] | b[name] for name in a.keys() & b.keys() if isinstance(a[name], dict)}
    return a | b | both


def octavo_round(options: argparse.Namespace) -> Result:
    """`octavo bench` of prompts, and decoding after them and at the end of a long context."""
    result: Result = {"prefill": {str(n): read_prompt(options, n) for n in options.prefill}}
    for head in ("int8", "bf16"):
        flags = {"head": head, "prompt": PROMPT, "decode": options.steps}
        result[f"decode_{head}_head"] = {
            str(n): bench(options, batch=n, **flags) for n in options.decode
        }
    if options.context:
        result["context"] = end_of_context(options)
    return result


def end_of_context(options: argparse.Namespace, **flags: object) -> Result:
    """`octavo bench` of the last tokens of a context that is filled in."""
    prompt, steps = 512, 16
    length = options.context - prompt - steps
    return bench(options, head="int8", prompt=prompt, decode=steps, context=length, **flags)


def read_prompt(options: argparse.Namespace, n_tokens: int, **flags: object) -> Result:
    """`octavo bench` of one prompt; a long one is read once."""
    if n_tokens > LONG:
        flags["rounds"] = 1
    return bench(options, prompt=n_tokens, decode=1, **flags)


def octavo_once(options: argparse.Namespace) -> Result:
    """`octavo bench` in its other settings, and the start with the checkpoint that vLLM loads."""
    result: Result = {}
    longest = max(options.prefill, default=0)
    if longest > LONG and options.kv != "bf16":
        result["prefill_bf16_kv"] = {str(longest): read_prompt(options, longest, kv="bf16")}
    if short := [n for n in options.prefill if n <= LONG]:  # the most beside the fewest weights
        run = bench(options, head="int8", prompt=max(short), decode=options.steps)
        result["prefill_int8_head"] = {str(max(short)): run}
    if options.context and options.full:
        result["full_context"] = end_of_context(options, layers=None)
    if options.full:
        result["full"] = bench(options, head="int8", prompt=512, decode=16, layers=None)
    folder = w8a8_folder(options.work, options.shape, options.layers)
    start = [sys.executable, str(PEERS / "run_octavo.py"), str(folder), "--kv", options.kv]
    for _ in range(2):  # the first reads the files, as the peers' measurements of speed do
        started = run_to_file([*start, "--prompt", str(PROMPT)], environment(options), TIMEOUT)
    return result | {"version": started["version"], "first_token_s": started["first_token_s"]}


def bench(options: argparse.Namespace, **flags: object) -> Result:
    """The figures of one `octavo bench`; a flag that is None is left out."""
    given = {"kv": options.kv, "layers": options.layers, "chunk": options.chunk} | flags
    words = [
        word for name, value in given.items() if value is not None
        for word in (f"--{name}", str(value))
    ]  # fmt: skip
    command = [
        sys.executable, "-m", "octavo", "bench", "--shape", options.shape, "--scheme", "w8a8",
        "--threads", str(options.threads), *words, "--json",
    ]  # fmt: skip
    figures: Result = json.loads(run(command, environment(options), TIMEOUT).stdout)
    return figures


def vllm_round(options: argparse.Namespace) -> Result:
    """vLLM's speed; by long prompts in a process that is made for such."""
    short = [n for n in options.prefill if n <= LONG]
    long = [n for n in options.prefill if n > LONG]
    speed = paced(lambda: run_vllm(options, lengths(short, options.decode)))
    return merged(speed, run_vllm(options, lengths(long, []))) if long else speed


def vllm_once(options: argparse.Namespace) -> Result:
    """Its start in a new process, by when it has compiled before."""
    return {"first_token_s": run_vllm(options, ["--start"])["first_token_s"]}


def run_vllm(options: argparse.Namespace, arguments: list[str]) -> Result:
    """Its driver's figures."""
    folder = w8a8_folder(options.work, options.shape, options.layers)
    command = [
        options.vllm_python, str(PEERS / "run_vllm.py"), str(folder),
        "--chunk", str(options.chunk), *common_arguments(options), *arguments,
    ]  # fmt: skip
    env = environment(options) | {
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores()[: options.threads])),
        "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    return run_to_file(command, env, TIMEOUT)


def paced(measurement: Callable[[], Result]) -> Result:
    """A peer's figures, and the paces at which memory was read before and after it."""
    before = read_bytes_per_second() / 1e9
    figures = measurement()
    return figures | {PACES: [before, read_bytes_per_second() / 1e9]}


def llama_round(options: argparse.Namespace) -> Result:
    """llama.cpp's speed."""
    return paced(lambda: run_llama(options, lengths(options.llama_prefill, options.decode)))


def llama_once(options: argparse.Namespace) -> Result:
    """Its start."""
    return {"first_token_s": run_llama(options, ["--start"])["first_token_s"]}


def run_llama(options: argparse.Namespace, arguments: list[str]) -> Result:
    """Its driver's figures."""
    file = q8_file(options.work, options.shape, options.layers, options.llama_python)
    script = str(PEERS / "run_llama.py")
    command = [options.llama_python, script, str(file), *common_arguments(options), *arguments]
    return run_to_file(command, environment(options), TIMEOUT)


def measure_attention(options: argparse.Namespace) -> Result:
    """`benchmarks.attention`."""
    return run_module("benchmarks.attention", [], options)


def measure_prompt_lookup(options: argparse.Namespace) -> Result:
    """`benchmarks.prompt_lookup`."""
    arguments = [
        "--shape", options.shape, "--layers", str(options.layers), "--kv", options.kv,
    ]  # fmt: skip
    return run_module("benchmarks.prompt_lookup", arguments, options)


def run_module(name: str, arguments: list[str], options: argparse.Namespace) -> Result:
    """Another benchmark of this folder, and the figures that it writes with `--json`."""
    path = options.json.with_name(f"{options.json.name}.part")
    command = [sys.executable, "-m", name, *arguments, "--json", str(path)]
    run(command, environment(options), TIMEOUT)
    figures = read_figures(path)
    path.unlink()
    return figures


def common_arguments(options: argparse.Namespace) -> list[str]:
    """What both peers are told in the same words."""
    return ["--prompt", str(PROMPT), "--steps", str(options.steps)]


def lengths(prefill: list[int], decode: list[int]) -> list[str]:
    """What a peer is to measure."""
    return ["--prefill", *map(str, prefill), "--decode", *map(str, decode)]


def environment(options: argparse.Namespace) -> dict[str, str]:
    """As many threads for each."""
    return {"OMP_NUM_THREADS": str(options.threads)}


if __name__ == "__main__":
    main()
