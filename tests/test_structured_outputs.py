"""Answers held to a form: always whole and fitting, however wildly the model samples."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from octavo import LLM, SamplingParams, StructuredOutputsParams
from octavo.checkpoint import DEMO
from octavo.engine.constraint import Constraint
from octavo.engine.outputs import CompletionOutput
from octavo.engine.structured_outputs import MAX_GRAMMAR_LENGTH, MAX_SCHEMA_DEPTH, read_schema
from octavo.errors import RequestError
from octavo.tokenizer import Tokenizer
from tests.threads import threads

PROMPT = [{"role": "user", "content": "What's the weather like today in Paris?"}]
SHORT = {"type": "string", "maxLength": 6}
SCHEMAS: dict[str, dict[str, Any]] = {
    "nested": {
        "type": "object",
        "properties": {
            "place": {
                "type": "object",
                "properties": {"city": SHORT, "zip": {"type": "integer", "minimum": 0}},
                "required": ["city", "zip"],
                "additionalProperties": False,
            },
            "sunny": {"type": "boolean"},
        },
        "required": ["place", "sunny"],
        "additionalProperties": False,
    },
    "enum and const": {
        "type": "object",
        "properties": {"unit": {"enum": ["celsius", 7, None]}, "kind": {"const": {"a": [1]}}},
        "required": ["unit", "kind"],
        "additionalProperties": False,
    },
    "array": {
        "type": "array",
        "items": {"anyOf": [{"type": "integer", "maximum": 99, "minimum": -9}, SHORT]},
        "minItems": 2,
        "maxItems": 3,
    },
    "$ref": {
        "$defs": {"Paar[é]": {"type": "array", "items": SHORT, "minItems": 2, "maxItems": 2}},
        "type": "object",
        "properties": {
            "one": {"$ref": "#/$defs/Paar[é]"},
            "two": {"$ref": "#/$defs/Paar%5B%C3%A9%5D"},
        },
        "required": ["one", "two"],
        "additionalProperties": False,
    },
    "non-ASCII": {
        "type": "object",
        "properties": {"名前": {"enum": ["図書館 🏛️", "Köln"]}, "é": {"type": "null"}},
        "required": ["名前", "é"],
        "additionalProperties": False,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def demo() -> Iterator[LLM]:
    with threads(1):  # this small, more would mostly wait for one another
        yield LLM("demo", max_num_seqs=16)


def answers(llm: LLM, n: int = 12, max_tokens: int = 100, **form: Any) -> list[CompletionOutput]:
    params = SamplingParams(
        n=n, seed=0, max_tokens=max_tokens, structured_outputs=StructuredOutputsParams(**form)
    )
    return llm.chat(PROMPT, params)[0].outputs


def ended(outputs: list[CompletionOutput]) -> list[str]:
    """Texts of the answers that were not cut; at least half are not."""
    texts = [output.text for output in outputs if output.finish_reason == "stop"]
    assert len(texts) >= len(outputs) / 2
    return texts


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
def test_sampled_answers_fit_their_schema(demo: LLM, schema: dict[str, Any]) -> None:
    texts = ended(answers(demo, n=6, json=json.dumps(schema)))
    for text in texts:
        jsonschema.validate(json.loads(text), schema)
    assert len(set(texts)) > 1  # held, and yet sampled


def test_sampled_answers_match_their_regex(demo: LLM) -> None:
    for regex in (r"\d{4}-\d\d-\d\d", "(図書館|é{2}|a/b)\n?", r"[^a-z]{1,5}"):
        for text in ended(answers(demo, regex=regex)):
            assert re.fullmatch(regex, text)


def test_sampled_answers_are_one_of_the_choices(demo: LLM) -> None:
    assert len(ended(answers(demo, n=1, choice=[f"word {i}" for i in range(9999)]))) == 1
    choice = ["red", 'a "quoted"\n\\one', "図書館 🏛️", "re"]
    texts = ended(answers(demo, choice=choice))
    assert set(texts) <= set(choice) and len(set(texts)) > 1


def test_sampled_answers_follow_their_grammar(demo: LLM) -> None:
    grammar = 'start: sum "=" NUMBER\nsum: NUMBER ("+" NUMBER)~1..3\nNUMBER: /[0-9]{1,3}/\n'
    for text in ended(answers(demo, grammar=grammar)):
        assert re.fullmatch(r"\d{1,3}(\+\d{1,3}){1,3}=\d{1,3}", text)


def test_any_json_object(demo: LLM) -> None:
    params = SamplingParams(
        n=16,
        seed=0,
        max_tokens=100,
        temperature=0.4,
        logit_bias={demo.tokenizer.encode("}", bos=False)[0]: 5},
        structured_outputs=StructuredOutputsParams(json_object=True),
    )
    for text in ended(demo.chat(PROMPT, params)[0].outputs):
        assert isinstance(json.loads(text), dict)


def test_greedy_answer_that_fits_is_unchanged(demo: LLM) -> None:
    greedy = SamplingParams(max_tokens=60, temperature=0)
    free = demo.chat(PROMPT, greedy)[0].outputs[0]
    assert free.finish_reason == "stop" and len(free.text) > 10
    for form in (
        StructuredOutputsParams(regex=r"[\s\S]*"),
        StructuredOutputsParams(choice=["something else", free.text]),
        StructuredOutputsParams(regex=re.escape(free.text[:10]) + r".*\s*.*"),
    ):
        held = demo.chat(PROMPT, replace(greedy, structured_outputs=form))[0].outputs[0]
        assert held.token_ids == free.token_ids


def test_an_answer_cut_by_max_tokens_or_stop_says_so(demo: LLM) -> None:
    form = StructuredOutputsParams(json=SCHEMAS["nested"])
    cut = demo.chat(PROMPT, SamplingParams(seed=1, max_tokens=5, structured_outputs=form))
    assert cut[0].outputs[0].finish_reason == "length"
    params = SamplingParams(seed=1, max_tokens=100, structured_outputs=form, stop='"city"')
    answer = demo.chat(PROMPT, params)[0].outputs[0]
    assert (answer.finish_reason, answer.stop_reason) == ("stop", '"city"')
    assert re.fullmatch(r'\{\s*"place"\s*:\s*\{\s*', answer.text)


def test_logprobs_of_held_answers_are_the_models_own() -> None:
    demo = LLM("demo", dtype="float32")  # a logit in bf16 is up to 0.06 off, by how it was summed
    form = StructuredOutputsParams(json=SCHEMAS["array"])
    params = SamplingParams(n=2, seed=3, max_tokens=40, logprobs=1, structured_outputs=form)
    output = demo.chat(PROMPT, params)[0]
    for answer in output.outputs:
        ids = output.prompt_token_ids + answer.token_ids
        scored = demo.generate([ids], SamplingParams(max_tokens=0, prompt_logprobs=0))[0]
        assert scored.prompt_logprobs is not None and answer.logprobs is not None
        rows = scored.prompt_logprobs[len(output.prompt_token_ids) :]
        for token, row, expected in zip(answer.token_ids, answer.logprobs, rows, strict=True):
            assert expected is not None
            assert row[token].logprob == pytest.approx(expected[token].logprob, abs=1e-3)


def test_siblings_are_held_each_on_its_own_and_as_one_alone(demo: LLM) -> None:
    together = answers(demo, n=3, json=SCHEMAS["array"])
    assert len({answer.text for answer in together}) == 3
    form = StructuredOutputsParams(json=SCHEMAS["array"])
    for i, answer in enumerate(together):
        params = SamplingParams(seed=i, max_tokens=100, structured_outputs=form)
        assert demo.chat(PROMPT, params)[0].outputs[0].token_ids == answer.token_ids


def test_min_tokens_holds_the_end_back_only_where_something_else_may_come(demo: LLM) -> None:
    params = SamplingParams(seed=0, min_tokens=12, max_tokens=40)
    word = replace(params, structured_outputs=StructuredOutputsParams(choice=["red"]))
    answer = demo.chat(PROMPT, word)[0].outputs[0]
    assert (answer.text, answer.finish_reason) == ("red", "stop")
    long = replace(params, structured_outputs=StructuredOutputsParams(regex="a*"))
    answer = demo.chat(PROMPT, long)[0].outputs[0]
    assert len(answer.token_ids) >= 12 and set(answer.text) == {"a"}


def test_ignore_eos_goes_on_behind_the_form(demo: LLM) -> None:
    form = StructuredOutputsParams(choice=["red"])
    params = SamplingParams(seed=0, ignore_eos=True, max_tokens=20, structured_outputs=form)
    answer = demo.chat(PROMPT, params)[0].outputs[0]
    assert len(answer.token_ids) == 20 and answer.text.startswith("red")
    assert len(answer.text) > len("red")


def allowed(constraint: Constraint, tokenizer: Tokenizer) -> set[int]:
    logits = constraint.mask(torch.zeros(tokenizer.vocab_size))
    return set(torch.isfinite(logits).nonzero().flatten().tolist())


def compiled(tokenizer: Tokenizer, **form: Any) -> Constraint:
    return Constraint.compile(StructuredOutputsParams(**form), tokenizer)


def test_control_tokens_are_never_text_and_parts_of_characters_may_come(demo: LLM) -> None:
    tokenizer = demo.tokenizer
    control = {i for i in range(tokenizer.vocab_size) if tokenizer.guidance.is_special_token(i)}
    assert tokenizer.tool_calls_id in control
    free = compiled(tokenizer, regex=r"(.|\n)*")
    assert allowed(free, tokenizer) & control == {tokenizer.eos_id}
    inside = compiled(tokenizer, regex='"[^"]*"')
    inside.accept(tokenizer.encode('"', bos=False)[0])
    assert not allowed(inside, tokenizer) & control
    first, second = tokenizer.encode("図", bos=False)  # neither is a character
    quote = tokenizer.encode('"', bos=False)[0]
    assert {first, quote} <= allowed(inside, tokenizer)
    assert second not in allowed(inside, tokenizer)
    inside.accept(first)
    assert second in allowed(inside, tokenizer) and quote not in allowed(inside, tokenizer)


def test_the_end_may_come_where_the_form_may_end_and_only_it_at_the_very_end(demo: LLM) -> None:
    tokenizer = demo.tokenizer
    a = tokenizer.encode("a", bos=False)[0]
    constraint = compiled(tokenizer, regex="aa?")
    assert tokenizer.eos_id not in allowed(constraint, tokenizer)
    constraint.accept(a)
    assert {a, tokenizer.eos_id} <= allowed(constraint, tokenizer)
    sibling = constraint.copy()
    constraint.accept(a)
    assert allowed(constraint, tokenizer) == {tokenizer.eos_id}
    assert a in allowed(sibling, tokenizer)
    assert [constraint.finished, sibling.finished] == [True, False]


def test_a_dead_end_leaves_only_the_end(demo: LLM) -> None:
    tokenizer = demo.tokenizer
    constraint = compiled(tokenizer, grammar='start: "a" /[^\\s\\S]/')
    a = tokenizer.encode("a", bos=False)[0]
    assert allowed(constraint, tokenizer) == {a}
    constraint.accept(a)
    assert allowed(constraint, tokenizer) == {tokenizer.eos_id}


def test_a_compiled_form_is_not_used_up(demo: LLM) -> None:
    tokenizer = demo.tokenizer
    for _ in range(2):
        constraint = compiled(tokenizer, choice=["ab"])
        assert tokenizer.eos_id not in allowed(constraint, tokenizer)
        for token in tokenizer.encode("ab", bos=False):
            constraint.accept(token)
        assert constraint.finished


def test_a_form_with_a_trigger_begins_behind_it(demo: LLM) -> None:
    tokenizer = demo.tokenizer
    trigger, b = (tokenizer.encode(text, bos=False)[0] for text in "!b")
    constraint = compiled(tokenizer, choice=["b"], trigger=trigger)
    assert len(allowed(constraint, tokenizer)) == tokenizer.vocab_size
    constraint.accept(b)
    sibling = constraint.copy()
    constraint.accept(trigger)
    assert allowed(constraint, tokenizer) == {b}
    assert len(allowed(sibling, tokenizer)) == tokenizer.vocab_size
    constraint.accept(b)
    assert allowed(constraint, tokenizer) == {tokenizer.eos_id}


DEEP = "[" * (MAX_SCHEMA_DEPTH - 1) + "]" * (MAX_SCHEMA_DEPTH - 1)


@pytest.mark.parametrize(
    ("form", "problem"),
    [
        ({}, "exactly one of json, regex, choice, grammar, json_object, not none"),
        ({"regex": "a", "json": {}}, "exactly one of .* not json, regex"),
        ({"json_object": 1}, "json_object must be true or false"),
        ({"json": "{"}, "json: not JSON"),
        ({"json": "[" * 100_000}, "json: nested deeper than"),
        ({"json": "[1]"}, "json: a JSON schema is an object, not list"),
        ({"json": 3}, "json: a JSON schema is an object, not int"),
        ({"json": {"a": object()}}, "json: not JSON"),
        ({"json": '"' + "a" * MAX_GRAMMAR_LENGTH + '"'}, "json: 131074 characters; at most 131072"),
        ({"json": {"a": "a" * MAX_GRAMMAR_LENGTH}}, "json: .* at most 131072"),
        ({"json": f'{{"enum": {DEEP[1:-1]}}}'}, None),
        ({"json": f'{{"enum": {DEEP}}}'}, None),
        ({"json": f'{{"enum": [{DEEP}]}}'}, "json: nested deeper than the 64 levels"),
        ({"regex": ""}, "regex must be a non-empty string"),
        ({"regex": "a" * (MAX_GRAMMAR_LENGTH + 1)}, "regex: 131073 characters"),
        ({"grammar": 1}, "grammar must be a non-empty string"),
        ({"choice": []}, "choice must be a list of non-empty strings"),
        ({"choice": "red"}, "choice must be a list"),
        ({"choice": [""]}, "choice must be a list"),
        ({"json_object": True, "trigger": -1}, "trigger must be a token id"),
    ],
)
def test_malformed_forms_are_refused_by_name(form: Any, problem: str | None) -> None:
    if problem is None:
        assert StructuredOutputsParams(**form)
        return
    with pytest.raises(RequestError, match=f"structured_outputs(: |.){problem}") as caught:
        StructuredOutputsParams(**form)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("form", "problem"),
    [
        ({"json": {"not": {"type": "string"}}}, 'json: Unimplemented keys: ["not"]'),
        ({"json": {"type": "foo"}}, "json: Invalid type: foo"),
        ({"json": {"$ref": "#/$defs/x"}}, "json: Pointer '/$defs/x' does not exist"),
        ({"json": {"$ref": "http://a/b"}}, "json: Resource 'http://a/b' is not present"),
        ({"json": {"type": "integer", "minimum": 5, "maximum": 1}}, "json: Unsatisfiable schema"),
        ({"json": {"type": "string", "pattern": "(?=a)b"}}, "json: regex parse error: look-around"),
        ({"regex": "(?=a)b"}, "regex: invalid regex"),
        ({"regex": "[a"}, "unclosed character class"),
        ({"regex": "\ud800"}, "regex: "),
        ({"grammar": 'begin: "a"'}, "grammar: "),
        ({"grammar": "start: <[999999]>"}, "grammar: at 1(8): Token range end too large"),
        ({"json": {"$ref": "\ud800"}}, "json: Resource"),
        ({"regex": r"[^\s\S]"}, "regex: "),
        ({"grammar": 'start: "a" b'}, 'grammar: at 1(8): unknown name: "b"'),
    ],
)
def test_forms_that_cannot_be_held_are_refused_in_one_line(
    demo: LLM, form: Any, problem: str
) -> None:
    params = SamplingParams(structured_outputs=StructuredOutputsParams(**form))
    with pytest.raises(RequestError, match=re.escape(problem)) as caught:
        demo.chat(PROMPT, params)
    assert "\n" not in str(caught.value) and not demo.engine.has_work


def test_limits_on_schemas_may_be_tighter() -> None:
    schema = {"properties": {"a": {"type": "integer"}}}
    assert read_schema("response_format", schema, max_depth=3) == schema
    with pytest.raises(RequestError, match="response_format: nested deeper than the 2 levels"):
        read_schema("response_format", schema, max_depth=2)
    with pytest.raises(RequestError, match="response_format: 42 characters; at most 10"):
        read_schema("response_format", schema, max_length=10)


def test_biased_tokens_must_be_in_the_vocabulary(demo: LLM) -> None:
    with pytest.raises(RequestError, match="logit_bias: token 2048 is outside the vocabulary"):
        demo.chat(PROMPT, SamplingParams(logit_bias={2048: 1}))
    answer = demo.chat(PROMPT, SamplingParams(seed=0, max_tokens=5, logit_bias={70: 100}))
    assert answer[0].outputs[0].token_ids == [70] * 5


def test_without_llguidance_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise ImportError

    tokenizer = Tokenizer.from_file(DEMO / "tekken.json")
    monkeypatch.setattr("mistral_common.guidance.tokenizer.assert_llguidance_installed", missing)
    monkeypatch.setitem(sys.modules, "llguidance", None)
    for form in ({"regex": "a"}, {"json_object": True}):
        with pytest.raises(RequestError, match=r"needs llguidance; install octavo\[serve\]"):
            compiled(tokenizer, **form)


def test_a_sentencepiece_tokenizer_cannot_be_held() -> None:
    mistral = MistralTokenizer.v3()
    tokenizer = Tokenizer(mistral, Path("tokenizer.model.v3"))
    with pytest.raises(RequestError, match="structured output needs a Tekken tokenizer"):
        compiled(tokenizer, regex="a")
