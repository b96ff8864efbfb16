"""`octavo generate MODEL`: one prompt, or a JSONL file of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import octavo
from octavo.cli import options
from octavo.engine.sampling_params import SamplingParams
from octavo.errors import RequestError
from octavo.jsonl import read_jsonl

if TYPE_CHECKING:
    from octavo.engine.outputs import RequestOutput

BATCH = 64  # records whose answers are in memory at a time


def generate(
    model: options.Model,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Text, or - for standard input.")
    ] = None,
    input: Annotated[
        Path | None,
        typer.Option("--input", "-i", help="JSONL: a `prompt` or `messages` (and `tools`) a line."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="JSONL of answers; default stdout.")
    ] = None,
    instruct: Annotated[
        bool, typer.Option(help="Put a prompt in the instruct template, as a user's message.")
    ] = True,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "--max_tokens", help="Of one answer.")
    ] = 256,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = 1.0,
    top_k: Annotated[int, typer.Option("--top-k", "--top_k", help="0 keeps all tokens.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="Ends an answer; may be repeated.")] = None,
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
    """Answer a prompt (-p), or every line of a JSONL file (-i)."""
    if (prompt is None) == (input is None):
        raise RequestError("give either a prompt with -p or a JSONL file with -i")
    if output is not None and input is None:
        raise RequestError(
            "--output: is for the answers to a file (-i); an answer to a prompt goes to stdout"
        )
    params = SamplingParams(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, stop=stop,
        seed=seed,
    )  # fmt: skip
    records = _read_records(input) if input is not None else []
    if input is not None and output is not None and output.exists() and output.samefile(input):
        raise RequestError(f"--output: {output} is the --input; give another file")
    llm = options.load(
        model, tokenizer, tokenizer_mode, config_format, load_format, max_model_len, device,
        dtype, attention_pattern, kv_cache_dtype=kv_cache_dtype,
    )  # fmt: skip
    if prompt is not None:
        _answer_prompt(llm, sys.stdin.read() if prompt == "-" else prompt, params, instruct)
        return
    if output is None:
        _answer_file(llm, records, params, instruct, sys.stdout)
    else:
        try:
            with output.open("w", encoding="utf-8") as file:
                _answer_file(llm, records, params, instruct, file)
        except OSError as error:
            raise RequestError(f"{output}: cannot be written: {error.strerror}") from None


def _answer_prompt(llm: octavo.LLM, prompt: str, params: SamplingParams, instruct: bool) -> None:
    """Stream one answer to stdout."""
    request_id = llm.engine.add_request(_encode(llm, {"prompt": prompt}, instruct), params)
    written = 0
    for step in llm.engine.stream(request_id):
        text = step.outputs[0].text
        print(text[written:], end="", flush=True)
        written = len(text)
    print()


def _answer_file(
    llm: octavo.LLM,
    records: list[dict[str, Any]],
    params: SamplingParams,
    instruct: bool,
    file: TextIO,
) -> None:
    """Write an answer for each record, in their order, a batch at a time.

    A record that cannot be answered gets its `error`, and the others go on; there is then one line
    at the end that counts them, and the command fails.
    """
    n_errors = 0
    bar = Progress(
        TextColumn("answering"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=Console(stderr=True), disable=not sys.stderr.isatty(),
    )  # fmt: skip
    with bar:
        task = bar.add_task("", total=len(records))
        for start in range(0, len(records), BATCH):
            batch = records[start : start + BATCH]
            rows: list[dict[str, Any]] = [{} for _ in batch]
            row_of_request: dict[int, int] = {}
            for i, record in enumerate(batch):
                try:
                    prompt_ids = _encode(llm, record, instruct)
                    row_of_request[llm.engine.add_request(prompt_ids, params)] = i
                except RequestError as error:
                    rows[i] = {"error": str(error)}
                    n_errors += 1
                    bar.advance(task)
            for output in llm.engine.run(list(row_of_request)):
                rows[row_of_request[output.request_id]] = _answer(llm.with_tool_calls(output))
                bar.advance(task)
            for record, row in zip(batch, rows, strict=True):
                file.write(_json_line(record | row, file.encoding))
            file.flush()
    if n_errors:
        raise RequestError(f"{n_errors} of {len(records)} records have an `error`, and no answer")


def _json_line(values: dict[str, Any], encoding: str) -> str:
    """A line of JSONL, escaped where the encoding lacks a character or it is half a pair."""
    line = json.dumps(values, ensure_ascii=False) + "\n"
    try:
        line.encode(encoding)
    except UnicodeEncodeError:
        return json.dumps(values) + "\n"
    return line


def _answer(output: RequestOutput) -> dict[str, Any]:
    answer = output.outputs[0]
    row: dict[str, Any] = {"text": answer.text, "finish_reason": answer.finish_reason}
    if answer.tool_calls:
        row["tool_calls"] = [call.to_openai() for call in answer.tool_calls]
    row["usage"] = {
        "prompt_tokens": len(output.prompt_token_ids),
        "completion_tokens": len(answer.token_ids),
    }
    return row


def _encode(llm: octavo.LLM, record: dict[str, Any], instruct: bool) -> list[int]:
    tools = record.get("tools")
    if "messages" in record:
        return llm.tokenizer.encode_chat(record["messages"], tools)
    if instruct:
        return llm.tokenizer.encode_chat([{"role": "user", "content": record["prompt"]}], tools)
    return llm.tokenizer.encode(record["prompt"])


def _read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a JSONL file; every bad line is an error that names it."""
    records = []
    for number, record in read_jsonl(path):
        if not (isinstance(record.get("prompt"), str) or isinstance(record.get("messages"), list)):
            raise RequestError(
                f"{path}: line {number} must be an object with a `prompt` string or `messages` list"
            )
        records.append(record)
    return records
