"""What an llm-compressor W8A8 checkpoint loses in its own runtime, and what it loses in octavo.

llm-compressor quantises a model as the model card's script does (SmoothQuant 0.8, then GPTQ with a
dampening of 0.1, all linears but the head) and saves it. The same folder is then run by
transformers with compressed-tensors and by octavo, and each is measured by the KL divergence of its
next-token distributions from those of the unquantised model in fp32, mean over tokens of held-out
text. Calibration and measurement take different halves of that text.

llm-compressor has its own demands on the versions of torch and transformers, so give it an
environment of its own:

    python3 -m venv build/llm-compressor
    build/llm-compressor/bin/pip install llmcompressor
    build/llm-compressor/bin/pip install --editable .
    build/llm-compressor/bin/python benchmarks/llm_compressor.py
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from torch import Tensor

from octavo import Transformer
from octavo.checkpoint import Checkpoint, open_checkpoint, resolve_model
from octavo.checkpoint.huggingface import module_name
from octavo.config import ModelConfig
from octavo.tokenizer import Tokenizer

SMOOTHING_STRENGTH = 0.8
DAMPENING_FRAC = 0.1
IGNORE = ["lm_head"]
N_RANDOM, RANDOM_LENGTH = 64, 512  # sequences and tokens each, where there is no text
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# llm-compressor insists on a tokenizer, and never asks it anything where the data are tokens.
UNUSED_TOKENIZER = transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0}, "[UNK]"))
)

Logits = Callable[[Tensor], Tensor]  # [T] ids to [T, vocab_size] fp32
Row = dict[str, Any]


def main() -> None:
    """Quantise, measure, print a table."""
    options = parse_arguments()
    source = resolve_model(options.model)
    checkpoint = open_checkpoint(source)
    calibration, measured = read_sequences(source, checkpoint.config, options)
    with tempfile.TemporaryDirectory() as temporary:
        folder: Path = options.output or Path(temporary) / "W8A8"
        unquantised = Path(temporary) / "unquantised"
        to_transformers(checkpoint, checkpoint.dtype).save_pretrained(unquantised)
        quantize(unquantised, calibration, folder, options.max_length)
        rows = [measure(checkpoint, folder, measured, name) for name in DTYPES]
    result = {
        "model": str(options.model),
        "calibration_tokens": sum(map(len, calibration)),
        "measured_tokens": sum(map(len, measured)),
        "versions": {
            name: version(name)
            for name in ("llmcompressor", "compressed-tensors", "transformers", "torch", "octavo")
        },
        "rows": rows,
    }
    print_table(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", default="demo", help="folder, hub id or `demo`, unquantised")
    parser.add_argument(
        "--text",
        type=Path,
        help="JSON lines of `text` or `messages` (and `tools`); "
        "without it the model's held_out.jsonl, or random tokens where it has none",
    )
    parser.add_argument("--max-length", type=int, default=2048, help="tokens of a sequence")
    parser.add_argument("--output", type=Path, help="where to keep the quantised checkpoint")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    parser.add_argument("--seed", type=int, default=0, help="of random tokens")
    options = parser.parse_args()
    if options.output and options.output.exists() and any(options.output.iterdir()):
        parser.error(f"--output: {options.output} is not empty")
    return options


def read_sequences(
    source: Path, config: ModelConfig, options: argparse.Namespace
) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of (calibration, measurement): the records at even and at odd places."""
    file: Path = options.text or source / "held_out.jsonl"
    if options.text is None and not file.is_file():
        print(f"{file}: not there; taking random tokens")
        generator = random.Random(options.seed)
        sequences = [
            generator.choices(range(config.vocab_size), k=min(RANDOM_LENGTH, options.max_length))
            for _ in range(N_RANDOM)
        ]
    else:
        tokenizer = Tokenizer.for_model(source, config)
        lines = file.read_text(encoding="utf-8").splitlines()
        sequences = [encode(tokenizer, json.loads(line))[: options.max_length] for line in lines]
    return sequences[::2], sequences[1::2]


def encode(tokenizer: Tokenizer, record: dict[str, Any]) -> list[int]:
    """Plain text, or a conversation with its last answer where that is text."""
    if "text" in record:
        return tokenizer.encode(record["text"])
    messages = list(record["messages"])
    answer = messages.pop() if messages[-1]["role"] == "assistant" else {}
    prompt = tokenizer.encode_chat(messages, record.get("tools"))
    if not answer.get("content"):
        return prompt
    return [*prompt, *tokenizer.encode(answer["content"], bos=False), tokenizer.eos_id]


def to_transformers(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """The unquantised model as transformers' `MinistralForCausalLM`."""
    config = checkpoint.config
    if config.quantization is not None:
        raise SystemExit(f"--model: {checkpoint.folder} is quantised already; give its original")
    windows = {w for w in config.windows if w is not None}
    if len(windows) > 1:
        raise SystemExit(f"--model: transformers runs one size of window, not {sorted(windows)}")
    model = transformers.MinistralForCausalLM._from_config(
        transformers.MinistralConfig(
            hidden_size=config.dim,
            num_hidden_layers=config.n_layers,
            head_dim=config.head_dim,
            intermediate_size=config.hidden_dim,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads,
            vocab_size=config.vocab_size,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            max_position_embeddings=config.max_seq_len,
            tie_word_embeddings=config.tied_embeddings,
            sliding_window=windows.pop() if windows else config.max_seq_len,
            layer_types=[
                "full_attention" if w is None else "sliding_attention" for w in config.windows
            ],
        ),
        attn_implementation="eager",
    )
    state = {}
    for name, tensor in checkpoint.load(dtype).items():
        module, kind = name.rsplit(".", 1)
        state[f"{module_name(module)}.{kind}"] = tensor
    if config.tied_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True)
    return model.to(dtype).eval().requires_grad_(False)


def quantize(
    unquantised: Path,
    calibration: Sequence[list[int]],
    folder: Path,
    max_length: int,
    dtype: str = "auto",
    scheme: str = "W8A8",
) -> None:
    """A Hugging Face folder, quantised by llm-compressor in `dtype` and saved to `folder`."""
    auto: Any = transformers.AutoModelForCausalLM
    model = auto.from_pretrained(unquantised, dtype=dtype, attn_implementation="eager")
    data = Dataset.from_dict(
        {
            "input_ids": list(calibration),
            "attention_mask": [[1] * len(ids) for ids in calibration],
        }
    )
    oneshot(
        model=model,
        dataset=data,
        tokenizer=UNUSED_TOKENIZER,
        recipe=[
            SmoothQuantModifier(smoothing_strength=SMOOTHING_STRENGTH),
            GPTQModifier(
                targets="Linear", scheme=scheme, ignore=IGNORE, dampening_frac=DAMPENING_FRAC
            ),
        ],
        max_seq_length=max_length,
        num_calibration_samples=len(calibration),
    )
    model.save_pretrained(folder, save_compressed=True)


@torch.inference_mode()
def measure(
    checkpoint: Checkpoint, folder: Path, sequences: Sequence[list[int]], dtype_name: str
) -> Row:
    """What both runtimes lose when they compute in this dtype, in nats a token."""
    dtype = DTYPES[dtype_name]
    exact = with_transformers(to_transformers(checkpoint, torch.float32))
    unquantised = with_transformers(to_transformers(checkpoint, dtype))
    auto: Any = transformers.AutoModelForCausalLM
    compressed = with_transformers(
        auto.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
    )
    model = Transformer.from_folder(folder, dtype=dtype)
    if model.config.windows != checkpoint.config.windows:
        raise SystemExit(f"{folder}: octavo reads the windows {model.config.windows}")
    runs: dict[str, Logits] = {
        "unquantised": unquantised,
        "compressed_tensors": compressed,
        "octavo": lambda ids: model(ids, [len(ids)]),
    }
    totals = dict.fromkeys(runs, 0.0)
    between = 0.0
    n_tokens = 0
    for sequence in sequences:
        ids = torch.tensor(sequence)
        reference = exact(ids)
        logits = {name: run(ids) for name, run in runs.items()}
        for name, rows in logits.items():
            totals[name] += divergence(reference, rows)
        between += divergence(logits["compressed_tensors"], logits["octavo"])
        n_tokens += len(ids)
    row: Row = {"dtype": dtype_name} | {name: total / n_tokens for name, total in totals.items()}
    row["between"] = between / n_tokens
    row["ratio"] = row["octavo"] / row["compressed_tensors"]
    return row


def with_transformers(model: Any) -> Logits:
    """The model's logits without a cache."""
    return lambda ids: model(ids[None], use_cache=False).logits[0].float()


def divergence(reference: Tensor, logits: Tensor) -> float:
    """Sum over tokens of KL(reference ‖ logits), in nats."""
    p, q = reference.double().log_softmax(-1), logits.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum())


def print_table(result: dict[str, Any]) -> None:
    """The figures, for people."""
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    print(f"\n{result['model']}: W8A8 by llm-compressor ({versions})")
    print(
        f"calibrated on {result['calibration_tokens']:,} tokens, "
        f"measured on {result['measured_tokens']:,} others\n"
    )
    print("KL divergence from the unquantised model in fp32, nats a token:")
    columns = {
        "dtype": "computed in",
        "unquantised": "unquantised",
        "compressed_tensors": "compressed-tensors",
        "octavo": "octavo",
        "ratio": "octavo / compressed-tensors",
        "between": "compressed-tensors ‖ octavo",
    }
    print("| " + " | ".join(columns.values()) + " |")
    print("| " + " | ".join("---" for _ in columns) + " |")
    for row in result["rows"]:
        cells = [row[key] if key == "dtype" else f"{row[key]:.3g}" for key in columns]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
