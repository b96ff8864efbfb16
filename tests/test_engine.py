"""The engine: however requests are mixed, cut, preempted, cached or guessed, answers are the same.

The model is the bundled one in fp32, where sums in another order do not change a greedy token.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from itertools import zip_longest

import pytest
import torch

from octavo import LLM, SamplingParams, Transformer
from octavo.cache import CacheLayout, tokens_of_page
from octavo.cache.planner import working_bytes
from octavo.checkpoint import DEMO
from octavo.engine.decode import decode_bytes
from octavo.engine.defaults import default_num_seqs
from octavo.engine.engine import Engine
from octavo.engine.outputs import RequestOutput
from octavo.engine.step_limits import StepLimits
from octavo.tokenizer import Tokenizer

PAGE_SIZE = tokens_of_page(torch.float32)
CHUNK = 64


@pytest.fixture(scope="module")
def demo() -> LLM:
    return LLM("demo", dtype="float32", max_model_len=4096)


def engine(
    demo: LLM,
    *,
    n_pages: int | None = None,
    max_num_seqs: int = 8,
    chunk: int = CHUNK,
    max_model_len: int = 1024,
    caching: bool = True,
    speculate: bool = False,
) -> Engine:
    """One with a pool of just so many pages."""
    config = demo.model.config
    layout = CacheLayout.of(config, torch.float32)
    if n_pages is None:
        n_pages = max_num_seqs * layout.pages_needed(max_model_len, chunk)
    memory = (
        config.weight_bytes(4)
        + working_bytes(config, max_num_seqs, chunk)
        + decode_bytes(layout, demo.model, StepLimits(max_num_seqs, max_model_len, speculate))
        + n_pages * layout.page_bytes
    )
    made = Engine(
        demo.model,
        demo.tokenizer,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=chunk,
        memory=memory,
        enable_prefix_caching=caching,
        speculate=speculate,
    )
    assert made.pool.n_pages == n_pages
    return made


def prompts(tokenizer: Tokenizer, count: int, seed: int = 0) -> list[list[int]]:
    """Chats of 20 to 400 tokens of words at random."""
    generator = random.Random(seed)
    words = "the cat dog house sum of two and three river letter green runs over".split()  # noqa: SIM905
    made = []
    for _ in range(count):
        length = generator.randrange(5, 150)
        text = " ".join(generator.choice(words) for _ in range(length))
        made.append(tokenizer.encode_chat([{"role": "user", "content": text}]))
    return made


def greedy(max_tokens: int = 24) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)


def run(
    made: Engine, encoded: list[list[int]], params: SamplingParams | list[SamplingParams]
) -> list[RequestOutput]:
    """All at once; afterwards no page is held."""
    each = params if isinstance(params, list) else [params] * len(encoded)
    ids = [made.add_request(tokens, one) for tokens, one in zip(encoded, each, strict=True)]
    outputs = {output.request_id: output for output in made.run(ids)}
    assert made.pool.n_held == 0 and not made.has_work
    return [outputs[request_id] for request_id in ids]


def tokens_of(outputs: list[RequestOutput]) -> list[list[int]]:
    return [answer.token_ids for output in outputs for answer in output.outputs]


def alone(model: Transformer, prompt: list[int], n_tokens: int) -> list[int]:
    """Greedy, by one sequence in a cache of its own, without the engine."""
    cache = model.new_cache(len(prompt) + n_tokens)
    tokens = list(prompt)
    with torch.inference_mode():
        logits = model(torch.tensor(prompt), [len(prompt)], [cache])
        for _ in range(n_tokens):
            tokens.append(int(logits[-1].argmax()))
            logits = model(torch.tensor(tokens[-1:]), [1], [cache])
    return tokens[len(prompt) :]


@pytest.fixture(scope="module")
def encoded(demo: LLM) -> list[list[int]]:
    return prompts(demo.tokenizer, 10)


@pytest.fixture(scope="module")
def expected(demo: LLM, encoded: list[list[int]]) -> list[list[int]]:
    return [alone(demo.model, prompt, 24) for prompt in encoded]


@pytest.mark.parametrize("chunk", [16, 50, 1000])
@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("speculate", [False, True])
def test_batched_chunked_cached_and_speculative_answers_are_those_of_one_alone(
    demo: LLM,
    encoded: list[list[int]],
    expected: list[list[int]],
    chunk: int,
    caching: bool,
    speculate: bool,
) -> None:
    made = engine(demo, chunk=chunk, caching=caching, speculate=speculate)
    assert tokens_of(run(made, encoded, greedy())) == expected
    assert tokens_of(run(made, encoded, greedy())) == expected  # again, from the cache
    stats = made.stats()
    assert (stats.cached_tokens_total > 0) == caching
    if not speculate:
        assert stats.draft_tokens_total == 0
    elif chunk > 16:  # in smaller steps prompts leave hardly any room for guesses
        assert 0 < stats.accepted_tokens_total < stats.draft_tokens_total


@pytest.fixture(scope="module")
def long_answers(demo: LLM, encoded: list[list[int]]) -> list[list[int]]:
    return [alone(demo.model, prompt[:40], 120) for prompt in encoded[:4]]


@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("speculate", [False, True])
def test_preempted_answers_go_on_where_they_were(
    demo: LLM,
    encoded: list[list[int]],
    long_answers: list[list[int]],
    caching: bool,
    speculate: bool,
) -> None:
    layout = CacheLayout.of(demo.model.config, torch.float32)
    # Room for two of the four when they are long.
    made = engine(
        demo,
        n_pages=2 * layout.pages_needed(160, CHUNK),
        max_model_len=160,
        caching=caching,
        speculate=speculate,
    )
    short = [prompt[:40] for prompt in encoded[:4]]
    assert tokens_of(run(made, short, greedy(120))) == long_answers
    assert made.stats().preemptions_total > 0


def test_sampled_answers_with_a_seed_do_not_depend_on_how_they_ran(
    demo: LLM, encoded: list[list[int]]
) -> None:
    params = [
        SamplingParams(max_tokens=20, seed=i, temperature=0.8, top_p=0.9, ignore_eos=True)
        for i in range(len(encoded))
    ]
    one_by_one = engine(demo, max_num_seqs=1, caching=False)
    expected = [
        tokens_of(run(one_by_one, [p], [s]))[0] for p, s in zip(encoded, params, strict=True)
    ]
    layout = CacheLayout.of(demo.model.config, torch.float32)
    longest = max(map(len, encoded)) + 20
    for made in (
        engine(demo),
        engine(demo, speculate=True, chunk=33),
        engine(
            demo,
            n_pages=layout.pages_needed(longest, CHUNK) + 8,
            max_model_len=longest,
            speculate=True,
        ),
    ):
        assert tokens_of(run(made, encoded, params)) == expected


def test_speculation_keeps_the_distribution_of_samples(demo: LLM) -> None:
    """The tokens behind a text that repeats, drawn many times with and without guesses."""
    records = (DEMO / "calibration.jsonl").read_text(encoding="utf-8").splitlines()
    text = next(record["text"] for record in map(json.loads, records) if "text" in record)
    ids = demo.tokenizer.encode(text)[:60]
    prompt, n_draws = ids + ids[1:20], 500
    answers: list[list[tuple[int, ...]]] = []
    for speculate in (False, True):
        made = engine(demo, speculate=speculate, max_num_seqs=4)
        params = [
            SamplingParams(
                max_tokens=4, seed=i + n_draws * speculate, ignore_eos=True, temperature=2, top_k=3
            )
            for i in range(n_draws)
        ]
        answers.append(
            [tuple(tokens) for tokens in tokens_of(run(made, [prompt] * n_draws, params))]
        )
        stats = made.stats()
        assert (stats.accepted_tokens_total > 100) == speculate
        assert (stats.draft_tokens_total > stats.accepted_tokens_total) == speculate
    for n_tokens in (1, 2, 3, 4):
        before, after = (Counter(tokens[:n_tokens] for tokens in each) for each in answers)
        for kind in before | after:
            share = (before[kind] + after[kind]) / (2 * n_draws)
            # Five standard deviations of the difference of two counts.
            bound = 5 * (2 * n_draws * share * (1 - share)) ** 0.5
            assert abs(before[kind] - after[kind]) <= bound


def test_a_long_prompt_delays_answers_by_one_chunk_at_most(demo: LLM) -> None:
    made = engine(demo, chunk=32)
    sizes: list[int] = []
    hidden = made.model.hidden

    class Watched:
        """The model, its passes counted."""

        def __getattr__(self, name: str) -> object:
            return getattr(demo.model, name)

        def hidden(self, input_ids: torch.Tensor, *rest: object) -> torch.Tensor:
            sizes.append(len(input_ids))
            return hidden(input_ids, *rest)  # type: ignore[arg-type]

    made.model = Watched()  # type: ignore[assignment]
    short = made.add_request(prompts(demo.tokenizer, 1)[0][:20], greedy(60))
    made.step()
    long = made.add_request([5] * 900, greedy(1))
    for n_tokens in range(2, 20):
        made.step()
        assert len(made.output(short).outputs[0].token_ids) == n_tokens
        assert made.output(long).outputs[0].token_ids == []
    assert max(sizes) == 32
    made.abort(short)
    made.abort(long)
    assert made.pool.n_held == 0


def test_first_come_first_served_with_as_many_as_fit(demo: LLM) -> None:
    made = engine(demo, max_num_seqs=3)
    ids = [made.add_request([5 + i] * 30, greedy(10)) for i in range(9)]
    finished = [output.request_id for output in made.run(ids)]
    assert finished == ids
    assert made.stats().preemptions_total == 0


def test_a_shared_system_prompt_is_computed_once(demo: LLM) -> None:
    system = "You are a helpful assistant. " * 20
    chats = [
        demo.tokenizer.encode_chat(
            [{"role": "system", "content": system}, {"role": "user", "content": f"Say {i}"}]
        )
        for i in range(6)
    ]
    shared = next(i for i, pair in enumerate(zip(*chats, strict=False)) if len(set(pair)) > 1)
    assert shared > 3 * 64  # far longer than the bundled model's window
    made = engine(demo, max_num_seqs=1)
    outputs = run(made, chats, greedy(8))
    assert outputs[0].num_cached_tokens == 0
    for output in outputs[1:]:
        assert output.num_cached_tokens == shared // PAGE_SIZE * PAGE_SIZE
    assert tokens_of(outputs) == [alone(demo.model, chat, 8) for chat in chats]


def test_a_growing_conversation_is_computed_once(demo: LLM) -> None:
    made = engine(demo, max_model_len=2048)
    messages = [{"role": "user", "content": "Tell me of the river and the green house. " * 12}]
    before = 0
    for _ in range(4):
        chat = demo.tokenizer.encode_chat(messages)
        [output] = run(made, [chat], SamplingParams(max_tokens=30, temperature=0))
        if before:
            assert output.num_cached_tokens >= before - PAGE_SIZE
        before = len(chat)
        messages += [
            {"role": "assistant", "content": output.outputs[0].text or "Yes."},
            {"role": "user", "content": "And then?"},
        ]


def test_n_answers_share_the_prompts_pages(demo: LLM) -> None:
    made = engine(demo, max_num_seqs=8, caching=False)
    prompt = prompts(demo.tokenizer, 1, seed=3)[0]
    request = made.add_request(prompt, SamplingParams(n=6, max_tokens=4, seed=1, ignore_eos=True))
    held_by_one = 0
    while made.has_work:
        if made.stats().running == 1:
            held_by_one = made.pool.n_held
        made.step()
        if made.stats().running == 6:
            assert made.pool.n_held <= held_by_one + 6 * 2 * sum(made.pool.layout.rows)
    assert request == 0 and made.pool.n_held == 0


@pytest.mark.parametrize("max_num_seqs", [1, 2, 3, 8])
def test_n_answers_are_those_of_their_seeds_however_few_run_at_once(
    demo: LLM, max_num_seqs: int
) -> None:
    prompt = prompts(demo.tokenizer, 1, seed=4)[0]
    made = engine(demo, max_num_seqs=max_num_seqs)
    several = run(made, [prompt], SamplingParams(n=4, max_tokens=9, seed=5, ignore_eos=True))
    for i, tokens in enumerate(tokens_of(several)):
        one = SamplingParams(max_tokens=9, seed=5 + i, ignore_eos=True)
        assert tokens == tokens_of(run(made, [prompt], one))[0]


def test_answers_that_start_late_go_before_what_came_later(demo: LLM) -> None:
    made = engine(demo, max_num_seqs=2)
    several = SamplingParams(n=3, max_tokens=8, seed=1, ignore_eos=True)
    params = [several, several, greedy(8), greedy(8)]
    ids = [made.add_request([5 + i] * 20, each) for i, each in enumerate(params)]
    made.step()  # both first answers read their prompts
    waiting = [(s.request_id, s.index) for s in made.scheduler.waiting]
    assert waiting == [(0, 1), (0, 2), (1, 1), (1, 2), (2, 0), (3, 0)]
    assert [output.request_id for output in made.run(ids)] == ids


def test_streams_and_runs_of_one_engine_take_turns(demo: LLM) -> None:
    made = engine(demo, chunk=100)
    first, second, third, fourth = (made.add_request([5 + i] * 20, greedy(6)) for i in range(4))
    pairs = zip_longest(made.stream(first), made.stream(second))
    outputs = [output for pair in pairs for output in pair if output is not None]
    finished = [output for output in outputs if output.finished]
    assert sorted(output.request_id for output in finished) == [first, second]
    assert all(len(tokens) == 6 for tokens in tokens_of(finished))
    # All four have finished by now, and the others are kept for who asks.
    assert not made.has_work
    assert [output.request_id for output in made.run([fourth])] == [fourth]
    [output] = made.stream(third)
    assert output.request_id == third and output.finished
    assert list(made.run([fourth])) == list(made.stream(third)) == []


def test_a_run_gives_its_own_requests_and_ends_without_those_that_have_gone(demo: LLM) -> None:
    made = engine(demo)
    ids = [made.add_request([5 + i] * 20, greedy(4)) for i in range(5)]
    others = made.run(ids[3:])
    assert next(others).request_id == ids[3]
    made.abort(ids[0])
    made.abort(ids[4])  # which has finished and waits to be taken
    assert [output.request_id for output in made.run(ids[:3])] == ids[1:3]
    assert list(others) == [] and not made.has_work


def test_only_the_first_answer_scores_the_prompt(demo: LLM) -> None:
    made = engine(demo, max_num_seqs=1)  # so that the others cannot begin as its copies
    prompt = prompts(demo.tokenizer, 1, seed=3)[0]
    params = SamplingParams(n=3, max_tokens=4, seed=1, ignore_eos=True, prompt_logprobs=0)
    [output] = run(made, [prompt], params)
    assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == len(prompt)
    known = (len(prompt) - 1) // PAGE_SIZE * PAGE_SIZE
    assert output.num_cached_tokens == 0 and made.stats().cached_tokens_total == 2 * known


def test_aborted_requests_free_their_pages_at_once(demo: LLM) -> None:
    made = engine(demo, max_num_seqs=2)
    ids = [made.add_request([7 + i] * 100, greedy(50)) for i in range(4)]
    for _ in range(5):
        made.step()
    assert made.stats().running == 2 and made.stats().waiting == 2
    for request_id in ids:
        made.abort(request_id)
        made.abort(request_id)  # a second time is no error
    stats = made.stats()
    assert (stats.running, stats.waiting, stats.pages_used) == (0, 0, 0)


def test_prompt_logprobs_are_whole_after_a_preemption(demo: LLM) -> None:
    layout = CacheLayout.of(demo.model.config, torch.float32)
    made = engine(demo, n_pages=layout.pages_needed(300, CHUNK) + 4, max_model_len=300)
    encoded = [prompt[:90] for prompt in prompts(demo.tokenizer, 6) if len(prompt) >= 90]
    params = SamplingParams(max_tokens=200, temperature=0, ignore_eos=True, prompt_logprobs=0)
    outputs = run(made, encoded, params)
    assert made.stats().preemptions_total > 0
    for prompt, output in zip(encoded, outputs, strict=True):
        rows = output.prompt_logprobs
        assert rows is not None and len(rows) == len(prompt) and rows[0] is None
        with torch.inference_mode():
            logits = demo.model(torch.tensor(prompt), [len(prompt)]).log_softmax(-1)
        for position in range(1, len(prompt)):
            row = rows[position]
            assert row is not None
            exact = float(logits[position - 1, prompt[position]])
            assert row[prompt[position]].logprob == pytest.approx(exact, abs=1e-3)


def test_random_requests_and_aborts_leave_nothing_behind(demo: LLM) -> None:
    generator = random.Random(0)
    layout = CacheLayout.of(demo.model.config, torch.float32)
    made = engine(
        demo, n_pages=layout.pages_needed(500, CHUNK) + 20, max_model_len=500, speculate=True
    )
    encoded = prompts(demo.tokenizer, 30, seed=9)
    live: list[int] = []

    def arrivals() -> Iterator[list[int]]:
        for prompt in encoded:
            yield prompt[: generator.randrange(10, 250)]

    for prompt in arrivals():
        params = SamplingParams(
            n=generator.choice((1, 1, 3)),
            max_tokens=generator.randrange(1, 60),
            temperature=generator.choice((0, 1)),
            seed=generator.randrange(100),
        )
        live.append(made.add_request(prompt, params))
        for _ in range(generator.randrange(6)):
            for output in made.step():
                live.remove(output.request_id)
        if live and generator.random() < 0.3:
            made.abort(live.pop(generator.randrange(len(live))))
    for output in made.run(live):
        assert output.finished
    stats = made.stats()
    assert (stats.running, stats.waiting, stats.pages_used) == (0, 0, 0)


def test_how_many_answers_are_made_at_once_follows_the_device(demo: LLM) -> None:
    assert demo.engine.max_num_seqs == default_num_seqs(demo.model.device) == 16
    assert default_num_seqs(torch.device("cuda:1")) == 64
