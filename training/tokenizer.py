"""Cut Mistral's Tekken vocabulary down to the bundled model's size."""

from __future__ import annotations

import json
from pathlib import Path

import mistral_common
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from octavo.checkpoint import DEMO

VOCAB_SIZE = 2048
SPECIAL_TOKENS = 64


def cut_tokenizer(
    target: Path, vocab_size: int = VOCAB_SIZE, special: int = SPECIAL_TOKENS
) -> None:
    """Write mistral-common's own V3-Tekken file with only its first merges to `target`.

    Tekken lists its tokens in the order in which they were merged, so a prefix of the list is
    again a valid byte-pair vocabulary; pattern and templates stay those of Ministral-8B.
    """
    source = Path(mistral_common.__file__).parent / "data" / "tekken_240718.json"
    data = json.loads(source.read_text())
    data["vocab"] = data["vocab"][: vocab_size - special]
    data["config"]["num_vocab_tokens"] = vocab_size - special
    data["config"]["default_vocab_size"] = vocab_size
    data["config"]["default_num_special_tokens"] = special
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(data, ensure_ascii=False))


def load_tokenizer(path: Path = DEMO / "tekken.json") -> MistralTokenizer:
    """The cut tokenizer, made first where it is missing."""
    if not path.exists():
        cut_tokenizer(path)
    return MistralTokenizer.from_file(str(path))


if __name__ == "__main__":
    cut_tokenizer(DEMO / "tekken.json")
