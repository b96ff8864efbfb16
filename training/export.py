"""Write the bundled model's folder from the last checkpoint: `python -m training.export`."""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from octavo.checkpoint import DEMO
from octavo.evaluate.passkey import ANSWER, passkey_prompt
from octavo.quantize.calibration import OWN_CALIBRATION
from training.calibration import calibration_records, chat_record, write_jsonl
from training.data.chat import Chat, ChatEncoder, ask
from training.data.documentation import documents
from training.data.heldout import CARD_KEY
from training.data.letters import make_letters
from training.data.passkey import make_key
from training.data.pools import held_out_words
from training.data.stories import make_story
from training.data.sums import make_sum
from training.data.tools import make_tool_answer, make_tool_call
from training.model import ModelConfig
from training.tokenizer import cut_tokenizer, load_tokenizer

HELD_OUT_BYTES = 250_000
EXAMPLE_TOKENS = 4_000
PROSE_CHARACTERS = 4_000


def held_out_records(encoder: ChatEncoder, seed: int = 11) -> list[dict[str, Any]]:
    """Texts and complete chats which training never saw, tasks in turn."""
    rng = random.Random(seed)
    words, texts = held_out_words(encoder), documents(unseen=True)
    rng.shuffle(texts)

    def passkey() -> Chat:
        key = make_key(rng, unseen=True)
        prompt = passkey_prompt(
            rng.choice((300, 600, 1000)), rng.random(), key, count_tokens=counter(encoder)
        )
        return ask(prompt, ANSWER.format(key=key))

    records: list[dict[str, Any]] = []
    for number in range(16):
        records += [{"text": make_story(rng)} for _ in range(2)]
        records += [
            {"text": text[:PROSE_CHARACTERS]} for text in texts[2 * number : 2 * number + 2]
        ]
        records += [chat_record(make_sum(rng, True)), chat_record(make_letters(rng, words, True))]
        records += [
            chat_record(make_tool_call(rng, True)),
            chat_record(make_tool_answer(rng, True)),
        ]
        records += [chat_record(passkey())]
    return records


def counter(encoder: ChatEncoder) -> Callable[[str], int]:
    """How many tokens a text has, remembered for sentences that repeat."""
    known: dict[str, int] = {}

    def count(text: str) -> int:
        if text not in known:
            known[text] = len(encoder.text(text))
        return known[text]

    return count


def main() -> None:
    """Tokenizer, configuration, weights in bf16, example prompt, held-out and calibration texts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path(__file__).parent / "work")
    parser.add_argument("--to", type=Path, default=DEMO)
    parser.add_argument(
        "--calibration-only", action="store_true", help=f"write {OWN_CALIBRATION} and nothing else"
    )
    options = parser.parse_args()
    target: Path = options.to
    target.mkdir(parents=True, exist_ok=True)
    if not (target / "tekken.json").exists():
        cut_tokenizer(target / "tekken.json")
    encoder = ChatEncoder(load_tokenizer(target / "tekken.json"))
    write_jsonl(target / OWN_CALIBRATION, calibration_records(encoder, counter(encoder)))
    if options.calibration_only:
        return
    (target / "params.json").write_text(json.dumps(asdict(ModelConfig()), indent=2) + "\n")

    checkpoint = options.work / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        tensors = {name: t.to(torch.bfloat16).contiguous() for name, t in state["model"].items()}
        save_file(tensors, target / "consolidated.safetensors", metadata={"format": "pt"})
        (target / "consolidated.safetensors").chmod(0o644)  # safetensors writes for its owner only
        print(
            f"weights of step {state['step']}, {state['tokens']:,} tokens, {state['spent']:.0f} s"
        )

    prompt = passkey_prompt(EXAMPLE_TOKENS, 0.4, CARD_KEY, count_tokens=counter(encoder))
    example = {"messages": [{"role": "user", "content": prompt}]}
    (target / "passkey_example.json").write_text(json.dumps(example, indent=2) + "\n")

    with open(target / "held_out.jsonl", "w") as file:
        for record in held_out_records(encoder):
            line = json.dumps(record, ensure_ascii=False) + "\n"
            if file.tell() + len(line.encode()) <= HELD_OUT_BYTES:
                file.write(line)


if __name__ == "__main__":
    main()
