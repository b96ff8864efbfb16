"""From process start to first token of octavo, with the checkpoint that vLLM loads.

`octavo bench` makes its weights; this reads them from disk, as its peers do.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from octavo.model import Transformer
from octavo.version import __version__


def main() -> None:
    """Load, read one prompt, choose a token, write when that was."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--kv", default="auto", help="dtype of the KV cache")
    options = parser.parse_args()
    model = Transformer.from_folder(options.model)
    prompt = torch.randint(model.config.vocab_size, (options.prompt,))
    with torch.inference_mode():
        caches = model.new_caches(1, options.prompt + 1, options.kv)
        hidden = model.hidden(prompt, [options.prompt], caches, n_outputs=[1])
        token = int(model.logits(hidden).argmax())
    first = {"version": __version__, "first_token_at": time.time(), "token": token}
    options.out.write_text(json.dumps(first), encoding="utf-8")


if __name__ == "__main__":
    main()
