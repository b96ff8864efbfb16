"""Train the bundled model: `python -m training.train`. Resumes from its last checkpoint."""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.data.batches import PASSKEY_TAIL, TASKS, Batch, Batches, Row, collate
from training.data.chat import ChatEncoder
from training.data.pools import load
from training.model import Ministral, ModelConfig, initialise
from training.probe import probe
from training.tokenizer import load_tokenizer

MUON_RATE, ADAM_RATE = 0.02, 0.004
WARMUP = 50
SHORT_MIX = {"sum": 0.3, "letters": 0.55, "smalltalk": 0.15}
MEDIUM_MIX = {"tool": 0.6, "answer": 0.15, "sum": 0.1, "letters": 0.15}
COMPILED_LENGTH = 512  # longer rows come in too many shapes to be worth compiling


@dataclass(frozen=True)
class Phase:
    """Until `end` (a share of all steps): how many rows of each kind a step has."""

    end: float
    passkey_pairs: int  # rows of two prompts of 128 tokens
    passkey_short: int  # rows of 256 tokens
    chats_short: int
    prose: int
    passkey_medium: int  # rows of 512 tokens
    chats_medium: int
    long: tuple[tuple[int, int, int], ...]  # (every so many steps, rows, length)
    weights: dict[str, float]


PHASES = (
    # Retrieval first: it needs many short prompts before anything shows.
    Phase(0.07, 8, 8, 10, 6, 2, 4, (), {"passkey": 2.0, "smalltalk": 0.2, "answer": 0.3}),
    # Then the other skills, and sharpness among many distractors.
    Phase(
        0.8, 1, 3, 13, 3, 2, 6, ((8, 2, 2048), (16, 1, 8192)),
        {"passkey": 2.0, "sum": 1.5, "letters": 3.0, "tool": 3.0, "smalltalk": 0.5, "answer": 1.5},
    ),
    Phase(
        1.0, 1, 3, 13, 3, 2, 6, ((8, 2, 2048), (8, 1, 8192), (16, 1, 16384)),
        {"passkey": 2.0, "sum": 1.5, "letters": 3.0, "tool": 3.0, "smalltalk": 0.5, "answer": 1.5},
    ),
)  # fmt: skip


def step_batches(batches: Batches, rng: random.Random, phase: Phase, step: int) -> list[Batch]:
    """The batches of one step: a short one, a medium one, sometimes long passkey prompts."""
    short: list[Row] = [batches.passkey(rng, 256, 2) for _ in range(phase.passkey_pairs)]
    short += [batches.passkey(rng, 256) for _ in range(phase.passkey_short)]
    short += [batches.chats(rng, 256, SHORT_MIX) for _ in range(phase.chats_short)]
    short += [batches.prose(rng, 256) for _ in range(phase.prose)]
    medium = [batches.passkey(rng, 512) for _ in range(phase.passkey_medium)]
    medium += [batches.chats(rng, 512, MEDIUM_MIX) for _ in range(phase.chats_medium)]
    # Sums and letters only fill what tools leave of the medium rows.
    found = [
        collate(short, phase.weights),
        collate(medium, {**phase.weights, "sum": 0.3, "letters": 0.5}),
    ]
    for number, (every, count, length) in enumerate(phase.long):
        if (step + number) % every == 0:
            rows = [batches.passkey(rng, length) for _ in range(count)]
            found.append(collate(rows, phase.weights, PASSKEY_TAIL))
    return found


def losses(model: nn.Module, output: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy [N] of the learnt tokens, their weights [N] and their tasks [N]."""
    stance = "default" if batch.labels.shape[1] <= COMPILED_LENGTH else "force_eager"
    with torch.compiler.set_stance(stance), torch.autocast("cpu", torch.bfloat16):
        hidden = model(batch.rows)
        wanted = hidden.shape[1]
        chosen = batch.tasks[:, -wanted:] >= 0
        logits = output(hidden[chosen])
    error = F.cross_entropy(logits.float(), batch.labels[:, -wanted:][chosen], reduction="none")
    return error, batch.weights[:, -wanted:][chosen], batch.tasks[:, -wanted:][chosen]


def optimizers(model: Ministral) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for embeddings, output and norms."""
    matrices = [p for p in model.layers.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if all(p is not m for m in matrices)]
    return [
        torch.optim.Muon(matrices, lr=MUON_RATE, weight_decay=0.05),
        torch.optim.AdamW(rest, lr=ADAM_RATE, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def rate(step: int, steps: int) -> float:
    """Warm-up, then a straight line down to 1 %."""
    return min(1.0, (step + 1) / WARMUP) * max(0.01, 1 - step / steps)


def main() -> None:
    """Train from the last checkpoint in the work folder, or from nothing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2850)
    parser.add_argument("--stop", type=int, help="end early, for a trial of the schedule's start")
    parser.add_argument("--work", type=Path, default=Path(__file__).parent / "work")
    parser.add_argument("--pools", type=float, default=1.0, help="size of the token pools")
    parser.add_argument("--no-compile", action="store_true")
    options = parser.parse_args()

    torch.set_num_threads(2)
    encoder = ChatEncoder(load_tokenizer())
    batches = Batches(encoder, load(options.work, options.pools))
    model = Ministral(ModelConfig())
    initialise(model)
    optims = optimizers(model)
    checkpoint = options.work / "checkpoint.pt"
    first, tokens, spent = 0, 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for optim, saved in zip(optims, state["optims"], strict=True):
            optim.load_state_dict(saved)
        first, tokens, spent = state["step"], state["tokens"], state["spent"]
    if not options.no_compile:
        for layer in model.layers:
            layer.compile(dynamic=False)
        torch._dynamo.config.cache_size_limit = 64

    sums, counts = torch.zeros(len(TASKS)), torch.zeros(len(TASKS))
    started = time.time() - spent
    for step in range(first, options.stop or options.steps):
        phase = next(p for p in PHASES if step < p.end * options.steps)
        scale = rate(step, options.steps)
        for optim, peak in zip(optims, (MUON_RATE, ADAM_RATE), strict=True):
            optim.param_groups[0]["lr"] = peak * scale
        for batch in step_batches(batches, random.Random(f"step {step}"), phase, step):
            error, weights, tasks = losses(model, model.output, batch)
            (error * weights).sum().backward()
            sums.index_add_(0, tasks, error.detach())
            counts.index_add_(0, tasks, torch.ones_like(error))
            tokens += batch.labels.numel()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optim in optims:
            optim.step()
            optim.zero_grad()
        done = step + 1
        if done % 25 == 0:
            means = (sums / counts.clamp(min=1)).tolist()
            shown = " ".join(f"{t} {m:.3f}" for t, m in zip(TASKS, means, strict=True))
            spent = time.time() - started
            print(f"{done} {spent:.0f}s {tokens / 1e6:.2f}M rate {scale:.3f} | {shown}", flush=True)
            sums.zero_()
            counts.zero_()
        if done % 200 == 0 or done == (options.stop or options.steps):
            state = {"model": model.state_dict(), "optims": [o.state_dict() for o in optims]}
            state |= {"step": done, "tokens": tokens, "spent": time.time() - started}
            torch.save(state, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").replace(checkpoint)
            print(f"{done} right: {probe(model, encoder)}", flush=True)


if __name__ == "__main__":
    main()
