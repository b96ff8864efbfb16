"""Log-probabilities as clients read them, whichever kind of tokenizer the model has."""

from __future__ import annotations

from pathlib import Path

import pytest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from octavo.engine.outputs import Logprob
from octavo.serve.logprobs import TextOffsets, chat_logprobs, completion_logprobs
from octavo.tokenizer import Tokenizer

TEXTS = ["Hello wörld 🜁  two\nlines", " led by a space", "图书馆"]


@pytest.fixture(scope="module", params=["tekken", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    mistral = MistralTokenizer.v3(is_tekken=request.param == "tekken")
    return Tokenizer(mistral, Path(mistral.instruct_tokenizer.tokenizer.file_path))


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("text", TEXTS)
def test_tokens_begin_where_their_offsets_say(
    tokenizer: Tokenizer, text: str, special: bool
) -> None:
    token_ids = tokenizer.encode(text) + tokenizer.encode_chat([{"role": "user", "content": text}])
    offsets = TextOffsets(tokenizer, special=special).add(token_ids)
    # What goes on with a character begins where that does.
    before = [tokenizer.decode(token_ids[:i], special=special) for i in range(len(token_ids))]
    assert offsets == [len(told.rstrip("\ufffd")) for told in before]


def test_tokens_have_their_bytes_and_names_of_their_own(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode("led led\n🜁", bos=False)
    rows = [{token: Logprob(logprob=-1.0, rank=1)} for token in token_ids]
    content = chat_logprobs(tokenizer, token_ids, rows, 1).content
    assert content is not None
    told = bytes(byte for token in content for byte in token.bytes or ())
    assert told.decode().lstrip() == "led led\n🜁"
    # A word after a space and the same word without one are two tokens, and so two names.
    pair = [tokenizer.encode(text, bos=False)[-1] for text in ("a table", "\ntable")]
    both = [{token: Logprob(logprob=-1.0, rank=i) for i, token in enumerate(pair, 1)}]
    tops = completion_logprobs(tokenizer, pair[:1], both, 2, [0]).top_logprobs
    assert tops is not None and set(tops[0] or ()) == {" table", "table"}
    partial = tokenizer.encode("🜁", bos=False)[-1]
    named = completion_logprobs(tokenizer, [partial], [None], 0, [0]).tokens
    assert named == ["bytes:\\x81"]


def test_control_tokens_stand_in_the_text_by_their_names(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode_chat([{"role": "user", "content": "two words"}])
    told = tokenizer.decode(token_ids, special=True)
    assert told.replace("[INST] ", "[INST]") == "<s>[INST]two words[/INST]"
