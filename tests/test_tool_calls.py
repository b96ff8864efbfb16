"""Tool calls: whatever the split, the streamed answer is the unstreamed one."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from octavo.checkpoint import DEMO
from octavo.tokenizer import Detokenizer, Tokenizer
from octavo.tool_calls import (
    ArgumentsDelta,
    CallStarted,
    ContentDelta,
    Event,
    ToolCall,
    ToolCallParser,
    split_answer,
)

CUT = Tokenizer.from_file(DEMO / "tekken.json")
CALL = CUT.tool_calls_id or -1
assert CALL >= 0
EOS = CUT.eos_id
Calls = list[tuple[str, str]]


@pytest.fixture(scope="module")
def tekken() -> Tokenizer:
    mistral = MistralTokenizer.v3(is_tekken=True)
    return Tokenizer(mistral, Path(mistral.instruct_tokenizer.tokenizer.file_path))


def answer_ids(content: str, *blocks: str, tokenizer: Tokenizer = CUT) -> list[int]:
    """Tokens of an answer in which each block stands behind a [TOOL_CALLS]."""
    ids = tokenizer.encode(content, bos=False)
    for block in blocks:
        assert tokenizer.tool_calls_id is not None
        ids += [tokenizer.tool_calls_id, *tokenizer.encode(block, bos=False)]
    return ids


def parsed(content: str, *blocks: str) -> tuple[str, Calls]:
    text, calls = split_answer(CUT, answer_ids(content, *blocks))
    return text, [(call.name, call.arguments) for call in calls]


def collected(events: list[Event]) -> tuple[str, Calls]:
    """What a client makes of the events; calls must start in order, before their arguments."""
    content, ids = "", set()
    calls: Calls = []
    for event in events:
        if isinstance(event, ContentDelta):
            assert event.text
            content += event.text
        elif isinstance(event, CallStarted):
            assert event.index == len(calls)
            calls.append((event.name, ""))
            ids.add(event.id)
        else:
            assert event.text and event.index == len(calls) - 1
            calls[-1] = (calls[-1][0], calls[-1][1] + event.text)
    assert len(ids) == len(calls)
    return content, calls


def streamed(
    ids: list[int], lengths: list[int], tokenizer: Tokenizer = CUT, text_length: int | None = None
) -> tuple[str, Calls]:
    """The answer fed in pieces of these lengths, which are taken in turn."""
    parser, events, at = ToolCallParser(tokenizer), [], 0
    turn = 0
    while at < len(ids):
        piece = ids[at : at + lengths[turn % len(lengths)]]
        events += parser.add(piece, text_length=text_length)
        at, turn = at + len(piece), turn + 1
    events += parser.finish(text_length=text_length)
    content, calls = collected(events)
    assert content == parser.content
    assert calls == [(call.name, call.arguments) for call in parser.calls]
    return content, calls


def test_calls_come_with_the_models_own_arguments_and_ids_of_nine_characters() -> None:
    text = '[{"name": "f", "arguments": {"a":  "{[\\"é]}"}}, {"name": "g", "arguments": {}}]'
    content, calls = split_answer(CUT, [*answer_ids("Let me see.", text), EOS])
    assert content == "Let me see."
    assert [(c.name, c.arguments) for c in calls] == [("f", '{"a":  "{[\\"é]}"}'), ("g", "{}")]
    assert all(len(c.id) == 9 and c.id.isalnum() for c in calls)
    assert calls[0].id != calls[1].id


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        ('{"name": "f", "arguments": {"a": 1}}', [("f", '{"a": 1}')]),
        (' \n[ {"name":"f" ,\t"arguments" : { } } ]', [("f", "{ }")]),
        ('[{"arguments": {"a": [1, {}]}, "name": "f"}]', [("f", '{"a": [1, {}]}')]),
        ('[{"name": "f", "arguments": "{\\"a\\": \\"\\\\n\\"}"}]', [("f", '{"a": "\\n"}')]),
        ('[{"arguments": "{}", "name": "f"}]', [("f", "{}")]),
        ('[{"name": "f"}, {"name": "g"}]', [("f", "{}"), ("g", "{}")]),
        ('[{"id": "abc", "name": "f", "x": [{"y": "}"}], "n": 1.5, "arguments": {}, "z": null}]',
         [("f", "{}")]),
        ('[{"name": "f", "arguments": {"s": "\\ud83d\\ude00 \\\\"}}]',
         [("f", '{"s": "\\ud83d\\ude00 \\\\"}')]),
        ('[{"name": "\\u00e9", "arguments": {"図": "🏛️"}}]', [("é", '{"図": "🏛️"}')]),
        ('[{"name": "f", "arguments": {"s": "line\nbreak"}}]', [("f", '{"s": "line\nbreak"}')]),
    ],
)  # fmt: skip
def test_every_way_to_write_a_call(block: str, expected: Calls) -> None:
    assert parsed("", block) == ("", expected)
    assert streamed(answer_ids("", block), [1]) == ("", expected)


NO_CALLS = [
    "", "null", "[]", "[1]", '[{"name": 1}]', '{"a": 1}', '[{"name": "f", "arguments": "x"}]',
    '[{"name": "f", "arguments": "[1]"}]', '[{"name": "f", "arguments": null}]', "[" * 300,
    '[{"name": ""}]', '[{"name": "\\ud800"}]', '[{"name": "f" "arguments": {}}]', "[{1: 2}]",
    '[{"name": "f", "arg', '[{"arguments": {"a": 1}', '[{"name": "f", "arguments": ', "Sorry, no.",
    '[{"name": "f", "arguments": "{\\"a\\"', '[{"name": "f", "n": 12', '[{"name" "f"}]',
]  # fmt: skip


@pytest.mark.parametrize("block", NO_CALLS)
def test_what_is_no_call_stays_text(block: str) -> None:
    assert parsed("So: ", block) == (f"So: {block}", [])


def test_calls_one_after_another_and_text_behind_them() -> None:
    f, g = '[{"name": "f", "arguments": {}}]', '{"name": "g", "arguments": {"a": 1}}'
    assert parsed("x", f, g) == ("x", [("f", "{}"), ("g", '{"a": 1}')])
    assert parsed("", f + " \n") == ("", [("f", "{}")])
    assert parsed("a", f + " \n b ", g + " c") == ("ab c", [("f", "{}"), ("g", '{"a": 1}')])
    assert parsed("", f[:-1] + ", 42] oh") == (", 42] oh", [("f", "{}")])
    assert parsed("", f[:-1] + " and") == (" and", [("f", "{}")])
    assert parsed("", "no", g) == ("no", [("g", '{"a": 1}')])


def test_an_answer_cut_anywhere_keeps_what_was_begun() -> None:
    whole = [{"name": "f", "arguments": {"a": "b{"}}, {"name": "g", "arguments": {"c": [1, 2]}}]
    text = json.dumps(whole)
    arguments = [json.dumps(call["arguments"]) for call in whole]
    for end in range(len(text)):
        content, calls = parsed("", text[:end])
        begun = [text.index(part) for part in arguments]
        assert [name for name, _ in calls] == ["f", "g"][: sum(end > at for at in begun)]
        assert content == ("" if calls else text[:end])
        for (_, found), part, at in zip(calls, arguments, begun, strict=False):
            assert found == part[: end - at]


def test_nothing_of_a_call_comes_before_it_is_certain() -> None:
    parser = ToolCallParser(CUT)
    assert parser.add(answer_ids("", '[{"name": "f", "arguments": ')) == []
    started, arguments = parser.add(CUT.encode('{"a"', bos=False))
    assert isinstance(started, CallStarted) and started.name == "f"
    assert arguments == ArgumentsDelta(0, '{"a"')
    assert parser.add(CUT.encode(": 1}}]", bos=False)) == [ArgumentsDelta(0, ": 1}")]
    assert parser.finish() == []


def test_letters_that_look_like_the_control_token_are_text() -> None:
    text = '[TOOL_CALLS][{"name": "f", "arguments": {}}]'
    assert split_answer(CUT, CUT.encode(text, bos=False)) == (text, [])


def test_a_stop_string_cuts_content_and_calls_where_it_cut_the_text() -> None:
    ids = answer_ids("Hello.", '[{"name": "f", "arguments": {"a": "STOP"}}]')
    text = CUT.decode(ids)
    for length in range(len(text) + 1):
        cut = answer_ids(text[:6], text[6:length]) if length > 6 else plainly(text[:length])
        content, calls = split_answer(CUT, cut)
        expected = (content, [(call.name, call.arguments) for call in calls])
        assert streamed(ids, [1, 2], text_length=length) == expected
        assert split_answer(CUT, ids, length)[0] == content


def test_text_that_the_engine_keeps_back_is_not_handed_out() -> None:
    parser = ToolCallParser(CUT)
    ids = CUT.encode("abcdefgh", bos=False)
    assert parser.add(ids, text_length=3) == [ContentDelta("abc")]
    assert parser.add([EOS], text_length=5) == [ContentDelta("de")]
    assert parser.finish(text_length=6) == [ContentDelta("f")]


def test_a_call_goes_back_into_the_template() -> None:
    call = ToolCall("f", '{"a": 1}')
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "go"},
        {"role": "assistant", "tool_calls": [call.to_openai()], "content": ""},
        {"role": "tool", "content": "42", "tool_call_id": call.id, "name": "f"},
    ]
    text = CUT.decode(CUT.encode_chat(messages), special=True)
    assert f'[TOOL_CALLS][{{"name": "f", "arguments": {{"a": 1}}, "id": "{call.id}"}}]</s>' in text


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    ['"}]', "{[", "\\", '\\"', "🏛️é図", "[TOOL_CALLS]", "}}, {"]
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
calls_lists = st.lists(
    st.tuples(texts.filter(bool), st.dictionaries(texts, values, max_size=3)),
    min_size=1,
    max_size=3,
)
split_lengths = st.lists(st.integers(1, 9), min_size=1, max_size=5)


@given(
    content=texts,
    calls=calls_lists,
    lengths=split_lengths,
    indent=st.sampled_from([None, 1]),
    ascii_only=st.booleans(),
    spelled_in_bytes=st.booleans(),
    cut=st.floats(0, 1) | st.just(1.0),
)
@settings(max_examples=150, deadline=None)
def test_streamed_calls_equal_unstreamed_ones(
    content: str, calls: list[tuple[str, dict[str, Any]]], lengths: list[int], indent: int | None,
    ascii_only: bool, spelled_in_bytes: bool, cut: float,
) -> None:  # fmt: skip
    def dump(value: Any) -> str:
        return json.dumps(value, ensure_ascii=ascii_only, indent=indent)

    block = ", ".join(f'{{"name": {dump(n)}, "arguments": {dump(a)}}}' for n, a in calls)
    encode = in_bytes if spelled_in_bytes else plainly
    ids = [*encode(content), CALL, *encode(f"[{block}]"), EOS]
    whole = (content, [(name, dump(arguments)) for name, arguments in calls])
    assert streamed(ids, lengths) == whole
    ids = ids[: round(cut * len(ids))]
    at_once = split_answer(CUT, ids)
    assert streamed(ids, lengths) == (at_once[0], [(c.name, c.arguments) for c in at_once[1]])


def plainly(text: str) -> list[int]:
    return CUT.encode(text, bos=False)


def in_bytes(text: str) -> list[int]:
    """A token a byte, so that every character outside ASCII is split."""
    first = CUT.encode("\0", bos=False)[0]  # byte tokens come in order
    return [first + byte for byte in text.encode()]


pieces = st.lists(
    st.sampled_from(
        ['[{"name": "f", "arguments": ', "{", "}", "[", "]", '"', "\\", ",", ":", " ", '"name"',
         '"arguments"', '"f"', "1", "null", "\n", "é", '"a": "}"', "[TOOL_CALLS]"]
    )
    | texts,
    max_size=12,
)  # fmt: skip


@given(blocks=st.lists(pieces.map("".join), min_size=1, max_size=3), lengths=split_lengths)
@settings(max_examples=200, deadline=None)
def test_any_text_streams_as_it_is_read_at_once(blocks: list[str], lengths: list[int]) -> None:
    ids = answer_ids(*blocks)
    at_once = split_answer(CUT, ids)
    assert streamed(ids, lengths) == (at_once[0], [(c.name, c.arguments) for c in at_once[1]])
    if not at_once[1]:
        assert at_once[0] == CUT.decode(ids)  # what the engine calls the answer's text


@given(
    ids=st.lists(st.integers(0, CUT.vocab_size - 1) | st.just(CALL), max_size=40),
    lengths=split_lengths,
)
@settings(max_examples=150, deadline=None)
def test_any_tokens_stream_as_they_are_read_at_once(ids: list[int], lengths: list[int]) -> None:
    at_once = split_answer(CUT, ids)
    assert streamed(ids, lengths) == (at_once[0], [(c.name, c.arguments) for c in at_once[1]])
    if not at_once[1]:
        detokenizer = Detokenizer(CUT)
        assert at_once[0] == detokenizer.add(ids) + detokenizer.flush()


def test_splits_of_the_real_vocabulary(tekken: Tokenizer) -> None:
    generator = random.Random(0)
    block = json.dumps(
        [{"name": "wetter_für", "arguments": {"ort": "Köln 🏛️ 図書館", "q": '"}]\\'}}] * 2,
        ensure_ascii=False,
    )
    ids = answer_ids("Où ? ", block, tokenizer=tekken)
    expected = ("Où ? ", [("wetter_für", '{"ort": "Köln 🏛️ 図書館", "q": "\\"}]\\\\"}')] * 2)
    for _ in range(20):
        assert streamed(ids, [generator.randint(1, 6) for _ in range(5)], tekken) == expected
