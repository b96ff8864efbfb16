"""What an operator may set about a server; each has a flag of `octavo serve`."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1024 * 1024


@dataclass(frozen=True)
class Settings:
    """Names, keys and limits of one server.

    Attributes:
        model_names: names that clients may ask for; the first is what answers carry.
        api_keys: any of them lets a client in; none lets everybody in.
        allowed_hosts: values of the Host header that are answered; None is any. On a machine's own
            address, without a key, this keeps a web page from reaching the server by a DNS name
            that it has pointed there.
        allowed_origins: web origins whose pages may call the server (CORS); `*` is any.
        max_body_bytes: of one request.
        max_n: answers to one prompt.
        max_prompts: prompts in one completion request.
        max_stop: stop strings, or stop token ids.
        max_logprobs: likeliest tokens reported a step.
        max_tools: tools in one request.
        max_schema_length, max_schema_depth: characters and levels of one JSON schema; a property
            costs two levels.
        max_queue: answers that may wait while `max_num_seqs` run; past it, 429.
        request_timeout: seconds from arrival to the last token; past it, 504.
        drain_timeout: seconds that running answers have after SIGTERM.
    """

    model_names: tuple[str, ...]
    api_keys: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] | None = None
    allowed_origins: tuple[str, ...] = ()
    max_body_bytes: int = 8 * MIB
    max_n: int = 16
    max_prompts: int = 128
    max_stop: int = 16
    max_logprobs: int = 20
    max_tools: int = 128
    max_schema_length: int = 64 * 1024
    max_schema_depth: int = 32
    max_queue: int = 512
    request_timeout: float = 600.0
    drain_timeout: float = 60.0
