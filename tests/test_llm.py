"""What callers of `LLM` and `generate` rely on, on a random model in fp32."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo import LLM, SamplingParams, Transformer, generate
from octavo.engine.engine import Engine
from octavo.errors import CheckpointError, ConfigError, RequestError

PROMPTS = ["Hello", "The sun is yellow. " * 12, "a"]
GREEDY = SamplingParams(max_tokens=24, temperature=0)


@pytest.fixture(scope="module")
def model(text_model: Path) -> Transformer:
    return Transformer.from_folder(text_model, dtype="float32")


def test_greedy_answer_is_the_argmax_of_one_plain_pass_a_token(llm: LLM) -> None:
    ids = llm.tokenizer.encode(PROMPTS[1])
    expected = list(ids)
    for _ in range(24):
        logits = llm.model(torch.tensor(expected), [len(expected)])
        expected.append(int(logits[-1].argmax()))
    params = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
    assert llm.generate(PROMPTS[1], params)[0].outputs[0].token_ids == expected[len(ids) :]


def test_a_batch_answers_as_each_prompt_alone(llm: LLM) -> None:
    together = llm.generate(PROMPTS, GREEDY)
    for prompt, output in zip(PROMPTS, together, strict=True):
        assert output.prompt == prompt
        assert output.outputs[0].token_ids == llm.generate(prompt, GREEDY)[0].outputs[0].token_ids


@pytest.mark.parametrize("budget", [3, 5, 64])
def test_answers_do_not_depend_on_the_chunk_budget(llm: LLM, text_model: Path, budget: int) -> None:
    small = LLM(text_model, dtype="float32", max_num_seqs=2, max_num_batched_tokens=budget)
    expected = [o.outputs[0].token_ids for o in llm.generate(PROMPTS, GREEDY)]
    assert [o.outputs[0].token_ids for o in small.generate(PROMPTS, GREEDY)] == expected


def test_no_step_exceeds_the_token_budget(
    model: Transformer, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    hidden = Transformer.hidden

    def counted(self: Transformer, input_ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        sizes.append(len(input_ids))
        return hidden(self, input_ids, *rest)

    monkeypatch.setattr(Transformer, "hidden", counted)
    engine = Engine(model, llm.tokenizer, max_num_seqs=3, max_num_batched_tokens=16)
    ids = [engine.add_request(llm.tokenizer.encode(p), GREEDY) for p in PROMPTS]
    assert len(list(engine.run(ids))) == 3
    assert max(sizes) == 16


def test_sampling_with_a_seed_repeats_in_any_company(llm: LLM) -> None:
    params = SamplingParams(max_tokens=12, seed=7)
    alone = llm.generate("Hello", params)[0].outputs[0].token_ids
    others = [SamplingParams(max_tokens=30)] * 2
    among = llm.generate(["b", "Hello", "c"], [others[0], params, others[1]])
    assert among[1].outputs[0].token_ids == alone
    other = llm.generate("Hello", SamplingParams(max_tokens=12, seed=8))[0].outputs[0].token_ids
    assert other != alone


def test_n_answers_differ_and_the_first_is_that_of_one_alone(llm: LLM) -> None:
    several = llm.generate("Hello", SamplingParams(n=3, max_tokens=12, seed=7))[0].outputs
    assert [answer.index for answer in several] == [0, 1, 2]
    assert len({tuple(answer.token_ids) for answer in several}) == 3
    for i, answer in enumerate(several):
        alone = llm.generate("Hello", SamplingParams(max_tokens=12, seed=7 + i))[0].outputs[0]
        assert answer.token_ids == alone.token_ids


def test_max_tokens_and_context_end_an_answer_with_length(llm: LLM, text_model: Path) -> None:
    answer = llm.generate("Hello", SamplingParams(max_tokens=5, ignore_eos=True))[0].outputs[0]
    assert (len(answer.token_ids), answer.finish_reason) == (5, "length")
    short = LLM(text_model, max_model_len=20)
    unlimited = SamplingParams(max_tokens=None, ignore_eos=True)
    output = short.generate("Hello", unlimited)[0]
    assert len(output.prompt_token_ids) + len(output.outputs[0].token_ids) == 20


def test_end_of_sequence_stops_unless_ignored(llm: LLM, model: Transformer) -> None:
    ids = llm.tokenizer.encode("Hello")
    free = Engine(model, llm.tokenizer)
    (output,) = free.run([free.add_request(ids, GREEDY)])
    third = output.outputs[0].token_ids[2]
    engine = Engine(model, llm.tokenizer, eos_id=third)
    (stopped,) = engine.run([engine.add_request(ids, GREEDY)])
    answer = stopped.outputs[0]
    assert answer.token_ids == output.outputs[0].token_ids[: answer.token_ids.index(third) + 1]
    assert (answer.finish_reason, answer.stop_reason) == ("stop", None)
    ignoring = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
    (ignored,) = engine.run([engine.add_request(ids, ignoring)])
    assert ignored.outputs[0].token_ids == output.outputs[0].token_ids


def test_stop_token_ends_the_answer_and_is_named(llm: LLM) -> None:
    free = llm.generate("Hello", GREEDY)[0].outputs[0]
    token = free.token_ids[3]
    params = SamplingParams(max_tokens=24, temperature=0, stop_token_ids=[token])
    answer = llm.generate("Hello", params)[0].outputs[0]
    assert answer.token_ids[-1] == token == answer.stop_reason
    assert answer.finish_reason == "stop" and answer.token_ids.count(token) == 1
    assert answer.text == llm.tokenizer.decode(answer.token_ids[:-1])


def test_min_tokens_holds_every_stop_back(llm: LLM) -> None:
    free = llm.generate("Hello", GREEDY)[0].outputs[0]
    params = SamplingParams(
        max_tokens=24, temperature=0, min_tokens=10, stop_token_ids=[free.token_ids[3]]
    )
    assert len(llm.generate("Hello", params)[0].outputs[0].token_ids) >= 10


def test_stop_strings_cut_the_text_wherever_tokens_split_them(llm: LLM) -> None:
    free = llm.generate("Hello", GREEDY)[0].outputs[0].text
    for at in range(1, len(free) - 3, 4):
        stop = free[at : at + 3]
        params = SamplingParams(max_tokens=24, temperature=0, stop=[stop, "never in there"])
        answer = llm.generate("Hello", params)[0].outputs[0]
        assert answer.text == free[: free.index(stop)]
        assert (answer.finish_reason, answer.stop_reason) == ("stop", stop)
        kept = SamplingParams(
            max_tokens=24, temperature=0, stop=stop, include_stop_str_in_output=True
        )
        text = llm.generate("Hello", kept)[0].outputs[0].text
        assert text == free[: free.index(stop)] + stop


def test_stream_grows_to_the_whole_answer_and_never_takes_back(llm: LLM) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    whole = llm.chat(messages, GREEDY)[0].outputs[0].text
    for stop in (None, whole[8:11]):
        params = SamplingParams(max_tokens=24, temperature=0, stop=stop)
        expected = llm.chat(messages, params)[0].outputs[0].text
        texts = [o.outputs[0].text for o in llm.stream_chat(messages, params)]
        assert texts[-1] == expected and len(texts) > 2
        assert all(b.startswith(a) for a, b in pairwise(texts))


def test_stream_left_early_frees_its_cache(llm: LLM) -> None:
    stream = llm.stream_chat([{"role": "user", "content": "Hello"}], GREEDY)
    next(stream)
    assert llm.engine.has_work
    stream.close()  # type: ignore[attr-defined]
    assert not llm.engine.has_work


def test_logprobs_are_the_models_own(llm: LLM) -> None:
    params = SamplingParams(max_tokens=6, seed=1, logprobs=2, prompt_logprobs=0, ignore_eos=True)
    output = llm.generate(PROMPTS[1], params)[0]
    answer = output.outputs[0]
    ids = output.prompt_token_ids + answer.token_ids
    expected = llm.model(torch.tensor(ids), [len(ids)]).log_softmax(-1)
    n_prompt = len(output.prompt_token_ids)
    assert answer.logprobs is not None and output.prompt_logprobs is not None
    assert len(output.prompt_logprobs) == n_prompt and output.prompt_logprobs[0] is None
    for position in range(1, len(ids)):
        row = [*output.prompt_logprobs, *answer.logprobs][position]
        assert row is not None
        want = expected[position - 1, ids[position]].item()
        assert row[ids[position]].logprob == pytest.approx(want, abs=1e-4)
    chosen = [
        row[token].logprob for row, token in zip(answer.logprobs, answer.token_ids, strict=True)
    ]
    assert answer.cumulative_logprob == pytest.approx(sum(chosen))
    assert all(2 <= len(row) <= 3 for row in answer.logprobs)
    top = answer.logprobs[0]
    assert {entry.rank for entry in top.values()} >= {1, 2}


def test_prompts_come_as_text_tokens_or_dicts(llm: LLM) -> None:
    ids = llm.tokenizer.encode("Hello")
    expected = llm.generate("Hello", GREEDY)[0].outputs[0].token_ids
    as_text: list[Any] = ["Hello", ["Hello"], {"prompt": "Hello"}]
    as_tokens: list[Any] = [ids, [ids], [{"prompt_token_ids": ids}]]
    for prompt in as_text + as_tokens:
        [output] = llm.generate(prompt, GREEDY)
        assert output.outputs[0].token_ids == expected
        assert output.prompt == ("Hello" if prompt in as_text else None)


def test_chat_takes_one_conversation_or_several(llm: LLM) -> None:
    one = [{"role": "user", "content": "Hello"}]
    two = [{"role": "user", "content": "Bye"}]
    outputs = llm.chat([one, two], GREEDY)
    assert [o.outputs[0].text for o in outputs] == [
        llm.chat(c, GREEDY)[0].outputs[0].text for c in (one, two)
    ]


@pytest.mark.parametrize("prompts", ["", [[]], [3.5], None, 5, [None], [{}], [[1, 99999]], [[-1]]])
def test_wrong_prompts_are_refused(llm: LLM, prompts: Any) -> None:
    if prompts == "":  # not empty: it is a begin-of-sequence token
        assert llm.generate(prompts, GREEDY)[0].prompt_token_ids == [1]
        return
    with pytest.raises(RequestError, match="prompt"):
        llm.generate(prompts, GREEDY)
    assert not llm.engine.has_work


def test_over_long_prompt_is_refused_with_both_numbers(llm: LLM) -> None:
    with pytest.raises(RequestError, match="600 tokens and the model's context is 512"):
        llm.generate([[5] * 600], GREEDY)


def test_one_bad_prompt_of_several_is_named_and_nothing_is_left_behind(llm: LLM) -> None:
    with pytest.raises(RequestError, match="prompt 1: "):
        llm.generate([[5], [5] * 600], GREEDY)
    with pytest.raises(RequestError, match=r"^prompt 1: token 99999 is outside the vocabulary"):
        llm.generate([[5], [99999]], GREEDY)
    assert not llm.engine.has_work


def test_as_many_params_as_prompts(llm: LLM) -> None:
    with pytest.raises(RequestError, match="1 sampling_params for 2 prompts"):
        llm.generate(["a", "b"], [GREEDY])


@pytest.mark.parametrize("params", [{"temperature": 0}, [{"temperature": 0}], 5])
def test_wrong_params_are_refused(llm: LLM, params: Any) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    with pytest.raises(RequestError, match="sampling_params must be a SamplingParams"):
        llm.generate("Hello", params)
    with pytest.raises(RequestError, match="sampling_params must be a SamplingParams"):
        next(llm.stream_chat(messages, params))


@pytest.mark.parametrize(
    "tokens", [{"stop_token_ids": [5, 10**6], "min_tokens": 2}, {"logit_bias": {10**6: 1}}]
)
def test_tokens_outside_the_vocabulary_are_refused(llm: LLM, tokens: Any) -> None:
    problem = f"{next(iter(tokens))}: token 1000000 is outside the vocabulary"
    with pytest.raises(RequestError, match=problem):
        llm.generate("Hello", SamplingParams(**tokens))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"tokenizer_mode": "slow"}, "tokenizer_mode: 'slow'"),
        ({"max_model_len": 1000}, "max_model_len 1000 is more than the model's context of 512"),
        ({"max_model_len": 0}, "max_model_len must be a positive integer"),
        ({"max_num_seqs": -1}, "max_num_seqs must be a positive integer"),
        ({"tensor_parallel": 0}, "tensor_parallel must be a positive integer"),
    ],
)
def test_wrong_options_are_refused_by_name(
    text_model: Path, options: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        LLM(text_model, **options)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"max_model_len": 1000}, "max_model_len 1000 is more than the model's context of 512"),
        ({"max_num_seqs": 0}, "max_num_seqs must be a positive integer"),
        ({"max_num_batched_tokens": 1.5}, "max_num_batched_tokens must be a positive integer"),
    ],
)
def test_an_engine_refuses_wrong_options_by_name(
    model: Transformer, options: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        Engine(model, **options)


@pytest.mark.parametrize("chunk_size", [0, -1])
def test_generate_refuses_chunks_of_nothing(model: Transformer, chunk_size: int) -> None:
    with pytest.raises(ConfigError, match=f"chunk_size must be a positive .* not {chunk_size}"):
        generate([[1]], model, max_tokens=1, temperature=0, chunk_size=chunk_size)


def test_the_cards_tensor_parallel_is_taken(
    text_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert LLM(text_model, tensor_parallel=2).generate("Hello", GREEDY)
    assert "tensor_parallel=2 comes later; running on one device" in caplog.text


def test_generate_returns_tokens_without_eos_and_logprobs_of_prompt_and_answer(
    model: Transformer, llm: LLM
) -> None:
    prompts = [llm.tokenizer.encode(p) for p in PROMPTS]
    tokens, logprobs = generate(prompts, model, max_tokens=9, temperature=0.0)
    for prompt, answer, scores in zip(prompts, tokens, logprobs, strict=True):
        assert len(answer) == 9 and len(scores) == len(prompt) - 1 + 9
    eos_id = tokens[0][4]
    shorter, _ = generate(prompts, model, max_tokens=9, temperature=0.0, eos_id=eos_id)
    assert shorter[0] == tokens[0][: tokens[0].index(eos_id)]


def test_generate_only_scores_with_no_tokens_to_make(model: Transformer, llm: LLM) -> None:
    prompt = llm.tokenizer.encode(PROMPTS[1])
    tokens, logprobs = generate([prompt], model, max_tokens=12, temperature=0.0)
    scored = generate([prompt + tokens[0]], model, max_tokens=0, temperature=0.0, chunk_size=7)
    assert scored[0] == [[]]
    assert scored[1][0] == pytest.approx(logprobs[0], abs=1e-4)


def test_generate_samples_repeatably_with_a_seed(model: Transformer) -> None:
    def run(seed: int) -> list[int]:
        return generate([[1, 70]], model, max_tokens=9, temperature=1.5, seed=seed)[0][0]

    assert run(1) == run(1) != run(2)


CALL = '[{"name": "f", "arguments": {"a": 1}}]'


def answer_with_a_call(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    tool_id = llm.tokenizer.tool_calls_id
    assert tool_id is not None
    script = iter([tool_id, *llm.tokenizer.encode(CALL, bos=False), llm.tokenizer.eos_id])
    monkeypatch.setattr(llm.engine.scheduler, "speculate", False)
    monkeypatch.setattr(
        "octavo.engine.sampler.sample", lambda logits, *_: [next(script) for _ in logits]
    )


def test_tool_calls_of_a_chat_come_parsed(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    answer_with_a_call(llm, monkeypatch)
    params = SamplingParams(max_tokens=100, temperature=0)
    answer = llm.chat([{"role": "user", "content": "go"}], params)[0].outputs[0]
    assert [(c.name, c.arguments) for c in answer.tool_calls] == [("f", '{"a": 1}')]
    assert answer.text == CALL and answer.finish_reason == "stop"


def test_tool_calls_are_not_read_past_a_stop_string(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_with_a_call(llm, monkeypatch)
    params = SamplingParams(max_tokens=100, temperature=0, skip_special_tokens=False, stop=" 1}")
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    answer = llm.chat([{"role": "user", "content": "go"}], params, tools=tools)[0].outputs[0]
    assert answer.text == CALL[: CALL.index(" 1}")]
    assert [(c.name, c.arguments) for c in answer.tool_calls] == [("f", '{"a":')]


def test_weights_that_compute_nan_are_named(text_model: Path) -> None:
    damaged = LLM(text_model, dtype="float32")
    damaged.model.norm.weight.data.fill_(float("nan"))
    for temperature in (0.0, 1.0):
        with pytest.raises(CheckpointError, match="the model computed NaN"):
            damaged.generate("Hello", SamplingParams(temperature=temperature))
