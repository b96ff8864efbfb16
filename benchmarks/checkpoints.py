"""Random checkpoints of one shape for octavo and its peers, made once and used again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from octavo.bench.random_model import DTYPE, random_state
from octavo.bench.shapes import find_shape, quantised
from octavo.checkpoint import huggingface, mistral, writer
from octavo.config import ModelConfig

GGUF_SCRIPT = Path(__file__).parent / "peers" / "write_gguf.py"


def w8a8_folder(work: Path, shape: str, layers: int) -> Path:
    """A folder in compressed-tensors' W8A8 with a bf16 head, which octavo and vLLM read."""
    folder = work / f"{shape}-{layers}-w8a8"
    if (folder / huggingface.CONFIG).is_file():
        return folder
    print(f"writing {folder}", file=sys.stderr, flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_w8a8(folder, quantised(find_shape(shape, layers), "w8a8", "bf16"))
    return folder


def write_w8a8(folder: Path, config: ModelConfig) -> None:
    """The checkpoint; its config comes last, and makes it one."""
    state = {
        # On disk a scale is [N, 1].
        name: tensor[:, None] if name.endswith("weight_scale") else tensor
        for name, tensor in random_state(config).items()
    }
    writer.write_shard(folder / writer.shard_name(1, 1), state)
    writer.write_index(folder)
    special_ids = {"bos_token_id": 1, "eos_token_id": 2}
    writer.write_config(folder, config, DTYPE, ["lm_head"], special_ids)
    (folder / mistral.PARAMS).unlink()  # vLLM would take the folder for one in Mistral's format
    path = folder / huggingface.CONFIG
    fields = json.loads(path.read_text(encoding="utf-8"))
    # vLLM runs the type `ministral` by transformers' model and `mistral` by its own, which knows
    # `layer_types` as well.
    fields |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    writer.write_json(path, fields)


def q8_file(work: Path, shape: str, layers: int, python: str) -> Path:
    """A GGUF in Q8_0, written by the `gguf` of llama.cpp's environment."""
    path = work / f"{shape}-{layers}-q8_0.gguf"
    if path.is_file():
        return path
    print(f"writing {path}", file=sys.stderr, flush=True)
    work.mkdir(parents=True, exist_ok=True)
    params = work / f"{shape}-{layers}-params.json"
    writer.write_json(params, writer.mistral_params(find_shape(shape, layers)))
    subprocess.run([python, GGUF_SCRIPT, params, path], check=True)
    return path
