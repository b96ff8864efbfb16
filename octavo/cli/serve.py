"""`octavo serve MODEL`: the model behind the OpenAI API."""

from __future__ import annotations

import ipaddress
import os
import re
from typing import Annotated

import typer

import octavo
from octavo.cli import options
from octavo.config import parse_bytes
from octavo.engine.defaults import MAX_NUM_BATCHED_TOKENS
from octavo.errors import ConfigError, OctavoError

SERVED_NUM_SEQS = 64  # a caller's own engine takes fewer on a CPU
KEYS_VARIABLE = "OCTAVO_API_KEY"
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
# As browsers send it: no path, small letters; `null` is a page's that was opened from a file.
_ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^/\sA-Z]+")


def serve(
    model: options.Model,
    host: Annotated[
        str | None,
        typer.Option(help="Address to listen on. [127.0.0.1; with an API key 0.0.0.0]"),
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            "--api-key", "--api_key",
            help=f"Lets its bearer in; may be repeated. Also ${KEYS_VARIABLE}, with commas.",
        ),
    ] = None,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(
            "--served-model-name", "--served_model_name",
            help="What clients call the model; may be repeated. [MODEL]",
        ),
    ] = None,
    allowed_origins: Annotated[
        list[str] | None,
        typer.Option(
            "--allowed-origins", "--allowed_origins",
            help="A web origin whose pages may call the server, or *; may be repeated.",
        ),
    ] = None,
    tokenizer: options.TokenizerFile = None,
    tokenizer_mode: options.TokenizerMode = "auto",
    config_format: options.ConfigFormat = "auto",
    load_format: options.LoadFormat = "auto",
    max_model_len: options.MaxModelLen = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    attention_pattern: options.Pattern = None,
    max_num_seqs: Annotated[
        int, typer.Option("--max-num-seqs", "--max_num_seqs", help="Answers in the making at once.")
    ] = SERVED_NUM_SEQS,
    max_num_batched_tokens: Annotated[
        int,
        typer.Option(
            "--max-num-batched-tokens", "--max_num_batched_tokens", help="Tokens in one pass."
        ),
    ] = MAX_NUM_BATCHED_TOKENS,
    memory: options.Memory = None,
    kv_cache_dtype: options.KvCacheDtype = "auto",
    prefix_caching: Annotated[
        bool,
        typer.Option(
            "--enable-prefix-caching/--no-enable-prefix-caching",
            help="Compute prompts that begin alike once.",
        ),
    ] = True,
    prompt_lookup: Annotated[
        bool,
        typer.Option(
            "--prompt-lookup/--no-prompt-lookup",
            help="Guess tokens from the text before them; the answers are the same.",
        ),
    ] = True,
    tensor_parallel: Annotated[
        int,
        typer.Option(
            "--tensor-parallel", "--tensor_parallel", "--tensor-parallel-size",
            "--tensor_parallel_size", min=1, help="Taken, and comes later: one device for now.",
        ),
    ] = 1,
    max_queue: Annotated[
        int, typer.Option("--max-queue", "--max_queue", min=0, help="Waiting answers before 429.")
    ] = 512,
    max_n: Annotated[
        int, typer.Option("--max-n", "--max_n", min=1, help="Answers to one prompt.")
    ] = 16,
    max_stop: Annotated[
        int, typer.Option("--max-stop", "--max_stop", min=0, help="Stop strings in a request.")
    ] = 16,
    max_body: Annotated[
        str, typer.Option("--max-body", "--max_body", help="Bytes of a request: 8m.")
    ] = "8m",
    request_timeout: Annotated[
        float,
        typer.Option("--request-timeout", "--request_timeout", min=0.001, help="Seconds."),
    ] = 600.0,
    drain_timeout: Annotated[
        float,
        typer.Option(
            "--drain-timeout", "--drain_timeout", min=0,
            help="Seconds that running answers have after SIGTERM.",
        ),
    ] = 60.0,
) -> None:  # fmt: skip
    """Serve a model behind the OpenAI API."""
    try:
        from octavo.engine.decode_graph import DecodeGraphs
        from octavo.serve.server import listen
        from octavo.serve.server import serve as run
        from octavo.serve.settings import Settings
    except ImportError as error:
        raise OctavoError(f"serve needs {error.name}; install octavo[serve]") from None
    if tensor_parallel > 1:
        print(f"octavo: --tensor_parallel={tensor_parallel} comes later; serving on one device")
    keys = _keys(api_key)
    host = _host(host, keys)
    settings = Settings(
        model_names=_names(served_model_name) or (model,),
        api_keys=keys,
        allowed_hosts=None if keys else tuple(dict.fromkeys((*LOOPBACK, _in_header(host)))),
        allowed_origins=_origins(allowed_origins),
        max_body_bytes=parse_bytes(max_body, "--max-body"),
        max_n=max_n,
        max_stop=max_stop,
        max_queue=max_queue,
        request_timeout=request_timeout,
        drain_timeout=drain_timeout,
    )
    listener = listen(host, port)
    address = f"http://{_in_header(host)}:{listener.getsockname()[1]}"

    def load() -> octavo.LLM:
        print(f"octavo: loading {model}", flush=True)
        llm = options.load(
            model,
            tokenizer,
            tokenizer_mode,
            config_format,
            load_format,
            max_model_len,
            device,
            dtype,
            attention_pattern,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            memory=memory,
            kv_cache_dtype=kv_cache_dtype,
            enable_prefix_caching=prefix_caching,
            prompt_lookup=prompt_lookup,
        )
        print(f"octavo: {llm.engine.plan.describe()}", flush=True)
        if isinstance(llm.engine.decode, DecodeGraphs):
            print("octavo: trying prompts, and capturing decode steps as CUDA graphs", flush=True)
            llm.engine.warm_up()
        return llm

    def announce() -> None:
        print(f"octavo: serving {', '.join(settings.model_names)} at {address}/v1", flush=True)
        print(f"octavo: {address}/docs describes the API", flush=True)

    if not keys:
        print(f"octavo: no --api-key, so only this machine can connect ({host})")
    run(settings, listener, load, announce)


def _keys(given: list[str] | None) -> tuple[str, ...]:
    """The keys of the flag and of the environment.

    Raises:
        ConfigError: an empty one, or one that cannot stand in a header.
    """
    keys = [*(given or ()), *filter(None, os.environ.get(KEYS_VARIABLE, "").split(","))]
    for key in keys:
        if not (key.isascii() and key.isprintable() and key.strip() == key and key):
            raise ConfigError("--api-key: a key is one or more printable ASCII characters")
    return tuple(keys)


def _names(given: list[str] | None) -> tuple[str, ...]:
    """What clients call the model.

    Raises:
        ConfigError: an empty one.
    """
    if not all(name.strip() for name in given or ()):
        raise ConfigError("--served-model-name: a name is one or more characters")
    return tuple(given or ())


def _origins(given: list[str] | None) -> tuple[str, ...]:
    """The web origins whose pages may call the server.

    Raises:
        ConfigError: one that no browser sends.
    """
    for origin in given or ():
        if not _ORIGIN.fullmatch(origin):
            raise ConfigError(
                f"--allowed-origins: {origin!r} is no origin; give scheme and host in small "
                "letters, such as https://page.example, or *"
            )
    return tuple(given or ())


def _host(given: str | None, keys: tuple[str, ...]) -> str:
    """Where to listen: this machine only, unless clients need a key.

    Raises:
        ConfigError: an address that others can reach, without a key.
    """
    if given is None:
        return "0.0.0.0" if keys else "127.0.0.1"
    if not keys and not _is_loopback(given):
        raise ConfigError(
            f"--host: {given} would let anyone in; set --api-key (or {KEYS_VARIABLE}), or listen "
            "on 127.0.0.1"
        )
    return given


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _in_header(host: str) -> str:
    """A host as URLs and Host headers write it."""
    return f"[{host}]" if ":" in host else host
