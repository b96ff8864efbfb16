"""/v1/completions, /v1/models, /tokenize and /detokenize, against a server process."""

from __future__ import annotations

from typing import Any

import pytest
from openai import OpenAI

from tests.serving import CARD_MODEL, Server

STORY = "The sun is"


def complete(client: OpenAI, prompt: Any = STORY, **fields: Any) -> Any:
    create: Any = client.completions.create
    return create(prompt=prompt, **({"model": CARD_MODEL, "temperature": 0} | fields))


def encode(server: Server, **body: Any) -> list[int]:
    ids: list[int] = server.http.post("/tokenize", json=body).json()["tokens"]
    return ids


def test_a_prompt_is_the_same_as_text_and_as_tokens(server: Server, client: OpenAI) -> None:
    ids = encode(server, prompt=STORY)
    as_text = complete(client)
    assert as_text.usage.prompt_tokens == len(ids) and as_text.usage.completion_tokens == 16
    assert as_text.choices[0].text and as_text.choices[0].finish_reason == "length"
    assert complete(client, ids).choices[0].text == as_text.choices[0].text


def test_several_prompts_are_answered_in_their_order(server: Server, client: OpenAI) -> None:
    prompts = [STORY, "Add", "x = "]
    alone = [complete(client, p, n=2, seed=4, temperature=1).choices for p in prompts]
    for several in (prompts, [encode(server, prompt=p) for p in prompts]):
        together = complete(client, several, n=2, seed=4, temperature=1)
        assert [c.index for c in together.choices] == list(range(6))
        assert [c.text for c in together.choices] == [c.text for two in alone for c in two]
    assert together.usage.completion_tokens == 96


@pytest.mark.parametrize(
    "fields",
    [{}, {"echo": True}, {"n": 2, "seed": 1, "temperature": 1.5}, {"stop": ["e"], "max_tokens": 64},
     {"echo": True, "logprobs": 1}, {"logprobs": 3}, {"prompt": [STORY, "Add"]}],
)  # fmt: skip
def test_a_streamed_completion_is_the_unstreamed_one(
    client: OpenAI, fields: dict[str, Any]
) -> None:
    whole = complete(client, **fields)
    text: dict[int, str] = {}
    tokens: dict[int, list[Any]] = {}
    ends: dict[int, str] = {}
    usage = None
    for chunk in complete(client, stream=True, stream_options={"include_usage": True}, **fields):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text[choice.index] = text.get(choice.index, "") + choice.text
            if choice.logprobs:
                rows = zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True)
                tokens.setdefault(choice.index, []).extend(rows)
            if choice.finish_reason:
                ends[choice.index] = choice.finish_reason
    assert usage == whole.usage
    for choice in whole.choices:
        assert text[choice.index] == choice.text
        assert ends[choice.index] == choice.finish_reason
        if choice.logprobs:
            rows = zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True)
            assert tokens[choice.index] == list(rows)


def test_echo_scores_the_prompt_alone(client: OpenAI) -> None:
    choice = complete(client, echo=True, max_tokens=0, logprobs=1).choices[0]
    assert choice.text == STORY and "".join(choice.logprobs.tokens) == STORY
    assert all(value < 0 for value in choice.logprobs.token_logprobs)
    # The same prompt with one token more to say has the same scores for its own.
    longer = complete(client, echo=True, max_tokens=1, logprobs=1).choices[0].logprobs
    n = len(choice.logprobs.tokens)
    assert longer.token_logprobs[:n] == pytest.approx(choice.logprobs.token_logprobs, abs=1e-4)
    assert len(longer.tokens) == n + 1


def test_logprobs_of_given_tokens_begin_with_none(server: Server, client: OpenAI) -> None:
    ids = encode(server, prompt=STORY)
    logprobs = complete(client, ids, echo=True, max_tokens=0, logprobs=0).choices[0].logprobs
    assert len(logprobs.tokens) == len(ids)
    assert logprobs.tokens[0] == "<s>" and logprobs.token_logprobs[0] is None


def test_offsets_say_where_a_token_is_in_the_text(client: OpenAI) -> None:
    choice = complete(client, echo=True, logprobs=2, max_tokens=12).choices[0]
    logprobs = choice.logprobs
    for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
        assert choice.text[offset : offset + len(token)] == token
    for token, value, top in zip(
        logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True
    ):
        assert top[token] == value and 2 <= len(top) <= 3


def test_a_part_of_a_character_is_told_in_bytes(server: Server, client: OpenAI) -> None:
    ids = encode(server, prompt="猫", add_special_tokens=False)
    logprobs = complete(client, ids, echo=True, max_tokens=0, logprobs=0).choices[0].logprobs
    assert len(ids) > 1 and logprobs.tokens[0].startswith("bytes:\\xe7")


@pytest.mark.parametrize("streamed", [False, True])
def test_a_part_of_a_character_is_where_the_character_is(client: OpenAI, streamed: bool) -> None:
    text = "日本語\ufffd😀é."
    fields: Any = {"logprobs": 0, "max_tokens": 50, "extra_body": {"guided_choice": [text]}}
    answer = complete(client, stream=streamed, **fields)
    choices = [chunk.choices[0] for chunk in (answer if streamed else [answer])]
    told = [choice.logprobs for choice in choices if choice.logprobs]
    assert "".join(choice.text for choice in choices) == text
    offsets = [offset for each in told for offset in each.text_offset]
    assert len(offsets) > len(text) and offsets == sorted(offsets)
    assert set(offsets) == set(range(len(text)))
    found = dict.fromkeys(offsets, b"")
    for token, offset in zip((t for each in told for t in each.tokens), offsets, strict=True):
        part = token.removeprefix("bytes:").replace("\\x", "")
        found[offset] += token.encode() if part == token else bytes.fromhex(part)
    assert all(text[offset:].encode().startswith(each) for offset, each in found.items())


def test_half_a_surrogate_pair_is_a_replacement_character(server: Server) -> None:
    body = b'{"prompt": "a\\ud800", "echo": true, "max_tokens": 0}'
    headers = {"Content-Type": "application/json"}
    answer = server.http.post("/v1/completions", content=body, headers=headers).json()
    assert answer["choices"][0]["text"] == "a\ufffd"


def test_models_are_listed_and_told(server: Server, client: OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object) == (CARD_MODEL, "model")
    assert client.models.retrieve(CARD_MODEL) == model
    assert model.model_dump()["max_model_len"] == 131_072


def test_tokens_and_back(server: Server) -> None:
    answer = server.http.post("/tokenize", json={"prompt": "Grüße, 猫!"}).json()
    assert answer["count"] == len(answer["tokens"]) and answer["max_model_len"] == 131_072
    text = server.http.post("/detokenize", json={"tokens": answer["tokens"]}).json()["prompt"]
    assert text == "<s>Grüße, 猫!"
    without = encode(server, prompt="Grüße, 猫!", add_special_tokens=False)
    assert without == answer["tokens"][1:]


def test_a_conversation_is_tokenised_in_the_template(server: Server) -> None:
    ids = encode(server, messages=[{"role": "user", "content": "Hello"}])
    text = server.http.post("/detokenize", json={"tokens": ids}).json()["prompt"]
    assert text == "<s>[INST]Hello[/INST]"


def test_metrics_count_what_was_served(server: Server, client: OpenAI) -> None:
    def responses() -> float:
        return server.metric(r'octavo_http_responses_total\{path="/v1/completions",status="200"\}')

    names = ("octavo_time_to_first_token_seconds_count", "octavo_request_latency_seconds_count",
             "octavo_time_per_output_token_seconds_count")  # fmt: skip
    complete(client)
    before = [server.metric(name) for name in names]
    n_responses = responses()
    complete(client)
    list(complete(client, stream=True))
    assert [server.metric(name) for name in names] == [value + 2 for value in before]
    assert responses() == n_responses + 2
    text = server.http.get("/metrics").text
    for name in (
        "answers_running", "requests_waiting", "pages_used", "pages", "prompt_tokens_total",
        "cached_tokens_total", "generated_tokens_total", "preemptions_total",
        "draft_tokens_total", "accepted_tokens_total",
    ):  # fmt: skip
        assert f"\noctavo_{name} " in text


def test_probes_and_documentation_are_there(server: Server) -> None:
    assert server.http.get("/health").json() == {"status": "ok"}
    assert server.http.get("/ready").json() == {"status": "ready"}
    assert "swagger" in server.http.get("/docs").text
    paths = server.http.get("/openapi.json").json()["paths"]
    assert {"/v1/chat/completions", "/v1/completions", "/tokenize", "/metrics"} <= set(paths)
