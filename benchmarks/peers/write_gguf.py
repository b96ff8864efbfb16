"""Write a GGUF in Q8_0 with random weights, for llama.cpp; needs only `gguf`.

Q8_0 has a half-precision scale for every 32 weights of a row: 34 bytes, the scale first.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np

BLOCK = 32  # weights that share a scale
SCALE = 2e-4  # times numbers from -127 to 127: activations keep about their size


def main() -> None:
    """Read a shape as Mistral's params.json says it, write the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("params", type=Path, help="params.json of the shape")
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    params = json.loads(options.params.read_text(encoding="utf-8"))
    part = options.out.with_name(f"{options.out.name}.part")
    write(params, part)
    part.replace(options.out)


def write(params: dict[str, Any], path: Path) -> None:
    """The whole file. llama.cpp's `llama` has no window for a layer: all layers are full."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(params["max_seq_len"])
    writer.add_embedding_length(params["dim"])
    writer.add_block_count(params["n_layers"])
    writer.add_feed_forward_length(params["hidden_dim"])
    writer.add_head_count(params["n_heads"])
    writer.add_head_count_kv(params["n_kv_heads"])
    writer.add_key_length(params["head_dim"])
    writer.add_value_length(params["head_dim"])
    writer.add_rope_dimension_count(params["head_dim"])
    writer.add_rope_freq_base(params["rope_theta"])
    writer.add_layer_norm_rms_eps(params["norm_eps"])
    writer.add_vocab_size(params["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_string("tokenizer.ggml.model", "no_vocab")
    random = np.random.default_rng(0)
    for name, (rows, columns) in shapes(params).items():
        writer.add_tensor(
            f"{name}.weight", q8_0(random, rows, columns),
            raw_dtype=gguf.GGMLQuantizationType.Q8_0,
        )  # fmt: skip
    norms = ["output_norm"]
    for i in range(params["n_layers"]):
        norms += [f"blk.{i}.attn_norm", f"blk.{i}.ffn_norm"]
    for name in norms:
        writer.add_tensor(f"{name}.weight", np.ones(params["dim"], dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def shapes(params: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Rows and columns of every matrix, by llama.cpp's names."""
    dim, hidden = params["dim"], params["hidden_dim"]
    q, kv = params["n_heads"] * params["head_dim"], params["n_kv_heads"] * params["head_dim"]
    matrices = {"token_embd": (params["vocab_size"], dim), "output": (params["vocab_size"], dim)}
    for i in range(params["n_layers"]):
        matrices |= {
            f"blk.{i}.attn_q": (q, dim),
            f"blk.{i}.attn_k": (kv, dim),
            f"blk.{i}.attn_v": (kv, dim),
            f"blk.{i}.attn_output": (dim, q),
            f"blk.{i}.ffn_gate": (hidden, dim),
            f"blk.{i}.ffn_up": (hidden, dim),
            f"blk.{i}.ffn_down": (dim, hidden),
        }
    return matrices


def q8_0(random: np.random.Generator, rows: int, columns: int) -> Any:
    """[rows, columns / 32 * 34] uint8."""
    n_blocks = rows * columns // BLOCK
    scale = np.full((n_blocks, 1), SCALE, dtype=np.float16).view(np.uint8)
    numbers = random.integers(-127, 128, (n_blocks, BLOCK), dtype=np.int8).view(np.uint8)
    return np.concatenate([scale, numbers], axis=1).reshape(rows, columns // BLOCK * (BLOCK + 2))


if __name__ == "__main__":
    main()
