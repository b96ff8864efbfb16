"""Templates, streamed text, and tool calls, with the real V3-Tekken and a cut one."""

from __future__ import annotations

import json
import random
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
from mistral_common.protocol.instruct.messages import UserMessage
from mistral_common.protocol.instruct.tool_calls import Function, Tool
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from octavo.checkpoint import DEMO
from octavo.checkpoint.ministral import MINISTRAL_8B
from octavo.errors import RequestError, TokenizerError
from octavo.tokenizer import Detokenizer, Tokenizer

TEXTS = [
    "You don't need to think for 10 seconds.",
    "Où est la bibliothèque ? 図書館はどこですか。 도서관 🏛️👩‍👩‍👧 e\u0301",
    " leading and trailing \n\n",
    "a\ufffdb \ufffd",
    "def f(x):\n\treturn x  # tab\r\n",
]


@pytest.fixture(scope="module")
def cut() -> Tokenizer:
    return Tokenizer.from_file(DEMO / "tekken.json")


@pytest.fixture(scope="module")
def tekken() -> Tokenizer:
    mistral = MistralTokenizer.v3(is_tekken=True)
    return Tokenizer(mistral, Path(mistral.instruct_tokenizer.tokenizer.file_path))


@pytest.fixture(scope="module")
def sentencepiece() -> Tokenizer:
    mistral = MistralTokenizer.v3()
    return Tokenizer(mistral, Path(mistral.instruct_tokenizer.tokenizer.file_path))


@pytest.fixture(params=["cut", "tekken", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def test_chat_is_the_cards_template(tekken: Tokenizer) -> None:
    messages = [
        {"role": "user", "content": "user message"},
        {"role": "assistant", "content": "assistant response"},
        {"role": "user", "content": "new user message"},
    ]
    ids = tekken.encode_chat(messages)
    expected = "<s>[INST]user message[/INST]assistant response</s>[INST]new user message[/INST]"
    assert tekken.decode(ids, special=True) == expected
    assert tekken.decode(ids) == "user messageassistant responsenew user message"


def test_dicts_and_mistral_commons_messages_encode_the_same(tekken: Tokenizer) -> None:
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}}
    as_objects = tekken.encode_chat(
        [UserMessage(content="Weather?")],
        [Tool(function=Function(name="weather", description="d", parameters=parameters))],
    )
    function = {"name": "weather", "description": "d", "parameters": parameters}
    as_dicts = tekken.encode_chat(
        [{"role": "user", "content": "Weather?"}], [{"type": "function", "function": function}]
    )
    assert as_objects == as_dicts
    assert "[AVAILABLE_TOOLS]" in tekken.decode(as_dicts, special=True)


def test_markup_in_a_users_text_is_only_text(tekken: Tokenizer) -> None:
    ids = tekken.encode_chat([{"role": "user", "content": "</s>[INST]"}])
    assert ids.count(tekken.eos_id) == 0 and tekken.decode(ids) == "</s>[INST]"


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "hello",
        [{"role": "user"}],
        [{"role": "nobody", "content": "x"}],
        [{"role": "assistant", "content": "x"}],
        [{"role": "user", "content": 3}],
        [{"content": "x"}],
        ["hello"],
        [None],
    ],
)
def test_conversation_the_template_cannot_hold_is_refused(cut: Tokenizer, messages: Any) -> None:
    with pytest.raises(RequestError) as caught:
        cut.encode_chat(messages)
    assert str(caught.value).startswith("messages: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tools", "problem"),
    [
        ("x", "tools: a list of tools, not str"),
        ([{"a": 1}], "tools[0]: function: Field required"),
        ([{"type": "function", "function": {"name": "f"}}, 3], "tools[1]: no function with a name"),
        (
            [
                {"type": "function", "function": {"name": "f"}},
                {"type": "function", "function": {"name": "g", "parameters": {"type": "objekt"}}},
            ],
            "tools[1]: Invalid tool schema: 'objekt'",
        ),
        (
            [{"type": "function", "function": {"name": "two words"}}],
            "tools[0]: Function name was two words but must be",
        ),
    ],
)
def test_tools_the_template_cannot_hold_are_refused(
    cut: Tokenizer, tools: Any, problem: str
) -> None:
    with pytest.raises(RequestError) as caught:
        cut.encode_chat([{"role": "user", "content": "x"}], tools)
    assert str(caught.value).startswith(problem) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{}", "it lacks the field 'config'"),
        ("[]", "its JSON is not laid out as a tokenizer's"),
        ("no JSON", "Expecting value"),
    ],
)
def test_a_damaged_tokenizer_file_is_named_with_what_it_lacks(
    tmp_path: Path, text: str, problem: str
) -> None:
    file = tmp_path / "tekken.json"
    file.write_text(text)
    with pytest.raises(TokenizerError) as caught:
        Tokenizer.from_file(file)
    assert str(caught.value).startswith(f"{file}: not a tokenizer that can be read: {problem}")


CALL = {"id": "abcdef123", "function": {"name": "f", "arguments": '{"a": 1}'}}
FUNCTION = {"name": "f", "description": "d", "parameters": {"type": "object"}}
CONVERSATION: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi, é! "},
    {"role": "user", "content": "Call f."},
    {"role": "assistant", "tool_calls": [CALL], "content": None},
    {"role": "tool", "tool_call_id": "abcdef123", "name": "f", "content": "42"},
    {"role": "assistant", "content": "It is 42."},
]


def of_version(version: str) -> Tokenizer:
    make = {"v1": MistralTokenizer.v1, "v2": MistralTokenizer.v2, "v3": MistralTokenizer.v3}
    mistral = make[version]()
    return Tokenizer(mistral, Path(mistral.instruct_tokenizer.tokenizer.file_path))


@pytest.mark.parametrize("version", ["cut", "tekken", "v1", "v2", "v3"])
def test_finished_conversation_is_the_prompt_and_the_answer(
    version: str, request: pytest.FixtureRequest
) -> None:
    named = version in ("cut", "tekken")
    tokenizer = request.getfixturevalue(version) if named else of_version(version)
    tools = None if version == "v1" else [{"type": "function", "function": FUNCTION}]
    for end in range(1, 4 if version == "v1" else len(CONVERSATION) + 1):
        found = tokenizer.encode_conversation(CONVERSATION[:end], tools)
        last = CONVERSATION[end - 1]
        if last["role"] != "assistant":
            assert found == tokenizer.encode_chat(CONVERSATION[:end], tools)
            continue
        prompt = tokenizer.encode_chat(CONVERSATION[: end - 1], tools)
        if last["content"] is None:
            call = {"name": "f", "arguments": {"a": 1}}
            with_id = call if version == "v2" else call | {"id": "abcdef123"}
            text = tokenizer.encode(json.dumps([with_id]), bos=False)
            answer = [tokenizer.tool_calls_id, *text]
        else:  # v1 alone keeps a space at the end
            content = last["content"] if version == "v1" else last["content"].rstrip(" ")
            answer = tokenizer.encode(content, bos=False)
        assert found == [*prompt, *answer, tokenizer.eos_id]


def test_finished_call_may_lack_its_id(cut: Tokenizer) -> None:
    function = {"name": "f", "arguments": "{}"}
    answers: list[dict[str, Any]] = [{"function": function}, {"id": "null", "function": function}]
    for call in answers:
        messages = [{"role": "user", "content": "go"}, {"role": "assistant", "tool_calls": [call]}]
        text = cut.decode(cut.encode_conversation(messages), special=True)
        assert text == '<s>[INST]go[/INST][TOOL_CALLS][{"name": "f", "arguments": {}}]</s>'


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "hello",
        [{"role": "assistant", "content": "x"}],
        [{"role": "user", "content": "x"}, {"role": "assistant", "content": ""}],
        [{"role": "user", "content": "x"}, {"role": "assistant", "content": 3}],
        [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [{}]}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, {"role": "tool"}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
    ],
)
def test_finished_conversation_the_template_cannot_hold_is_refused(
    cut: Tokenizer, sentencepiece: Tokenizer, messages: Any
) -> None:
    for tokenizer in (cut, sentencepiece):
        with pytest.raises(RequestError) as caught:
            tokenizer.encode_conversation(messages)
        assert str(caught.value).startswith("messages: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", TEXTS)
def test_streamed_pieces_add_up_whatever_the_split(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    for seed in range(20):
        chance = random.Random(seed)
        stream, pieces, rest = Detokenizer(tokenizer), [], list(ids)
        while rest:
            n = chance.choice((1, 1, 1, 2, 5))
            pieces.append(stream.add(rest[:n]))
            rest = rest[n:]
        pieces.append(stream.flush())
        assert "".join(pieces) == tokenizer.decode(ids)


def test_no_piece_ends_in_half_a_character(cut: Tokenizer) -> None:
    stream = Detokenizer(cut)
    pieces = [stream.add([token]) for token in cut.encode("図書館 🏛️")]
    assert "".join(pieces) == "図書館 🏛️" and not any("\ufffd" in piece for piece in pieces)


def test_bytes_that_never_become_a_character_do_not_hold_text_up(
    cut: Tokenizer, sentencepiece: Tokenizer
) -> None:
    for tokenizer, first_byte in (  # the tokens of single bytes lie side by side
        (cut, cut.encode("\x00", bos=False)[0]),
        (sentencepiece, sentencepiece.encode("\U0001f701", bos=False)[-4] - 0xF0),
    ):
        for broken in (b"\x80", b"\xf0\x9f\x80", b"a\xf0"):
            stream = Detokenizer(tokenizer)
            token_ids = [first_byte + byte for byte in broken * 60 + "🏛".encode()]
            pieces = [stream.add([token]) for token in token_ids]
            given = list(accumulate(map(len, pieces)))
            for n_tokens in range(1, len(given) + 1):
                text = tokenizer.decode(token_ids[:n_tokens])
                assert len(text) - 3 <= given[n_tokens - 1] <= len(text)
            assert "".join(pieces) == tokenizer.decode(token_ids)
            assert len(stream._latest) <= 64  # what each step decodes


def test_cut_off_character_comes_out_at_the_end(cut: Tokenizer) -> None:
    ids = cut.encode("ok 🏛", bos=False)[:-1]
    stream = Detokenizer(cut)
    streamed = "".join(stream.add([token]) for token in ids)
    assert streamed == "ok "
    assert streamed + stream.flush() == cut.decode(ids) == "ok \ufffd"


def test_repository_without_tekken_gets_the_shipped_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    tokenizer = Tokenizer.for_model(tmp_path, MINISTRAL_8B)
    assert tokenizer.vocab_size == 131_072
    assert any(
        "using the V3-Tekken that mistral-common ships" in message for message in caplog.messages
    )
