"""Arguments and options that several commands share, and the model they describe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import octavo
from octavo.config import parse_size

Model = Annotated[str, typer.Argument(help="A folder, a hub id, or `demo`.", show_default=False)]
TokenizerFile = Annotated[
    Path | None, typer.Option("--tokenizer", help="Tokenizer file, in place of the model's own.")
]
TokenizerMode = Annotated[
    str, typer.Option("--tokenizer-mode", "--tokenizer_mode", help="auto or mistral.")
]
ConfigFormat = Annotated[
    str, typer.Option("--config-format", "--config_format", help="auto, mistral or hf.")
]
LoadFormat = Annotated[
    str, typer.Option("--load-format", "--load_format", help="auto, mistral or hf.")
]
MaxModelLen = Annotated[
    str | None,
    typer.Option(
        "--max-model-len", "--max_model_len", help="Tokens of prompt and answer: 32768 or 32k."
    ),
]
Device = Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda or cuda:1.")]
Dtype = Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")]
Pattern = Annotated[
    str | None,
    typer.Option(
        "--attention-pattern", help="Windows that repeat over the layers: 128k,32k,32k,32k."
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(
        help="Of the device, for weights, KV cache and all else: 16G. [most of what is free]"
    ),
]
KvCacheDtype = Annotated[
    str,
    typer.Option(
        "--kv-cache-dtype", "--kv_cache_dtype", help="Of keys and values: auto, bf16 or int8."
    ),
]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token.")]
TopP = Annotated[float, typer.Option("--top-p", "--top_p", help="Nucleus sampling.")]
Seed = Annotated[int | None, typer.Option(help="Makes sampling repeatable.")]


def load(
    model: str,
    tokenizer: Path | None,
    tokenizer_mode: str,
    config_format: str,
    load_format: str,
    max_model_len: str | None,
    device: str,
    dtype: str,
    attention_pattern: str | None,
    **further: Any,
) -> octavo.LLM:
    """The model that these options describe; `further` are options of `LLM` as it names them."""
    return octavo.LLM(
        model,
        tokenizer=tokenizer,
        tokenizer_mode=tokenizer_mode,
        config_format=config_format,
        load_format=load_format,
        max_model_len=parse_size(max_model_len, "--max-model-len") if max_model_len else None,
        device=device,
        dtype=dtype,
        attention_pattern=attention_pattern,
        **further,
    )
