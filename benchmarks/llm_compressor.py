"""What an llm-compressor W8A8 checkpoint loses in its own runtime, and what it loses in octavo.

llm-compressor quantises a model as the model card's script does (SmoothQuant 0.8, then GPTQ with a
dampening of 0.1, all linears but the head) and saves it. The same folder is then run by
transformers with compressed-tensors and by octavo, and each is measured by the KL divergence of its
next-token distributions from those of the unquantised model in fp32, mean over tokens of held-out
text.

llm-compressor has its own demands on the versions of torch and transformers, so give it an
environment of its own:

    python3 -m venv build/llm-compressor
    build/llm-compressor/bin/pip install torch==2.13.0 llmcompressor
    build/llm-compressor/bin/pip install --editable .
    build/llm-compressor/bin/python -m benchmarks.llm_compressor
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
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

from benchmarks import common
from benchmarks.figures import write_figures
from octavo import Transformer
from octavo.checkpoint import open_checkpoint, resolve_model
from octavo.evaluate.divergence import kl_divergence

SMOOTHING_STRENGTH = 0.8
DAMPENING_FRAC = 0.1
IGNORE = ["lm_head"]
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
    samples = common.samples_of(source, options.samples, options.text)
    with tempfile.TemporaryDirectory() as temporary:
        folder: Path = options.output or Path(temporary) / "W8A8"
        unquantised = Path(temporary) / "unquantised"
        common.write_unquantised(checkpoint, checkpoint.load(), unquantised)
        quantize(unquantised, samples.calibration, folder)
        rows = [measure(unquantised, folder, samples.held_out, name) for name in DTYPES]
    result = common.conditions(samples) | {"model": options.model, "rows": rows}
    common.print_table(
        f"{options.model}, W8A8 by llm-compressor: KL from the original in fp32, nats a token",
        result,
        [{name: f"{v:.3g}" if name != "dtype" else v for name, v in row.items()} for row in rows],
    )
    write_figures(result, options.json)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = common.make_parser(__doc__)
    common.add_model(parser)
    parser.add_argument("--text", help="JSONL or dataset to calibrate on, in place of the model's")
    parser.add_argument("--output", type=Path, help="where to keep the quantised checkpoint")
    options = parser.parse_args()
    if options.output and options.output.exists() and any(options.output.iterdir()):
        parser.error(f"--output: {options.output} is not empty")
    return options


def load_with_transformers(folder: Path, dtype: torch.dtype | str) -> Any:
    """The model in transformers; octavo's attention is held to this one."""
    auto: Any = transformers.AutoModelForCausalLM
    return auto.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


def quantize(
    unquantised: Path,
    calibration: Sequence[list[int]],
    folder: Path,
    dtype: str = "auto",
    scheme: str = "W8A8",
) -> None:
    """A Hugging Face folder, quantised by llm-compressor in `dtype` and saved to `folder`."""
    model = load_with_transformers(unquantised, dtype)
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
        max_seq_length=common.MAX_LENGTH,
        num_calibration_samples=len(calibration),
    )
    model.save_pretrained(folder, save_compressed=True)


@torch.inference_mode()
def measure(
    unquantised: Path, folder: Path, sequences: Sequence[list[int]], dtype_name: str
) -> Row:
    """What both runtimes lose when they compute in this dtype, in nats a token."""
    dtype = DTYPES[dtype_name]
    exact = with_transformers(unquantised, torch.float32)
    model = Transformer.from_folder(folder, dtype=dtype)
    if model.config.windows != open_checkpoint(unquantised).config.windows:
        raise SystemExit(f"{folder}: octavo reads the windows {model.config.windows}")
    runs: dict[str, Logits] = {
        "unquantised": with_transformers(unquantised, dtype),
        "compressed-tensors": with_transformers(folder, dtype),
        "octavo": lambda ids: model(ids, [len(ids)]),
    }
    totals = dict.fromkeys([*runs, "between"], 0.0)
    for sequence in sequences:
        ids = torch.tensor(sequence)
        reference = exact(ids)
        logits = {name: run(ids) for name, run in runs.items()}
        for name, rows in logits.items():
            totals[name] += float(kl_divergence(reference, rows).sum())
        between = kl_divergence(logits["compressed-tensors"], logits["octavo"])
        totals["between"] += float(between.sum())
    n_tokens = sum(map(len, sequences))
    row: Row = {"dtype": dtype_name} | {name: total / n_tokens for name, total in totals.items()}
    row["octavo / compressed-tensors"] = row["octavo"] / row["compressed-tensors"]
    return row


def with_transformers(folder: Path, dtype: torch.dtype) -> Logits:
    """The logits of a folder in transformers, without a cache."""
    model = load_with_transformers(folder, dtype)
    return lambda ids: model(ids[None], use_cache=False).logits[0].float()


if __name__ == "__main__":
    main()
