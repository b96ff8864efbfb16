"""Passkey tries: which prompts, and what a model answers to each."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from octavo.engine.llm import LLM
from octavo.engine.sampling_params import SamplingParams
from octavo.errors import ConfigError
from octavo.evaluate.passkey import CLASSIC_FILLER, passkey_found, passkey_prompt
from octavo.tokenizer import Tokenizer

ANSWER_TOKENS = 32  # of the length, left for the answer
SHORTEST = 256  # tokens that introduction, key, question, template and answer surely fit in


@dataclass(frozen=True)
class Trial:
    """One prompt.

    Attributes:
        length: tokens of template, prompt and answer together, at most.
        depth: where the key stands, 0 (start) to 1 (end).
        key: five digits.
        start: the sentence of the filler that comes first.
    """

    length: int
    depth: float
    key: str
    start: int


@dataclass(frozen=True)
class Outcome:
    """What a model made of a trial.

    Attributes:
        trial: the prompt.
        n_prompt_tokens: its tokens with the template.
        n_cached_tokens: of them, those that an earlier trial's cache had.
        answer: the model's text.
        seconds: from the prompt's tokens to the answer.
    """

    trial: Trial
    n_prompt_tokens: int
    n_cached_tokens: int
    answer: str
    seconds: float

    @property
    def is_right(self) -> bool:
        """Whether the answer's first number is the key."""
        return passkey_found(self.answer, self.trial.key)


def spread(tries: int, n_depths: int) -> list[int]:
    """For each of a length's tries the index of its depth, ascending, as even as can be.

    With fewer tries than depths the first and the last depth are among them.
    """
    if tries >= n_depths:
        return [i * n_depths // tries for i in range(tries)]
    if tries == 1:
        return [n_depths // 2]
    return [round(i * (n_depths - 1) / (tries - 1)) for i in range(tries)]


def make_trials(
    lengths: Sequence[int], depths: Sequence[float], tries: int, seed: int = 0
) -> list[Trial]:
    """The trials of every length, one length after another; the same for the same arguments.

    A length's tries do not depend on which others are run. Their fillers start with one sentence
    after another, so that prompts at one depth differ in more than the key.

    Raises:
        ConfigError: a length that no prompt fits in, or no tries.
    """
    if tries < 1:
        raise ConfigError(f"--tries: {tries}; give 1 or more")
    for length in lengths:
        if length < SHORTEST:
            raise ConfigError(
                f"--lengths: {length} tokens are too few for key, question and answer; "
                f"give {SHORTEST} or more"
            )
    trials = []
    for length in lengths:
        rng = random.Random(f"passkey {seed} {length}")
        for i, index in enumerate(spread(tries, len(depths))):
            key = str(rng.randrange(10_000, 100_000))
            trials.append(Trial(length, depths[index], key, i % len(CLASSIC_FILLER)))
    return trials


def encode_trial(tokenizer: Tokenizer, trial: Trial) -> list[int]:
    """A trial's prompt in the instruct template: with the answer, `trial.length` tokens.

    Less by what one more sentence of the filler would need, never more. Sentences are counted one
    by one first; where a tokenizer joins them otherwise, what was missed is made up for.
    """
    count = cache(lambda text: len(tokenizer.encode(text, bos=False)))
    most = trial.length - ANSWER_TOKENS
    sentence = max(count(" " + text) for text in CLASSIC_FILLER)
    budget, fitting = most, None
    for _ in range(8):  # the second is right for every tokenizer that was met
        prompt = passkey_prompt(budget, trial.depth, trial.key, CLASSIC_FILLER, count, trial.start)
        token_ids = tokenizer.encode_chat([{"role": "user", "content": prompt}])
        spare = most - len(token_ids)
        if spare >= 0 and (fitting is None or len(token_ids) > len(fitting)):
            fitting = token_ids
        if 0 <= spare < sentence:
            break
        budget += spare
    if fitting is None:
        raise ConfigError(f"--lengths: no prompt of {trial.length} tokens fits this tokenizer")
    return fitting


def run_trial(llm: LLM, trial: Trial) -> Outcome:
    """Answer one trial greedily.

    Raises:
        RequestError: the model's context, or what memory leaves of it, is shorter.
    """
    token_ids = encode_trial(llm.tokenizer, trial)
    started = time.perf_counter()
    params = SamplingParams(max_tokens=ANSWER_TOKENS, temperature=0)
    output = llm.generate([token_ids], params)[0]
    seconds = time.perf_counter() - started
    return Outcome(trial, len(token_ids), output.num_cached_tokens, output.outputs[0].text, seconds)
