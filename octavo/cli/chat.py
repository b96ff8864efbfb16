"""`octavo chat MODEL`: a conversation in the terminal, or over a pipe."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

import octavo
from octavo.cli import options
from octavo.engine.sampling_params import SamplingParams
from octavo.errors import RequestError

_HELP = "/reset forgets the conversation, /quit leaves, Ctrl-C stops an answer"


def chat(
    model: options.Model,
    system: Annotated[str | None, typer.Option(help="A system prompt.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", "--max_tokens", help="Of one answer.")
    ] = None,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = 1.0,
    seed: options.Seed = None,
    tokenizer: options.TokenizerFile = None,
    tokenizer_mode: options.TokenizerMode = "auto",
    config_format: options.ConfigFormat = "auto",
    load_format: options.LoadFormat = "auto",
    max_model_len: options.MaxModelLen = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    attention_pattern: options.Pattern = None,
    kv_cache_dtype: options.KvCacheDtype = "auto",
) -> None:
    """Chat with a model; it answers as it writes and keeps the conversation."""
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    llm = options.load(
        model, tokenizer, tokenizer_mode, config_format, load_format, max_model_len, device,
        dtype, attention_pattern, kv_cache_dtype=kv_cache_dtype,
    )  # fmt: skip
    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401 - gives input() its editing and history

        print(f"{model}: {_HELP}.", file=sys.stderr)
    opening = [{"role": "system", "content": system}] if system else []
    messages: list[dict[str, Any]] = list(opening)
    while True:
        try:
            line = _read_line(interactive)
            if line is None or line == "/quit":
                break
            if line == "/reset":
                messages = list(opening)
                print("The conversation is forgotten.", file=sys.stderr)
            elif line.startswith("/"):
                print(f"{line.split()[0]}: no such command; {_HELP}.", file=sys.stderr)
            elif line:
                messages = _take_turn(llm, messages, line, params, interactive)
        except KeyboardInterrupt:  # at the prompt, or meant for an answer that has just ended
            if not interactive:
                raise
            print()


def _take_turn(
    llm: octavo.LLM,
    messages: list[dict[str, Any]],
    line: str,
    params: SamplingParams,
    interactive: bool,
) -> list[dict[str, Any]]:
    """Answer a line; the conversation with both, or as it was if the line cannot be answered."""
    asked = [*messages, {"role": "user", "content": line}]
    text = ""
    try:
        for output in llm.stream_chat(asked, params):
            print(output.outputs[0].text[len(text) :], end="", flush=True)
            text = output.outputs[0].text
        print(flush=True)
    except KeyboardInterrupt:
        if not interactive:
            raise
        print(" [stopped]", flush=True)
    except RequestError as error:
        print(f"octavo: {error}", file=sys.stderr)
        return messages
    # An empty answer cannot stand in the template: drop the turn.
    return [*asked, {"role": "assistant", "content": text}] if text else messages


def _read_line(interactive: bool) -> str | None:
    """The next line without its end, or None when there are no more."""
    if not interactive:
        line = sys.stdin.readline()
        return line.strip() if line else None
    try:
        return input("> ").strip()
    except EOFError:
        print()
        return None
