"""mistral-common behind one small door: encode text, chats and tools; stream text back."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from mistral_common.exceptions import (
    InvalidToolException,
    InvalidToolSchemaException,
    MistralCommonException,
)
from mistral_common.protocol.instruct.messages import UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.tool_calls import Tool
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy, SpecialTokens
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from mistral_common.tokens.tokenizers.tekken import Tekkenizer

from octavo.config import ModelConfig
from octavo.errors import RequestError, TokenizerError

# Newest first; V3-Tekken is Ministral's, the sentencepiece ones are those of older 7B models.
FILES = ("tekken.json", "tokenizer.model.v3", "tokenizer.model.v2", "tokenizer.model.v1")
V3_TEKKEN_VOCAB_SIZE = 131_072
_SPACE, _BYTE = "▁", re.compile("<0x[0-9A-F]{2}>")  # in the pieces of sentencepiece's vocabularies
_INCOMPLETE = "\ufffd"  # what decoding yields for a character whose bytes are not all there,
_N_OPEN = 3  # at most so many times: sentencepiece yields one for each of its bytes

logger = logging.getLogger("octavo")


class Tokenizer:
    """A Mistral tokenizer with its instruct template.

    Attributes:
        mistral: the mistral-common tokenizer underneath.
        path: the file it came from.
        is_tekken: of Tekken's kind; texts of sentencepiece's lose a space that leads them.
    """

    def __init__(self, mistral: MistralTokenizer, path: Path) -> None:
        self.mistral = mistral
        self.path = path
        self._base: Any = mistral.instruct_tokenizer.tokenizer
        self.is_tekken = isinstance(self._base, Tekkenizer)
        self.vocab_size: int = self._base.n_words
        self.bos_id: int = self._base.bos_id
        self.eos_id: int = self._base.eos_id
        self.tool_calls_id: int | None = self._special(SpecialTokens.tool_calls.value)

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Load `tekken.json` or a sentencepiece `tokenizer.model.v*`.

        Raises:
            TokenizerError: missing, damaged, or of a kind mistral-common does not know.
        """
        path = Path(path)
        if not path.is_file():
            raise TokenizerError(f"{path}: no such tokenizer file")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # notices meant for mistral-common's own users
                return cls(MistralTokenizer.from_file(str(path)), path)
        except ImportError:
            raise TokenizerError(
                f"{path}: needs sentencepiece; install octavo[sentencepiece]"
            ) from None
        except Exception as error:  # a damaged file surfaces as whatever its parser raises
            reason = _reading_problem(error)
            raise TokenizerError(f"{path}: not a tokenizer that can be read: {reason}") from None

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """Load the tokenizer that lies beside a checkpoint.

        Raises:
            TokenizerError: none there.
        """
        folder = Path(folder)
        for name in FILES:
            if (folder / name).is_file():
                return cls.from_file(folder / name)
        raise TokenizerError(
            f"{folder}: no tokenizer (looked for {', '.join(FILES)}); copy the model's tekken.json "
            "there, or name a file with --tokenizer"
        )

    @classmethod
    def for_model(
        cls, folder: Path, config: ModelConfig, file: str | Path | None = None
    ) -> Tokenizer:
        """The tokenizer of a checkpoint, checked against its embedding.

        A repository that holds V3-Tekken only in Hugging Face's form (`tokenizer.json`) gets the
        copy that mistral-common ships, and a line that says so.

        Args:
            folder: the checkpoint's.
            config: its architecture.
            file: a tokenizer file to use instead of the folder's.

        Raises:
            TokenizerError: missing, or its vocabulary is not the embedding's.
        """
        if file is not None:
            tokenizer = cls.from_file(file)
        elif (
            config.vocab_size == V3_TEKKEN_VOCAB_SIZE
            and (folder / "tokenizer.json").is_file()
            and not any((folder / name).is_file() for name in FILES)
        ):
            mistral = MistralTokenizer.v3(is_tekken=True)
            tokenizer = cls(mistral, Path(mistral.instruct_tokenizer.tokenizer.file_path))
            logger.warning(
                "octavo: no tekken.json in %s; using the V3-Tekken that mistral-common ships",
                folder,
            )
        else:
            tokenizer = cls.from_folder(folder)
        if tokenizer.vocab_size != config.vocab_size:
            raise TokenizerError(
                f"{tokenizer.path}: {tokenizer.vocab_size} tokens, but the model's embedding has "
                f"{config.vocab_size} rows; this is another model's tokenizer"
            )
        return tokenizer

    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        """Token ids of plain text; markup such as [INST] in it is only text.

        Raises:
            RequestError: a text that cannot be split, such as a million spaces.
        """
        try:
            return self._base.encode(text, bos=bos, eos=False)
        except ValueError as error:
            raise RequestError(f"prompt: {_first_problem(error)}") from None

    def encode_chat(
        self, messages: Sequence[Any], tools: Sequence[Any] | None = None, **request: Any
    ) -> list[int]:
        """Token ids of a conversation in the model's instruct template.

        Args:
            messages: OpenAI's dicts (role, content, tool_calls, …) or mistral-common's messages.
            tools: OpenAI's tool dicts or mistral-common's `Tool`s.
            request: further fields of mistral-common's ChatCompletionRequest, such as
                `continue_final_message`.

        Raises:
            RequestError: a conversation that the template cannot hold.
        """
        return _encode(self.mistral, messages, tools, request)

    def encode_conversation(
        self, messages: Sequence[Any], tools: Sequence[Any] | None = None
    ) -> list[int]:
        """Token ids of a finished conversation: `encode_chat` of all but the answer at its end,
        then the answer (text or tool calls) and </s>. Without an answer there, `encode_chat`.

        Args:
            messages: OpenAI's dicts or mistral-common's messages.
            tools: OpenAI's tool dicts or mistral-common's `Tool`s.

        Raises:
            RequestError: a conversation that the template cannot hold.
        """
        if not _ends_with_answer(messages):
            return self.encode_chat(messages, tools)
        return _encode(self._for_finished, messages, tools, {})

    @cached_property
    def _for_finished(self) -> MistralTokenizer:
        """The same tokenizer with mistral-common's rules for conversations that are finished."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return MistralTokenizer.from_file(str(self.path), mode=ValidationMode.finetuning)

    @cached_property
    def guidance(self) -> Any:
        """The vocabulary as llguidance's `LLTokenizer`; 131,072 tokens take over a second, once.

        Raises:
            RequestError: llguidance is not installed, or this is not a Tekken tokenizer.
        """
        from mistral_common.guidance.tokenizer import from_mistral_tokenizer

        try:
            return from_mistral_tokenizer(self.mistral)
        except ImportError:
            raise RequestError(
                "structured output needs llguidance; install octavo[serve]"
            ) from None
        except (TypeError, ValueError) as error:
            raise RequestError(f"structured output needs a Tekken tokenizer: {error}") from None

    def decode(self, token_ids: Sequence[int], *, special: bool = False) -> str:
        """Text of the ids; control tokens such as </s> are left out unless `special`."""
        if special and not self.is_tekken:  # the library would give pieces, not text
            return "".join(
                "".join(map(self._base.id_to_piece, run)) if is_control else self.decode(list(run))
                for is_control, run in groupby(token_ids, self.is_control)
            )
        policy = SpecialTokenPolicy.KEEP if special else SpecialTokenPolicy.IGNORE
        return self._base.decode(list(token_ids), special_token_policy=policy)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to a text; a control token's name."""
        if self.is_tekken:
            return bytes(self._base.id_to_byte_piece(token_id, SpecialTokenPolicy.KEEP))
        piece: str = self._base.id_to_piece(token_id)
        if _BYTE.fullmatch(piece):
            return bytes.fromhex(piece[3:5])
        return piece.replace(_SPACE, " ").encode()

    def is_control(self, token_id: int) -> bool:
        """Whether a token is markup such as [INST], and no part of a text."""
        return bool(self._base.is_special(token_id))

    def _special(self, name: str) -> int | None:
        try:
            found = self._base.get_special_token(name)
        except Exception:  # sentencepiece files before v2 have no tools
            return None
        return None if found == self._base.unk_id else found  # sentencepiece's way to say so


class Detokenizer:
    """Text of a growing list of tokens, handed out as soon as its characters are whole.

    Whatever the split, the pieces add up to `tokenizer.decode` of all the tokens, with control
    tokens if `special`.
    """

    def __init__(self, tokenizer: Tokenizer, *, special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._special = special
        # The latest tokens are decoded again with the next ones, since a character may go on in
        # those, and sentencepiece drops a space that leads a text.
        self._latest: list[int] = []
        self._n_given = 0  # characters of their text that are handed out

    def add(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete; may be empty."""
        self._latest.extend(token_ids)
        text = self._decode(self._latest)
        return self._hand_out(text, _N_OPEN if text.endswith(_INCOMPLETE) else 0)

    def flush(self) -> str:
        """What is left, an incomplete character included (as U+FFFD)."""
        return self._hand_out(self._decode(self._latest), 0)

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, special=self._special)

    def _hand_out(self, text: str, n_left: int) -> str:
        """All but the last `n_left` characters, as far as they are not handed out yet."""
        end = max(len(text) - n_left, self._n_given)
        piece = text[self._n_given : end]
        self._n_given = end
        self._forget(len(text) - end)
        return piece

    def _forget(self, n_left: int) -> None:
        """Let go of early tokens, so that no step decodes many.

        Where the first that stays is in the middle of a character, up to three characters at the
        start of the text are others now. So those that are left are counted from its end.
        """
        n_kept = 32 if n_left else 4
        if len(self._latest) > 2 * n_kept:
            latest = self._latest[-n_kept:]
            n_given = len(self._decode(latest)) - n_left
            if not n_left or n_given >= _N_OPEN:  # control tokens have no characters
                self._latest, self._n_given = latest, n_given


def _encode(
    mistral: MistralTokenizer,
    messages: Sequence[Any],
    tools: Sequence[Any] | None,
    request: dict[str, Any],
) -> list[int]:
    """Token ids of a conversation under the rules of `mistral`; its complaints in one line."""
    offered = _offered(tools)
    try:
        return mistral.encode_chat_completion(_request(messages, offered, request)).tokens
    except RequestError:
        raise
    except (InvalidToolException, InvalidToolSchemaException) as error:
        at = _first_refused(mistral, offered)
        raise RequestError(f"tools{at}: {_first_problem(error)}") from None
    except KeyError as error:
        raise RequestError(f"messages: a message lacks the field {error}") from None
    except (
        MistralCommonException, ValueError, TypeError, AttributeError, AssertionError, RuntimeError
    ) as error:  # fmt: skip
        raise RequestError(f"messages: {_first_problem(error)}") from None


def _first_refused(mistral: MistralTokenizer, tools: list[Tool]) -> str:
    """The place, such as `[1]`, of a tool whose name or schema is against the template's rules."""
    for i, tool in enumerate(tools):
        try:
            mistral.encode_chat_completion(_request([UserMessage(content="")], [tool], {}))
        except (InvalidToolException, InvalidToolSchemaException):
            return f"[{i}]"
    return ""


def _ends_with_answer(messages: Any) -> bool:
    if not isinstance(messages, Sequence) or not messages:
        return False
    last = messages[-1]
    role = last.get("role") if isinstance(last, dict) else getattr(last, "role", None)
    return role == "assistant"


def _offered(tools: Any) -> list[Tool]:
    """Tools as mistral-common's, whatever they came as."""
    if tools is None:
        return []
    if isinstance(tools, str) or not isinstance(tools, Sequence):
        raise RequestError(f"tools: a list of tools, not {type(tools).__name__}")
    offered = []
    for i, tool in enumerate(tools):
        try:
            offered.append(Tool.from_openai(tool if isinstance(tool, dict) else tool.to_openai()))
        except (TypeError, AttributeError):
            raise RequestError(f"tools[{i}]: no function with a name") from None
        except ValueError as error:
            raise RequestError(f"tools[{i}]: {_first_problem(error)}") from None
    return offered


def _request(
    messages: Sequence[Any], tools: list[Tool], request: dict[str, Any]
) -> ChatCompletionRequest:
    if isinstance(messages, str) or not isinstance(messages, Sequence):
        raise RequestError(f"messages: a list of messages, not {type(messages).__name__}")
    if all(isinstance(message, dict) for message in messages):
        openai_tools = [tool.to_openai() for tool in tools] or None
        return ChatCompletionRequest.from_openai(list(messages), tools=openai_tools, **request)
    return ChatCompletionRequest(messages=list(messages), tools=tools or None, **request)


def _reading_problem(error: Exception) -> str:
    """One line of what a parser raised at a damaged file; Python's own words say nothing there."""
    if isinstance(error, KeyError):
        return f"it lacks the field {error}"
    if isinstance(error, (TypeError, AttributeError)):
        return "its JSON is not laid out as a tokenizer's"
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def _first_problem(error: Exception) -> str:
    """One line of a pydantic report: where, and what."""
    errors = getattr(error, "errors", None)
    if callable(errors) and (problems := errors()):
        where = ".".join(str(part) for part in problems[0]["loc"])
        return f"{where}: {problems[0]['msg']}"
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
