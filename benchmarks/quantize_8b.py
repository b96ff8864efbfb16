"""What quantising the 8B takes: a few layers of its shape, random weights, extrapolated to 36.

    python -m benchmarks.quantize_8b --layers 2 --samples 128 --length 512

Time and memory do not depend on the weights' values. The checkpoint (0.39 GB a layer, and 2.15 GB
for embedding and head) and the activations lie in a temporary folder, whose place TMPDIR chooses.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import mistral_common
import torch
from safetensors.torch import save_file

from benchmarks.common import make_parser
from benchmarks.figures import write_figures
from octavo.checkpoint import DEMO
from octavo.checkpoint.ministral import MINISTRAL_8B
from octavo.checkpoint.writer import mistral_params, write_json
from octavo.config import ModelConfig
from octavo.quantize.quantize import quantize
from octavo.tokenizer import Tokenizer

N_LAYERS = MINISTRAL_8B.n_layers


def main() -> None:
    """Write, quantise, extrapolate."""
    parser = make_parser(__doc__)
    parser.add_argument("--layers", type=int, default=2, help="of the 36")
    parser.add_argument("--samples", type=int, default=128, help="calibration texts")
    parser.add_argument("--length", type=int, default=512, help="tokens of each")
    parser.add_argument("--scheme", default="W8A8", help="of the output")
    parser.add_argument("--dtype", default="auto", help="of the computation")
    parser.add_argument("--max-memory", default="8G", help="as octavo quantize has it")
    options = parser.parse_args()
    started: dict[int, float] = {}

    def on_progress(done: float, total: int) -> None:
        if int(done) not in started:
            started[int(done)] = time.perf_counter()
            print(f"step {int(done)} of {total}", flush=True)

    with tempfile.TemporaryDirectory() as temporary:
        model, texts = Path(temporary) / "model", Path(temporary) / "texts.jsonl"
        windows = MINISTRAL_8B.windows[-options.layers :]
        write_model(model, replace(MINISTRAL_8B, n_layers=options.layers, windows=windows))
        write_texts(texts, Tokenizer.from_folder(model), 2 * options.samples, options.length)
        report = quantize(
            model,
            dataset_id=texts,
            num_calibration_samples=options.samples,
            max_sequence_length=options.length,
            scheme=options.scheme,
            output_dir=Path(temporary) / "quantised",
            sample_prompt=None,
            dtype=options.dtype,
            max_memory=options.max_memory,
            on_progress=on_progress,
        )
    layer = (started[options.layers + 1] - started[1]) / options.layers
    rest = report.seconds - layer * options.layers
    result: dict[str, Any] = {
        "layers": options.layers,
        "calibration_tokens": report.calibration_tokens,
        "held_out_tokens": report.held_out_tokens,
        "computed_in": report.settings["dtype"],
        "scheme": options.scheme,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "seconds_a_layer": layer,
        "seconds_embedding_and_head": rest,
        "hours_extrapolated_to_36_layers": (layer * N_LAYERS + rest) / 3600,
        "peak_rss_bytes": report.peak_rss_bytes,
    }
    print(json.dumps(result, indent=2))
    write_figures(result, options.json)


def write_model(folder: Path, config: ModelConfig) -> None:
    """A checkpoint of random bf16 weights in Mistral's layout, with the real V3-Tekken."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)

    parts: list[dict[str, torch.Tensor]] = []
    for i in range(config.n_layers):
        names = [name for name in config.linear_names() if name.startswith(f"layers.{i}.")]
        layer = {f"{name}.weight": normal(*config.linear_shape(name)) for name in names}
        for norm in ("attention_norm", "ffn_norm"):
            layer[f"layers.{i}.{norm}.weight"] = torch.ones(config.dim, dtype=torch.bfloat16)
        parts.append(layer)
    parts.append(
        {
            "tok_embeddings.weight": normal(config.vocab_size, config.dim),
            "norm.weight": torch.ones(config.dim, dtype=torch.bfloat16),
            "output.weight": normal(config.vocab_size, config.dim),
        }
    )
    for i, tensors in enumerate(parts, 1):
        save_file(tensors, folder / f"consolidated-{i:05}-of-{len(parts):05}.safetensors")
    write_json(folder / "params.json", mistral_params(config))
    tekken = Path(mistral_common.__file__).parent / "data" / "tekken_240718.json"
    shutil.copyfile(tekken, folder / "tekken.json")


def write_texts(path: Path, tokenizer: Tokenizer, count: int, length: int) -> None:
    """Texts of at least `length` tokens each: the bundled model's, joined and begun elsewhere."""
    lines = (DEMO / "calibration.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [record["text"] for record in map(json.loads, lines) if "text" in record]
    with path.open("w", encoding="utf-8") as file:
        for i in range(count):
            text, at = "", i
            while len(tokenizer.encode(text)) < length:
                text += texts[at % len(texts)] + "\n\n"
                at += 1
            file.write(json.dumps({"text": text}) + "\n")


if __name__ == "__main__":
    main()
